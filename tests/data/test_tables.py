"""Tables give the rows they hold, and name the column and the row of what no index can use."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import ArtefactError, DataError

VECTORS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def read_table(tmp_path, columns, **config):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    return open_corpus(CorpusConfig(path=str(tmp_path / "a.parquet"), **({"vector_column": "v"} | config))).read_all()


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("make", [lambda k: pa.list_(k, 2), pa.list_, pa.large_list])
def test_every_kind_of_float_list_is_read(tmp_path, kind, make):
    column = pa.array(np.array(VECTORS).tolist(), make(pa.float64())).cast(make(kind))
    np.testing.assert_array_equal(read_table(tmp_path, {"v": column}).items, np.array(VECTORS, np.float32))


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_files_and_streams_equal_parquet(tmp_path, writer):
    table = pa.table({"v": pa.array(VECTORS * 5), "id": range(15)})
    with writer(str(tmp_path / "a.arrow"), table.schema) as sink:
        sink.write_table(table, max_chunksize=4)
    corpus = open_corpus(CorpusConfig(path=str(tmp_path), vector_column="v", id_column="id"))
    assert corpus.rows == 15
    np.testing.assert_array_equal(corpus.read_all().items, VECTORS * 5)
    np.testing.assert_array_equal(corpus.take(np.array([1, 3, 4, 14])).ids, [1, 3, 4, 14])


def test_string_labels_index_their_sorted_names(tmp_path):
    pq.write_table(pa.table({"v": VECTORS, "y": ["pear", "apple", "pear"]}), tmp_path / "a.parquet")
    corpus = open_corpus(CorpusConfig(path=str(tmp_path), vector_column="v", label_column="y"))
    assert corpus.label_names == ["apple", "pear"]
    assert corpus.read_all().labels.tolist() == [1, 0, 1]


def test_without_id_column_the_row_number_is_the_id(tmp_path):
    assert read_table(tmp_path, {"v": VECTORS}).ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("ids", [[1, -2, 3], [1, None, 3], [1.0, 2.0, 3.5], ["a", "b", "c"]])
def test_ids_that_are_no_whole_numbers_from_zero_are_refused(tmp_path, ids):
    with pytest.raises(DataError, match="id"):
        read_table(tmp_path, {"v": VECTORS, "id": ids}, id_column="id")


def test_ids_beyond_int64_are_refused(tmp_path):
    with pytest.raises(DataError, match="int64"):
        read_table(tmp_path, {"v": VECTORS, "id": pa.array([1, 2, 2**63], pa.uint64())}, id_column="id")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_number_that_is_not_finite_is_refused_with_its_row(tmp_path, bad):
    with pytest.raises(DataError, match="row 1"):
        read_table(tmp_path, {"v": [[1.0, 2.0], [3.0, bad], [5.0, 6.0]]})


def test_null_vector_is_refused_with_its_row(tmp_path):
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2)):
        with pytest.raises(DataError, match="row 1"):
            read_table(tmp_path, {"v": pa.array([[1, 2], None, [5, 6]], kind)})


def test_ragged_lists_are_refused(tmp_path):
    with pytest.raises(DataError, match="row 2"):
        read_table(tmp_path, {"v": [[1.0, 2.0], [3.0, 4.0], [5.0]]})


def test_width_that_changes_between_row_groups_is_refused(tmp_path):
    pq.write_table(pa.table({"v": [[1.0, 2.0], [1.0]]}), tmp_path / "a.parquet", row_group_size=1)
    with pytest.raises(DataError, match="row 1"):
        open_corpus(CorpusConfig(path=str(tmp_path), vector_column="v")).read_all()


def test_files_of_one_folder_must_have_one_dimension(tmp_path):
    for dim in (2, 3):
        pq.write_table(
            pa.table({"v": pa.array([[0.0] * dim], pa.list_(pa.float32(), dim))}), tmp_path / f"{dim}.parquet"
        )
    with pytest.raises(DataError):
        open_corpus(CorpusConfig(path=str(tmp_path), vector_column="v")).read_all()


@pytest.mark.parametrize("role", ["id_column", "vector_column", "label_column", "payload_columns"])
def test_missing_column_is_named_with_those_that_exist(tmp_path, role):
    with pytest.raises(DataError, match=r"(?s)nope.*other"):
        read_table(tmp_path, {"v": VECTORS, "other": [1, 2, 3]}, **{role: ["nope"] if role.startswith("p") else "nope"})


def test_table_without_item_column_lists_what_there_is(tmp_path):
    with pytest.raises(DataError, match="vector_column"):
        read_table(tmp_path, {"v": VECTORS}, vector_column=None)


def test_null_label_is_refused(tmp_path):
    with pytest.raises(DataError, match="null"):
        read_table(tmp_path, {"v": VECTORS, "y": [1, None, 2]}, label_column="y")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_garbage_is_one_clear_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ArtefactError, DataError)) as caught:
        open_corpus(CorpusConfig(path=str(tmp_path), vector_column="v"))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_parquet_is_one_clear_error(tmp_path):
    pq.write_table(pa.table({"v": VECTORS}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises((ArtefactError, DataError), match=r"a\.parquet"):
        open_corpus(CorpusConfig(path=str(tmp_path), vector_column="v"))
