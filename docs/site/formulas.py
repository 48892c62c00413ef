r"""Formulas as MathML, made when the site is built: a browser shows them without a script or a font from elsewhere.

They are written as code hosts show them, too: a block of ```math, or $`x`$ in a line, in LaTeX.
"""

from __future__ import annotations

import re

import markdown
from latex2mathml.converter import convert
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor
from markdown.preprocessors import Preprocessor
from mkdocs.exceptions import PluginError

_BLOCK = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
_INLINE = r"\$`([^`]+)`\$"
# Before fences (25) and code in a line (190) take them for code.
_BEFORE_FENCES, _BEFORE_CODE = 30, 195


class Formulas(Extension):
    """Adds formulas to Markdown."""

    def extendMarkdown(self, md: markdown.Markdown) -> None:  # noqa: N802 - the name that Markdown calls
        """Take formulas before anything else sees them."""
        md.preprocessors.register(_Blocks(md), "formula blocks", _BEFORE_FENCES)
        md.inlinePatterns.register(_Inline(_INLINE, md), "formulas", _BEFORE_CODE)


def show_formula(text: str, display: str = "inline") -> str:
    """Give a formula as MathML.

    Raises:
        PluginError: something in it is not known, and would be shown as it is written.
    """
    shown, braces = convert(text, display=display), re.sub(r"\\[{}]", "", text)
    if "\\" in shown or "<mo />" in shown or braces.count("{") != braces.count("}"):
        raise PluginError(f"this formula cannot be shown as it is written: {text}")
    return shown


class _Blocks(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return _BLOCK.sub(self._show, "\n".join(lines)).split("\n")

    def _show(self, match: re.Match[str]) -> str:
        shown = f'<div class="formula">{show_formula(match[1], "block")}</div>'
        return f"\n\n{self.md.htmlStash.store(shown)}\n\n"


class _Inline(InlineProcessor):
    def handleMatch(  # type: ignore[override]  # noqa: N802 - the name that Markdown calls
        self, match: re.Match[str], data: str
    ) -> tuple[str, int, int]:
        return self.md.htmlStash.store(show_formula(match[1])), match.start(0), match.end(0)
