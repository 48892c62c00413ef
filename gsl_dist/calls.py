"""What can be asked of a service: requests as bytes, and what is read from their answers.

Queries are packed as raw float32 (`gsl_dist.wire`), all else as JSON; an error comes back as the one that the service
raised, with its fields. Who carries the bytes, and over which connection, is for `gsl_dist.client`.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsl_dist.errors import Denied, GslError, Overloaded, QueryError, ShardUnavailable
from gsl_dist.hits import FAR, Effort, Hits
from gsl_dist.wire import HITS_TYPE, QUERY_TYPE, pack_query, unpack_hits

RawItem = bytes | ArrayLike | Mapping[str, bytes | ArrayLike]
"""A file, an array of numbers, or of each modality, by its name, one of both."""

_LONGEST_WAIT_S = 5.0
_JSON_TYPE = "application/json"


@dataclass(frozen=True)
class Answer:
    """What a server said, whichever library heard it."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Call:
    """A request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[str, Answer], Any]
    body: bytes = b""
    kind: str = _JSON_TYPE


class Calls:
    """What can be asked of a service, as requests."""

    @staticmethod
    def search(  # noqa: PLR0913 - what a query may ask for
        queries: ArrayLike | None,
        k: int = 10,
        probes: int | None = None,
        *,
        ids: Sequence[int] | None = None,
        items: Sequence[RawItem] | None = None,
        refine: int | None = None,
        recall: float | None = None,
        where: Mapping[str, Any] | None = None,
        within: float | None = None,
        offset: int = 0,
        group_by: str | None = None,
        group_size: int = 1,
        payload: Sequence[str] = (),
        require_all: bool = False,
        timeout_s: float | None = None,
    ) -> Call:
        """Ask for the nearest items of vectors, of items, or of raw items."""
        options: dict[str, Any] = {"require_all": require_all, "offset": offset, "timeout_s": timeout_s}
        options |= {"group_by": group_by, "group_size": group_size if group_by is not None else None}
        if ids is not None or items is not None:
            effort = {"k": k, "probes": probes, "refine": refine, "recall": recall, "where": where, "within": within}
            source = (
                {"ids": [int(item) for item in ids]}
                if ids is not None
                else {"items": _show_items(() if items is None else items)}
            )
            return _post("/v1/search", _keep({**source, "payload": list(payload), **effort, **options}), _read_shown)
        words = {"require_all": "true" if require_all else None, "offset": offset or None}
        params = [*_keep(options | words).items(), *(("payload", name) for name in payload)]
        body = pack_query(_as_matrix(queries), Effort(k, probes, refine, recall, where, within))
        return Call("POST", "/v1/search" + (f"?{urlencode(params)}" if params else ""), _read_hits, body, QUERY_TYPE)

    @staticmethod
    def fetch(ids: Sequence[int], payload: Sequence[str] = ()) -> Call:
        """Ask for the payload of items."""
        body = {"ids": [int(item) for item in ids], "payload": list(payload)}
        return _post("/v1/items/fetch", body, lambda url, answer: _read_object(url, answer)["items"])

    @staticmethod
    def upsert(
        ids: Sequence[int], vectors: ArrayLike, payload: Sequence[Mapping[str, Any]] | Mapping[str, Any] = ()
    ) -> Call:
        """Write items."""
        rows = _as_rows(payload, len(ids))
        matrix = _as_matrix(vectors)
        if len(matrix) != len(ids):
            raise QueryError("vectors", _Shown(f"{len(matrix)} rows"), f"there must be one for each of {len(ids)} ids")
        if not np.isfinite(matrix).all():
            raise QueryError("vectors", _Shown("not a number or infinite"), "all must be finite numbers")
        items = [
            {"id": int(item), "vector": vector.tolist(), "payload": row}
            for item, vector, row in zip(ids, matrix, rows, strict=True)
        ]
        return _post("/v1/items", {"items": items}, _read_seq)

    @staticmethod
    def update(ids: Sequence[int], payload: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Call:
        """Change columns of items."""
        rows = _as_rows(payload, len(ids))
        items = [{"id": int(item), "payload": row} for item, row in zip(ids, rows, strict=True)]
        return _post("/v1/items/payload", {"items": items}, _read_seq)

    @staticmethod
    def delete(ids: Sequence[int]) -> Call:
        """End items."""
        return _post("/v1/items/delete", {"ids": [int(item) for item in ids]}, _read_seq)

    @staticmethod
    def promote(version: str) -> Call:
        """Serve another version."""
        return _post("/v1/promote", {"version": version}, _read_object)

    @staticmethod
    def versions() -> Call:
        """Ask what there is and what is served."""
        return Call("GET", "/v1/versions", _read_object)

    @staticmethod
    def health() -> Call:
        """Ask how many shards answer."""
        return Call("GET", "/healthz", _read_object)


def put_off(answer: Answer, deadline: float) -> float | None:
    """Give how long to wait before asking again; None if the answer is one."""
    if answer.status != HTTPStatus.TOO_MANY_REQUESTS:
        return None
    wait_s = min(float(answer.headers.get("retry-after", "1")), _LONGEST_WAIT_S)
    return wait_s if time.monotonic() + wait_s < deadline else None


def read_answer(url: str, call: Call, answer: Answer) -> Any:
    """Give what a call asked for.

    Raises:
        GslError: the error that the service answered with, or there is none of ours at the url.
    """
    if 200 <= answer.status < 300:
        return call.read(url + call.path, answer)
    raise _read_error(url, answer)


class _Shown(str):
    """A value that the server has already made fit to show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _post(path: str, body: dict[str, Any], read: Callable[[str, Answer], Any]) -> Call:
    return Call("POST", path, read, json.dumps(body, separators=(",", ":")).encode())


def _keep(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what nothing was said of."""
    return {name: value for name, value in fields.items() if value is not None}


def _as_matrix(queries: ArrayLike | None) -> NDArray[np.float32]:
    try:
        matrix = np.asarray(queries)
    except ValueError:
        matrix = np.empty(0, object)  # rows of different lengths
    if matrix.dtype.kind not in "fiu" or matrix.ndim not in (1, 2):
        shown = f"{matrix.dtype} of shape {matrix.shape}"
        raise QueryError("vectors", _Shown(shown), "it must be one vector of numbers, or rows of equal length")
    with np.errstate(over="ignore"):  # what becomes infinite, the server refuses
        matrix = matrix.astype(np.float32, copy=False)
    return matrix[None] if matrix.ndim == 1 else matrix


def _as_rows(payload: Sequence[Mapping[str, Any]] | Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    rows = [payload] * count if isinstance(payload, Mapping) else list(payload) or [{}] * count
    if len(rows) != count:
        raise QueryError(
            "payload", _Shown(f"{len(rows)} rows"), f"there must be one for each of {count} ids, or one for all"
        )
    return [dict(row) for row in rows]


def _show_items(items: Sequence[RawItem]) -> list[Any]:
    return [
        {name: _show_part(part) for name, part in item.items()} if isinstance(item, Mapping) else _show_part(item)
        for item in items
    ]


def _show_part(item: bytes | ArrayLike) -> Any:
    return base64.b64encode(item).decode() if isinstance(item, bytes) else np.asarray(item).tolist()


def _read_hits(url: str, answer: Answer) -> Hits:
    if answer.headers.get("content-type") != HITS_TYPE:
        raise GslError(f"{url} answered with something that is not hits: is it a gsl service?")
    return unpack_hits(answer.body)


def _read_shown(url: str, answer: Answer) -> Hits:
    """Read hits from JSON, as binary ones would be."""
    import pyarrow as pa

    content = _read_object(url, answer)
    ids = np.array(content["ids"], np.int64)
    distances = np.array([[FAR if far is None else far for far in row] for row in content["distances"]], np.float32)
    shares = content["shards_answered"], content["shards_total"], content["version"], tuple(content.get("missing", ()))
    rows = [row for page in content.get("payload", []) for row in page]
    return Hits(ids, distances, *shares, pa.Table.from_pylist(rows) if rows else None)


def _read_seq(url: str, answer: Answer) -> int:
    return int(_read_object(url, answer)["seq"])


def _read_object(url: str, answer: Answer) -> dict[str, Any]:
    content = _find_object(answer)
    if content is None:
        raise GslError(f"{url} answered with something that is not JSON: is it a gsl service?")
    return content


def _find_object(answer: Answer) -> dict[str, Any] | None:
    try:
        content = json.loads(answer.body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _read_error(url: str, answer: Answer) -> GslError:
    content = _find_object(answer) or {}
    message, status = content.get("message", _phrase(answer.status)), answer.status
    if "missing" in content:
        return ShardUnavailable(content["missing"], content["total"])
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Overloaded(0, float(answer.headers.get("retry-after", "1")))
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Denied(message, status)
    if 400 <= status < 500 and content.get("field"):
        return QueryError(content["field"], _Shown(content.get("value")), content.get("allowed", message), status)
    return GslError(f"{url} answered {status}: {message}")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else ""
