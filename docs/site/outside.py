"""Links out of docs/: the file that one leads to is taken into the site, so that it leads somewhere there too.

`deploy/README.md` is a page of the site. Links of a page that lies elsewhere in the repository are read from there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

PAGES = {"deploy/README.md": "deploy.md"}
"""Pages of the site that lie elsewhere."""

_LINK = re.compile(r"(?<!!)\]\((?![a-z]+:|#|/)([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def find_files(docs: Path) -> dict[str, Path]:
    """Give the files of the repository that pages link to, and pages that lie elsewhere, by their place in the site."""
    found = dict(PAGES)
    for page in [*docs.rglob("*.md"), *(docs.parent / source for source in PAGES)]:
        for match in _LINK.finditer(_CODE.sub("", page.read_text(encoding="utf-8"))):
            source = _resolve(page.relative_to(docs.parent).as_posix(), match[1])
            if not source.startswith("docs/"):
                found.setdefault(source, f"files/{source}")
    return {place: docs.parent / source for source, place in found.items()}


def turn_links(markdown: str, page: str, docs: Path) -> str:
    """Let links of a page that lead out of docs/ lead to the same file in the site.

    Args:
        markdown: the page.
        page: its place in the site.
        docs: the folder.
    """
    written = {place: source for source, place in PAGES.items()}.get(page, f"docs/{page}")

    def turn(match: re.Match[str]) -> str:
        source = _resolve(written, match[1])
        place = source.removeprefix("docs/") if source.startswith("docs/") else PAGES.get(source, f"files/{source}")
        return f"]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return _LINK.sub(turn, markdown)


def _resolve(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
