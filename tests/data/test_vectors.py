"""Flat files of vectors are read by offset, and a damaged one is refused."""

import numpy as np
import pytest

from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import ArtefactError, DataError


def write_vecs(path, vectors):
    kind = {"fvecs": "<f4", "bvecs": "u1"}[path.suffix[1:]]
    with open(path, "wb") as stream:
        for vector in vectors:
            stream.write(np.int32(len(vector)).tobytes() + np.asarray(vector, kind).tobytes())


def write_any(path, vectors):
    np.save(path, vectors) if path.suffix == ".npy" else write_vecs(path, vectors)


@pytest.mark.parametrize(
    "suffix,dtype", [("npy", "f2"), ("npy", "f4"), ("npy", "f8"), ("fvecs", "f4"), ("bvecs", "u1")]
)
def test_every_format_gives_the_rows_it_holds(tmp_path, suffix, dtype):
    vectors = np.random.default_rng(0).integers(0, 200, (20, 5)).astype(dtype)
    write_any(tmp_path / f"a.{suffix}", vectors[:13])
    write_any(tmp_path / f"b.{suffix}", vectors[13:])
    corpus = open_corpus(CorpusConfig(path=str(tmp_path)))
    assert (corpus.rows, corpus.kind, corpus.item_shape) == (20, "vectors", (5,))
    rows = np.array([0, 5, 12, 13, 19])
    np.testing.assert_array_equal(corpus.read_all().items, vectors.astype(np.float32))
    np.testing.assert_array_equal(corpus.take(rows).items, vectors[rows].astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([b.ids for b in corpus.read(11, 16, batch_rows=2)]), range(11, 16))


@pytest.mark.parametrize("name", ["a.npy", "a.fvecs", "a.bvecs"])
@pytest.mark.parametrize("cut", [-1, 3, 0])
def test_truncated_file_is_refused(tmp_path, name, cut):
    write_any(tmp_path / name, np.ones((4, 3), np.float32))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:cut])
    with pytest.raises((ArtefactError, DataError)):
        open_corpus(CorpusConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.npy", "a.fvecs"])
def test_garbage_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff" * 100)
    with pytest.raises((ArtefactError, DataError), match="a"):
        open_corpus(CorpusConfig(path=str(tmp_path)))


def test_files_of_one_folder_must_have_one_dimension(tmp_path):
    write_vecs(tmp_path / "a.fvecs", np.ones((2, 3)))
    write_vecs(tmp_path / "b.fvecs", np.ones((2, 4)))
    with pytest.raises(DataError):
        open_corpus(CorpusConfig(path=str(tmp_path)))


def test_row_of_another_length_is_refused(tmp_path):
    write_vecs(tmp_path / "a.fvecs", [[1, 2, 3], [1, 2, 3]])
    content = bytearray((tmp_path / "a.fvecs").read_bytes())
    content[16:20] = np.int32(2).tobytes()
    (tmp_path / "a.fvecs").write_bytes(bytes(content))
    with pytest.raises(DataError, match="row 1"):
        open_corpus(CorpusConfig(path=str(tmp_path))).read_all()


@pytest.mark.parametrize("array", [np.ones(5, np.float32), np.ones((2, 2, 2), np.float32), np.ones((2, 2), complex)])
def test_npy_that_holds_no_rows_of_numbers_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError):
        open_corpus(CorpusConfig(path=str(tmp_path)))


def test_pickled_npy_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises((ArtefactError, DataError)):
        open_corpus(CorpusConfig(path=str(tmp_path)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_number_that_is_not_finite_is_refused_with_its_row(tmp_path, bad):
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, bad]], np.float32))
    with pytest.raises(DataError, match="row 1"):
        open_corpus(CorpusConfig(path=str(tmp_path))).read_all()


def test_number_that_float32_cannot_hold_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 1e300]]))
    with pytest.raises(DataError, match="row 1"):
        open_corpus(CorpusConfig(path=str(tmp_path))).read_all()


def test_columns_of_a_file_without_columns_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 2), np.float32))
    with pytest.raises(DataError, match="id_column"):
        open_corpus(CorpusConfig(path=str(tmp_path), id_column="id"))
