"""Queries and hits as bytes: what the router sends its replicas and what the batch door takes and gives.

A body is a fixed little-endian header (a magic word, the format's version, counts) and raw arrays behind it. Numbers in
the header are claims: the length they imply must be the length of the body, so that no count is ever trusted. Arrays
are read where they lie, without a copy.

    query   GSLQ  version  queries  dim  k  probes  refine  listed  filter bytes  recall
            | queries x dim float32 | queries x listed int32 | queries x listed float32 | filter, JSON
    hits    GSLH  version  name bytes  queries  k  answered  total | ids int64 | distances float32 | version name

`listed` lists are named for each query, with their distances, where a router has found them for its replicas.

This module knows neither HTTP nor gRPC.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import json
import operator
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsl_dist.errors import QueryError
from gsl_dist.hits import Effort, Hits

QUERY_TYPE, HITS_TYPE = "application/x-gsl-query", "application/x-gsl-hits"
FORMAT = 3
Lists = tuple[NDArray[np.int64], NDArray[np.float32]]
HIT_BYTES = 12
"""What one hit takes: an int64 id and a float32 distance."""

# Both headers are whole multiples of eight bytes, so that the arrays behind them are aligned.
_QUERY_HEAD = struct.Struct("<4sB3xIIIIIIIf")
_HITS_HEAD = struct.Struct("<4sBxHIIII")
_LARGEST = 2**32 - 1

QUERY_HEAD_BYTES = _QUERY_HEAD.size


def pack_query(queries: NDArray[np.float32], effort: Effort, probed: Lists | None = None) -> bytes:
    """Write queries and the effort to search them with; what is left open is for the server to choose.

    Shapes: queries (Q, D) float32; probed, lists and their distances, (Q, P) each.
    Raises:
        QueryError: a count is no whole number above zero, recall is no share, or the filter is nothing that JSON knows.
    """
    counted = zip(Effort._fields[:3], effort[:3], strict=True)
    asked = [0 if value is None else _count(name, value) for name, value in counted]
    where = b"" if effort.where is None else _write_where(effort.where)
    lists, distances = probed if probed is not None else (np.empty((0, 0)), np.empty((0, 0)))
    counts = len(queries), queries.shape[1], *asked, lists.shape[1], len(where), check_share(effort.recall)
    parts = [(queries, "<f4"), (lists, "<i4"), (distances, "<f4")]
    arrays = [np.ascontiguousarray(array, kind).tobytes() for array, kind in parts]
    return b"".join((_QUERY_HEAD.pack(b"GSLQ", FORMAT, *counts), *arrays, where))


def unpack_query(body: bytes) -> tuple[NDArray[np.float32], Effort, Lists | None]:
    """Read queries, the effort, and lists if any were named; queries are a read-only view of the body.

    Shapes: -> queries (Q, D) float32; lists (Q, P) int64 and their distances (Q, P) float32, or None.
    Raises:
        QueryError: another format, or a length that its header does not account for.
    """
    rows, dim, k, probes, refine, listed, where_bytes, recall = _read_head(_QUERY_HEAD, b"GSLQ", body)
    lists_at = _QUERY_HEAD.size + 4 * rows * dim
    where_at = lists_at + 8 * rows * listed
    _expect_length(body, where_at + where_bytes)
    queries = np.frombuffer(body, "<f4", rows * dim, _QUERY_HEAD.size).reshape(rows, dim)
    where = _read_where(body[where_at:]) if where_bytes else None
    # As few digits as tell a float32 from its neighbours: .95 comes back as .95.
    effort = Effort(k, probes or None, refine or None, float(str(np.float32(recall))) if recall else None, where)
    if not listed:
        return queries, effort, None
    lists = np.frombuffer(body, "<i4", rows * listed, lists_at).reshape(rows, listed).astype(np.int64)
    distances = np.frombuffer(body, "<f4", rows * listed, lists_at + 4 * rows * listed).reshape(rows, listed)
    return queries, effort, (lists, distances)


def pack_hits(hits: Hits) -> bytes:
    """Write an answer."""
    name = hits.version.encode()
    head = _HITS_HEAD.pack(b"GSLH", FORMAT, len(name), *hits.ids.shape, hits.shards_answered, hits.shards_total)
    ids, distances = np.ascontiguousarray(hits.ids, "<i8"), np.ascontiguousarray(hits.distances, "<f4")
    return b"".join((head, ids.tobytes(), distances.tobytes(), name))


def unpack_hits(body: bytes) -> Hits:
    """Read an answer; its arrays are read-only views of the body.

    Raises:
        QueryError: another format, or a length that its header does not account for.
    """
    name_bytes, rows, k, answered, total = _read_head(_HITS_HEAD, b"GSLH", body)
    name_at = _HITS_HEAD.size + HIT_BYTES * rows * k
    _expect_length(body, name_at + name_bytes)
    ids = np.frombuffer(body, "<i8", rows * k, _HITS_HEAD.size).reshape(rows, k)
    distances = np.frombuffer(body, "<f4", rows * k, _HITS_HEAD.size + 8 * rows * k).reshape(rows, k)
    try:
        version = bytes(body[name_at:]).decode()
    except UnicodeDecodeError:
        raise QueryError("body", "a version name", "it must be UTF-8") from None
    return Hits(ids, distances, answered, total, version)


def _write_where(where: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(where).encode()
    except (TypeError, ValueError) as error:
        raise QueryError("where", where, f"it must be strings, numbers, true and false alone ({error})") from None


def _read_where(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise QueryError("where", "the filter of the body", f"it must be JSON ({error})") from None


def check_share(recall: Any) -> float:
    """Give the recall that is asked for; 0 if none is.

    Raises:
        QueryError: it is no share of what there is.
    """
    if recall is None:
        return 0.0
    if isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1:
        raise QueryError("recall", recall, "it must be a share above 0 and up to 1")
    return float(recall)


def _read_head(head: struct.Struct, magic: bytes, body: bytes) -> tuple[Any, ...]:
    if len(body) < head.size:
        raise QueryError("body", f"{len(body)} bytes", f"it must begin with a header of {head.size} bytes")
    word, version, *counts = head.unpack_from(body)
    if word != magic or version != FORMAT:
        given = f"{bytes(word)!r} version {version}"
        raise QueryError("body", given, f"it must be {magic.decode()} version {FORMAT}")
    return tuple(counts)


def _expect_length(body: bytes, wanted: int) -> None:
    if len(body) != wanted:
        raise QueryError("body", f"{len(body)} bytes", f"its header accounts for {wanted}")


def _count(field: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    # True would pass for 1.
    if isinstance(value, bool) or not 1 <= count <= _LARGEST:
        raise QueryError(field, value, "it must be a whole number above zero")
    return count
