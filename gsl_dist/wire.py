"""Queries and hits as bytes: what the router sends its replicas and what the batch door takes and gives.

A body is a fixed little-endian header (a magic word, the format's version, counts) and raw arrays behind it. Numbers in
the header are claims: the length they imply must be the length of the body, so that no count is ever trusted. Arrays
are read where they lie, without a copy.

    query   GSLQ  version  queries  dim  k  probes  refine  listed  filter bytes  recall  within  patience in ms
            | queries x dim float32 | queries x listed int32 | queries x listed float32 | filter, JSON
    hits    GSLH  version  name bytes  queries  k  answered  total  missing bytes  payload bytes
            | ids int64 | distances float32 | version name | names of missing shards, a line each | Arrow stream

`listed` lists are named for each query, with their distances, where a router has found them for its replicas. Patience
is how long whoever asks will wait: an answer that comes later is none, so it need not be found.

This module knows neither HTTP nor gRPC.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import io
import json
import math
import operator
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gsl_dist.errors import QueryError
from gsl_dist.hits import Effort, Hits

QUERY_TYPE, HITS_TYPE = "application/x-gsl-query", "application/x-gsl-hits"
FORMAT = 4
Lists = tuple[NDArray[np.int64], NDArray[np.float32]]
HIT_BYTES = 12
"""What one hit takes: an int64 id and a float32 distance."""

# Both headers are whole multiples of eight bytes, so that the arrays behind them are aligned.
_QUERY_HEAD = struct.Struct("<4sB3xIIIIIIIffI")
_HITS_HEAD = struct.Struct("<4sBxHIIIIII")
_LARGEST = 2**32 - 1
# Message.header, DictionaryBatch.data and RecordBatch.compression in the schemas of Arrow's messages.
_HEADER_SLOT, _BATCH_SLOT, _COMPRESSION_SLOT = 2, 1, 3
_PLACE, _OFFSET, _SHORT = struct.Struct("<I"), struct.Struct("<i"), struct.Struct("<H")
_ROWS_AT, _PATIENCE_AT = 8, _QUERY_HEAD.size - 4

QUERY_HEAD_BYTES = _QUERY_HEAD.size


def pack_query(
    queries: NDArray[np.float32], effort: Effort, probed: Lists | None = None, patience_s: float | None = None
) -> bytes:
    """Write queries and the effort to search them with; what is left open is for the server to choose.

    Shapes: queries (Q, D) float32; probed, lists and their distances, (Q, P) each.
    Raises:
        QueryError: a count is no whole number above zero, recall is no share, or the filter is nothing that JSON knows.
    """
    counted = zip(Effort._fields[:3], effort[:3], strict=True)
    asked = [0 if value is None else _count(name, value) for name, value in counted]
    where = b"" if effort.where is None else _write_where(effort.where)
    lists, distances = probed if probed is not None else (np.empty((0, 0)), np.empty((0, 0)))
    within = math.nan if effort.within is None else check_number("within", effort.within)
    patience_ms = 0 if patience_s is None else min(max(1, round(patience_s * 1e3)), _LARGEST)
    shape = len(queries), queries.shape[1], *asked, lists.shape[1], len(where)
    counts = *shape, check_share(effort.recall), within, patience_ms
    parts = [(queries, "<f4"), (lists, "<i4"), (distances, "<f4")]
    arrays = [np.ascontiguousarray(array, kind).tobytes() for array, kind in parts]
    return b"".join((_QUERY_HEAD.pack(b"GSLQ", FORMAT, *counts), *arrays, where))


def unpack_query(body: bytes) -> tuple[NDArray[np.float32], Effort, Lists | None]:
    """Read queries, the effort, and lists if any were named; queries are a read-only view of the body.

    Shapes: -> queries (Q, D) float32; lists (Q, P) int64 and their distances (Q, P) float32, or None.
    Raises:
        QueryError: another format, or a length that its header does not account for.
    """
    rows, dim, k, probes, refine, listed, where_bytes, recall, within, _ = _read_head(_QUERY_HEAD, b"GSLQ", body)
    lists_at = _QUERY_HEAD.size + 4 * rows * dim
    where_at = lists_at + 8 * rows * listed
    _expect_length(body, where_at + where_bytes)
    queries = np.frombuffer(body, "<f4", rows * dim, _QUERY_HEAD.size).reshape(rows, dim)
    where = _read_where(body[where_at:]) if where_bytes else None
    share, reach = _shorten(recall) if recall else None, None if math.isnan(within) else _shorten(within)
    effort = Effort(k, probes or None, refine or None, share, where, reach)
    if not listed:
        return queries, effort, None
    lists = np.frombuffer(body, "<i4", rows * listed, lists_at).reshape(rows, listed).astype(np.int64)
    distances = np.frombuffer(body, "<f4", rows * listed, lists_at + 4 * rows * listed).reshape(rows, listed)
    return queries, effort, (lists, distances)


def read_patience(body: bytes) -> float | None:
    """Give how many seconds whoever sent a query will wait, if they said so; the body was not checked."""
    if len(body) < _QUERY_HEAD.size:
        return None
    return int.from_bytes(body[_PATIENCE_AT : _PATIENCE_AT + 4], "little") / 1e3 or None


def tell_apart(body: bytes) -> bytes:
    """Give what must be alike in queries that can be searched as one: all of the header but rows and patience."""
    return body[:_ROWS_AT] + body[_ROWS_AT + 4 : _PATIENCE_AT]


def pack_hits(hits: Hits) -> bytes:
    """Write an answer."""
    name, missing = hits.version.encode(), "\n".join(hits.missing).encode()
    payload = b"" if hits.payload is None else pack_table(hits.payload)
    shares = hits.shards_answered, hits.shards_total, len(missing), len(payload)
    head = _HITS_HEAD.pack(b"GSLH", FORMAT, len(name), *hits.ids.shape, *shares)
    ids, distances = np.ascontiguousarray(hits.ids, "<i8"), np.ascontiguousarray(hits.distances, "<f4")
    return b"".join((head, ids.tobytes(), distances.tobytes(), name, missing, payload))


def unpack_hits(body: bytes) -> Hits:
    """Read an answer; its arrays are read-only views of the body.

    Raises:
        QueryError: another format, or a length that its header does not account for.
    """
    name_bytes, rows, k, answered, total, missing_bytes, payload_bytes = _read_head(_HITS_HEAD, b"GSLH", body)
    name_at = _HITS_HEAD.size + HIT_BYTES * rows * k
    missing_at = name_at + name_bytes
    payload_at = missing_at + missing_bytes
    _expect_length(body, payload_at + payload_bytes)
    ids = np.frombuffer(body, "<i8", rows * k, _HITS_HEAD.size).reshape(rows, k)
    distances = np.frombuffer(body, "<f4", rows * k, _HITS_HEAD.size + 8 * rows * k).reshape(rows, k)
    try:
        version = bytes(body[name_at:missing_at]).decode()
        missing = tuple(bytes(body[missing_at:payload_at]).decode().splitlines())
    except UnicodeDecodeError:
        raise QueryError("body", "a name", "it must be UTF-8") from None
    payload = unpack_table(body[payload_at:]) if payload_bytes else None
    return Hits(ids, distances, answered, total, version, missing, payload)


def pack_table(table: pa.Table) -> bytes:
    """Write a table as a stream of Arrow."""
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def unpack_table(body: bytes) -> pa.Table:
    """Read a stream of Arrow, and check that its buffers are what they say.

    Compressed streams are refused: some thousand bytes could stand for more than there is memory for.

    Raises:
        QueryError: it is none, or it is compressed.
    """
    try:
        is_compressed = any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(body))
        if not is_compressed:
            with pa.ipc.open_stream(body) as stream:
                table = stream.read_all()
            table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:
        raise QueryError("body", f"{len(body)} bytes", f"it must be a stream of Arrow ({error})") from None
    if is_compressed:
        raise QueryError("body", "compressed buffers", "it must be a stream of Arrow that is not compressed")
    return table


def _is_compressed(message: pa.Message) -> bool:
    """Tell whether the buffers of a message are compressed, which its metadata, a flatbuffer, says in one field."""
    if message.type not in ("record batch", "dictionary"):
        return False
    metadata = message.metadata.to_pybytes()
    (root,) = _PLACE.unpack_from(metadata)
    batch = _follow(metadata, root, _HEADER_SLOT)
    if message.type == "dictionary":
        batch = _follow(metadata, batch, _BATCH_SLOT)
    return _follow(metadata, batch, _COMPRESSION_SLOT) > 0


def _follow(metadata: bytes, table: int, slot: int) -> int:
    """Give where the table lies that a table of a flatbuffer refers to; 0 where it refers to none."""
    known = table - _OFFSET.unpack_from(metadata, table)[0]
    at, size = 4 + 2 * slot, _SHORT.unpack_from(metadata, known)[0]
    field = _SHORT.unpack_from(metadata, known + at)[0] if at < size else 0
    return table + field + _PLACE.unpack_from(metadata, table + field)[0] if field else 0


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


def check_number(field: str, value: Any) -> float:
    """Give a number that is finite, also as a float32.

    Raises:
        QueryError: it is none.
    """
    is_number = isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= float(np.finfo(np.float32).max):
        raise QueryError(field, value, "it must be a finite number")
    return float(value)


def _shorten(value: float) -> float:
    # As few digits as tell a float32 from its neighbours: .95 comes back as .95.
    return float(str(np.float32(value)))


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
