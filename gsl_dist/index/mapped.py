"""Files of arrays that are mapped into memory, not read: what lies in them costs memory only where it is looked at.

They are safetensors files, whose own library would read them whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

_NAMES = {"I64": np.int64, "U8": np.uint8, "I8": np.int8, "F16": np.float16, "F32": np.float32}


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


def _map_array(path: Path, begin: int, entry: dict[str, Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    (start, stop), shape = entry["data_offsets"], tuple(entry["shape"])
    if _NAMES.get(entry["dtype"]) != dtype or stop - start != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise ValueError("an array is not what the header says")
    if start == stop:
        return np.empty(shape, dtype)
    # A plain view: memmap's own class would only be in the way.
    return np.asarray(np.memmap(path, dtype, "r", begin + start, shape)).view()
