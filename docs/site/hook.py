"""What mkdocs calls while it builds the site: pages that are made of the code, and formulas without a script.

Nothing that is made lies in the repository. Pages written by hand are plain Markdown that reads as well where it lies:
a link out of docs/ leads to a copy of the file in the site, or to the page that was made of it.
"""

from __future__ import annotations

from pathlib import Path

import commands
import fields
import outside
import python
import results
import routes
from formulas import Formulas
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

MADE = {
    "reference/configs.md": fields.write_page,
    "reference/commands.md": commands.write_page,
    "reference/http.md": routes.write_page,
    "reference/python.md": python.write_page,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add what renders formulas, and the pages of results that are there."""
    config.markdown_extensions.append(Formulas())
    results.fill_nav(config.nav or [], Path(config.docs_dir))
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the files outside of docs/ that pages link to."""
    for path, write in MADE.items():
        files.append(File.generated(config, path, content=write()))
    for path, source in outside.find_files(Path(config.docs_dir)).items():
        files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links out of docs/ lead to where the site has those files, and list all results."""
    docs = Path(config.docs_dir)
    if page.file.src_uri == results.FIRST:
        markdown = results.add_missing(markdown, docs / "results")
    return outside.turn_links(markdown, page.file.src_uri, docs)
