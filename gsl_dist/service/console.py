"""The console: one page that brings its own style and script, and the headers that let it run nothing else.

The policy names the script and the style by their hashes, so whatever a payload smuggled into the page would stay dead
text. Only pictures may come from elsewhere, since payloads hold their addresses. The page asks the routes of the app
that it came from, as any client does, and knows nothing more of them. Other pages of the service keep the same policy.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

_PAGE = Path(__file__).with_name("console.html")


def open_console() -> tuple[bytes, dict[str, str]]:
    """Give the page and its headers."""
    text = _PAGE.read_text(encoding="utf-8")
    script = _hash_part(text, "script")
    return text.encode(), guard_page(text, script=script, connect="'self'", img="data: http: https:")


def guard_page(text: str, **sources: str) -> dict[str, str]:
    """Give the headers by which a page has its own style, what is named of other kinds, and nothing else."""
    rules = {
        "default-src": "'none'",
        "style-src": _hash_part(text, "style"),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        **{f"{kind}-src": allowed for kind, allowed in sources.items()},
    }
    return {
        "content-security-policy": "; ".join(f"{name} {allowed}" for name, allowed in rules.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


def _hash_part(text: str, tag: str) -> str:
    """Name the only script, or style, of a page as a policy does: by what stands between its tags."""
    [part] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
