"""Work handed to Ray in tasks: in order, so many at once, again where a process was lost, and stopped by an error."""

import signal
import subprocess
import sys
import time

import pytest
from chores import double, fall_once, name_process, refuse

from gsl_dist.cluster.session import heard_interrupts, run_tasks
from gsl_dist.config import Resources
from gsl_dist.errors import DataError

pytestmark = pytest.mark.ray
SMALL = Resources(cpus=0.5)


def test_results_come_in_the_order_of_the_calls_and_ends_are_told(ray_session, tmp_path):
    ended = []
    calls = [(number, str(tmp_path)) for number in range(6)]
    found = run_tasks(double, calls, SMALL, ended=lambda count, result: ended.append((count, result)))
    assert found == [0, 2, 4, 6, 8, 10]
    assert [count for count, _ in ended] == [1, 2, 3, 4, 5, 6] and sorted(result for _, result in ended) == found


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_run_at_once_than_may(ray_session, tmp_path, at_once):
    run_tasks(double, [(number, str(tmp_path)) for number in range(6)], SMALL, at_once=at_once)
    spans = [tuple(map(float, path.read_text().split())) for path in tmp_path.iterdir()]
    most = max(sum(begun <= moment < done for begun, done in spans) for moment, _ in spans)
    assert most == at_once


def test_a_task_whose_process_was_killed_runs_again(ray_session, tmp_path):
    assert run_tasks(fall_once, [(number, str(tmp_path)) for number in range(3)], SMALL) == [0, 1, 2]
    assert (tmp_path / "fell-1").exists()


def test_the_first_error_is_raised_as_ours_and_ends_the_rest(ray_session, tmp_path):
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^rows: got 1, but none but the first are wanted$"):
        run_tasks(refuse, [(number, str(tmp_path)) for number in range(4)], SMALL)
    assert time.monotonic() - started < 100
    # There is room again at once: what was running has been stopped.
    assert run_tasks(fall_once, [(2, str(tmp_path))], Resources(cpus=3.5)) == [2]
    assert time.monotonic() - started < 140


def test_a_process_that_is_free_takes_the_next_task(ray_session):
    assert len(set(run_tasks(name_process, [(number,) for number in range(8)], SMALL, at_once=1))) == 1


def test_what_is_started_in_the_background_still_starts_processes_that_hear_interrupts():
    ask = [sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"]

    def is_deaf():
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() == "True"

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert is_deaf()
        with heard_interrupts():
            assert not is_deaf()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
