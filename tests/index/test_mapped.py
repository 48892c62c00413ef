"""Files of arrays: mapped as they were written, and refused where header and file disagree."""

import json
import mmap
import random

import numpy as np
import pytest
from safetensors.numpy import load_file

from gsl_dist.index.mapped import ArrayFile, map_arrays, write_arrays

ARRAYS = {
    "long": np.arange(7),
    "bytes": np.arange(15, dtype=np.uint8).reshape(5, 3),
    "halves": np.linspace(0, 1, 6, dtype=np.float16).reshape(2, 3),
    "floats": np.linspace(-1, 1, 4, dtype=np.float32),
    "nothing": np.empty((0, 3), np.float32),
}
WANTED = {name: array.dtype for name, array in ARRAYS.items()}


@pytest.fixture
def path(tmp_path):
    write_arrays(tmp_path / "arrays", ARRAYS, {"made": "here"})
    return tmp_path / "arrays"


def test_arrays_and_marks_come_back_as_they_were(path):
    found, marks = map_arrays(path, WANTED)
    assert marks == {"made": "here"}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape


def test_the_safetensors_library_reads_the_same_file(path):
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_arrays_are_mapped_and_cannot_be_written(path):
    found = map_arrays(path, WANTED)[0]["bytes"]
    owner = found
    while getattr(owner, "base", None) is not None:
        owner = owner.base
    assert isinstance(owner, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_arrays_that_are_not_contiguous_are_written_by_value(tmp_path):
    turned = np.arange(12.0, dtype=np.float32).reshape(3, 4).T[::2]
    write_arrays(tmp_path / "turned", {"x": turned}, {})
    np.testing.assert_array_equal(map_arrays(tmp_path / "turned", {"x": np.float32})[0]["x"], turned)


@pytest.mark.parametrize("name, dtype", [("long", np.int8), ("floats", np.float16), ("absent", np.int64)])
def test_an_array_of_another_type_or_none_is_refused(path, name, dtype):
    with pytest.raises((ValueError, KeyError)):
        map_arrays(path, WANTED | {name: dtype})


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises((ValueError, KeyError, TypeError, OSError)):
            map_arrays(path, WANTED)


@pytest.mark.parametrize(
    "change", [{"shape": [4, 3]}, {"shape": [1 << 40, 1 << 40]}, {"data_offsets": [0, 1 << 40]}, {"dtype": "BF16"}]
)
def test_a_header_that_claims_what_is_not_there_is_refused(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["bytes"] |= change
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises((ValueError, OverflowError)):
        map_arrays(path, WANTED)


@pytest.mark.parametrize("marks", [{}, {"made": "here"}])
def test_a_file_written_in_parts_ends_with_the_same_bytes(tmp_path, marks):
    write_arrays(tmp_path / "whole", ARRAYS, marks)
    parts = [(name, row, array[row : row + 2]) for name, array in ARRAYS.items() for row in range(0, len(array), 2)]
    random.shuffle(parts)
    with ArrayFile(tmp_path / "parts", {name: (a.dtype, a.shape) for name, a in ARRAYS.items()}, marks) as file:
        for part in parts:
            file.put(*part)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()
