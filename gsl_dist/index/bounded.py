"""Shards filled within a given memory: lists, vectors and payload, in as many passes over the codes as it takes.

`room_bytes` is what rows may take while they are held, whatever their number; libraries, the codebook and
`stream.READ_BYTES` come on top. Where the rows of a shard fit, one pass does. Otherwise rows are counted first, by
list, and each pass keeps those of the next lists; nothing is put aside on the disk. A list that does not fit by itself
is cut by id, and so are vectors and payload, which lie in the order of their ids: for these the ids are held, eight
bytes a row.

The room changes no byte of a file.
"""

# Shapes: N rows, n of them, D dims, R lists

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, Codebook, IdArray
from gsl_dist.index.mapped import ArrayFile
from gsl_dist.index.refine import Precision, Scale, describe_store, make_scale
from gsl_dist.index.shards import CoarseSearch, CodeLayout
from gsl_dist.index.stream import (
    ID_BYTES,
    OWN_COLUMNS,
    Portion,
    count_lists,
    read_bytes,
    read_halves,
    read_lists,
)
from gsl_dist.index.writers import ListWriter, open_writer

# Besides its code: the id, the list, the place in the order, and what sorting takes.
_SORTED_BYTES = 8 + 4 + 8 + 8
# A number of a vector as it is read and, two bytes becoming one, on its way.
_ROUNDED_BYTES = 2 + 3 * 4
_PUT_ROWS = 1 << 14
_PAYLOAD_ROWS = 1 << 14
# Rows of a payload are held as they came, picked in order, and once more in the writer.
_PAYLOAD_COPIES = 3


class Span(NamedTuple):
    """Rows `start` to `stop` of a shard: those of the lists from `first` to before `last`, with ids `low` to `high`."""

    start: int
    stop: int
    first: int
    last: int
    low: int = 0
    high: int = np.iinfo(np.int64).max


class Rows(NamedTuple):
    """Rows as they came, and the order in which they belong.

    Shapes: lists, ids, order (n,); codes (n, code_bytes).
    """

    lists_n: NDArray[np.int32]
    ids_n: IdArray
    codes: CodeArray
    order_n: NDArray[np.intp]

    def pour(self, writer: ListWriter) -> None:
        """Write the rows in order."""
        for start in range(0, len(self.order_n), _PUT_ROWS):
            some = self.order_n[start : start + _PUT_ROWS]
            writer.put(self.lists_n[some].astype(np.int64), self.ids_n[some], self.codes[some])


def write_lists(
    portion: Portion,
    codebook: Codebook,
    path: Path,
    room_bytes: int,
    coarse_search: CoarseSearch = "flat",
    code_layout: CodeLayout = "plain",
) -> None:
    """Write the file of a shard's lists; within a list rows are ordered by id.

    Raises:
        DataError: a row lies in a list that the codebook does not have.
    """
    most = max(1, room_bytes // (codebook.code_bytes + _SORTED_BYTES))
    if portion.rows <= most:
        rows = _gather_rows(portion, codebook, Span(0, portion.rows, 0, codebook.lists))
        sizes_R = np.bincount(rows.lists_n, minlength=codebook.lists)
        with open_writer(path, codebook, sizes_R, coarse_search, code_layout) as writer:
            rows.pour(writer)
        return
    sizes_R = count_lists(portion, codebook)
    with open_writer(path, codebook, sizes_R, coarse_search, code_layout) as writer:
        for span in plan_spans(portion, codebook, sizes_R, most):
            _gather_rows(portion, codebook, span).pour(writer)


def plan_spans(portion: Portion, codebook: Codebook, sizes_R: IdArray, most: int) -> Iterator[Span]:
    """Yield spans of at most so many rows that hold all rows of a shard, in the order of its lists."""
    offsets_R, first = np.concatenate([[0], np.cumsum(sizes_R)]), 0
    while offsets_R[first] < offsets_R[-1]:
        last = int(np.searchsorted(offsets_R, offsets_R[first] + most, "right")) - 1
        start = int(offsets_R[first])
        if offsets_R[last] > start:
            yield Span(start, int(offsets_R[last]), first, last)
        elif last == first:
            last = first + 1
            yield from _cut_list(portion, codebook, Span(start, int(offsets_R[last]), first, last), most)
        first = last


def hold_ids(portion: Portion) -> IdArray:
    """Give the ids of a shard in ascending order.

    Shapes: -> (N,) int64.
    """
    ids_N, filled = np.empty(portion.rows, np.int64), 0
    for batch in portion.stream(["id"], ID_BYTES):
        ids_N[filled : filled + batch.num_rows] = batch.column("id").to_numpy()
        filled += batch.num_rows
    assert filled == portion.rows, (filled, portion.rows)
    ids_N.sort()
    return ids_N


def write_vectors(
    portion: Portion, ids_N: IdArray, dim: int, path: Path, room_bytes: int, precision: Precision
) -> None:
    """Write the store of a shard's vectors.

    Args:
        portion: the shard.
        ids_N: its ids, ascending.
        dim: numbers of a vector.
        path: the file.
        room_bytes: what vectors may take while they are held, ids apart.
        precision: how exactly they are kept.
    """
    arrays, scale = describe_store(len(ids_N), dim, precision), _find_scale(portion, dim, precision)
    dtype = arrays["vectors"][0]
    most = max(1, room_bytes // (dim * np.dtype(dtype).itemsize))
    with ArrayFile(path, arrays, {}) as file:
        file.put("ids", 0, ids_N)
        file.put("low", 0, scale.low_D)
        file.put("step", 0, scale.step_D)
        for start in range(0, len(ids_N), most):
            some_n = ids_N[start : start + most]
            kept_nD = np.empty((len(some_n), dim), dtype)
            for batch in portion.stream(["id", "vector"], _ROUNDED_BYTES * dim):
                inside_n, places_n = _find_places(batch, some_n)
                kept_nD[places_n] = scale.round(read_halves(batch.column("vector"), dim)[inside_n])
            file.put("vectors", start, kept_nD)
            del kept_nD  # or it would still be there while the next is made


def write_payload(portion: Portion, ids_N: IdArray, path: Path, room_bytes: int) -> None:
    """Write the payload of a shard with the ids before it; one pass does where all of it fits.

    Args:
        portion: the shard, whose codes have a payload.
        ids_N: its ids, ascending.
        path: the file, Parquet.
        room_bytes: what payload may take while it is held, ids apart.
    """
    codes = portion.schema
    columns = name_payload(codes)
    schema = pa.schema([codes.field(name) for name in ["id", *columns]], metadata=codes.metadata)
    held, bytes_G = _weigh_payload(portion, ids_N, schema, room_bytes // _PAYLOAD_COPIES)
    with pq.ParquetWriter(path, schema) as writer:
        if held is not None:
            _write_sorted(pa.Table.from_batches(held, schema), writer)
            return
        for first, last in _share_groups(bytes_G, room_bytes // _PAYLOAD_COPIES):
            some_n = ids_N[first * _PAYLOAD_ROWS : last * _PAYLOAD_ROWS]
            found = [batch.take(pa.array(_find_places(batch, some_n)[0])) for batch in _read_rows(portion, schema)]
            _write_sorted(pa.Table.from_batches([batch for batch in found if len(batch)], schema), writer)
            del found


def name_payload(codes: pa.Schema) -> list[str]:
    """Give the columns of a file of codes that are payload."""
    return [name for name in codes.names if name not in OWN_COLUMNS]


def _gather_rows(portion: Portion, codebook: Codebook, span: Span) -> Rows:
    count, width = span.stop - span.start, codebook.code_bytes
    lists_n, ids_n, codes = np.empty(count, np.int32), np.empty(count, np.int64), np.empty((count, width), np.uint8)
    filled, everything = 0, count == portion.rows
    for batch in portion.stream(["id", "cell", "code"], width + 12):
        found = read_lists(batch, codebook), batch.column("id").to_numpy(), read_bytes(batch.column("code"), width)
        if not everything:
            inside = (
                (found[0] >= span.first) & (found[0] < span.last) & (found[1] >= span.low) & (found[1] <= span.high)
            )
            found = found[0][inside], found[1][inside], found[2][inside]
        some = slice(filled, filled + len(found[0]))
        lists_n[some], ids_n[some], codes[some] = found
        filled = some.stop
    assert filled == count, (filled, count)
    # Numbers of two bytes are sorted by counting.
    short = span.last - span.first <= 1 << 16
    order_n = np.lexsort((ids_n, (lists_n - span.first).astype(np.uint16) if short else lists_n))
    return Rows(lists_n, ids_n, codes, order_n)


def _cut_list(portion: Portion, codebook: Codebook, span: Span, most: int) -> Iterator[Span]:
    """Yield parts of one long list, by the ids that they begin and end with."""
    ids_n, filled = np.empty(span.stop - span.start, np.int64), 0
    for batch in portion.stream(["id", "cell"], 12):
        some = batch.column("id").to_numpy()[read_lists(batch, codebook) == span.first]
        ids_n[filled : filled + len(some)] = some
        filled += len(some)
    ids_n.sort()
    lows, highs = ids_n[::most].tolist(), [*ids_n[most - 1 :: most].tolist(), int(ids_n[-1])]
    del ids_n
    for part, low in enumerate(lows):
        start = span.start + part * most
        yield Span(start, min(start + most, span.stop), span.first, span.last, low, highs[part])


def _find_places(batch: pa.RecordBatch, some_n: IdArray) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Give which rows of a batch have an id among some that follow each other, and the places of those."""
    ids = batch.column("id").to_numpy()
    inside = np.flatnonzero((ids >= some_n[0]) & (ids <= some_n[-1]))
    return inside, np.searchsorted(some_n, ids[inside])


def _find_scale(portion: Portion, dim: int, precision: Precision) -> Scale:
    """Give the scale of a shard's vectors; only bytes need to have seen them."""
    low_D, high_D = np.full(dim, np.inf, np.float32), np.full(dim, -np.inf, np.float32)
    if precision == "float16" or portion.rows == 0:
        return make_scale(np.zeros(dim, np.float32), np.zeros(dim, np.float32), precision)
    for batch in portion.stream(["vector"], _ROUNDED_BYTES * dim):
        if batch.num_rows:
            x_ND = read_halves(batch.column("vector"), dim).astype(np.float32)
            low_D, high_D = np.minimum(low_D, x_ND.min(0)), np.maximum(high_D, x_ND.max(0))
    return make_scale(low_D, high_D, precision)


def _read_rows(portion: Portion, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for batch in portion.stream(schema.names, 1 << 10):
        yield batch.select(schema.names)


def _weigh_payload(
    portion: Portion, ids_N: IdArray, schema: pa.Schema, most_bytes: int
) -> tuple[list[pa.RecordBatch] | None, NDArray[np.float64]]:
    """Give the payload where it fits, and what each group of rows in the file will take."""
    held: list[pa.RecordBatch] | None = []
    bytes_G = np.zeros(-(-len(ids_N) // _PAYLOAD_ROWS))
    for batch in _read_rows(portion, schema):
        if batch.num_rows:
            groups_n = np.searchsorted(ids_N, batch.column("id").to_numpy()) // _PAYLOAD_ROWS
            bytes_G += np.bincount(groups_n, minlength=len(bytes_G)) * (batch.nbytes / batch.num_rows)
        held = [*held, batch] if held is not None and bytes_G.sum() <= most_bytes else None
    return held, bytes_G


def _share_groups(bytes_G: NDArray[np.float64], most_bytes: int) -> Iterator[tuple[int, int]]:
    ends_G, first = np.cumsum(bytes_G), 0
    while first < len(bytes_G):
        before = ends_G[first] - bytes_G[first]
        last = max(first + 1, int(np.searchsorted(ends_G, before + most_bytes, "right")))
        yield first, last
        first = last


def _write_sorted(table: pa.Table, writer: pq.ParquetWriter) -> None:
    """Write rows by ascending id, each group from arrays in one piece: their pieces would show in the file."""
    order_n = np.argsort(table["id"].to_numpy())
    for start in range(0, len(order_n), _PAYLOAD_ROWS):
        writer.write_table(table.take(pa.array(order_n[start : start + _PAYLOAD_ROWS])).combine_chunks())
