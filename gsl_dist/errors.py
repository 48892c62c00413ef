"""What can go wrong, as few classes that carry fields instead of prose.

A caller's mistake is a `BadInput`: it names the field, the value that was given and what is allowed, and the doors
turn it into exit code 2 or a 4xx answer. A file that is missing, cut short or altered is an `ArtefactError`. All of
them cross Ray workers, so they survive pickling with their fields.
"""

from __future__ import annotations

import json
import re
from typing import Any

_KEY = re.compile(r"://[^/@?]+@")


class GslError(Exception):
    """The root: everything that gsl_dist raises on purpose."""

    exit_code = 2
    """What a process ends with that it ends: 2 where trying again would not help, 1 where it may."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


class BadInput(GslError, ValueError):  # noqa: N818 - reads as what it is
    """A value that a caller can put right.

    Args:
        field: the dotted name of what was given, such as `train.batch_size` or `k`.
        value: what was given; shown shortened.
        allowed: what would be accepted, in words.
        status: the HTTP status that a door answers with.
    """

    def __init__(self, field: str, value: Any, allowed: str, status: int = 400) -> None:
        self.field, self.value, self.allowed, self.status = field, shorten(value), hide_key(allowed), status
        super().__init__(f"{field}: got {self.value}, but {self.allowed}")


class ConfigError(BadInput):
    """A setting that no stage accepts."""


class DataError(BadInput):
    """A corpus, or rows of one, that cannot be used as they are."""


class QueryError(BadInput):
    """A search request that cannot be answered."""


class ArtefactError(GslError):
    """A file of an artefact is absent, cut short, altered, or belongs to another artefact.

    Args:
        path: the file or folder.
        reason: what is wrong and what would be right.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = hide_key(str(path)), hide_key(reason)
        super().__init__(f"{self.path}: {self.reason}")


class Unwritable(GslError):  # noqa: N818
    """A place takes no more: its disk is full, or may not be written.

    Args:
        path: the file.
        reason: what the system said.
    """

    exit_code = 1

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = hide_key(str(path)), hide_key(reason)
        super().__init__(f"{self.path}: it cannot be written ({self.reason})")


class ShardUnavailable(GslError):  # noqa: N818
    """Shards did not answer and the caller asked for all of them.

    Args:
        missing: names of the shards.
        total: how many shards the version has.
    """

    def __init__(self, missing: list[str], total: int) -> None:
        self.missing, self.total = list(missing), total
        super().__init__(f"{len(self.missing)} of {total} shards did not answer: {', '.join(self.missing)}")


class Overloaded(GslError):  # noqa: N818
    """The service has as much to do as it may take on; the caller should come back.

    Args:
        waiting: how many requests are being answered.
        retry_after_s: when there may be room.
    """

    def __init__(self, waiting: int, retry_after_s: float = 1.0) -> None:
        self.waiting, self.retry_after_s = waiting, retry_after_s
        super().__init__(f"{waiting} requests are being answered and no more are taken on: ask again later")


class Denied(GslError):  # noqa: N818
    """The caller shows no token (status 401), or one that does not allow what is asked (403).

    Args:
        message: which of both.
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        self.status = status
        super().__init__(message)


def pack_error(error: GslError) -> str:
    """Write one of our errors as JSON, for paths that carry only bytes."""
    return json.dumps({"kind": type(error).__name__, "args": list(error.args), "fields": error.__dict__})


def unpack_error(text: str) -> GslError:
    """Undo `pack_error`."""
    plain = json.loads(text)
    kinds = {kind.__name__: kind for kind in (*GslError.__subclasses__(), *BadInput.__subclasses__())}
    kind = kinds.get(plain["kind"], GslError)
    return _restore(kind, tuple(plain["args"]), plain["fields"])


def hide_key(text: str) -> str:
    """Give a text as messages and artefacts may show it: without the keys that URIs in it bear before their host."""
    return _KEY.sub("://***@", text)


def shorten(value: Any, limit: int = 80) -> str:
    """Show a value in at most `limit` characters, without keys; a long one by its ends, since paths end with names."""
    text = hide_key(repr(value))
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 2
    return f"{text[: limit - 3 - tail]}...{text[-tail:]}"


def _restore(kind: type[GslError], args: tuple[Any, ...], fields: dict[str, Any]) -> GslError:
    # The constructors take fields, not the message, so the default pickling (which calls them with the message) fails.
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error
