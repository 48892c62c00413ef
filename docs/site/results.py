"""The pages of docs/results in the menu and on its first page: whatever lies there, so that a new one is on no list."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FIRST = "results/README.md"
_FOLDER = "results/"


def fill_nav(nav: list[dict[str, Any]], docs: Path) -> None:
    """Put the pages of a folder where the menu names the folder, in the order of its README."""
    for entry in nav:
        for title, pages in entry.items():
            if pages == _FOLDER:
                entry[title] = [_FOLDER + name for name in list_pages(docs / _FOLDER)]


def list_pages(folder: Path) -> list[str]:
    """Name the pages of a folder: its README, those that it links to, and others by name."""
    told = re.findall(r"\]\(([^)/#]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    there = sorted(page.name for page in folder.glob("*.md") if page.name != "README.md")
    return ["README.md", *(name for name in told if name in there), *(name for name in there if name not in told)]


def add_missing(markdown: str, folder: Path) -> str:
    """Put pages of a folder that its README does not link to at its end, by their titles."""
    missing = [name for name in list_pages(folder)[1:] if f"]({name})" not in markdown]
    return markdown.rstrip() + "".join(f"\n- [{_read_title(folder / name)}]({name})" for name in missing) + "\n"


def _read_title(page: Path) -> str:
    return next(line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# "))[2:]
