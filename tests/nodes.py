"""Several machines on this one: a Ray of a head and workers, each in a network of its own where that is allowed.

The head has no cores and is where stages are started. The machines are connected by a bridge, so that what passes
between nodes goes through a network that can be cut; they share the disk. Where namespaces are not allowed, the nodes
are further raylets on the loopback address.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from clusters import ROOT, find_ports

CORES = 2
_QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def has_namespaces() -> bool:
    """Tell whether this process may make network namespaces and bridges."""
    name = f"gsl-try-{os.getpid()}"
    if os.geteuid() != 0 or not any((Path(folder) / "ip").exists() for folder in os.get_exec_path()):
        return False
    try:
        run("ip", "netns", "add", name)
        run("ip", "link", "add", f"br{os.getpid()}", "type", "bridge")
    except subprocess.CalledProcessError:
        return False
    finally:
        for words in (["netns", "del", name], ["link", "del", f"br{os.getpid()}"]):
            subprocess.run(["ip", *words], capture_output=True)
    return True


class Network:
    """A bridge of this machine and namespaces that are connected with it; those of other processes have other names."""

    def __init__(self) -> None:
        number = os.getpid() % 250
        self._number, self._names = number, list[str]()
        self.bridge, self.host = f"gsl{number}", f"10.213.{number}.1"
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.host}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def add(self) -> tuple[str, str]:
        """Connect another namespace, and give its name and its address."""
        rank = len(self._names) + 2
        name, here, there = f"{self.bridge}-{rank}", f"{self.bridge}h{rank}", f"{self.bridge}n{rank}"
        run("ip", "netns", "add", name)
        self._names.append(name)
        run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        run("ip", "link", "set", here, "master", self.bridge, "up")
        for words in (["addr", "add", f"10.213.{self._number}.{rank}/24", "dev", there], ["link", "set", there, "up"]):
            run("ip", "-n", name, *words)
        run("ip", "-n", name, "link", "set", "lo", "up")
        return name, f"10.213.{self._number}.{rank}"

    def cut(self, name: str) -> None:
        """Unplug a namespace."""
        run("ip", "link", "set", name.replace("-", "h"), "down")

    def close(self) -> None:
        """Take everything away."""
        for words in [*(["netns", "del", name] for name in self._names), ["link", "del", self.bridge]]:
            subprocess.run(["ip", *words], capture_output=True)


class Node:
    """One machine: the processes of a `ray start`, and where they run."""

    def __init__(self, words: list[str], env: dict[str, str], log: Path, namespace: str | None) -> None:
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        self.namespace, self._log = namespace, log
        with open(log, "ab") as stream:
            command = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
            self.process = subprocess.Popen(command, env=env, stdout=stream, stderr=stream, start_new_session=True)

    def await_start(self, timeout_s: float = 180) -> None:
        """Wait until Ray says that it has started here."""
        end = time.monotonic() + timeout_s
        while "runtime started" not in (told := self._log.read_text()):
            assert self.process.poll() is None and time.monotonic() < end, told
            time.sleep(0.05)

    def find_workers(self) -> list[str]:
        """Give the titles of Ray's processes that this machine runs now."""
        titles = []
        for process in self._list():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                titles += [words[0]] if words and words[0].startswith("ray::") else []
        return titles

    def kill(self) -> None:
        """End everything at once, as a machine does that loses its power."""
        for process in self._list():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _list(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [*(base := psutil.Process(self.process.pid)).children(recursive=True), base]
        return []


class Machines:
    """A Ray of several machines.

    Args:
        folder: for sessions and logs; its path may not be long.
        network: what connects them; None: loopback.
    """

    def __init__(self, folder: Path, network: Network | None) -> None:
        self._folder, self.network, self._started = folder, network, 0
        self.nodes: list[Node] = []
        gcs, client, agent = find_ports(3)
        self.host = network.host if network else "127.0.0.1"
        self.address = f"{self.host}:{gcs}"
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.env = clean | _QUICK | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        ports = [f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        head = ["--head", "--num-cpus=0", f"--node-ip-address={self.host}", f"--temp-dir={folder}", *ports]
        self.head = Node(
            [*head, "--include-dashboard=false", "--disable-usage-stats"], self.env, folder / "head.log", None
        )
        self.head.await_start()

    def add(self, cores: int = CORES) -> Node:
        """Start another machine; one after another, since they share their folder."""
        namespace, host = self.network.add() if self.network else (None, "127.0.0.1")
        words = [f"--address={self.address}", f"--node-ip-address={host}", f"--num-cpus={cores}"]
        if not self.network:
            words += [f"--dashboard-agent-listen-port={find_ports(1)[0]}"]
        self._started += 1
        node = Node(words, self.env, self._folder / f"node-{self._started}.log", namespace)
        node.await_start()
        self.nodes.append(node)
        return node

    def start_stage(self, stage: str, config: Path, *overrides: str) -> subprocess.Popen[str]:
        """Start a stage on the head, as a job does."""
        command = [sys.executable, "-m", "gsl_dist.cluster.job", stage, str(config), *overrides]
        env = self.env | {"RAY_ADDRESS": self.address}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def leave(self) -> None:
        """End all machines but the head."""
        for node in self.nodes:
            node.kill()
        self.nodes.clear()

    def close(self) -> None:
        """End all of them."""
        for node in [*self.nodes, self.head]:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGTERM)
        for node in [*self.nodes, self.head]:
            node.kill()


@contextlib.contextmanager
def start_machines() -> Iterator[Machines]:
    """Run a Ray of a head as long as the block lasts; machines are added to it."""
    network = Network() if has_namespaces() else None
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        machines = Machines(Path(folder), network)
        try:
            yield machines
        finally:
            machines.close()
            if network:
                network.close()
