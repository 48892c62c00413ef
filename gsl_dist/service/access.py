"""Who may ask what: bearer tokens with a scope.

A token is 32 random bytes; the service keeps only its SHA-256, in a file that `gsl token` writes. So long a random
secret needs no slow hash: nobody can try them all. `read` may search and look; `admin` may write, promote and compact
as well. Without a token file everybody may do everything, which is why such a service listens on loopback alone.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from gsl_dist.config import Strict
from gsl_dist.errors import ArtefactError, ConfigError, Denied
from gsl_dist.storage import split_location

Scope = Literal["read", "admin"]

_TOKEN_BYTES = 32


class Token(Strict):
    """What a service knows of a token."""

    name: str = Field(min_length=1, max_length=64)
    scope: Scope
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Access:
    """Lets requests pass that show a token of sufficient scope.

    Args:
        tokens: those that count; None: everybody may do everything.
    """

    def __init__(self, tokens: Sequence[Token] | None = None) -> None:
        self.tokens = None if tokens is None else list(tokens)

    def check(self, header: str | None, scope: Scope) -> None:
        """Let a request pass.

        Args:
            header: what it says under `Authorization`.
            scope: what it asks for.

        Raises:
            Denied: it shows no token that counts (401), or one that may not do this (403).
        """
        if self.tokens is None:
            return
        kind, _, shown = (header or "").partition(" ")
        digest = hashlib.sha256(shown.strip().encode()).hexdigest()
        # All are compared, each in constant time: how long it takes says nothing about any of them.
        known = [token for token in self.tokens if hmac.compare_digest(token.sha256, digest)]
        if kind.lower() != "bearer" or not known:
            raise Denied("this needs a token: Authorization: Bearer TOKEN", 401)
        if scope == "admin" and all(token.scope != "admin" for token in known):
            raise Denied("this needs a token of scope admin", 403)


def make_token(name: str, scope: Scope) -> tuple[str, Token]:
    """Make a token, and what a service keeps of it."""
    text = secrets.token_urlsafe(_TOKEN_BYTES)
    return text, Token(name=name, scope=scope, sha256=hashlib.sha256(text.encode()).hexdigest())


def read_tokens(location: str) -> list[Token]:
    """Read a token file.

    Raises:
        ArtefactError: it is absent or no token file.
    """
    folder, name = split_location(location)
    try:
        content = folder.read_sealed(name, always=False)
        if list(content) != ["tokens"]:
            raise ValueError("it holds something else")
        return [Token.model_validate(token) for token in content["tokens"]]
    except (ValueError, TypeError) as error:
        raise ArtefactError(location, f"it is no token file ({type(error).__name__}); gsl token makes one") from error


def add_token(location: str, token: Token) -> None:
    """Put a token into a file, which is made if it is not there.

    Raises:
        ConfigError: there is one of that name.
        ArtefactError: the file is something else.
    """
    folder, name = split_location(location)
    tokens = read_tokens(location) if folder.exists(name) else []
    if any(known.name == token.name for known in tokens):
        raise ConfigError("name", token.name, f"{location} has a token of that name; choose another")
    folder.write_sealed(name, {"tokens": [known.model_dump() for known in [*tokens, token]]})
