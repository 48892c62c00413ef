import numpy as np
import pyarrow.parquet as pq
import pytest

from gsl_dist.hits import FAR, Hits
from gsl_dist.index.answers import drop_own, make_schema, make_table, read_pairs
from gsl_dist.storage import Folder

IDS = np.array([[7, 3, 9], [4, -1, -1], [-1, -1, -1]])
FARS = np.array([[0.5, 1, 2], [3, FAR, FAR], [FAR, FAR, FAR]], np.float32)
ASKED = np.array([10, 20, 30])
PAIRS = [(10, 7), (10, 3), (10, 9), (20, 4)]


def make_hits():
    return Hits(IDS.copy(), FARS.copy(), 1, 1)


def test_lists_hold_every_query_and_rows_every_hit():
    lists, rows = (make_table(ASKED, make_hits(), form) for form in ("lists", "rows"))
    assert lists.schema == make_schema("lists", 3) and rows.schema == make_schema("rows", 3)
    assert lists.to_pydict() == {"query_id": ASKED.tolist(), "ids": IDS.tolist(), "distances": FARS.tolist()}
    assert list(zip(rows["query_id"].to_pylist(), rows["id"].to_pylist(), strict=True)) == PAIRS
    assert rows["rank"].to_pylist() == [1, 2, 3, 1] and rows["distance"].to_pylist() == [0.5, 1, 2, 3]


@pytest.mark.parametrize("form", ["lists", "rows"])
def test_pairs_are_read_back_from_either_form(tmp_path, monkeypatch, form):
    monkeypatch.setattr("gsl_dist.index.answers._READ_ROWS", 2)
    pq.write_table(make_table(ASKED, make_hits(), form), tmp_path / "answers.parquet", row_group_size=1)
    pairs = [np.column_stack(found) for found in read_pairs(Folder(tmp_path), "answers.parquet", form)]
    assert np.concatenate(pairs).tolist() == [list(pair) for pair in PAIRS]


def test_the_item_itself_is_left_out_wherever_it_stands():
    found = drop_own(np.array([3, 8, 30]), make_hits(), 2)
    assert found.ids.tolist() == [[7, 9], [4, -1], [-1, -1]]
    np.testing.assert_array_equal(found.distances, np.array([[0.5, 2], [3, FAR], [FAR, FAR]], np.float32))
