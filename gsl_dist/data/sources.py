"""Where rows come from: a source a format, all with the same few members.

A source knows how many rows there are and gives any range of them as a `Chunk`, raw as they lie: it neither decodes
images nor checks values. Tables are read by row group and in small batches, never whole files.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gsl_dist.data.images import SUFFIXES
from gsl_dist.data.vectors import NpyFile, VecsFile
from gsl_dist.errors import DataError
from gsl_dist.storage import Folder


@dataclass(frozen=True)
class Chunk:
    """Some rows as they lie in the source: a table, a matrix of vectors, or files (name, class, content)."""

    start: int
    table: pa.Table | None = None
    vectors: NDArray[np.float32] | None = None
    files: list[tuple[str, str, bytes]] | None = None


class Source(Protocol):
    """Rows in order, readable by range."""

    rows: int
    names: list[str]

    def read(self, start: int, stop: int, batch_rows: int) -> Iterator[Chunk]:
        """Give rows [start, stop) in order, at most `batch_rows` at a time."""


class Parts:
    """Files one after another as one run of rows."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.ends = list(accumulate(counts))
        self.rows = self.ends[-1] if self.ends else 0

    def cut(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Give (part, its first row, its last row + 1, place of that first row in the whole)."""
        part = bisect.bisect_right(self.ends, start)
        while start < stop:
            before = self.ends[part - 1] if part else 0
            end = min(stop, self.ends[part])
            if end > start:
                yield part, start - before, end - before, start
            start, part = end, part + 1


class TableSource:
    """Parquet or Arrow files with the same columns."""

    def __init__(self, folder: Folder, names: list[str], kind: str, columns: list[str]) -> None:
        self._folder, self.names, self._kind, self._columns = folder, names, kind, columns
        self.schema, counts = self._open_all()
        self._parts = Parts(counts)
        self.rows = self._parts.rows
        self._refuse_missing()

    def read(self, start: int, stop: int, batch_rows: int) -> Iterator[Chunk]:
        """Give rows [start, stop) of the wanted columns as tables."""
        for part, first, last, place in self._parts.cut(start, stop):
            reader = self._read_parquet if self._kind == "parquet" else self._read_arrow
            for table in reader(self.names[part], first, last, batch_rows):
                yield Chunk(place, table=table)
                place += len(table)

    def _open_all(self) -> tuple[pa.Schema, list[int]]:
        schema, counts = None, []
        for name in self.names:
            try:
                found, rows = self._open(name)
            except (pa.ArrowException, OSError) as error:
                reason = f"it must be a whole {self._kind} file ({' '.join(str(error).split())})"
                raise DataError("corpus.path", self._folder.path(name), reason) from error
            wanted = [column for column in self._columns if column in found.names]
            if schema is not None and any(schema.field(c).type != found.field(c).type for c in wanted if c in schema.names):
                raise DataError("corpus.path", self._folder.path(name), "its columns differ in type from the file before")
            schema = found if schema is None else schema
            counts.append(rows)
        assert schema is not None
        return schema, counts

    def _open(self, name: str) -> tuple[pa.Schema, int]:
        if self._kind == "parquet":
            with self._folder.open(name) as stream:
                file = pq.ParquetFile(stream)
                return file.schema_arrow, file.metadata.num_rows
        with self._folder.open(name) as stream:
            reader = pa.ipc.open_file(stream)
            return reader.schema, sum(reader.get_batch(n).num_rows for n in range(reader.num_record_batches))

    def _refuse_missing(self) -> None:
        for column in self._columns:
            if column not in self.schema.names:
                known = ", ".join(self.schema.names)
                raise DataError("corpus", f"column {column}", f"there is no such column; {self.names[0]} has {known}")

    def _read_parquet(self, name: str, first: int, last: int, batch_rows: int) -> Iterator[pa.Table]:
        with self._folder.open(name) as stream:
            file = pq.ParquetFile(stream)
            groups = Parts([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)])
            for group, low, high, _ in groups.cut(first, last):
                at = 0
                for batch in file.iter_batches(batch_rows, row_groups=[group], columns=self._columns):
                    begin, end = max(low - at, 0), min(high - at, len(batch))
                    at += len(batch)
                    if begin < end:
                        yield pa.Table.from_batches([batch.slice(begin, end - begin)])
                    if at >= high:
                        break

    def _read_arrow(self, name: str, first: int, last: int, batch_rows: int) -> Iterator[pa.Table]:
        with self._folder.open(name) as stream:
            reader = pa.ipc.open_file(stream)
            sizes = Parts([reader.get_batch(n).num_rows for n in range(reader.num_record_batches)])
            for number, low, high, _ in sizes.cut(first, last):
                table = pa.Table.from_batches([reader.get_batch(number)]).select(self._columns)
                for start in range(low, high, batch_rows):
                    yield table.slice(start, min(batch_rows, high - start))


class VectorSource:
    """npy, fvecs or bvecs files of one width."""

    def __init__(self, folder: Folder, names: list[str], kind: str) -> None:
        opened: list[Any] = [NpyFile(folder, n) if kind == "npy" else VecsFile(folder, n, kind) for n in names]
        self.names, self._files, self.dim = names, opened, opened[0].dim
        for name, file in zip(names, opened, strict=True):
            if file.dim != self.dim:
                raise DataError("corpus.path", f"{name}: {file.dim} numbers a row", f"{names[0]} has {self.dim}")
        self._parts = Parts([file.rows for file in opened])
        self.rows = self._parts.rows

    def read(self, start: int, stop: int, batch_rows: int) -> Iterator[Chunk]:
        """Give rows [start, stop) as matrices."""
        for part, first, last, place in self._parts.cut(start, stop):
            for low in range(first, last, batch_rows):
                yield Chunk(place + low - first, vectors=self._files[part].read(low, min(last, low + batch_rows)))


class ImageSource:
    """Image files in a folder; the name of a sub-folder is the class of the images in it."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self.names = [name for name in folder.names() if name.lower().endswith(SUFFIXES)]
        for inner in folder.names(folders=True):
            found = folder.child(inner).names()
            self.names += [f"{inner}/{name}" for name in found if name.lower().endswith(SUFFIXES)]
        self.rows = len(self.names)
        self.classes = sorted({name.rpartition("/")[0] for name in self.names} - {""})

    def read(self, start: int, stop: int, batch_rows: int) -> Iterator[Chunk]:
        """Give rows [start, stop) as file contents."""
        for low in range(start, stop, batch_rows):
            names = self.names[low : min(stop, low + batch_rows)]
            yield Chunk(low, files=[(n, n.rpartition("/")[0], self._folder.read_bytes(n)) for n in names])
