"""Rows with one id: what is left out, against a loop over all rows."""

import numpy as np
import pytest

pytest.importorskip("faiss")
from worlds import make_codebook, make_rows, write_codes

from gsl_dist.errors import DataError
from gsl_dist.index.repeats import find_repeats, group_files
from gsl_dist.index.stream import Survey

every_room = pytest.mark.parametrize("room", [200, 5_000, 1 << 24])


def write_ids(place, ids, *, files=3):
    codebook = make_codebook()
    _, lists, codes = make_rows(codebook, len(ids))
    return write_codes(place, codebook, (np.asarray(ids, np.int64), lists, codes), files=files)


def drop_in_loops(ids, duplicates):
    kept = {}
    for row, item in enumerate(ids.tolist()):
        if duplicates == "last" or item not in kept:
            kept[item] = row
    return sorted(set(range(len(ids))) - set(kept.values()))


@every_room
@pytest.mark.parametrize("duplicates", ["first", "last"])
@pytest.mark.parametrize("span", [3, 100, 10**15])
def test_of_rows_with_one_id_the_first_or_last_stays(tmp_path, duplicates, span, room):
    ids = np.random.default_rng(span).integers(span, size=301)
    pieces = write_ids(tmp_path, ids)
    found = find_repeats(str(tmp_path / "codes"), pieces, duplicates, room)
    edges = np.cumsum([0, *(piece.rows for piece in pieces)])
    rows = [row + edge for rows, edge in zip(found, edges, strict=False) for row in rows.tolist()]
    assert rows == drop_in_loops(ids, duplicates)
    assert (len(rows) > 0) == (span <= 100)


@every_room
@pytest.mark.parametrize("twice", [(4, 5), (4, 290)])
def test_an_id_that_occurs_twice_is_refused_and_named(tmp_path, room, twice):
    ids = np.random.default_rng(0).permutation(10**6)[:300]
    pieces = write_ids(tmp_path, ids)
    assert [len(rows) for rows in find_repeats(str(tmp_path / "codes"), pieces, "refuse", room)] == [0, 0, 0]
    ids[twice[1]] = ids[twice[0]]
    pieces = write_ids(tmp_path, ids)
    with pytest.raises(DataError, match=f"id: got {ids[twice[0]]}, but each id may occur once"):
        find_repeats(str(tmp_path / "codes"), pieces, "refuse", room)


@pytest.mark.parametrize("duplicates", ["refuse", "first", "last"])
def test_a_negative_id_is_refused(tmp_path, duplicates):
    pieces = write_ids(tmp_path, [5, 3, -1, 8])
    with pytest.raises(DataError, match="id: got -1, but ids are 0 or more"):
        find_repeats(str(tmp_path / "codes"), pieces, duplicates, 1 << 20)


def test_files_are_compared_only_where_their_ids_overlap():
    ends = [(50, 60), (0, 9), (0, -1), (55, 70), (70, 80), (10, 20)]
    surveys = [Survey(f"{n}", 0 if last < first else 9, first, last) for n, (first, last) in enumerate(ends)]
    assert group_files(surveys) == [[1], [5], [0, 3, 4]]
    assert group_files([]) == []
