"""Vectors in raw files: npy, and the fvecs and bvecs of the literature, read by place without loading the rest."""

# Shapes: N rows, D dims

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gsl_dist.errors import DataError
from gsl_dist.storage import Folder

_VECS = {"fvecs": np.dtype("<f4"), "bvecs": np.dtype("u1")}


class NpyFile:
    """A matrix in .npy format.

    Raises:
        DataError: not a C-ordered matrix of numbers, or shorter than its header says.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        with folder.open(name) as stream:
            self.dtype, shape, self._start = _read_npy_header(stream.read(4096), folder.path(name))
        self.rows, self.dim = shape
        size, wanted = folder.size(name), self._start + self.rows * self.dim * self.dtype.itemsize
        if size < wanted:
            raise DataError("corpus.path", folder.path(name), f"its header promises {wanted} bytes, it has {size}")

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Give rows [start, stop) as float32."""
        width = self.dim * self.dtype.itemsize
        with self._folder.open(self._name) as stream:
            stream.seek(self._start + start * width)
            rows = np.frombuffer(stream.read((stop - start) * width), self.dtype)
        return rows.reshape(-1, self.dim).astype(np.float32)


class VecsFile:
    """Rows that each begin with their length as an int32: fvecs (float32) or bvecs (bytes).

    Raises:
        DataError: empty, cut short, or rows of different lengths.
    """

    def __init__(self, folder: Folder, name: str, kind: str) -> None:
        self._folder, self._name, self._item = folder, name, _VECS[kind]
        size = folder.size(name)
        with folder.open(name) as stream:
            head = stream.read(4)
        self.dim = struct.unpack("<i", head)[0] if len(head) == 4 else 0
        self._width = 4 + self.dim * self._item.itemsize
        if self.dim <= 0 or size % self._width:
            raise DataError("corpus.path", folder.path(name), f"a {kind} file holds whole rows of one length each")
        self.rows = size // self._width

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Give rows [start, stop) as float32."""
        with self._folder.open(self._name) as stream:
            stream.seek(start * self._width)
            raw = np.frombuffer(stream.read((stop - start) * self._width), np.uint8).reshape(-1, self._width)
        lengths = raw[:, :4].copy().view("<i4")[:, 0]
        if (lengths != self.dim).any():
            row = start + int(np.argmax(lengths != self.dim))
            raise DataError("corpus.path", f"row {row} of {self._name}", f"every row must have {self.dim} numbers")
        return raw[:, 4:].copy().view(self._item).astype(np.float32)


def write_fvecs(path: Path, vectors: ArrayLike) -> None:
    """Write vectors as an fvecs file.

    Shapes: vectors (N, D).
    """
    matrix = np.asarray(vectors, dtype="<f4")
    lengths = np.full((len(matrix), 1), matrix.shape[1], "<i4").view("<f4")
    path.write_bytes(np.hstack([lengths, matrix]).tobytes())


def _read_npy_header(head: bytes, path: str) -> tuple[np.dtype[Any], tuple[int, int], int]:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
    except ValueError as error:
        raise DataError("corpus.path", path, f"it must be a .npy file ({error})") from error
    if len(shape) != 2 or fortran or dtype.kind not in "fiu" or 0 in shape[1:]:
        raise DataError("corpus.path", f"{path}: {dtype} {shape}", "it must be a C-ordered matrix of numbers, (rows, dim)")
    return dtype, shape, stream.tell()
