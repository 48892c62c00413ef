"""Files of arrays that are mapped into memory, not read: what lies in them costs memory only where it is looked at.

They are safetensors files, whose own library would read them whole, and would have them whole to write them. An
`ArrayFile` is written in parts and ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

_NAMES = {"I64": np.int64, "U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}
_ALIGNED = 8


class ArrayFile:
    """A file of arrays that is written in parts, in any order.

    Args:
        path: the file.
        arrays: type and shape of each array.
        marks: what is to be known of them.
    """

    def __init__(self, path: Path, arrays: Mapping[str, tuple[Any, tuple[int, ...]]], marks: Mapping[str, str]) -> None:
        self._path, self._arrays = path, {name: (np.dtype(dtype), shape) for name, (dtype, shape) in arrays.items()}
        self._header, self._begins = _lay_out(self._arrays, marks)

    def __enter__(self) -> ArrayFile:
        self._stream = self._path.open("wb")
        self._stream.write(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def put(self, name: str, row: int, part: NDArray[Any]) -> None:
        """Write rows of an array, from a certain one on."""
        dtype, shape = self._arrays[name]
        assert part.shape[1:] == shape[1:] and part.dtype == dtype and row + len(part) <= shape[0], (name, part.shape)
        row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._stream.seek(self._begins[name] + row * row_bytes)
        self._stream.write(np.ascontiguousarray(part).data)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], marks: Mapping[str, str]) -> None:
    """Write arrays and what is to be known of them as one file."""
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path, metadata=dict(marks))


def map_arrays(path: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Map arrays of a file; numbers in its header are claims, and must agree with the file.

    Args:
        path: the file.
        wanted: the dtype of each array.

    Returns:
        the arrays, read-only, and the marks that were written with them.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: it is no such file, or not whole.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length < path.stat().st_size:
            raise ValueError("it has no header")
        header = json.loads(stream.read(length))
    marks = dict(header.pop("__metadata__", {}))
    return {name: _map_array(path, 8 + length, header[name], np.dtype(wanted[name])) for name in wanted}, marks


def _lay_out(
    arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], marks: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Give the header that the library would write, and where each array begins: the widest types first, by name."""
    called = {np.dtype(dtype): name for name, dtype in _NAMES.items()}
    header: dict[str, Any] = {"__metadata__": dict(marks)}
    at, starts = 0, {}
    for name, (dtype, shape) in sorted(arrays.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        starts[name], size = at, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": called[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    begins = {name: 8 + len(text) + start for name, start in starts.items()}
    return len(text).to_bytes(8, "little") + text, begins


def _map_array(path: Path, begin: int, entry: dict[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if _NAMES.get(entry["dtype"]) != dtype or stop - start != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError("an array is not what the header says")
    if start == stop:
        return np.empty(shape, dtype)
    # A plain view: memmap's own class would only be in the way.
    return np.asarray(np.memmap(path, dtype, "r", begin + start, shape)).view()
