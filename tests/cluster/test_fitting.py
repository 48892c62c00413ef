"""The codebook stage with many cells: workers, progress, rejected rows, and what is refused before anything starts."""

import numpy as np
import pytest
from corpora import write_vectors

from gsl_dist.cluster import codebook as stage
from gsl_dist.cluster import coordinator
from gsl_dist.cluster.codebook import CodebookConfig, load_codebook, run_codebook
from gsl_dist.config import check_config
from gsl_dist.data.corpus import Batch, Reject
from gsl_dist.errors import ConfigError, DataError

LLOYD = {"iterations": 4, "batch_share": 0.5, "cell_search": {"two_level": True}}


def settings(folder, name, *, cells=40, **changes):
    tree = {
        "source": "fitted",
        "corpus": {"path": str(folder / "corpus.parquet"), "id_column": "id", "vector_column": "vector"},
        "quantizer": {"kind": "pq", "sub_vectors": 4, "bits": 3, "cells": cells},
        "lloyd": LLOYD,
        "output": str(folder / name),
    }
    return check_config(CodebookConfig, tree | changes)


@pytest.mark.ray
def test_two_workers_train_the_cells_that_one_does_and_the_driver_sees_every_iteration(ray_session, tmp_path):
    write_vectors(tmp_path / "corpus.parquet", rows=600)
    seen = []
    for workers in (1, 2):
        resources = {"workers": workers}
        run_codebook(settings(tmp_path, f"by-{workers}", resources=resources), lambda *drawn: seen.append(drawn))
    one, two = (load_codebook(str(tmp_path / f"by-{workers}")) for workers in (1, 2))
    np.testing.assert_allclose(one.coarse, two.coarse, atol=1e-5)
    np.testing.assert_allclose(one.books, two.books, atol=1e-5)
    once = [(phase, done, 4) for phase in ("cells", "books") for done in range(1, 5)]
    assert [drawn[:3] for drawn in seen if drawn[0] in ("cells", "books")] == 2 * once
    assert all("quantization error 0." in drawn[3] for drawn in seen if drawn[:2] == ("books", 4))


@pytest.mark.ray
def test_many_workers_whose_answers_are_joined_train_what_one_does(ray_session, tmp_path, monkeypatch):
    monkeypatch.setattr(coordinator, "FAN_IN", 2)
    write_vectors(tmp_path / "corpus.parquet", rows=600)
    for workers in (1, 5):
        run_codebook(settings(tmp_path, f"by-{workers}", resources={"workers": workers, "cpus": 0.5}))
    one, many = (load_codebook(str(tmp_path / f"by-{workers}")) for workers in (1, 5))
    np.testing.assert_allclose(one.coarse, many.coarse, atol=1e-5)
    np.testing.assert_allclose(one.books, many.books, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"cells": 601}, DataError, "got '600 rows', but the codebook needs at least 601"),
        ({"lloyd": {"sample_rows": 39}}, ConfigError, "lloyd.sample_rows: got 39, but the codebook needs 40 rows"),
    ],
)
def test_more_cells_than_rows_are_refused_before_anything_starts(changes, error, match, tmp_path, monkeypatch):
    write_vectors(tmp_path / "corpus.parquet", rows=600)
    monkeypatch.setattr(stage, "start_session", lambda cpus: pytest.fail("Ray was started"))
    with pytest.raises(error, match=match):
        run_codebook(settings(tmp_path, "codebook", **changes))


class Holey:
    """A corpus of the numbers of its rows, some of which cannot be read."""

    rows, item_shape = 20_000, (1,)

    def take(self, rows):
        bad = rows % 7 == 3
        rejects = [Reject(int(row), "file", "broken") for row in rows[bad]]
        return Batch(rows[~bad], rows[~bad, None].astype(np.float32), rejects=rejects)


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_that_are_rejected_leave_the_others_their_numbers(workers, tmp_path, monkeypatch):
    write_vectors(tmp_path / "corpus.parquet", rows=600)
    config = settings(tmp_path, "codebook")
    monkeypatch.setattr(stage, "open_corpus", lambda _: Holey())
    parts = [stage._read_sample(config, rank, workers, 20_000) for rank in range(workers)]
    numbers = np.concatenate([rows.numbers_N for rows in parts])
    assert numbers.tolist() == [row for row in range(20_000) if row % 7 != 3]
    assert np.array_equal(numbers, np.concatenate([rows.x_ND[:, 0].numpy() for rows in parts]))
    assert {rows.total for rows in parts} == {20_000}
