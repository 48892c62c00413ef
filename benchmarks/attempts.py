"""One artefact, made while faults of one kind strike whoever makes it."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pyarrow.fs as fs
from faults import (
    DELAY,
    SKEW,
    Machines,
    find_stages,
    find_workers,
    hook_workers,
    kill,
    pause,
    shift_clock,
    slow_disk,
)
from remains import Ledger, digest_files, measure_difference, name_differences, read_ids
from stages import EPOCHS, ROWS, SHARDS, STEPS, WORKERS, Launch, Yard, go_alone
from stores import Proxy

from gsl_dist.cluster.job import PIPELINE
from gsl_dist.storage import find_store

TASKS = ("_take_part", "encode_shard", "survey_codes", "find_repeats", "build_shard", "RayTrainWorker", "_read_rows")
COORDINATOR = "Coordinator"
MOST_STRIKES, MOST_LAUNCHES = 5, 30
SOON_S, EARLY, LONGEST_S, DAYS_S, POLL_S = 0.05, 0.15, 0.05, 3 * 86_400.0, 0.004
LEAST_BYTES, ENOUGH_BYTES = 8 << 10, 64 << 20
CUT = 0.15
TOLERANCE = 1e-4
NO_ROOM = "No space left on device"
WATCHED = {"encode": ("codes",), "build": ("index/versions/v1",), PIPELINE: ("codes", "index/versions/v1")}
PASSIVE = ("slow", "clock", "upload", "none")
"""Kinds that last as long as a stage runs, one fault each time."""


@dataclass(frozen=True)
class Trial:
    """What strikes which stage.

    Args:
        stage: the stage, or `pipeline`.
        kind: of the faults; `none` for none.
        how: `alone` or `ray`.
    """

    stage: str
    kind: str
    how: str


@dataclass(frozen=True)
class Undisturbed:
    """What a stage makes that nobody disturbs: how long it takes, and the files by their hashes."""

    seconds: float
    files: Mapping[str, str]
    bytes: int


class Attempt:
    """The making of one artefact, however often its stage is started for it.

    Args:
        yard: where it is made.
        trial: what strikes whom.
        rng: when and how often.
        machines: of Ray.
        store: that outputs go to; None: the yard's folder.
    """

    def __init__(
        self,
        yard: Yard,
        trial: Trial,
        rng: random.Random,
        machines: Machines | None = None,
        store: Proxy | None = None,
    ) -> None:
        self.yard, self.trial, self._rng, self._machines, self._store = yard, trial, rng, machines, store
        self.struck = self.launches = self.named = 0
        self._ledgers: list[Ledger] = []
        self._strikes: dict[str, Callable[[Launch], bool]] = {
            "driver": self._kill_driver,
            "job": lambda launch: kill(psutil.Process(launch.pid)),
            "worker": lambda launch: self._kill_one(TASKS),
            "coordinator": lambda launch: self._kill_one((COORDINATOR,)),
            "node": self._kill_node,
            "pause": self._pause,
        }

    def clear(self) -> None:
        """Forget what was made before."""
        self.yard.clear()
        if self._store:
            self._store.faults.cut_short = 0.0
            far, place = find_store(self.yard.place)
            if far.get_file_info(place).type != fs.FileType.NotFound:
                far.delete_dir(place)

    def watch(self) -> None:
        """Begin to note which shards are begun and finished."""
        watched = () if self._store else WATCHED.get(self.trial.stage, ())
        self._ledgers = [Ledger(self.yard.out / name) for name in watched]

    def start(self) -> Launch:
        """Start the stage."""
        self.launches += 1
        meddle: list[Callable[[], None]] = [go_alone] if self.trial.how == "alone" else []
        env: dict[str, str] = {}
        if self.trial.kind in ("slow", "clock"):
            hook, name, most = (
                (slow_disk, DELAY, LONGEST_S) if self.trial.kind == "slow" else (shift_clock, SKEW, DAYS_S)
            )
            env = hook_workers(hook, **{name: f"{self._rng.uniform(0.2, 1) * most:g}"})
            meddle.append(hook)
        if self._store:
            self._store.faults.cut_short = CUT * (self.trial.kind == "upload")
        return self.yard.start(self.trial.stage, meddle, **env)

    def pass_once(self) -> float:
        """Start the stage from nothing, without a fault, and give how long it takes.

        Raises:
            RuntimeError: it does not end well.
        """
        self.clear()
        start = time.monotonic()
        launch = self.start()
        if launch.wait() != 0:
            raise RuntimeError(f"{self.trial.stage} fails undisturbed: {launch.read_log()}")
        return time.monotonic() - start

    def besiege(self, usual: Undisturbed) -> int | None:
        """Start the stage until it ends well, strike at random moments, and give its last exit code."""
        strikes = 0 if self.trial.kind in PASSIVE else self._rng.randint(1, MOST_STRIKES)
        while True:
            launch = self.start()
            while self.struck < strikes and self._await_moment(launch, usual.seconds):
                self.struck += self._strikes[self.trial.kind](launch)
            code = launch.wait()
            self.struck += self._count_passive()
            if code in (0, None) or self.launches == MOST_LAUNCHES:
                return code

    def fill(self, resize: Callable[[int], None], usual: Undisturbed) -> int | None:
        """Start the stage on a disk that is too small, then on larger ones, and give its last exit code."""
        shares = sorted(self._rng.uniform(0, 1.1) for _ in range(self._rng.randint(1, MOST_STRIKES)))
        for share in shares:
            resize(LEAST_BYTES + int(share * usual.bytes))
            launch = self.start()
            code = launch.wait()
            if code in (0, None):
                return code
            self.struck += 1
            self.named += NO_ROOM in launch.read_log()
        resize(ENOUGH_BYTES)
        return self.start().wait()

    def fetch(self) -> None:
        """Have what was made in the yard's folder, also where it lies in a store."""
        if self._store:
            self._store.faults.cut_short = 0.0
            shutil.rmtree(self.yard.out)
            far, place = find_store(self.yard.place)
            fs.copy_files(place, str(self.yard.out), source_filesystem=far)

    def judge(self, usual: Undisturbed) -> dict[str, Any]:
        """Compare what was made with what an undisturbed stage makes, and count units of work done in vain."""
        found: dict[str, Any] = {}
        if self.trial.kind == "full":
            found["named"] = self.named == self.struck
        if self.trial.stage == "train":
            steps = self.yard.tally.stat().st_size / WORKERS
            difference = measure_difference(self.yard.out / "model", self.yard.made / "model")
            found |= {"equal": difference < TOLERANCE, "difference": difference, "units": EPOCHS}
            return found | {"repeated": round(steps / STEPS - EPOCHS, 3), "redone": 0}
        differing = name_differences(digest_files(self.yard.out), usual.files)
        found |= {"equal": not differing, "differing": differing}
        if self.trial.stage != "codebook":
            ids = read_ids(self.yard.out / WATCHED[self.trial.stage][-1])
            found["rows"] = np.array_equal(ids, np.arange(ROWS))
        for ledger in self._ledgers:
            ledger.close()
        if self._ledgers:
            begun = sum(sum(ledger.begun.values()) for ledger in self._ledgers)
            finished = sum(sum(ledger.finished.values()) for ledger in self._ledgers)
            units = SHARDS * len(self._ledgers)
            found |= {"units": units, "repeated": begun - units, "redone": finished - units}
        return found

    def _await_moment(self, launch: Launch, seconds: float) -> bool:
        """Wait for a moment to strike, and tell whether the stage still runs."""
        chance, wait_s = self._rng.random(), self._rng.uniform(0, SOON_S)
        share = self._measure_progress()
        target = share + self._rng.random() * (1 - share)
        if chance < EARLY:
            target, wait_s = 0.0, self._rng.uniform(0, seconds)
        while not launch.is_over and self._measure_progress() < target:
            time.sleep(POLL_S)
        while not launch.is_over and self.trial.stage == "codebook" and chance >= EARLY and not find_workers(*TASKS):
            time.sleep(10 * POLL_S)
        end = time.monotonic() + wait_s * (1 + 10 * (self.trial.stage == "codebook"))
        while not launch.is_over and time.monotonic() < end:
            time.sleep(POLL_S)
        return not launch.is_over

    def _measure_progress(self) -> float:
        """Give the share of its work that the stage has begun; of a codebook nobody knows."""
        if self.trial.stage == "train":
            return self.yard.tally.stat().st_size / (WORKERS * EPOCHS * STEPS) if self.yard.tally.exists() else 0.0
        for ledger in self._ledgers:
            ledger.read()
        return float(np.mean([len(ledger.begun) / SHARDS for ledger in self._ledgers])) if self._ledgers else 1.0

    def _kill_one(self, titles: tuple[str, ...]) -> bool:
        workers = find_workers(*titles)
        return bool(workers) and kill(self._rng.choice(workers))

    def _kill_driver(self, launch: Launch) -> bool:
        # Of a pipeline: the process of the stage that it is at.
        drivers = find_stages(launch.pid) if self.trial.stage == PIPELINE else [psutil.Process(launch.pid)]
        return bool(drivers) and kill(drivers[0])

    def _kill_node(self, launch: Launch) -> bool:
        assert self._machines is not None
        self._machines.kill(self._rng)
        return True

    def _pause(self, launch: Launch) -> bool:
        drivers = find_stages(launch.pid) if self.trial.stage == PIPELINE else [psutil.Process(launch.pid)]
        candidates = [*drivers, *(find_workers(*TASKS, COORDINATOR) if self.trial.how == "ray" else [])]
        longest = 0.3 if self.trial.how == "alone" else 2.0
        return bool(candidates) and pause(self._rng.choice(candidates), self._rng.uniform(0.05, longest))

    def _count_passive(self) -> int:
        if self.trial.kind == "upload" and self._store:
            return int(self._store.faults.met.pop("cut_short", 0))
        return int(self.trial.kind in ("slow", "clock"))
