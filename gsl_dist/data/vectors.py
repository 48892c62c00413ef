"""Vectors in flat files: npy, and the fvecs, bvecs and ivecs of the ANN benchmarks.

Each is a row of equal records behind a header, so that any row is found by its offset. Local files are memory-mapped;
of remote ones, runs of rows are read. In fvecs, bvecs and ivecs every record begins with its own length as an int32,
which is compared with the first one whenever a row is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsl_dist.data.source import (
    CorpusConfig,
    Format,
    Raw,
    Rows,
    Source,
    SourceFile,
    readable,
    refuse_settings,
    spread_rows,
)
from gsl_dist.errors import ArtefactError, DataError
from gsl_dist.storage import Folder, split_location

_ELEMENTS: dict[str, np.dtype[Any]] = {"fvecs": np.dtype("<f4"), "bvecs": np.dtype("u1"), "ivecs": np.dtype("<i4")}
_LARGEST_DIM = 1 << 20
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class FlatFile:
    """A file of equal records.

    Args:
        record: the layout of one row; its field `vector` holds the numbers, `dim` (if any) their count.
        offset: where the first record begins.
    """

    folder: Folder
    name: str
    record: np.dtype[Any]
    offset: int
    rows: int

    @property
    def dim(self) -> int:
        """Give D, the length of a vector."""
        return int(self.record["vector"].shape[0])

    def take(self, rows: Rows) -> NDArray[Any]:
        """Give the rows with these numbers, which never fall, in their stored type.

        Raises:
            DataError: a record says that it has another length.
        """
        records = self._map()[rows] if self.folder.is_local else self._fetch(rows)
        if "dim" in (records.dtype.names or ()):
            wrong = np.flatnonzero(records["dim"] != self.dim)
            if len(wrong):
                row, dim = int(rows[wrong[0]]), int(records["dim"][wrong[0]])
                raise DataError("corpus", f"{dim} dims in row {row} of {self.name}", f"the first has {self.dim}")
        vectors: NDArray[Any] = records["vector"]
        return vectors

    def _map(self) -> NDArray[Any]:
        with readable(self.folder.path(self.name), "vector"), self.folder.local(self.name) as path:
            return np.memmap(path, dtype=self.record, mode="r", offset=self.offset, shape=(self.rows,))

    def _fetch(self, rows: Rows) -> NDArray[Any]:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        parts = []
        with readable(self.folder.path(self.name), "vector"), self.folder.open(self.name) as stream:
            for run in runs:
                stream.seek(self.offset + int(run[0]) * self.record.itemsize)
                parts.append(np.frombuffer(stream.read(len(run) * self.record.itemsize), dtype=self.record))
        return np.concatenate(parts)


class VectorSource(Source):
    """The rows of npy, fvecs or bvecs files; the id of a row is its number."""

    def __init__(self, config: CorpusConfig, folder: Folder, files: list[SourceFile], kind: Format) -> None:
        refuse_settings(config, kind)
        self._files = [open_flat(folder, file.name, kind) for file in files]
        self.counts = [file.rows for file in self._files]
        self.rows = sum(self.counts)
        self.dim = self._files[0].dim
        for file in self._files:
            if file.dim != self.dim:
                wanted = f"{self._files[0].name} has {self.dim}, and all files must agree"
                raise DataError("corpus.path", f"{file.dim} dims in {file.name}", wanted)

    def take(self, rows: Rows, batch_rows: int) -> Iterator[Raw]:
        """Yield the rows with these numbers."""
        for number, inside in spread_rows(self.counts, rows):
            file, first = self._files[number], sum(self.counts[:number])
            for at in range(0, len(inside), batch_rows):
                some = inside[at : at + batch_rows]
                with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused later
                    vectors = np.array(file.take(some), dtype=np.float32, order="C")
                yield Raw(some + first, [file.name] * len(some), vectors, some + first)


def open_flat(folder: Folder, name: str, kind: str) -> FlatFile:
    """Read the header of a file and check that its length is what the header promises.

    Raises:
        ArtefactError: cut short, or not of this format.
        DataError: of this format, but not vectors.
    """
    size = folder.size(name)
    if kind == "npy":
        return _open_npy(folder, name, size)
    element = _ELEMENTS[kind]
    with readable(folder.path(name), kind), folder.open(name) as stream:
        head = stream.read(4)
    dim = int.from_bytes(head, "little", signed=True) if len(head) == 4 else 1
    if not 1 <= dim <= _LARGEST_DIM:
        raise ArtefactError(folder.path(name), f"it is not {kind}: it begins with {dim} dims, not 1 to {_LARGEST_DIM}")
    record = np.dtype([("dim", "<i4"), ("vector", element, (dim,))])
    if size % record.itemsize:
        reason = f"it has {size} bytes, which is no multiple of the {record.itemsize} of a {kind} row of {dim} dims"
        raise ArtefactError(folder.path(name), reason)
    return FlatFile(folder, name, record, 0, size // record.itemsize)


def read_vectors(location: str | os.PathLike[str]) -> NDArray[Any]:
    """Read a whole fvecs, bvecs, ivecs or npy file, in its stored type.

    Shapes: (N, D) float32, uint8 or int32; npy as stored.

    Raises:
        ArtefactError: absent, cut short, or not of the format that its name says.
        DataError: its name says none of these formats, or a row has another length than the first.
    """
    folder, name = split_location(os.fspath(location))
    file = open_flat(folder, name, _kind_of(name))
    if not file.rows:
        raise DataError("vectors", folder.path(name), "the file must hold at least one row")
    return np.ascontiguousarray(file.take(np.arange(file.rows, dtype=np.int64)))


def write_vectors(location: str | os.PathLike[str], vectors: NDArray[Any]) -> None:
    """Write vectors as fvecs, bvecs, ivecs or npy, whichever the name says; the file is whole or absent.

    Shapes: vectors (N, D).

    Raises:
        DataError: not two dims, another format, or numbers that the format cannot hold.
    """
    folder, name = split_location(os.fspath(location))
    kind = _kind_of(name)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise DataError("vectors", vectors.shape, "they must be an array of shape (N, D)")
    with folder.whole(name) as path:
        if kind == "npy":
            with open(path, "wb") as stream:  # np.save would add a suffix to the draft's name
                np.save(stream, np.ascontiguousarray(vectors), allow_pickle=False)
        else:
            _to_records(vectors, kind).tofile(path)


def _to_records(vectors: NDArray[Any], kind: str) -> NDArray[Any]:
    element = _ELEMENTS[kind]
    records = np.zeros(len(vectors), dtype=[("dim", "<i4"), ("vector", element, (vectors.shape[1],))])
    records["dim"] = vectors.shape[1]
    records["vector"] = vectors.astype(element)
    if kind != "fvecs" and not np.array_equal(records["vector"], vectors):
        raise DataError("vectors", str(vectors.dtype), f"{kind} holds {element.name} and would change these numbers")
    return records


def _open_npy(folder: Folder, name: str, size: int) -> FlatFile:
    path = folder.path(name)
    with readable(path, "npy"), folder.open(name) as stream:
        try:
            shape, fortran, dtype = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
        except (ValueError, KeyError, SyntaxError) as error:
            raise ArtefactError(path, f"it is not an npy file ({error})") from error
        offset = stream.tell()
    if len(shape) != 2 or not shape[1] or (fortran and min(shape) > 1):
        raise DataError("corpus.path", f"{name} of shape {shape}", "an npy file must hold rows (N, D) in C order")
    if dtype.kind != "f" and dtype not in (np.uint8, np.int8):
        raise DataError("corpus.path", f"{name} of {dtype}", "vectors must be float16, float32, float64, uint8 or int8")
    record = np.dtype([("vector", dtype, (shape[1],))])
    if size != offset + shape[0] * record.itemsize:
        promised = offset + shape[0] * record.itemsize
        raise ArtefactError(path, f"it has {size} bytes, but its header promises {promised} ({shape[0]} rows)")
    return FlatFile(folder, name, record, offset, shape[0])


def _kind_of(name: str) -> str:
    kind = name.rpartition(".")[2].lower()
    if kind not in (*_ELEMENTS, "npy"):
        raise DataError("vectors", name, f"its name must end in .{', .'.join((*_ELEMENTS, 'npy'))}")
    return kind
