"""Ray, found or started; work handed to it in tasks; and its errors turned back into ours."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray

from gsl_dist.config import Resources
from gsl_dist.errors import GslError

Progress = Callable[[str, int, int, str], None]
"""Called as progress(what, done, total, remark); the doors draw it, or not."""


def stay_quiet(what: str, done: int, total: int, remark: str) -> None:
    """Draw no progress."""


def start_session(cpus: float = 1) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names (a Ray job has it set), or start Ray on this machine.

    Args:
        cpus: logical cores that the stage wants at once; a local Ray gets at least one more.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"logging_level": logging.WARNING, "log_to_driver": False, "namespace": "gsl"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return
    cores = max(os.cpu_count() or 1, int(cpus) + 1)
    # Workers start in another folder; whatever the driver can import, they can. They inherit it: those that were given
    # an environment of their own would not be the processes that Ray starts ahead of the first task.
    with _environ("PYTHONPATH", os.pathsep.join(_import_paths())), heard_interrupts():
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)


def run_tasks(
    work: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    resources: Resources,
    *,
    at_once: int | None = None,
    ended: Callable[[int, Any], None] = lambda count, result: None,
) -> list[Any]:
    """Give what each call gives, in their order; tasks of lost processes run again, and the first error ends them all.

    A process that has nothing to do takes the next task, of whichever stage: what it imported stays imported. On a GPU
    every task has a process of its own, as Ray would have it.

    Args:
        work: a function of a module.
        calls: its arguments, call by call.
        resources: what one call takes.
        at_once: how many may run side by side; None: as many as the cluster has room for.
        ended: called with how many calls have ended, and what the last one gave.
    """
    memory = {"memory": int(resources.memory_gb * 2**30)} if resources.memory_gb else {}
    task = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, **memory)(work)
    found: dict[int, Any] = {}
    waiting: dict[Any, int] = {}
    todo = list(enumerate(calls))[::-1]
    with own_errors():
        try:
            while todo or waiting:
                while todo and (at_once is None or len(waiting) < at_once):
                    number, call = todo.pop()
                    waiting[task.remote(*call)] = number
                [ready], _ = ray.wait(list(waiting), num_returns=1)
                number = waiting.pop(ready)
                found[number] = ray.get(ready)
                ended(len(found), found[number])
        finally:
            for left in waiting:
                ray.cancel(left)
    return [found[number] for number in range(len(calls))]


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise the GslError that a worker raised, instead of Ray's account of how it travelled."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - re-raised below, as ours if one of ours is inside
        raise find_cause(error) or error from None


def find_cause(error: BaseException | None) -> GslError | None:
    """Give the first GslError in what an error was caused by, if there is one."""
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        link = queue.pop(0)
        # Ray's own account of one of ours is of its class too, and reads as a traceback: the cause is what was raised.
        if isinstance(link, GslError) and not isinstance(link, ray.exceptions.RayTaskError):
            return link
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        queue += [getattr(link, "cause", None), link.__cause__, link.__context__]
        queue += list(getattr(link, "worker_failures", {}).values())
    return None


@contextlib.contextmanager
def watch_remarks(coordinator: Any, draw: Callable[[Any], None]) -> Iterator[None]:
    """Draw what workers remark to a coordinator, while the block lasts."""
    over = threading.Event()

    def draw_new() -> None:
        for remark in ray.get(coordinator.take_remarks.remote()):
            draw(remark)

    def poll() -> None:
        while not over.wait(0.5):
            draw_new()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        draw_new()


@contextlib.contextmanager
def stage_clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long a stage takes."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = time.perf_counter() - start


@contextlib.contextmanager
def heard_interrupts() -> Iterator[None]:
    """Let processes that are started meanwhile hear interrupts, by which Ray ends tasks that it is told to cancel.

    A shell starts what is to go on in the background with interrupts ignored, and so would all of Ray's workers: the
    tasks of a stage that failed would go on to their end.
    """
    is_deaf = (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread()
    )
    if is_deaf:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_deaf:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _environ(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _import_paths() -> list[str]:
    package_root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [package_root, *(path for path in inherited if path)]
