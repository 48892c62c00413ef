"""What workers are given to do in tests of tasks: one is slow, one falls, one refuses, one tells who it is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from gsl_dist.errors import DataError


def double(number, place):
    """Note when a call begins and ends; the first of all takes longest."""
    begun = time.monotonic()
    time.sleep(0.5 if number == 0 else 0.05)
    (Path(place) / str(number)).write_text(f"{begun} {time.monotonic()}")
    return 2 * number


def fall_once(number, place):
    """Take the process down, the first time."""
    marker = Path(place) / f"fell-{number}"
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number, place):
    """Fail at the second call; the others take long."""
    if number == 1:
        raise DataError("rows", number, "none but the first are wanted")
    for _ in range(1_700):  # an error ends a task between two steps
        time.sleep(0.1)


def name_process(number):
    """Give the number of the process, after a moment."""
    time.sleep(0.05)
    return os.getpid()
