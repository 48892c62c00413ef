"""Kills processes of a service while it is asked and written to, and counts what becomes of the answers.

    OMP_NUM_THREADS=1 python benchmarks/kills.py [--trials WORD ...] [--rounds 30] [--seed 0]

All processes are real, under Ray Serve, and are ended by SIGKILL at random moments; the next kill comes when the
service is whole again, so that every kill meets one that has something to lose. Every answer is compared with that of
the same shards in this process: those that answered, if the answer says that some did not.

    copies    a part has two replicas, of which one is killed    no answer fails, none is partial, none is wrong
    alone     a part has one replica                             what is missing is said, none is wrong
    router    the router is killed                               there are errors, none is wrong, and it comes back
    writes    all of them are killed at once                     every write that was acknowledged is there

What is written lies far from what is searched for, so that answers stay those of the version while it grows.
Writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from record import RESULTS, write_result
from serving import build_index, load_vectors

from gsl_dist.client import Client
from gsl_dist.cluster.serve import ServeConfig, serve, stop_service
from gsl_dist.config import Resources
from gsl_dist.demo import read_commit
from gsl_dist.errors import GslError, ShardUnavailable
from gsl_dist.hits import Hits
from gsl_dist.index.search import LocalSearcher, open_searcher

Names = Sequence[str]
Choose = Callable[[Names, np.random.Generator], Names]

ROWS, K, PROBES, REPLICAS, ASKERS = 100_000, 10, 8, 2, 3
AWAY, FIRST_ID, CHECKED = 200.0, 10**9, 1000
WHOLE_S, POLL_S, CALM_S = 120.0, 0.05, 0.6
TITLE = "ray::ServeReplica:gsl:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="*", choices=list(TRIALS), default=list(TRIALS))
    parser.add_argument("--rounds", type=int, default=30, help="times that something is killed, in each trial")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    base, queries, name = load_vectors(ROWS)
    path = RESULTS / "kills.json"
    trials = json.loads(path.read_text())["trials"] if path.exists() else {}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        build_index(folder, base)
        for trial in wanted.trials:
            found = run_trial(trial, folder, queries[:200], wanted.rounds, wanted.seed + list(TRIALS).index(trial))
            print(trial, found, flush=True)
            trials[trial] = found | {"commit": read_commit()}
            write_result("kills", {"vectors": name, "rows": ROWS, "seed": wanted.seed, "trials": trials})
    ray.shutdown()


def kill_a_copy(alive: Names, rng: np.random.Generator) -> Names:
    """Choose one replica of each part."""
    parts = sorted({name.rpartition("-")[0] for name in alive if name != "router"})
    return [str(rng.choice([name for name in alive if name.startswith(f"{part}-")])) for part in parts]


def kill_replicas(alive: Names, rng: np.random.Generator) -> Names:
    """Choose some replicas: one or all."""
    replicas = [name for name in alive if name != "router"]
    return [str(name) for name in rng.permutation(replicas)[: rng.integers(1, len(replicas) + 1)]]


def kill_router(alive: Names, rng: np.random.Generator) -> Names:
    """Choose the router."""
    return [name for name in alive if name == "router"]


def kill_all(alive: Names, rng: np.random.Generator) -> Names:
    """Choose everything."""
    return list(alive)


TRIALS: dict[str, tuple[int, Choose]] = {
    "copies": (2, kill_a_copy),
    "alone": (1, kill_replicas),
    "router": (1, kill_router),
    "writes": (1, kill_all),
}


def run_trial(trial: str, folder: str, queries: NDArray[np.float32], rounds: int, seed: int) -> dict[str, Any]:
    """Serve an index, kill in so many rounds, and give what was counted."""
    (copies, choose), rng, start = TRIALS[trial], np.random.default_rng(seed), time.monotonic()
    # A router that is started anew comes back at the port it had.
    config = ServeConfig(
        index=folder,
        replicas=REPLICAS,
        copies=copies,
        port=find_port(),
        serve_port=find_port(),
        resources=Resources(cpus=0.5),
    )
    service = serve(config)
    truth, over = Truth(folder, queries), threading.Event()
    askers = [Asker(service.url, truth, over, seed + number) for number in range(ASKERS)]
    writer = Writer(service.url, over, queries, seed) if trial == "writes" else None
    counted: Counter[str] = Counter()
    try:
        await_whole(service.url, REPLICAS * copies)
        for thread in [*askers, *([writer] if writer else [])]:
            thread.start()
        back_s = []
        for _ in range(rounds):
            time.sleep(rng.uniform(0, CALM_S))
            killed = kill(choose(list(find_processes()), rng))
            counted["kills"] += len(killed)
            back_s.append(await_whole(service.url, REPLICAS * copies, killed))
            counted["lost"] += writer.count_lost() if writer else 0
        time.sleep(CALM_S)
    finally:
        over.set()
        for thread in [*askers, *([writer] if writer else [])]:
            thread.join() if thread.ident else None
        stop_service()
    for thread in askers:
        counted += thread.counted
    times: dict[str, Any] = {"rounds": rounds, "whole_again_s": round(float(np.median(back_s)), 1)}
    times |= {"longest_answer_ms": round(1e3 * max(thread.longest_s for thread in askers))}
    written = {"acknowledged": writer.acknowledged, "unsure": writer.unsure, "lost": counted["lost"]} if writer else {}
    names = ("kills", "queries", "whole", "partial", "refused", "broken", "wrong")
    return {name: counted[name] for name in names} | written | times | {"seconds": round(time.monotonic() - start)}


class Truth:
    """What is right: the answers of the shards in this process, of any of them.

    Args:
        folder: the index.
        queries: those that will be asked, one at a time.
    """

    def __init__(self, folder: str, queries: NDArray[np.float32]) -> None:
        self.queries, self._folder = queries, folder
        self._whole, self._lock = open_searcher(folder), threading.Lock()
        self._known: dict[frozenset[str], Hits] = {}
        self.expect(frozenset())

    def expect(self, missing: frozenset[str]) -> Hits:
        """Give the answers to all queries without some shards."""
        with self._lock:
            if missing not in self._known:
                self._known[missing] = self._search(self._open_rest(missing))
            return self._known[missing]

    def _open_rest(self, missing: frozenset[str]) -> LocalSearcher:
        rest = [name for name in self._whole.shards if name not in missing]
        return open_searcher(self._folder, names=rest) if missing else self._whole

    def _search(self, searcher: LocalSearcher) -> Hits:
        # One at a time, as they are asked: batches round otherwise.
        found = [searcher.search(query, K, probes=PROBES) for query in self.queries]
        ids, distances = (np.concatenate([getattr(one, name) for one in found]) for name in ("ids", "distances"))
        return Hits(ids, distances, len(searcher.shards), len(self._whole.shards))

    def judge(self, number: int, hits: Hits) -> str:
        """Tell what an answer to a query is: `whole`, `partial` or `wrong`."""
        expected = self.expect(frozenset(hits.missing))
        near = expected.distances[number]
        is_sure = near < near[-1]  # of several at the last place any may be given
        is_near = np.allclose(hits.distances[0], near, rtol=1e-4)
        is_right = is_near and set(expected.ids[number][is_sure]) <= set(hits.ids[0])
        if not is_right or hits.shards_answered != hits.shards_total - len(hits.missing):
            return "wrong"
        return "partial" if hits.is_partial else "whole"


class Asker(threading.Thread):
    """Asks one query after another, and counts what the answers are."""

    def __init__(self, url: str, truth: Truth, over: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self._url, self._truth, self._over, self._rng = url, truth, over, np.random.default_rng(seed)
        self.counted: Counter[str] = Counter()
        self.longest_s = 0.0

    def run(self) -> None:
        """Ask until it is over."""
        with Client(self._url, timeout_s=30) as client:
            while not self._over.is_set():
                number, start = int(self._rng.integers(len(self._truth.queries))), time.monotonic()
                self.counted["queries"] += 1
                self.counted[self._ask(client, number)] += 1
                self.longest_s = max(self.longest_s, time.monotonic() - start)

    def _ask(self, client: Client, number: int) -> str:
        try:
            hits = client.search(self._truth.queries[number], K, PROBES)
        except GslError as error:
            time.sleep(POLL_S)
            return "refused" if isinstance(error, ShardUnavailable) else "broken"
        return self._truth.judge(number, hits)


class Writer(threading.Thread):
    """Writes item after item, ends some, and keeps book of what was acknowledged.

    Args:
        url: the service.
        over: when to stop.
        queries: far from which it writes.
        seed: of what it does.
    """

    def __init__(self, url: str, over: threading.Event, queries: NDArray[np.float32], seed: int) -> None:
        super().__init__(daemon=True)
        self._url, self._over, self._rng = url, over, np.random.default_rng(seed)
        self._dim, self._lock = queries.shape[1], threading.Lock()
        self._here: dict[int, bool] = {}
        self.acknowledged = self.unsure = 0

    def run(self) -> None:
        """Write until it is over."""
        item = FIRST_ID
        with Client(self._url, timeout_s=30) as client:
            while not self._over.is_set():
                if self._here and self._rng.random() < 0.2:
                    self._note(lambda old: client.delete([old]), int(self._rng.choice(list(self._here))), is_here=False)
                else:
                    item += 1
                    self._note(lambda new: client.upsert([new], self.place(new)), item, is_here=True)

    def place(self, item: int) -> NDArray[np.float32]:
        """Give where an item lies: off on the other side of zero, and apart from the others."""
        return np.random.default_rng(item).normal(-AWAY, AWAY / 4, size=(1, self._dim)).astype(np.float32)

    def count_lost(self) -> int:
        """Count the items of which the service does not say what it acknowledged."""
        with self._lock:
            known = dict(self._here)
        ids = list(known)
        with Client(self._url, timeout_s=30) as client:
            told = [row for at in range(0, len(ids), CHECKED) for row in client.fetch(ids[at : at + CHECKED])]
            last = [item for item in ids if known[item]][-1:]
            found = [client.search(self.place(item), 1, PROBES).ids[0, 0] for item in last]
        # What changed since the book was read is looked at the next time.
        with self._lock:
            same = {item for item in ids if self._here.get(item) is known[item]}
        lost = [item for item, row in zip(ids, told, strict=True) if item in same and (row is not None) != known[item]]
        return len(lost) + sum(item in same and item != int(near) for item, near in zip(last, found, strict=True))

    def _note(self, write: Callable[[int], int], item: int, *, is_here: bool) -> None:
        # Between the question and the answer nobody knows, and nothing is claimed.
        with self._lock:
            self._here.pop(item, None)
        try:
            write(item)
        except GslError:
            self.unsure += 1
            time.sleep(POLL_S)
            return
        with self._lock:
            self._here[item] = is_here
        self.acknowledged += 1


def find_processes() -> dict[str, psutil.Process]:
    """Give the processes of the service by the names of their deployments; only those that this process started."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = process.cmdline()[:1]
        except psutil.Error:
            continue
        if title and title[0].startswith(TITLE):
            found[title[0].removeprefix(TITLE).partition(".")[0]] = process
    return found


def kill(names: Names) -> dict[str, int]:
    """End processes at once, and give their numbers."""
    alive = find_processes()
    killed = {name: alive[name].pid for name in names}
    for number in killed.values():
        os.kill(number, signal.SIGKILL)
    return killed


def await_whole(url: str, replicas: int, killed: Mapping[str, int] = {}) -> float:
    """Wait until others are there for those killed and every replica can be asked, and give how long that took."""
    start = time.monotonic()
    while time.monotonic() - start < WHOLE_S:
        try:
            # A router may yet have to notice that somebody is gone.
            alive = find_processes()
            is_new = all(name in alive and alive[name].pid != number for name, number in killed.items())
            answer = httpx.get(f"{url}/readyz", timeout=2.0) if is_new else None
            if answer is not None and answer.is_success and answer.json()["connected"] == replicas:
                return time.monotonic() - start
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    raise GslError(f"{url} was not whole again within {WHOLE_S:g} s")


def find_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


if __name__ == "__main__":
    main()
