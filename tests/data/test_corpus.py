"""A corpus reads the same rows however they are asked for, and says what is wrong with its files."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gsl_dist.data import Batch, CorpusConfig, fashion_folder, merge_batches, open_corpus, split_rows
from gsl_dist.errors import DataError


def make_tables(folder, counts=(7, 5, 11), dim=4, group=3):
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        vectors = pa.array(list(rng.normal(size=(count, dim)).astype(np.float32)), pa.list_(pa.float32(), dim))
        ids = np.arange(first, first + count) + 100
        table = pa.table({"id": ids, "v": vectors, "y": ids % 3, "note": [f"n{i}" for i in ids]})
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=group)
        first += count
    return CorpusConfig(path=str(folder), id_column="id", vector_column="v", label_column="y", payload_columns=["note"])


def assert_same(one, other):
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.payload == other.payload
    assert one.rejects == other.rejects


@pytest.mark.parametrize("parts", [1, 2, 5, 23])
@pytest.mark.parametrize("batch_rows", [1, 4, 1000])
def test_reading_any_split_of_the_rows_equals_reading_the_whole(tmp_path, parts, batch_rows):
    corpus = open_corpus(make_tables(tmp_path / "c"))
    pieces = [batch for a, b in split_rows(corpus.rows, parts) for batch in corpus.read(a, b, batch_rows=batch_rows)]
    assert all(len(piece) <= batch_rows for piece in pieces)
    assert_same(merge_batches(pieces), corpus.read_all())


def test_take_equals_indexing(tmp_path):
    corpus = open_corpus(make_tables(tmp_path / "c"))
    whole, rows = corpus.read_all(), np.array([0, 2, 3, 6, 7, 12, 22])
    taken = corpus.take(rows)
    np.testing.assert_array_equal(taken.items, whole.items[rows])
    np.testing.assert_array_equal(taken.ids, whole.ids[rows])
    np.testing.assert_array_equal(taken.labels, whole.labels[rows])
    assert taken.payload["note"].to_pylist() == [f"n{i}" for i in whole.ids[rows]]


def test_items_can_be_written_to(tmp_path):
    items = open_corpus(make_tables(tmp_path / "c")).read_all().items
    assert items.flags.writeable and items.flags.c_contiguous and items.dtype == np.float32


def test_only_the_row_groups_that_are_asked_for_are_read(tmp_path, monkeypatch):
    corpus = open_corpus(make_tables(tmp_path / "c", counts=(30,), group=5))
    seen, plain = [], pq.ParquetFile.iter_batches

    def spy(self, *args, **kwargs):
        seen.extend(kwargs["row_groups"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    list(corpus.read(11, 14))
    corpus.take(np.array([0, 29]))
    assert seen == [2, 0, 5]


@pytest.mark.parametrize("rows,parts", [(10, 3), (3, 10), (1, 1), (0, 4), (1000, 7)])
def test_ranges_cover_the_rows_and_none_is_empty(rows, parts):
    ranges = split_rows(rows, parts)
    assert [row for a, b in ranges for row in range(a, b)] == list(range(rows))
    sizes = [b - a for a, b in ranges]
    assert len(ranges) == min(rows, parts)
    assert not sizes or max(sizes) - min(sizes) <= 1 <= min(sizes)


def test_fingerprint_follows_config_and_files(tmp_path):
    config = make_tables(tmp_path / "c")
    first = open_corpus(config).fingerprint
    assert open_corpus(config).fingerprint == first
    assert open_corpus(config.model_copy(update={"normalize": True})).fingerprint != first
    os.utime(tmp_path / "c" / "part-1.parquet", ns=(1, 1))
    assert open_corpus(config).fingerprint != first


def test_vectors_are_normalized_when_asked(tmp_path):
    config = make_tables(tmp_path / "c").model_copy(update={"normalize": True})
    np.testing.assert_allclose(np.linalg.norm(open_corpus(config).read_all().items, axis=1), 1, rtol=1e-6)


def test_missing_path_and_empty_folder_are_refused(tmp_path):
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(DataError, match=r"corpus\.path"):
            open_corpus(CorpusConfig(path=str(path)))


def test_corpus_of_zero_rows_is_refused(tmp_path):
    pq.write_table(pa.table({"v": pa.array([], pa.list_(pa.float32(), 4))}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"at least one row"):
        open_corpus(CorpusConfig(path=str(tmp_path), vector_column="v"))


def test_folder_of_two_formats_asks_which(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    make_tables(tmp_path)
    with pytest.raises(DataError, match=r"corpus\.format"):
        open_corpus(CorpusConfig(path=str(tmp_path)))


@pytest.mark.parametrize("start,stop", [(-1, 2), (3, 2), (0, 24)])
def test_range_outside_the_corpus_is_refused(tmp_path, start, stop):
    with pytest.raises(DataError, match="23"):
        list(open_corpus(make_tables(tmp_path / "c")).read(start, stop))


def test_take_refuses_rows_that_are_unsorted_or_not_there(tmp_path):
    corpus = open_corpus(make_tables(tmp_path / "c"))
    for rows in ([3, 2], [-1], [23]):
        with pytest.raises(DataError, match="sorted"):
            corpus.take(np.array(rows))


def test_merging_no_batches_is_refused():
    with pytest.raises(DataError):
        merge_batches([])
    assert len(Batch(np.arange(3), np.zeros((3, 2)))) == 3


@pytest.mark.parametrize("name,rows", [("train", 4000), ("database", 7000), ("queries", 1000)])
def test_demo_set_is_balanced_and_readable(name, rows):
    path = fashion_folder() / f"{name}.parquet"
    assert path.stat().st_size < 5_000_000
    corpus = open_corpus(CorpusConfig(path=str(path), id_column="id", image_column="image", label_column="label"))
    assert corpus.rows == rows
    some = merge_batches(list(corpus.read(0, 200)))
    assert some.items.shape == (200, 32, 32, 3) and not some.rejects
    labels = pq.read_table(path, columns=["label"])["label"].to_numpy()
    assert np.bincount(labels).tolist() == [rows // 10] * 10


def test_demo_parts_share_no_image():
    ids = {
        n: set(pq.read_table(fashion_folder() / f"{n}.parquet")["id"].to_pylist())
        for n in ("train", "database", "queries")
    }
    assert not ids["train"] & ids["database"]
    assert max(ids["train"] | ids["database"]) < 60_000 <= min(ids["queries"])


@pytest.mark.parametrize("path", ["/", "//"])
def test_the_root_of_everything_is_no_corpus(path):
    with pytest.raises(DataError, match=r"corpus\.path: .* it must be a folder of its own"):
        open_corpus(CorpusConfig(path=path, vector_column="v"))
