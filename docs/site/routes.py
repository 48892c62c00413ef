"""The reference of the HTTP API, made of the OpenAPI document that the service gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from gsl_dist.service.app import Desk, create_app
from gsl_dist.service.reference import Body, Route, read_routes
from gsl_dist.service.router import Router

_INTRODUCTION = """The service itself gives this page at `/docs`, and the OpenAPI document that both are made of at
`/openapi.json`; neither asks anything of another server. What the words mean is told in [the service](../service.md),
what the errors are in [errors](../errors.md). Fields in bold are needed in a request, and always there in an answer.

`POST /v1/search` and `/v1/echo` also take raw float32 (what [`Client`](python.md#client) sends) and a stream of Arrow
with a column `vector`. The other fields are then in the URL: `?k=5&payload=title&payload=year`.
"""


def write_page() -> str:
    """Give the page, a section a route."""
    routes = read_routes(describe_api())
    parts = ["# HTTP\n", _INTRODUCTION, "| route | |\n|---|---|"]
    parts.extend(f"| [{route.method} {route.path}](#{route.name}) | {route.summary} |" for route in routes)
    parts.append("")
    for route in routes:
        parts.extend(_write_route(route))
    return "\n".join(parts)


def describe_api() -> dict[str, Any]:
    """Give the OpenAPI document of a service that serves nothing."""
    # Routes look at the router when they are asked, and here none is.
    return create_app(Desk(cast(Router, None))).openapi()


def _write_route(route: Route) -> Iterator[str]:
    yield f"## {route.method} {route.path} {{#{route.name}}}\n"
    token = f" Where the service has tokens it takes one of scope `{route.scope}`." if route.scope else ""
    yield f"{route.summary}.{token}\n"
    yield f"```\n{route.command}\n```\n"
    if route.body:
        yield "**What it takes**" + _list_kinds(route.body)
        yield _write_rows(route.body)
    yield "**What it gives**" + _list_kinds(route.answers["200"])
    yield _write_rows(route.answers["200"])
    if route.answers["200"].example:
        yield f"```json\n{route.answers['200'].example}\n```\n"
    for status, body in route.answers.items():
        if status != "200":
            yield f"`{status}` {body.about}" + (f" `{body.example}`" if body.example else "") + "\n"


def _list_kinds(body: Body) -> str:
    return f" ({', '.join(f'`{kind}`' for kind in body.kinds)})\n"


def _write_rows(body: Body) -> str:
    if not body.rows:
        return ""
    rows = [
        f"| {f'**`{row.name}`**' if row.is_needed else f'`{row.name}`'} | {row.kind} | {row.about} |"
        for row in body.rows
    ]
    return "| field | | |\n|---|---|---|\n" + "\n".join(rows) + "\n"
