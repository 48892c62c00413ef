"""Processes that end at once, under load, as `benchmarks/kills.py` has it: a few times each."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")
from worlds import make_index, make_queries

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import kills

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("besieged")
    make_index(folder)
    return str(folder)


def besiege(trial, folder, rounds):
    return kills.run_trial(trial, folder, make_queries(50), rounds, seed=0)


def test_with_copies_no_kill_of_a_replica_is_noticed(ray_session, folder):
    found = besiege("copies", folder, 2)
    assert found["kills"] == 4 and found["queries"] == found["whole"] > 50


def test_without_copies_no_answer_is_wrong_and_none_hides_that_it_is_partial(ray_session, folder):
    found = besiege("alone", folder, 2)
    assert found["kills"] >= 2 and found["wrong"] == found["broken"] == 0
    assert found["partial"] + found["refused"] > 0 and found["whole"] > 0


def test_every_acknowledged_write_is_there_after_everything_was_killed(ray_session, folder):
    found = besiege("writes", folder, 2)
    assert found["kills"] == 6 and found["acknowledged"] > 10 and found["lost"] == found["wrong"] == 0
