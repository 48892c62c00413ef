"""The HTTP doors: one app, reached through uvicorn on a port of its own and through Ray Serve's ordinary route.

    POST /v1/search     JSON, or `application/x-gsl-query` for batches
    POST /v1/echo       reads the same body and searches nothing: the yardstick for latency
    GET  /v1/versions   what the index folder holds and what is served
    GET  /healthz       whether shards answer, found out by searching

Bodies are read by hand, since checking a batch number by number with pydantic takes longer than searching it. Whatever
a caller gets wrong is a 4xx answer of one shape: `code`, `message`, `field`. Where a query has fewer than k hits, the
JSON answer holds id -1 and distance null.

`create_app` knows a `Searching`, not where it runs; `DirectDoor` runs the router and uvicorn on one event loop in a
thread, and a `Handover` lets another loop of the same process search through that router.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import orjson
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gsl_dist.cluster.router import Router
from gsl_dist.errors import BadInput, ConfigError, QueryError, ShardUnavailable
from gsl_dist.hits import NO_ID, Effort, Hits
from gsl_dist.index.manifest import Manifest, current_version, list_versions
from gsl_dist.index.search import check_effort, check_queries
from gsl_dist.storage import Folder
from gsl_dist.wire import HIT_BYTES, HITS_TYPE, QUERY_TYPE, pack_hits, unpack_query

_log = logging.getLogger(__name__)

_CODES = {400: "bad_input", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_KEYS = {"vectors", *Effort._fields, "require_all", "version"}
_COUNTS = ("k", "probes", "refine")
_KEEP_ALIVE_S = 75


class Searching(Protocol):
    """What the app needs of a router."""

    manifest: Manifest

    async def search(  # noqa: D102
        self, queries: NDArray[np.float32], effort: Effort, *, require_all: bool
    ) -> Hits: ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one request may ask for.

    Args:
        batch: queries.
        body_bytes: the body, and the hits that answer it.
    """

    batch: int = 4096
    body_bytes: int = 64 << 20


@dataclasses.dataclass(frozen=True)
class Question:
    """A search request that has been read and checked."""

    queries: NDArray[np.float32]
    effort: Effort
    require_all: bool


def create_app(searching: Searching, index: str, limits: Limits = Limits()) -> FastAPI:
    """Make the app that answers for one served version of an index folder."""
    app = FastAPI(title="gsl_dist", description="Nearest neighbours from a few bytes an item.", version="1")
    manifest = searching.manifest

    @app.post("/v1/search", summary="Find the nearest items", openapi_extra=_SEARCH_DOC)
    async def search(request: Request) -> Response:
        question = await read_question(request, manifest, limits)
        hits = await searching.search(question.queries, question.effort, require_all=question.require_all)
        if _is_binary(request):
            return Response(pack_hits(hits), media_type=HITS_TYPE)
        return _answer(_show_hits(hits))

    @app.post("/v1/echo", summary="Read a search request and search nothing", openapi_extra=_SEARCH_DOC)
    async def echo(request: Request) -> Response:
        question = await read_question(request, manifest, limits)
        return _answer({"queries": len(question.queries), "k": question.effort.k, "version": manifest.version})

    @app.get("/healthz", summary="Tell whether shards answer")
    async def health() -> Response:
        anything = np.ones((1, manifest.dim), np.float32)
        hits = await searching.search(anything, Effort(1, 1, 1), require_all=False)
        status = "partial" if hits.is_partial else "ok"
        return _answer({"status": status, **_show_share(hits.shards_answered, hits.shards_total, manifest.version)})

    @app.get("/v1/versions", summary="Show what there is and what is served")
    def versions() -> Response:
        return _answer(_show_versions(Folder(index), manifest))

    _answer_errors(app)
    return app


async def read_question(request: Request, manifest: Manifest, limits: Limits) -> Question:
    """Read a search request of either kind.

    Raises:
        QueryError: anything in it is not as it should be.
    """
    body = await _read_body(request, limits.body_bytes)
    fields = _read_binary(body, request.query_params) if _is_binary(request) else _read_json(body, request.query_params)
    vectors = fields["vectors"]
    if not 1 <= len(vectors) <= limits.batch:
        status = 413 if len(vectors) else 400
        raise QueryError("vectors", f"{len(vectors)} rows", f"a request holds 1 to {limits.batch}", status)
    version = fields.get("version", manifest.version)
    if version != manifest.version:
        raise QueryError("version", version, f"{manifest.version} is the version served here", 404)
    if not isinstance(vectors, np.ndarray):
        vectors = _read_rows(vectors, manifest.dim)
    effort = check_effort(Effort(**{name: fields[name] for name in Effort._fields if name in fields}), manifest)
    if effort.k * len(vectors) * HIT_BYTES > limits.body_bytes:
        most = limits.body_bytes // HIT_BYTES
        raise QueryError("k", effort.k, f"k times the {len(vectors)} queries may be at most {most}", 413)
    return Question(check_queries(vectors, manifest.dim, manifest.metric), effort, fields.get("require_all", False))


async def _read_body(request: Request, limit: int) -> bytes:
    # A length that was announced is refused before anything is read; one that was not, as soon as it is passed.
    announced = request.headers.get("content-length", "0")
    size, chunks = int(announced) if announced.isdecimal() else 0, []
    if size <= limit:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                break
            chunks.append(chunk)
    if size > limit:
        raise QueryError("body", f"{size} bytes or more", f"a request body has at most {limit} bytes", 413)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _is_binary(request: Request) -> bool:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == QUERY_TYPE


def _read_binary(body: bytes, params: Mapping[str, str]) -> dict[str, Any]:
    _refuse_unknown(params, {"require_all", "version"})
    queries, effort, probed = unpack_query(body)
    if probed is not None:
        raise QueryError("body", "named lists", "only a router names lists, to its replicas")
    words = {"true": True, "false": False}
    asked = params.get("require_all", "false")
    if asked not in words:
        raise QueryError("require_all", asked, "it must be true or false")
    fields = {"vectors": queries, **effort._asdict(), "require_all": words[asked]}
    return fields | ({"version": params["version"]} if "version" in params else {})


def _read_json(body: bytes, params: Mapping[str, str]) -> dict[str, Any]:
    _refuse_unknown(params, set())
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise QueryError("body", body[:40], f"it must be JSON ({error})") from None
    if not isinstance(fields, dict):
        raise QueryError("body", fields, 'it must be an object such as {"vectors": [[0.1, ...]], "k": 10}')
    _refuse_unknown(fields, _KEYS)
    if not isinstance(fields.get("vectors"), list):
        raise QueryError("vectors", fields.get("vectors"), "it must be a list of vectors, each a list of numbers")
    for name in Effort._fields:
        # None stands for the default; a bool is an int to Python, but not to a caller.
        if fields.get(name) is None:
            fields.pop(name, None)
        elif name in _COUNTS and type(fields[name]) is not int:
            raise QueryError(name, fields[name], "it must be a whole number")
    if type(fields.get("require_all", False)) is not bool:
        raise QueryError("require_all", fields["require_all"], "it must be true or false")
    return fields


def _refuse_unknown(fields: Mapping[str, Any], known: set[str]) -> None:
    for name in fields:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "nothing beside the body"
            raise QueryError(name, fields[name], f"there is no such field; known here: {allowed}")


def _read_rows(rows: list[Any], dim: int) -> NDArray[np.float32]:
    # numpy would take "1.5" and true for numbers, so the types are looked at first.
    for place, row in enumerate(rows):
        if type(row) is not list or len(row) != dim:
            shown = f"{len(row)} numbers" if type(row) is list else row
            raise QueryError(f"vectors[{place}]", shown, f"it must be a list of {dim} numbers")
        if not set(map(type, row)) <= {int, float}:
            odd = next(value for value in row if type(value) not in (int, float))
            raise QueryError(f"vectors[{place}]", odd, "every entry must be a number")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused next
        return np.array(rows, dtype=np.float32)


def _show_hits(hits: Hits) -> dict[str, Any]:
    # orjson writes NaN as null, which is what stands beside id -1.
    distances = np.where(hits.ids == NO_ID, np.float32(np.nan), hits.distances)
    share = _show_share(hits.shards_answered, hits.shards_total, hits.version)
    return {"ids": np.ascontiguousarray(hits.ids), "distances": distances, **share}


def _show_share(answered: int, total: int, version: str) -> dict[str, Any]:
    return {"shards_answered": answered, "shards_total": total, "version": version}


def _show_versions(index: Folder, manifest: Manifest) -> dict[str, Any]:
    served = manifest.model_dump(
        include={"dim", "cells", "rows", "metric", "sub_vectors", "bits", "bytes_per_item", "fingerprint", "created"}
    )
    names = {"versions": list_versions(index), "served": manifest.version, "promoted": current_version(index)}
    return names | served | {"shards": len(manifest.shards)}


def _answer(content: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type="application/json")


def _refuse(status: int, code: str, message: str, field: str | None = None, **more: Any) -> Response:
    return _answer({"code": code, "message": message, "field": field, **more}, status)


def _answer_errors(app: FastAPI) -> None:
    """Give every error the one shape."""

    @app.exception_handler(BadInput)
    async def bad_input(_: Request, error: BadInput) -> Response:
        code = _CODES.get(error.status, "bad_input")
        return _refuse(error.status, code, str(error), error.field, value=error.value, allowed=error.allowed)

    @app.exception_handler(ShardUnavailable)
    async def unavailable(_: Request, error: ShardUnavailable) -> Response:
        return _refuse(503, "shards_unavailable", str(error), missing=error.missing, total=error.total)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        place = f"{request.method} {request.url.path}: {error.detail}"
        answer = _refuse(error.status_code, _CODES.get(error.status_code, "bad_input"), place)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return _refuse(500, "internal", "the service failed to answer; its log says why")


class DirectDoor:
    """Runs a router and uvicorn on one event loop, in a thread of this process.

    Args:
        router: the router; its connections will belong to that loop.
        app: the app that searches through it.
        host: the address to bind.
        port: the port; 0 for any free one.
    """

    def __init__(self, router: Router, app: FastAPI, *, host: str, port: int) -> None:
        self.router, self._socket = router, bind_port(host, port)
        self.port = int(self._socket.getsockname()[1])
        self.loop = uvloop.new_event_loop()
        # Ray Serve owns the process: signals, logging and the app's life are not uvicorn's here.
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self._thread = threading.Thread(target=self._run, name="direct-door", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop answering and hang up."""
        self._server.should_exit = True
        self._thread.join(timeout_s)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self.router.start()
        await self._server.serve(sockets=[self._socket])
        self.router.close()


class Handover:
    """Lets another event loop search through a router that lives on its own."""

    def __init__(self, door: DirectDoor) -> None:
        self.manifest, self._router, self._loop = door.router.manifest, door.router, door.loop

    async def search(self, queries: NDArray[np.float32], effort: Effort, *, require_all: bool) -> Hits:
        """Search on the router's loop and wait for it on this one."""
        work = self._router.search(queries, effort, require_all=require_all)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


def bind_port(host: str, port: int) -> socket.socket:
    """Take a port.

    Raises:
        ConfigError: it is taken, or the host is not this machine's.
    """
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise ConfigError("port", f"{host}:{port}", f"it must be free to listen on ({error.strerror})") from None
    return taken


_SEARCH_DOC: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["vectors"],
                    "additionalProperties": False,
                    "properties": {
                        "vectors": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
                        "k": {"type": "integer", "minimum": 1, "default": Effort().k},
                        "probes": {"type": "integer", "minimum": 1, "description": "by default 16 cells, or every one"},
                        "refine": {
                            "type": "integer",
                            "minimum": 1,
                            "description": "candidates a hit, ranked by the vectors kept; by default 4 where they are",
                        },
                        "recall": {
                            "type": "number",
                            "exclusiveMinimum": 0,
                            "maximum": 1,
                            "description": "share of the true neighbours, instead of probes and refine: gsl tune",
                        },
                        "where": {
                            "type": "object",
                            "description": 'which items may be hits: {"label": 3, "year": {"$gte": 1990}}; $ne $gt '
                            "$gte $lt $lte $in $nin $exists on columns, $and $or $not around filters",
                        },
                        "require_all": {
                            "type": "boolean",
                            "default": False,
                            "description": "503 over a partial answer",
                        },
                        "version": {"type": "string", "description": "404 unless this is the version served"},
                    },
                }
            },
            QUERY_TYPE: {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "responses": {
        "200": {
            "description": "The nearest items; id -1 and distance null where a query has fewer than k.",
            "content": {"application/json": {}, HITS_TYPE: {}},
        },
        "4XX": {"description": "What is wrong with the request: code, message, field."},
        "503": {"description": "No shard answered, or not all that were required: code, message, missing."},
    },
}
