"""What commands show: progress, tables of figures, and errors in a line each."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from gsl_dist.errors import GslError

# Paths and names are shown as they are: square brackets and colons in them are no markup.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)


class Screen:
    """Draws progress: bars on a terminal, lines elsewhere."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, TextColumn("{task.fields[remark]}", markup=False), console=console)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Screen:
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if console.is_terminal:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int, remark: str) -> None:
        """Show that `done` of `total` steps of something are behind us."""
        if not console.is_terminal:
            console.print(f"{what:>10} {done}/{total} {remark}", highlight=False)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, remark="")
        self._bars.update(self._tasks[what], completed=done, total=total, remark=remark)


def show_figures(title: str, figures: dict[str, Any]) -> None:
    """Print names and values as a table."""
    table = Table("what", Column("value", overflow="fold"), title=title)
    for name, value in sorted(figures.items()):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def show_error(word: str, error: GslError) -> None:
    """Print one line on standard error."""
    errors.print(Text.assemble((word, "bold red"), f" {error}"), highlight=False, soft_wrap=True)
