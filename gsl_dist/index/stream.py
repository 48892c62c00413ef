"""Codes on their way into a shard: streamed from Parquet, a batch of a row group at a time, never a file as a whole.

A shard of a version is a `Portion` of what was encoded: ranges of rows of one or more files of codes, and of those only
the rows in its own lists where shards are cut by cell. Whoever fills a shard streams its portion as often as his memory
asks for; nothing is kept between two passes. How many rows a batch has follows from how wide they are.
"""

# Shapes: N rows, D dims, R lists

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, Codebook, IdArray
from gsl_dist.data.tables import ParquetFile
from gsl_dist.errors import ArtefactError, DataError
from gsl_dist.storage import FileEntry, Folder

FINGERPRINT_KEY = b"gsl_codebook"
OWN_COLUMNS = ("id", "cell", "code", "vector")

ID_BYTES = 8
"""What a row takes as long as ids are held."""

READ_BYTES = 48 << 20
"""What streaming holds besides what is kept of it: a batch, and of each column its buffer and pages."""

_BATCH_BYTES, _BATCH_ROWS = 4 << 20, (1 << 10, 1 << 16)
_NONE: IdArray = np.empty(0, np.int64)


@dataclass(frozen=True)
class Piece:
    """Rows of one file of codes.

    Args:
        name: the file.
        start: its first row.
        stop: the row behind its last one.
        dropped: rows between them that are left out, ascending.
    """

    name: str
    start: int
    stop: int
    dropped: IdArray = field(default_factory=lambda: _NONE)

    @property
    def rows(self) -> int:
        """Give the number of rows."""
        return self.stop - self.start - len(self.dropped)


@dataclass(frozen=True)
class Portion:
    """The rows of one shard.

    Args:
        name: of the shard.
        location: the folder of codes.
        pieces: where they lie.
        rows: how many they are.
        own: which lists are the shard's; None: all.
    """

    name: str
    location: str
    pieces: tuple[Piece, ...]
    rows: int
    own: NDArray[np.bool_] | None = None

    @property
    def schema(self) -> pa.Schema:
        """Give the columns that every file of the codes has."""
        return ParquetFile(Folder(self.location), self.pieces[0].name).schema

    def stream(self, columns: Sequence[str], row_bytes: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows in the order of the corpus.

        Args:
            columns: those that are wanted; `cell` comes with them where shards are cut by cell.
            row_bytes: about how wide a row of them is.
        """
        read = list(dict.fromkeys([*columns, *(["cell"] if self.own is not None else [])]))
        batch_rows = int(np.clip(_BATCH_BYTES // max(1, row_bytes), *_BATCH_ROWS))
        for piece in self.pieces:
            for at, batch in _read_piece(self.location, piece, read, batch_rows):
                wanted_N = self._choose(piece, at, batch)
                yield batch if wanted_N.all() else batch.filter(pa.array(wanted_N))

    def _choose(self, piece: Piece, at: int, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        wanted_N = np.ones(batch.num_rows, bool) if self.own is None else self.own[batch.column("cell").to_numpy()]
        first, last = np.searchsorted(piece.dropped, (at, at + batch.num_rows))
        wanted_N[piece.dropped[first:last] - at] = False
        return wanted_N


@dataclass(frozen=True)
class Survey:
    """What is known of a file of codes before it is read for good; ids are 0 and -1 where it has no rows."""

    name: str
    rows: int
    first_id: int
    last_id: int


def survey_codes(location: str, entry: FileEntry, fingerprint: str) -> Survey:
    """Check a file of codes and give its rows and the range of its ids.

    Raises:
        ArtefactError: it is damaged, or its codes were written with another codebook.
    """
    folder = Folder(location)
    folder.check(entry)
    file = ParquetFile(folder, entry.name)
    written_with = (file.schema.metadata or {}).get(FINGERPRINT_KEY, b"none").decode()
    if written_with != fingerprint:
        raise ArtefactError(
            folder.path(entry.name),
            f"its codes were written with codebook {written_with}, but this one is {fingerprint}",
        )
    rows, ends = sum(file.counts), list[int]()
    whole = Portion(entry.name, location, (Piece(entry.name, 0, rows),), rows)
    for batch in whole.stream(["id"], 8):
        ids_N = batch.column("id").to_numpy()
        ends += [int(ids_N.min()), int(ids_N.max())] if len(ids_N) else []
    return Survey(entry.name, rows, min(ends, default=0), max(ends, default=-1))


def count_lists(portion: Portion, codebook: Codebook) -> IdArray:
    """Give how many rows of a portion lie in each list.

    Shapes: -> (R,) int64.
    Raises:
        DataError: a row lies in a list that the codebook does not have.
    """
    sizes_R = np.zeros(codebook.lists, np.int64)
    for batch in portion.stream(["cell"], 4):
        sizes_R += np.bincount(read_lists(batch, codebook), minlength=codebook.lists)
    return sizes_R


def read_lists(batch: pa.RecordBatch, codebook: Codebook) -> NDArray[np.int32]:
    """Give the lists that the rows of a batch lie in.

    Raises:
        DataError: one is none of the codebook's.
    """
    lists_N: NDArray[np.int32] = batch.column("cell").to_numpy()
    wrong = lists_N[(lists_N < 0) | (lists_N >= codebook.lists)]
    if len(wrong):
        name = "cells" if codebook.edge_count == 1 else "regions"
        raise DataError("cell", int(wrong[0]), f"{name} are 0 to {codebook.lists - 1}")
    return lists_N


def read_bytes(column: pa.Array, width: int) -> CodeArray:
    """Give a column of so many bytes a row as a matrix.

    Shapes: -> (N, width) uint8.
    """
    content = np.frombuffer(column.buffers()[-1], np.uint8, count=(column.offset + len(column)) * width)
    return content[column.offset * width :].reshape(-1, width)


def read_halves(column: pa.Array, dim: int) -> NDArray[np.float16]:
    """Give a column of vectors as a matrix.

    Shapes: -> (N, D) float16.
    """
    halves: NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False)
    return halves.reshape(-1, dim)


def _read_piece(
    location: str, piece: Piece, columns: list[str], batch_rows: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the rows of a piece, each batch with the number in the file of its first row."""
    file = ParquetFile(Folder(location), piece.name)
    edges = np.concatenate([[0], np.cumsum(file.counts)])
    groups = [n for n in range(len(file.counts)) if edges[n] < piece.stop and edges[n + 1] > piece.start]
    for at, batch in file.blocks(groups, columns, batch_rows):
        low, high = max(piece.start - at, 0), min(piece.stop - at, batch.num_rows)
        if low < high:
            yield at + low, batch.slice(low, high - low)
