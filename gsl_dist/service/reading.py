"""Requests read and checked: JSON, raw float32 (`gsl_dist.wire`), or a stream of Arrow with a column `vector`.

Bodies are read by hand, since checking a batch number by number with pydantic takes longer than searching it. What a
JSON body says in its fields, the other two say in the URL: `?k=5&payload=title&payload=year`. Whatever is wrong is a
`QueryError` that names the field.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from fastapi import Request
from numpy.typing import NDArray

from gsl_dist.errors import QueryError
from gsl_dist.hits import Effort
from gsl_dist.index.log import Operation, Write
from gsl_dist.index.manifest import Manifest
from gsl_dist.index.search import MAX_K, check_effort, check_queries
from gsl_dist.wire import HIT_BYTES, QUERY_TYPE, check_number, unpack_query, unpack_table

ARROW_TYPE = "application/vnd.apache.arrow.stream"
_COUNTS = ("k", "probes", "refine", "offset", "group_size")
_FLAGS = ("require_all",)
_NUMBERS = ("recall", "within", "timeout_s")
_SOURCES = ("vectors", "ids", "items")
_OPTIONS = {*Effort._fields, "offset", "group_by", "group_size", "payload", "require_all", "version", "timeout_s"}
_WORDS = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one request may ask for, and how many may be answered at once.

    Args:
        batch: queries, or writes.
        body_bytes: the body, and the hits that answer it.
        concurrent: requests being answered.
    """

    batch: int = 4096
    body_bytes: int = 64 << 20
    concurrent: int = 256


@dataclasses.dataclass(frozen=True)
class Question:
    """A search request that has been read and checked.

    One of `queries`, `ids` and `items` is what is searched for: vectors; items like which others are wanted; raw items
    for the encoder. Of the hits the first `offset` are left out, and those that share a value in `group_by` with
    `group_size` nearer ones; `payload` names the columns to give.
    """

    effort: Effort
    queries: NDArray[np.float32] | None = None
    ids: NDArray[np.int64] | None = None
    items: list[Any] | None = None
    offset: int = 0
    group_by: str | None = None
    group_size: int = 1
    payload: tuple[str, ...] = ()
    require_all: bool = False
    timeout_s: float | None = None


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body, but no more of it than is allowed.

    Raises:
        QueryError: it is longer.
    """
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


def find_type(request: Request) -> str:
    """Give the media type of a body."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def read_question(kind: str, body: bytes, params: Any, manifest: Manifest, limits: Limits) -> Question:
    """Read a search request of any kind.

    Args:
        kind: the media type of the body.
        body: the body.
        params: the query string, as Starlette gives it.
        manifest: the version that is to answer.
        limits: what it may ask for.

    Raises:
        QueryError: anything in it is not as it should be.
    """
    readers = {QUERY_TYPE: _read_binary, ARROW_TYPE: _read_arrow}
    fields = readers[kind](body, params) if kind in readers else _read_json(body, params)
    return settle_question(fields, manifest, limits)


def settle_question(fields: dict[str, Any], manifest: Manifest, limits: Limits) -> Question:
    """Check what a search request says in its fields, however it came; they are used up.

    Raises:
        QueryError: anything in them is not as it should be.
    """
    version = fields.pop("version", None)
    if version not in (None, manifest.version):
        raise QueryError("version", version, f"{manifest.version} is the version served here", 404)
    source, count = _read_source(fields, manifest, limits)
    asked = Effort(**{name: fields.pop(name) for name in Effort._fields if name in fields})
    options = _read_options(fields)
    effort = check_effort(asked, manifest)
    reach = effort.k + options.get("offset", 0)
    if reach > MAX_K:
        raise QueryError("offset", options["offset"], f"k and offset together may be at most {MAX_K}")
    if reach * count * HIT_BYTES > limits.body_bytes:
        most = limits.body_bytes // HIT_BYTES
        raise QueryError("k", effort.k, f"k times the {count} queries may be at most {most}", 413)
    # What was left open is settled for as many as are looked for, once that is known.
    return Question(asked._replace(k=effort.k), **source, **options)


def read_writes(body: bytes, operation: Operation, limits: Limits) -> list[Write]:
    """Read a request to write: `items` with an id, a vector and a payload each, or `ids` to delete.

    Raises:
        QueryError: anything in it is not as it should be.
    """
    fields, name = _load_object(body), "ids" if operation == "delete" else "items"
    _refuse_unknown(fields, {name})
    rows = fields.get(name)
    if not isinstance(rows, list) or not 1 <= len(rows) <= limits.batch:
        shown = f"{len(rows)} of them" if isinstance(rows, list) else rows
        raise QueryError(
            name, shown, f"it must be a list of 1 to {limits.batch}", 413 if isinstance(rows, list) else 400
        )
    if operation == "delete":
        return [Write("delete", item) for item in rows]
    return [_read_write(row, operation, f"items[{place}]") for place, row in enumerate(rows)]


def read_word(body: bytes, name: str) -> str:
    """Read a request that names one thing, such as `{"version": "v1"}`.

    Raises:
        QueryError: it does not.
    """
    fields = _load_object(body)
    _refuse_unknown(fields, {name})
    if not isinstance(fields.get(name), str):
        raise QueryError(name, fields.get(name), "it must be a string")
    return str(fields[name])


def read_fetch(body: bytes, limits: Limits) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Read a request for items by their ids: `{"ids": [...], "payload": [...]}`.

    Raises:
        QueryError: anything in it is not as it should be.
    """
    fields = _load_object(body)
    _refuse_unknown(fields, {"ids", "payload"})
    return _read_ids(fields.get("ids"), limits), _read_columns(fields.get("payload"))


def _read_write(row: Any, operation: Operation, place: str) -> Write:
    if not isinstance(row, dict):
        raise QueryError(place, row, 'it must be an object such as {"id": 7, "vector": [...], "payload": {...}}')
    known = {"id", "payload"} | ({"vector"} if operation == "upsert" else set())
    _refuse_unknown(row, known, f"{place}.")
    payload = row.get("payload") or {}
    if not isinstance(payload, dict) or (operation == "payload" and not payload):
        raise QueryError(f"{place}.payload", payload, "it must be an object of columns and their values")
    vector = None
    if operation == "upsert":
        given = row.get("vector")
        if not isinstance(given, list):
            raise QueryError(f"{place}.vector", given, "it must be a list of numbers")
        vector = _read_rows([given], len(given), f"{place}.vector")[0]
    return Write(operation, row.get("id", -1), vector, payload)


def _read_source(fields: dict[str, Any], manifest: Manifest, limits: Limits) -> tuple[dict[str, Any], int]:
    """Read what is searched for, and give how many queries that is."""
    named = [name for name in _SOURCES if fields.get(name) is not None]
    if len(named) != 1:
        raise QueryError("vectors", ", ".join(named) or None, "give one of vectors, ids and items")
    [name], given = named, fields.pop(named[0])
    for other in _SOURCES:
        fields.pop(other, None)
    if name == "ids":
        ids = _read_ids(given, limits)
        return {"ids": ids}, len(ids)
    if not isinstance(given, list | np.ndarray):
        raise QueryError(name, given, "it must be a list of vectors, each a list of numbers")
    if not 1 <= len(given) <= limits.batch:
        status = 413 if len(given) else 400
        raise QueryError(name, f"{len(given)} rows", f"a request holds 1 to {limits.batch}", status)
    if name == "items":
        return {"items": [_read_item(item, place) for place, item in enumerate(given)]}, len(given)
    rows = given if isinstance(given, np.ndarray) else _read_rows(given, manifest.dim)
    return {"queries": check_queries(rows, manifest.dim, manifest.metric)}, len(given)


def _read_ids(given: Any, limits: Limits) -> NDArray[np.int64]:
    is_list = isinstance(given, list)
    if not is_list or not 1 <= len(given) <= limits.batch:
        status = 413 if is_list and given else 400
        raise QueryError(
            "ids",
            f"{len(given)} of them" if is_list else given,
            f"it must be a list of 1 to {limits.batch} ids",
            status,
        )
    for item in given:
        if type(item) is not int or not 0 <= item < 2**63:
            raise QueryError("ids", item, "an id is a whole number from 0 to 2^63 - 1")
    return np.array(given, np.int64)


def _read_item(item: Any, place: int) -> Any:
    """Give a raw item: the bytes of a file in base64, numbers in lists, or an object with either for each modality."""
    if isinstance(item, dict):
        named = {name: part for name, part in item.items() if part is not None}
        return {name: _read_part(part, f"items[{place}].{name}") for name, part in named.items()}
    return _read_part(item, f"items[{place}]")


def _read_part(item: Any, field: str) -> Any:
    if isinstance(item, str):
        try:
            return base64.b64decode(item, validate=True)
        except binascii.Error as error:
            raise QueryError(field, item, f"a string holds the bytes of a file in base64 ({error})") from None
    try:
        row = np.array(item)
    except ValueError:
        row = np.empty(0, object)
    if not isinstance(item, list) or row.dtype.kind not in "fiu":
        raise QueryError(field, item, "it must be a file in base64, or numbers in lists")
    return row


def _read_options(fields: dict[str, Any]) -> dict[str, Any]:
    for name in ("offset", "group_size"):
        if name in fields and fields[name] < (1 if name == "group_size" else 0):
            raise QueryError(
                name, fields[name], f"it must be a whole number from {1 if name == 'group_size' else 0} on"
            )
    if "payload" in fields:
        fields["payload"] = _read_columns(fields["payload"])
    group = fields.get("group_by")
    if group is not None and not isinstance(group, str):
        raise QueryError("group_by", group, "it must name a payload column")
    if fields.get("timeout_s", 1) <= 0:
        raise QueryError("timeout_s", fields["timeout_s"], "it must be a number of seconds above 0")
    return fields


def _read_columns(given: Any) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given or []
    if not isinstance(names, list) or not all(isinstance(name, str) and "\n" not in name for name in names):
        raise QueryError("payload", given, "it must be a list of the names of columns")
    return tuple(dict.fromkeys(names))


def _read_binary(body: bytes, params: Any) -> dict[str, Any]:
    fields = _read_params(
        params, {"offset", "group_by", "group_size", "payload", "require_all", "version", "timeout_s"}
    )
    queries, effort, probed = unpack_query(body)
    if probed is not None:
        raise QueryError("body", "named lists", "only a router names lists, to its replicas")
    return (
        fields | {"vectors": queries} | {name: value for name, value in effort._asdict().items() if value is not None}
    )


def _read_arrow(body: bytes, params: Any) -> dict[str, Any]:
    fields, table = _read_params(params, _OPTIONS), unpack_table(body)
    if table.column_names.count("vector") != 1:
        raise QueryError("body", table.column_names, "it must have one column `vector`")
    column = table["vector"].combine_chunks()
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type) or column.null_count:
        raise QueryError("vector", str(kind), "it must be a column of lists of float32, none of them null")
    with np.errstate(over="ignore"):  # what becomes infinite is refused next
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return fields | {"vectors": flat.reshape(len(column), _measure_width(column))}


def _measure_width(column: pa.Array) -> int:
    if pa.types.is_fixed_size_list(column.type):
        return int(column.type.list_size)  # rows of no numbers take no bytes: there may be any number of them
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != lengths[0]).any():
        raise QueryError("vector", "lists of several lengths", "every vector must have the dimension of the index")
    return int(lengths[0]) if len(lengths) else 0


def _read_params(params: Any, known: set[str]) -> dict[str, Any]:
    """Read what a query string says as JSON would say it."""
    _refuse_unknown(params, known)
    fields: dict[str, Any] = {}
    for name in params:
        text = params[name]
        if name == "payload":
            fields[name] = params.getlist(name)
        elif name in _FLAGS:
            if text not in _WORDS:
                raise QueryError(name, text, "it must be true or false")
            fields[name] = _WORDS[text]
        elif name in ("version", "group_by"):
            fields[name] = text
        else:
            fields[name] = _load_json(text.encode(), name)
    return _check_kinds(fields)


def _read_json(body: bytes, params: Any) -> dict[str, Any]:
    _refuse_unknown(params, set())
    fields = _load_object(body)
    _refuse_unknown(fields, {*_OPTIONS, *_SOURCES})
    return _check_kinds(fields)


def _check_kinds(fields: dict[str, Any]) -> dict[str, Any]:
    # None stands for the default; a bool is an int to Python, but not to a caller.
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in _COUNTS:
        if name in fields and type(fields[name]) is not int:
            raise QueryError(name, fields[name], "it must be a whole number")
    for name in _NUMBERS:
        if name in fields:
            check_number(name, fields[name])
    for name in _FLAGS:
        if name in fields and type(fields[name]) is not bool:
            raise QueryError(name, fields[name], "it must be true or false")
    return fields


def _load_object(body: bytes) -> dict[str, Any]:
    fields = _load_json(body, "body")
    if not isinstance(fields, dict):
        raise QueryError("body", fields, 'it must be an object such as {"vectors": [[0.1, ...]], "k": 10}')
    return fields


def _load_json(text: bytes, field: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise QueryError(field, text[:40], f"it must be JSON ({error})") from None


def _refuse_unknown(fields: Mapping[str, Any], known: set[str], place: str = "") -> None:
    for name in fields:
        if name not in known:
            allowed = ", ".join(sorted(known)) or "nothing beside the body"
            raise QueryError(place + name, fields[name], f"there is no such field; known here: {allowed}")


def _read_rows(rows: list[Any], dim: int, field: str = "vectors") -> NDArray[np.float32]:
    # numpy would take "1.5" and true for numbers, so the types are looked at first.
    for place, row in enumerate(rows):
        name = f"vectors[{place}]" if field == "vectors" else field
        if type(row) is not list or len(row) != dim:
            shown = f"{len(row)} numbers" if type(row) is list else row
            raise QueryError(name, shown, f"it must be a list of {dim} numbers")
        if not set(map(type, row)) <= {int, float}:
            odd = next(value for value in row if type(value) not in (int, float))
            raise QueryError(name, odd, "every entry must be a number")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused next
        return np.array(rows, dtype=np.float32)
