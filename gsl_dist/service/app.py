"""The HTTP doors: one app, reached through uvicorn on a port of its own and through Ray Serve's ordinary route.

    POST /v1/search          JSON; for batches raw float32 (`gsl_dist.wire`) or a stream of Arrow
    POST /v1/items/fetch     payload of items by their ids
    POST /v1/items           writes items, new or in place of others; it is answered when no crash undoes it
    POST /v1/items/payload   changes columns of items
    POST /v1/items/delete    ends items
    GET  /v1/versions        what the index folder holds and what is served
    POST /v1/promote         serves another version, without losing a query
    POST /v1/compact         makes what was written part of the next version, and serves that
    POST /v1/echo            reads a search and searches nothing: the yardstick for latency
    GET  /livez, /readyz     the process answers; every shard does
    GET  /healthz            how many shards answer, found out by searching
    GET  /metrics            figures for Prometheus
    GET  /                   the console, a page to search and to look at it all
    GET  /docs               the same list as this, with all fields

Whatever a caller gets wrong is a 4xx answer of one shape: `code`, `message`, `field`. Where a query has fewer than k
hits, the JSON answer holds id -1 and distance null. How requests are read is for `gsl_dist.service.reading`, what is
answered for `gsl_dist.service.asking`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gsl_dist.errors import BadInput, Denied, GslError, Overloaded, QueryError, ShardUnavailable
from gsl_dist.hits import NO_ID, Effort, Hits
from gsl_dist.index.log import Operation
from gsl_dist.index.manifest import current_version, list_versions
from gsl_dist.service.access import Access, Scope
from gsl_dist.service.asking import Encode, answer_question
from gsl_dist.service.console import open_console
from gsl_dist.service.describe import DOCS, SECURITY
from gsl_dist.service.links import count_connected
from gsl_dist.service.reading import (
    ARROW_TYPE,
    Limits,
    find_type,
    read_body,
    read_fetch,
    read_question,
    read_word,
    read_writes,
)
from gsl_dist.service.reference import open_reference
from gsl_dist.service.router import Router
from gsl_dist.service.served import Served
from gsl_dist.wire import HITS_TYPE, QUERY_TYPE, pack_hits, pack_table

_log = logging.getLogger(__name__)

Hop = Callable[[Coroutine[Any, Any, Response]], Awaitable[Response]]
"""Does work on the loop of the router, whichever loop the request came in on."""

Compact = Callable[[], Awaitable[str]]

_CODES = {400: "bad_input", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_GONE = 499


async def stay(work: Coroutine[Any, Any, Response]) -> Response:
    """Do work on the loop that one is on."""
    return await work


@dataclass(frozen=True)
class Desk:
    """What every route goes through: who may ask, how many at once, and what is counted of it.

    Args:
        router: answers.
        limits: how much a request may ask for.
        access: who may ask.
        encode: makes vectors of raw items; None: vectors are what is searched for.
        compact: makes the next version of what was written over this one, and gives its name; None: a job does that.
        hop: takes work to the router's loop.
    """

    router: Router
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    encode: Encode | None = None
    compact: Compact | None = None
    hop: Hop = stay

    async def answer(self, request: Request, scope: Scope, work: Callable[[bytes], Awaitable[Response]]) -> Response:
        """Let a request pass and give its answer, or say why there is none."""
        tracer = self.router.meters.tracer
        if tracer is None:
            return await self._answer(request, scope, work)
        with tracer.trace(request.url.path, request.headers) as span:
            response = await self._answer(request, scope, work)
            span.set_attribute("http.response.status_code", response.status_code)
            return response

    async def _answer(self, request: Request, scope: Scope, work: Callable[[bytes], Awaitable[Response]]) -> Response:
        meters, start, route = self.router.meters, time.perf_counter(), request.url.path
        name, status = request.headers.get("x-request-id") or uuid.uuid4().hex[:16], 500
        meters.open.inc()
        try:
            self.access.check(request.headers.get("authorization"), scope)
            body = await read_body(request, self.limits.body_bytes)
            meters.note("read", start)
            response = await self.hop(self._work(work, body))
            status = response.status_code
        except (GslError, ClientDisconnect) as error:
            response = tell_error(error)
            status = response.status_code
        finally:
            meters.open.dec()
            meters.requests.labels(route, str(status)).inc()
            meters.note("request", start)
            level = logging.INFO if status < 500 else logging.WARNING
            if _log.isEnabledFor(level):
                took_ms = (time.perf_counter() - start) * 1e3
                _log.log(level, "%s", json.dumps({"request": name, "route": route, "status": status, "ms": took_ms}))
        response.headers["x-request-id"] = name
        return response

    @contextlib.contextmanager
    def admit(self, route: str, header: str | None, scope: Scope) -> Iterator[None]:
        """Let a request pass that comes through another door, on the router's loop, and count it."""
        meters, start, status = self.router.meters, time.perf_counter(), "200"
        meters.open.inc()
        try:
            self.access.check(header, scope)
            with self._place():
                yield
        except GslError as error:
            status = str(tell_error(error).status_code)
            raise
        finally:
            meters.open.dec()
            meters.requests.labels(route, status).inc()
            meters.note("request", start)

    async def _work(self, work: Callable[[bytes], Awaitable[Response]], body: bytes) -> Response:
        with self._place():
            return await work(body)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        # Counted on the router's loop, whichever door a request came through.
        open_now = self.router.open_requests
        if open_now >= self.limits.concurrent:
            raise Overloaded(open_now)
        self.router.open_requests += 1
        try:
            yield
        finally:
            self.router.open_requests -= 1


class App(FastAPI):
    """An app whose page also says what a token is."""

    def openapi(self) -> dict[str, Any]:
        """Give the OpenAPI page."""
        page = super().openapi()
        page["components"] = page.get("components", {}) | {"securitySchemes": SECURITY}
        return page


def create_app(desk: Desk) -> FastAPI:
    """Make the app that answers for an index folder."""
    # The pages that FastAPI would give fetch their scripts from elsewhere.
    pages: dict[str, Any] = {"docs_url": None, "redoc_url": None}
    app = App(title="gsl_dist", description="Nearest neighbours from a few bytes an item.", version="1", **pages)
    _add_search(app, desk)
    _add_items(app, desk)
    _add_versions(app, desk)
    _add_compact(app, desk)
    _add_health(app, desk)
    _add_page(app, "/", *open_console())
    _add_page(app, "/docs", *open_reference(app.openapi()))
    _answer_errors(app)
    return app


def _add_search(app: FastAPI, desk: Desk) -> None:
    router, limits = desk.router, desk.limits

    @app.post("/v1/search", summary="Find the nearest items", openapi_extra=DOCS["search"])
    async def search(request: Request) -> Response:
        kind = find_type(request)

        async def work(body: bytes) -> Response:
            with router.hold() as served:
                question = read_question(kind, body, request.query_params, served.manifest, limits)
                hits = await answer_question(served, question, desk.encode)
            router.meters.queries.inc(len(hits))
            router.meters.partial.inc(hits.is_partial)
            return _show(hits, kind)

        return await desk.answer(request, "read", work)

    @app.post("/v1/echo", summary="Read a search request and search nothing", openapi_extra=DOCS["echo"])
    async def echo(request: Request) -> Response:
        async def work(body: bytes) -> Response:
            question = read_question(find_type(request), body, request.query_params, router.manifest, limits)
            count = next(len(x) for x in (question.queries, question.ids, question.items) if x is not None)
            return show_json({"queries": count, "k": question.effort.k, "version": router.manifest.version})

        return await desk.answer(request, "read", work)


def _add_items(app: FastAPI, desk: Desk) -> None:
    router, limits = desk.router, desk.limits

    @app.post("/v1/items/fetch", summary="Give the payload of items", openapi_extra=DOCS["fetch"])
    async def fetch(request: Request) -> Response:
        async def work(body: bytes) -> Response:
            ids, columns = read_fetch(body, limits)
            with router.hold() as served:
                names = columns or tuple(name for name in served.overlay.schema.names if name != "id")
                fetched = await served.fetch(ids, names)
            rows = fetched.table.to_pylist() if names else [{}] * len(ids)
            items = [
                {"id": item, "payload": row} if is_here else None
                for item, is_here, row in zip(ids.tolist(), fetched.is_here_n, rows, strict=True)
            ]
            return show_json({"items": items, "version": served.manifest.version})

        return await desk.answer(request, "read", work)

    async def write(request: Request, operation: Operation) -> Response:
        async def work(body: bytes) -> Response:
            writes = read_writes(body, operation, limits)
            seq = await router.write(writes)
            return show_json({"written": len(writes), "seq": seq})

        return await desk.answer(request, "admin", work)

    @app.post("/v1/items", summary="Write items, new or in place of others", openapi_extra=DOCS["upsert"])
    async def upsert(request: Request) -> Response:
        return await write(request, "upsert")

    @app.post("/v1/items/payload", summary="Change columns of items", openapi_extra=DOCS["payload"])
    async def payload(request: Request) -> Response:
        return await write(request, "payload")

    @app.post("/v1/items/delete", summary="End items", openapi_extra=DOCS["delete"])
    async def delete(request: Request) -> Response:
        return await write(request, "delete")


def _add_versions(app: FastAPI, desk: Desk) -> None:
    router = desk.router

    @app.get("/v1/versions", summary="Show what there is and what is served", openapi_extra=DOCS["versions"])
    async def versions(request: Request) -> Response:
        async def work(_: bytes) -> Response:
            with router.hold() as served:
                return show_json(_show_versions(router, served))

        return await desk.answer(request, "read", work)

    @app.post("/v1/promote", summary="Serve another version", openapi_extra=DOCS["promote"])
    async def promote(request: Request) -> Response:
        async def work(body: bytes) -> Response:
            manifest = await router.promote(read_word(body, "version"))
            return show_json({"served": manifest.version, "rows": manifest.rows})

        return await desk.answer(request, "admin", work)


def _add_compact(app: FastAPI, desk: Desk) -> None:
    router = desk.router

    @app.post("/v1/compact", summary="Make what was written part of the next version", openapi_extra=DOCS["compact"])
    async def compact(request: Request) -> Response:
        async def work(_: bytes) -> Response:
            if desk.compact is None:
                raise QueryError("compact", None, "this service runs no stages; run gsl compact", 404)
            manifest = await router.promote(await desk.compact())
            return show_json({"served": manifest.version, "rows": manifest.rows, "seq": manifest.log_seq})

        return await desk.answer(request, "admin", work)


def _add_health(app: FastAPI, desk: Desk) -> None:
    router = desk.router

    @app.get("/livez", summary="Tell that the process answers", openapi_extra=DOCS["livez"])
    async def live() -> Response:
        return show_json({"status": "ok"})

    @app.get("/readyz", summary="Tell whether every shard can be asked", openapi_extra=DOCS["readyz"])
    async def ready() -> Response:
        with router.hold() as served:
            counted = count_connected(served.copies)
            return show_json(
                {"status": "ok" if served.is_connected else "starting", **counted}, 200 if served.is_connected else 503
            )

    @app.get("/healthz", summary="Tell how many shards answer", openapi_extra=DOCS["healthz"])
    async def health(request: Request) -> Response:
        async def work(_: bytes) -> Response:
            with router.hold() as served:
                anything = np.ones((1, served.manifest.dim), np.float32)
                hits = await served.search(anything, Effort(1, 1, 1), everywhere=True)
            return show_json({"status": "partial" if hits.is_partial else "ok", **_show_share(hits)})

        try:
            return await desk.hop(work(b""))
        except GslError as error:
            return tell_error(error)

    @app.get("/metrics", summary="Give figures to Prometheus", openapi_extra=DOCS["metrics"])
    async def metrics(request: Request) -> Response:
        async def work(_: bytes) -> Response:
            with router.hold() as served:
                counted = count_connected(served.copies)
                router.meters.replicas.labels("connected").set(counted["connected"])
                router.meters.replicas.labels("wanted").set(counted["replicas"])
                router.meters.hedges.set(sum(part.hedges for part in served.copies))
            return Response(router.meters.expose(), media_type="text/plain; version=0.0.4")

        return await desk.answer(request, "read", work)


def _add_page(app: FastAPI, path: str, page: bytes, headers: dict[str, str]) -> None:
    @app.get(path, include_in_schema=False)
    async def show() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def show_json(content: dict[str, Any], status: int = 200) -> Response:
    """Answer with JSON."""
    packed = orjson.dumps(content, default=_show_odd, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    return Response(packed, status, media_type="application/json")


def tell_error(error: GslError | ClientDisconnect) -> Response:
    """Answer with what went wrong, in the one shape."""
    if isinstance(error, BadInput):
        more = {"value": error.value, "allowed": error.allowed}
        return _refuse(error.status, _CODES.get(error.status, "bad_input"), str(error), error.field, **more)
    if isinstance(error, ShardUnavailable):
        return _refuse(503, "shards_unavailable", str(error), missing=error.missing, total=error.total)
    if isinstance(error, Overloaded):
        answer = _refuse(429, "overloaded", str(error))
        answer.headers["retry-after"] = str(max(1, round(error.retry_after_s)))
        return answer
    if isinstance(error, Denied):
        answer = _refuse(error.status, "unauthorized" if error.status == 401 else "forbidden", str(error))
        if error.status == 401:
            answer.headers["www-authenticate"] = "Bearer"
        return answer
    if isinstance(error, ClientDisconnect):
        return Response(status_code=_GONE)
    return _refuse(503, "unavailable", str(error))


def _show(hits: Hits, kind: str) -> Response:
    if kind == QUERY_TYPE:
        return Response(pack_hits(hits), media_type=HITS_TYPE)
    if kind == ARROW_TYPE:
        return Response(pack_table(_tabulate(hits)), media_type=ARROW_TYPE)
    # orjson writes NaN as null, which is what stands beside id -1.
    distances = np.where(hits.ids == NO_ID, np.float32(np.nan), hits.distances)
    content = {"ids": np.ascontiguousarray(hits.ids), "distances": distances, **_show_share(hits)}
    if hits.payload is not None:
        rows, k = hits.payload.to_pylist(), hits.ids.shape[1]
        content["payload"] = [rows[start : start + k] for start in range(0, len(rows), k)]
    return show_json(content)


def _tabulate(hits: Hits) -> pa.Table:
    """Give hits as a table: a row a query, lists of k."""
    k = hits.ids.shape[1]
    flat = {"ids": pa.array(hits.ids.ravel()), "distances": pa.array(hits.distances.ravel())}
    if hits.payload is not None:
        flat |= {f"payload.{name}": hits.payload[name].combine_chunks() for name in hits.payload.column_names}
    columns = {name: pa.FixedSizeListArray.from_arrays(column, k) for name, column in flat.items()}
    share = {name: json.dumps(value) for name, value in _show_share(hits).items()}
    return pa.table(columns).replace_schema_metadata(share)


def _show_share(hits: Hits) -> dict[str, Any]:
    share = {"shards_answered": hits.shards_answered, "shards_total": hits.shards_total, "version": hits.version}
    return share | ({"missing": list(hits.missing)} if hits.missing else {})


def _show_versions(router: Router, served: Served) -> dict[str, Any]:
    kept = {
        "dim",
        "cells",
        "rows",
        "metric",
        "sub_vectors",
        "bits",
        "bytes_per_item",
        "fingerprint",
        "created",
        "vectors",
    }
    names = {
        "versions": list_versions(router.index),
        "served": served.manifest.version,
        "promoted": current_version(router.index),
    }
    written = {"new_rows": served.overlay.rows, "hidden_rows": len(served.overlay.hidden), "seq": served.overlay.seq}
    columns = {field.name: str(field.type) for field in served.overlay.schema}
    whole = served.manifest.model_dump(include=kept) | count_connected(served.copies)
    return names | whole | written | {"shards": len(served.manifest.shards), "columns": columns}


def _show_odd(value: Any) -> Any:
    # Of what Arrow makes of columns, what JSON has no word for: bytes, decimals, durations.
    return value.hex() if isinstance(value, bytes) else str(value)


def _refuse(status: int, code: str, message: str, field: str | None = None, **more: Any) -> Response:
    return show_json({"code": code, "message": message, "field": field, **more}, status)


def _answer_errors(app: FastAPI) -> None:
    """Give the errors of routing the one shape, too."""

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        place = f"{request.method} {request.url.path}: {error.detail}"
        answer = _refuse(error.status_code, _CODES.get(error.status_code, "bad_input"), place)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(RequestValidationError)
    async def unread(_: Request, error: RequestValidationError) -> Response:
        return _refuse(400, "bad_input", str(error))

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return _refuse(500, "internal", "the service failed to answer; its log says why")
