"""The reference of what is used from Python, made of signatures and docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from gsl_dist import errors, hits
from gsl_dist.client import AsyncClient, Client
from gsl_dist.index.search import LocalSearcher, open_searcher

_INTRODUCTION = """`pip install gsl_dist` is enough for the client: importing it loads neither torch, Ray nor faiss.
With `gsl_dist[cpu]`, `open_searcher` searches a version in process and gives the same answers.

```python
from gsl_dist.client import Client

with Client("http://127.0.0.1:8080") as client:
    hits = client.search(queries, k=10, probes=16)  # queries: (Q, D) float32
    hits.ids, hits.distances  # (Q, 10) int64, squared L2; -1 where there is no further hit
```
"""

SHOWN: dict[str, tuple[Any, ...]] = {
    "Client": (Client, AsyncClient),
    "Answers": (hits.Hits, hits.Effort),
    "In process": (open_searcher, LocalSearcher.search),
    "Errors": tuple(
        kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.GslError)
    ),
}

_SECTION = re.compile(r"^(Args|Shapes|Raises|Source):(.*)$")


def write_page() -> str:
    """Give the page, a section a class or function."""
    parts = ["# Python\n", _INTRODUCTION]
    for title, shown in SHOWN.items():
        parts.append(f"## {title}\n")
        for thing in shown:
            parts.extend(
                _write_class(thing) if inspect.isclass(thing) else _write_function(thing, thing.__qualname__, 3)
            )
    return "\n".join(parts)


def list_methods(kind: type) -> dict[str, Any]:
    """Give the public methods and properties of a class that it defines itself, in their order."""
    members = {name: member for name, member in vars(kind).items() if not name.startswith("_")}
    return {name: m for name, m in members.items() if isinstance(m, property) or inspect.isfunction(m)}


def _write_class(kind: type) -> Iterator[str]:
    yield f"### {kind.__name__}\n"
    yield f"```python\n{_show_signature(kind, kind.__name__)}\n```\n"
    yield from _write_docstring(inspect.getdoc(kind) or "")
    for name, member in list_methods(kind).items():
        yield from _write_function(member, name, 4, f"{kind.__name__.lower()}-")


def _write_function(thing: Any, name: str, level: int, before: str = "") -> Iterator[str]:
    yield f"{'#' * level} {name} {{#{before}{name.lower().replace('_', '-')}}}\n"
    shown = f"{name}  # a property" if isinstance(thing, property) else _show_signature(thing, name)
    yield f"```python\n{shown}\n```\n"
    yield from _write_docstring(inspect.getdoc(thing) or "")


def _show_signature(thing: Any, name: str) -> str:
    try:
        signature = inspect.signature(thing)
    except ValueError:  # an exception that is made of whatever it is given
        return name
    kept = [p.replace(annotation=_plain(p.annotation)) for p in signature.parameters.values() if p.name != "self"]
    parts = [str(parameter).replace("'", "") for parameter in kept]
    keyword = next((at for at, p in enumerate(kept) if p.kind is inspect.Parameter.KEYWORD_ONLY), None)
    if keyword is not None:
        parts.insert(keyword, "*")
    gives = "" if inspect.isclass(thing) else f" -> {_plain(signature.return_annotation)}"
    short = f"{name}({', '.join(parts)}){gives}"
    before = "await " if inspect.iscoroutinefunction(thing) else ""
    return before + (short if len(short) <= 90 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){gives}")


def _plain(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _write_docstring(text: str) -> Iterator[str]:
    """Lay out a docstring: prose as it is, sections as lists."""
    section, entries = "", []
    for line in [*text.splitlines(), ""]:
        found = _SECTION.match(line)
        if section and (found or (line and not line.startswith(" "))):
            yield _write_section(section, entries)
            section, entries = "", []
        if found:
            section, entries = found[1], [found[2].strip()] if found[2].strip() else []
        elif not section:
            yield line
        elif line.strip():
            if entries and line.startswith(" " * 8):
                entries[-1] += f" {line.strip()}"
            else:
                entries.append(line.strip())
    if section:
        yield _write_section(section, entries)
    yield ""


def _write_section(section: str, entries: list[str]) -> str:
    if section in ("Shapes", "Source"):
        return f"\n*{section}*: {' '.join(entries)}\n"
    named = [re.sub(r"^([\w, *]+):", r"`\1`:", entry) for entry in entries]
    return f"\n*{section}*\n\n" + "".join(f"- {entry}\n" for entry in named)
