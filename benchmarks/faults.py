"""What strikes a stage: processes that are killed or stand still, machines that are lost, disks that fill up, clocks.

Everything here is real where it can be had without a kernel of one's own: SIGKILL, SIGSTOP, raylets that are ended with
all their workers, a tmpfs that is too small. Two things are injected in the process itself, in the stage's and in those
of its tasks: a clock that is off (`shift_clock`), and a disk on which syncing and renaming take longer (`slow_disk`).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster
from stages import share_imports

NODES, CORES = 2, 2
SKEW, DELAY = "CHAOS_SKEW_S", "CHAOS_DELAY_S"
# How long it takes until a machine counts as lost; Ray's own 15 to 30 s would be most of a round.
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


class Machines:
    """A Ray of several nodes on this machine: one without cores, where stages are started, and others that work.

    Args:
        count: how many work.
    """

    def __init__(self, count: int = NODES) -> None:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        share_imports()
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self._nodes = [self._cluster.add_node(num_cpus=CORES) for _ in range(count)]

    def kill(self, rng: random.Random) -> str:
        """End a working node at once, with its workers, and give its name; another takes its place."""
        node = self._nodes.pop(rng.randrange(len(self._nodes)))
        raylets = [psutil.Process(info.process.pid) for kind in node.all_processes.values() for info in kind]
        for process in [child for raylet in raylets for child in raylet.children(recursive=True)] + raylets:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=CORES, wait=False))
        return str(node.node_id)

    def close(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


def find_workers(*titles: str) -> list[psutil.Process]:
    """Give Ray's processes that do something of such a name now; only those that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words and words[0].startswith("ray::") and any(title in words[0] for title in titles):
                found.append(process)
    return found


def find_stages(pid: int) -> list[psutil.Process]:
    """Give the processes that a pipeline has started, and that are at work."""
    with contextlib.suppress(psutil.Error):
        return [child for child in psutil.Process(pid).children() if "gsl_dist.cluster.job" in child.cmdline()]
    return []


def kill(process: psutil.Process) -> bool:
    """End a process at once, and tell whether it was there."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def pause(process: psutil.Process, seconds: float) -> bool:
    """Let a process stand still for so long, and tell whether it was there."""
    try:
        process.suspend()
        time.sleep(seconds)
        process.resume()
    except psutil.NoSuchProcess:
        return False
    return True


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int], None]]:
    """Put a disk of little room under a folder while the block lasts; call what is given with its bytes.

    Raises:
        PermissionError: only root may.
    """
    if os.geteuid() != 0:
        raise PermissionError("only root mounts disks")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4096", "chaos", str(place)], check=True)
    try:
        yield lambda size: resize_disk(place, size)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def resize_disk(place: Path, size: int) -> None:
    """Give the disk of a folder so many bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


def shift_clock() -> None:
    """Let this process live at another time: by as much as `CHAOS_SKEW_S` says, before or after by its number."""
    off = float(os.environ[SKEW]) * (1 if os.getpid() % 2 else -1)
    now, now_ns, real = time.time, time.time_ns, datetime.datetime

    class Shifted(real):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + datetime.timedelta(seconds=off)

    time.time, time.time_ns = lambda: now() + off, lambda: now_ns() + int(off * 1e9)
    datetime.datetime = Shifted  # type: ignore[misc]


def slow_disk() -> None:
    """Let syncing and renaming files take up to `CHAOS_DELAY_S` longer in this process."""
    longest, rng = float(os.environ[DELAY]), random.Random(os.getpid())

    def delayed(work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def wait_first(*given: Any, **named: Any) -> Any:
            time.sleep(rng.uniform(0, longest))
            return work(*given, **named)

        return wait_first

    os.fsync, os.replace = delayed(os.fsync), delayed(os.replace)


def hook_workers(meddle: Callable[[], None], **env: str) -> dict[str, str]:
    """Give the variables with which a stage's workers call a function of this module before anything else."""
    told = {"worker_process_setup_hook": f"faults.{meddle.__name__}", "env_vars": env}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": told}), **env}
