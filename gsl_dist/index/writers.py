"""Files of shards, written list after list: the bytes that writing the whole from memory gives, without having it.

Faiss writes everything but the lists of an empty index, and we the lists behind that: how many rows each has, then for
each list its codes and its ids. The arrays of a `vlq` shard are written where they belong in their file. A writer is
told beforehand how many rows lie in each list, and then takes the rows in the order of the file. Lists of blocks alone
are held until they are whole.
"""

# Shapes: N rows, R lists

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from gsl_dist.codebook import CodeArray, Codebook, IdArray
from gsl_dist.index.blocks import append_rows, open_blocks
from gsl_dist.index.mapped import ArrayFile
from gsl_dist.index.shards import CoarseSearch, CodeLayout, create_shard, write_shard
from gsl_dist.index.vlq import describe_arrays, measure_squares, pick_rows

_BUFFER_BYTES = 1 << 20


class ListWriter(Protocol):
    """A file of lists that is being written."""

    def __enter__(self) -> ListWriter:
        """Begin the file."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the file."""

    def put(self, lists_N: IdArray, ids_N: IdArray, codes: CodeArray) -> None:
        """Write the next rows.

        Shapes: (N,) ascending, (N,), (N, code_bytes).
        """


class FaissWriter:
    """Writes what `gsl_dist.index.shards.write_shard` writes of filled lists.

    Args:
        path: the file.
        codebook: of the codes.
        sizes_R: the rows of each list.
        coarse_search: how a query finds its cells.
    """

    def __init__(self, path: Path, codebook: Codebook, sizes_R: IdArray, coarse_search: CoarseSearch) -> None:
        self._path, self._codebook, self._sizes_R, self._coarse = path, codebook, sizes_R, coarse_search
        self._offsets_R = np.concatenate([[0], np.cumsum(sizes_R)])
        self._row, self._begin = 0, 0

    def __enter__(self) -> FaissWriter:
        empty = create_shard(self._codebook, self._coarse)
        empty.ntotal = int(self._offsets_R[-1])
        write_shard(empty, self._codebook, self._path)
        none = np.zeros(len(self._sizes_R), np.int64)
        lists, head = (_describe_lists(sizes_R, self._codebook.code_bytes) for sizes_R in (self._sizes_R, none))
        self._stream = self._path.open("r+b", buffering=_BUFFER_BYTES)
        self._stream.seek(-len(head), 2)
        assert self._stream.read() == head, "faiss writes lists in another way than it used to"
        self._stream.seek(-len(head), 2)
        self._stream.write(lists)
        self._begin = self._stream.tell()
        self._at = self._begin
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def put(self, lists_N: IdArray, ids_N: IdArray, codes: CodeArray) -> None:
        """Write the next rows.

        Shapes: (N,) ascending, (N,), (N, code_bytes).
        """
        for number, start, stop in _find_runs(lists_N):
            self._put_list(number, self._row + start, ids_N[start:stop], codes[start:stop])
        self._row += len(lists_N)

    def _put_list(self, number: int, row: int, ids_n: IdArray, codes: CodeArray) -> None:
        first, size, width = int(self._offsets_R[number]), int(self._sizes_R[number]), codes.shape[1]
        begin = self._begin + first * (width + 8)
        self._write(begin + (row - first) * width, codes)
        self._write(begin + size * width + (row - first) * 8, ids_n)

    def _write(self, at: int, part: CodeArray | IdArray) -> None:
        # Asking a stream to go where it is would empty its buffer.
        if at != self._at:
            self._stream.seek(at)
        self._stream.write(part.data)
        self._at = at + part.nbytes


class LineWriter:
    """Writes what the lists of regions of `gsl_dist.index.vlq` write of themselves.

    Args:
        path: the file.
        codebook: of the codes.
        sizes_R: the rows of each region.
    """

    def __init__(self, path: Path, codebook: Codebook, sizes_R: IdArray) -> None:
        self._codebook, self._offsets_R = codebook, np.concatenate([[0], np.cumsum(sizes_R)])
        rows = int(self._offsets_R[-1])
        self._file = ArrayFile(path, describe_arrays(codebook, rows), {"fingerprint": codebook.fingerprint})
        # A product of matrices may round otherwise with more or fewer rows: they are measured by so many from the first
        # on, however they come.
        self._together, self._measured = pick_rows(codebook), 0
        self._waiting: list[tuple[IdArray, CodeArray]] = []
        self._rows, self._row = rows, 0

    def __enter__(self) -> LineWriter:
        self._file.__enter__()
        self._file.put("offsets", 0, self._offsets_R)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def put(self, lists_N: IdArray, ids_N: IdArray, codes: CodeArray) -> None:
        """Write the next rows.

        Shapes: (N,) ascending, (N,), (N, code_bytes).
        """
        self._file.put("ids", self._row, ids_N)
        self._file.put("codes", self._row, codes)
        self._row += len(ids_N)
        self._waiting.append((lists_N, codes))
        if self._row - self._measured >= self._together or self._row == self._rows:
            self._measure()

    def _measure(self) -> None:
        lists_N, codes = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        whole = len(lists_N) if self._row == self._rows else len(lists_N) // self._together * self._together
        squares_N = measure_squares(self._codebook, lists_N[:whole], codes[:whole])
        self._file.put("squares", self._measured, squares_N)
        self._waiting, self._measured = [(lists_N[whole:], codes[whole:])], self._measured + whole


class BlockWriter:
    """Fills lists of blocks in memory and lets faiss write them at the end: only it knows how rows lie in a block.

    Args:
        path: the file.
        codebook: of the codes.
        coarse_search: how a query finds its cells.
    """

    def __init__(self, path: Path, codebook: Codebook, coarse_search: CoarseSearch) -> None:
        self._path, self._codebook = path, codebook
        self._index = create_shard(codebook, coarse_search, "fastscan")

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            write_shard(self._index, self._codebook, self._path)

    def put(self, lists_N: IdArray, ids_N: IdArray, codes: CodeArray) -> None:
        """Put the next rows into their lists.

        Shapes: (N,) ascending, (N,), (N, code_bytes).
        """
        blocks = open_blocks(self._index)
        assert blocks, "made as blocks"
        for number, start, stop in _find_runs(lists_N):
            append_rows(blocks, number, ids_N[start:stop], codes[start:stop])
        self._index.ntotal += len(ids_N)


def open_writer(
    path: Path,
    codebook: Codebook,
    sizes_R: IdArray,
    coarse_search: CoarseSearch = "flat",
    code_layout: CodeLayout = "plain",
) -> ListWriter:
    """Give the writer of the file that a codebook's codes are searched in."""
    if codebook.kind == "vlq":
        return LineWriter(path, codebook, sizes_R)
    if code_layout == "fastscan":
        return BlockWriter(path, codebook, coarse_search)
    return FaissWriter(path, codebook, sizes_R, coarse_search)


def _find_runs(lists_N: IdArray) -> Iterator[tuple[int, int, int]]:
    """Yield each list of ascending ones, the first row that lies in it and the row behind its last."""
    starts = np.flatnonzero(np.r_[True, lists_N[1:] != lists_N[:-1]][: len(lists_N)])
    stops = np.r_[starts, len(lists_N)][1:]
    yield from zip(lists_N[starts].tolist(), starts.tolist(), stops.tolist(), strict=True)


def _describe_lists(sizes_R: IdArray, code_bytes: int) -> bytes:
    """Give what faiss writes before its lists: where half of them or more are empty, it names those that are not."""
    full = np.flatnonzero(sizes_R)
    if len(full) > len(sizes_R) // 2:
        form, numbers = b"full", sizes_R
    else:
        form, numbers = b"sprs", np.column_stack([full, sizes_R[full]]).ravel()
    head = b"ilar" + struct.pack("<QQ", len(sizes_R), code_bytes) + form
    return head + struct.pack("<Q", numbers.size) + numbers.astype("<u8").tobytes()
