"""The API in words at `/docs`: what OpenAPI says of it, as a page that runs nothing and asks nobody.

The page that comes with FastAPI fetches its script from elsewhere, which neither a closed network nor the policy of the
console lets it do. `read_routes` turns an OpenAPI document into rows; the site of docs/ lays the same rows out. This
module knows nothing of the routes but the document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gsl_dist.service.console import guard_page

_PAGE = Path(__file__).with_name("reference.html")
_JSON = "application/json"
_LARGEST = float(2**63 - 1)
"""Bounds all integers of 64 bits: nothing that has to be said."""
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "default": "by default"}


@dataclass(frozen=True)
class Row:
    """A field of a body or of an answer.

    Args:
        name: where it is: `items[].id` is of each of a list.
        kind: what it may be.
        about: what it means; empty where the name says it.
        is_needed: whether a request must have it, or an answer always does.
    """

    name: str
    kind: str
    about: str
    is_needed: bool


@dataclass(frozen=True)
class Body:
    """What a request holds, or an answer.

    Args:
        about: when it is given.
        kinds: its media types.
        rows: its fields, where it is JSON.
        example: one of it, as JSON; None: there is none.
    """

    about: str
    kinds: tuple[str, ...]
    rows: tuple[Row, ...]
    example: str | None


@dataclass(frozen=True)
class Route:
    """One thing that can be asked of a service.

    Args:
        method: GET or POST.
        path: where.
        summary: what for.
        scope: of the token that it takes, where the service has tokens; None: it takes none.
        body: what a request holds; None: nothing.
        answers: by status.
    """

    method: str
    path: str
    summary: str
    scope: str | None
    body: Body | None
    answers: dict[str, Body]

    @property
    def name(self) -> str:
        """Name the place of the route on a page."""
        return "-".join([self.method.lower(), *self.path.strip("/").split("/")])

    @property
    def command(self) -> str:
        """Give a command that asks it."""
        sent = f" -d '{self.body.example}'" if self.body else ""
        return f"curl{sent} http://127.0.0.1:8080{self.path}"


def read_routes(document: dict[str, Any]) -> list[Route]:
    """Read what an OpenAPI document says of each route, in its order."""
    return [
        _read_route(method.upper(), path, said)
        for path, methods in document["paths"].items()
        for method, said in methods.items()
    ]


def open_reference(document: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Give the page of an OpenAPI document, and its headers."""
    routes = read_routes(document)
    listed = "".join(
        f'<tr><td><a href="#{route.name}">{route.method} {route.path}</a><td>{escape(route.summary)}'
        for route in routes
    )
    text = _PAGE.read_text(encoding="utf-8")
    text = text.replace("<!-- list -->", listed).replace("<!-- routes -->", "".join(map(_show_route, routes)))
    return text.encode(), guard_page(text)


def _read_route(method: str, path: str, said: dict[str, Any]) -> Route:
    answers = {status: _read_body(answer) for status, answer in said["responses"].items()}
    scope = "admin" if "403" in answers else "read" if "401" in answers else None
    body = _read_body(said["requestBody"]) if "requestBody" in said else None
    return Route(method, path, said["summary"], scope, body, answers)


def _read_body(said: dict[str, Any]) -> Body:
    content = said.get("content", {})
    shown = content.get(_JSON, {})
    example = json.dumps(shown["example"]) if "example" in shown else None
    return Body(said.get("description", ""), tuple(content), tuple(_read_rows(shown.get("schema", {}))), example)


def _read_rows(schema: dict[str, Any], above: str = "") -> Iterator[Row]:
    for name, inner in schema.get("properties", {}).items():
        yield Row(above + name, _say_kind(inner), inner.get("description", ""), name in schema.get("required", ()))
        yield from _read_rows(inner.get("items", {}), f"{above}{name}[].")


def _say_kind(schema: dict[str, Any]) -> str:
    kinds = schema.get("type", "anything")
    kind = " or ".join([kinds] if isinstance(kinds, str) else kinds)
    if kind == "array":
        kind = f"list of {_say_kind(schema.get('items', {}))}"
    bounds = [(word, schema[key]) for key, word in _BOUNDS.items() if key in schema]
    return ", ".join([kind, *(f"{word} {_say_value(value)}" for word, value in bounds if value != _LARGEST)])


def _say_value(value: Any) -> str:
    # Bounds come as floats, whatever they were.
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _show_route(route: Route) -> str:
    token = f"<p>Takes a token of scope <b>{route.scope}</b>, where the service has tokens.</p>" if route.scope else ""
    parts = [f'<h2 id="{route.name}">{route.method} {route.path}</h2><p>{escape(route.summary)}.</p>{token}']
    parts.append(f"<pre>{escape(route.command)}</pre>")
    if route.body:
        parts.append(_show_body("What it takes", route.body))
    parts.extend(_show_body(status, body) for status, body in route.answers.items() if status == "200")
    failed = "".join(f"<tr><td>{status}<td>{escape(body.about)}" for status, body in route.answers.items())
    parts.append(f"<h3>Statuses</h3><table>{failed}</table>")
    return f"<section>{''.join(parts)}</section>"


def _show_text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _show_body(title: str, body: Body) -> str:
    rows = "".join(
        f"<tr><td><code>{row.name}</code>{' *' if row.is_needed else ''}<td>{row.kind}<td>{_show_text(row.about)}"
        for row in body.rows
    )
    kinds = ", ".join(f"<code>{kind}</code>" for kind in body.kinds)
    example = f"<pre>{escape(body.example)}</pre>" if body.example else ""
    title = "What it gives" if title == "200" else title
    return f"<h3>{title}</h3><p>{kinds}</p><table>{rows}</table>{example}"
