"""A Ray cluster as an operator starts it: `ray start --head` in a process of its own; its dashboard takes jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Cluster(NamedTuple):
    """A cluster that takes jobs: the address of its dashboard, and the folder of its sessions."""

    address: str
    folder: Path


def find_ports(count: int) -> list[int]:
    """Give ports that nobody listens at, none of those that Ray's workers take."""
    held, found = [], []
    while len(found) < count:
        held.append(socket.socket())
        held[-1].bind(("127.0.0.1", 0))
        port = held[-1].getsockname()[1]
        found += [port] if not 10002 <= port <= 19999 else []
    for each in held:
        each.close()
    return found


@contextlib.contextmanager
def start_cluster(cpus: int = 3, **env: str) -> Iterator[Cluster]:
    """Run a cluster of one node as long as the block lasts."""
    gcs, dashboard, client, agent = find_ports(4)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={cpus}"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
    # What an operator's machines have: the interpreter on the path, and the package.
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    known = {"PATH": paths, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # Sockets lie in this folder, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command += [f"--temp-dir={folder}"]
        with open(f"{folder}.log", "wb") as log:
            run = subprocess.Popen(
                command, env=clean | known | env, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
        try:
            address = await_dashboard(f"http://127.0.0.1:{dashboard}", run, Path(f"{folder}.log"))
            yield Cluster(address, Path(folder))
        finally:
            end_session(run)
            Path(f"{folder}.log").unlink()


def await_dashboard(address: str, run: subprocess.Popen, log: Path) -> str:
    """Give the address as soon as jobs can be submitted to it."""
    for _ in range(240):
        assert run.poll() is None, log.read_text()
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{address}/api/jobs/"):
            return address
        time.sleep(0.5)
    raise AssertionError(log.read_text())


def end_session(run: subprocess.Popen) -> None:
    """Stop Ray as Ctrl-C does, and whatever of its session is left."""
    run.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
