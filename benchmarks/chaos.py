"""Strikes every stage at random moments, lets it heal itself or be started again, and compares what it leaves behind.

    make chaos                                     # or, with all settings:
    OMP_NUM_THREADS=1 python benchmarks/chaos.py [--minutes 5] [--rounds N] [--seed 0] [--stages WORD ...]
                                                 [--kinds WORD ...] [--how alone ray]

A round makes one artefact, while faults of one kind strike (`faults.py`): several, where the stage outlives them or is
started again. In the end every file must have the bytes of an undisturbed run, of manifests less the time they were
made at; the rows must have the ids of the corpus, each once; of a training the numbers may differ by what rounding in
another order makes. No fault may cost more units of work, shards or epochs, than were in hand: one for each worker.

    worker       SIGKILL of a process that does a task, of a train worker      heals itself
    driver       SIGKILL of the process of the stage                           is started again
    job          SIGKILL of the pipeline, its stage ends with it               is started again
    coordinator  SIGKILL of the actor that adds up statistics                  is started again
    node         a raylet and all its workers; another machine takes its place heals itself, or is started again
    pause        SIGSTOP of a worker or the stage, and SIGCONT                 goes on
    full         no room left on the disk                                      says so, is started again with more
    slow         syncing and renaming take up to 50 ms longer                  takes longer
    upload       a store keeps the first half of what it is sent, and says OK  is sent again
    clock        the process lives at another time, days before or after       goes on

Clocks are shifted where there is no Ray: its own would be right in C++ and wrong in Python, as on no machine.

`alone` runs the tasks of a stage without Ray in its own process: thousands of such rounds are cheap. Rounds are lines
of results/chaos.jsonl; a round of a seed that is there is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attempts import Attempt, Trial, Undisturbed
from faults import CORES, NODES, Machines, small_disk
from record import RESULTS
from remains import digest_files
from stages import MAKES, WORKERS, Yard, make_codebook
from stores import BUCKET, Proxy, start_store

from gsl_dist.cluster.job import PIPELINE
from gsl_dist.demo import read_commit

FILE = RESULTS / "chaos.jsonl"
STAGES = ("encode", "build", "codebook", "train", PIPELINE)
KINDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("encode", "alone"): ("driver", "pause", "full", "slow", "upload", "clock"),
    ("build", "alone"): ("driver", "pause", "full", "slow", "upload", "clock"),
    ("encode", "ray"): ("worker", "driver", "node", "pause", "full", "slow"),
    ("build", "ray"): ("worker", "driver", "node", "pause", "full", "slow"),
    ("codebook", "ray"): ("worker", "driver", "coordinator", "node", "pause", "full"),
    ("train", "ray"): ("worker", "driver", "coordinator", "node", "pause", "full"),
    (PIPELINE, "ray"): ("job", "driver", "worker", "node", "pause", "full"),
}
IN_HAND = {("encode", "ray"): WORKERS, ("build", "ray"): NODES * CORES, (PIPELINE, "ray"): NODES * CORES}
"""How many units of work are in hand at once, where it is more than one."""
TRIALS = [Trial(stage, kind, how) for (stage, how), kinds in KINDS.items() for kind in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="after which no further round is begun")
    parser.add_argument("--rounds", type=int, default=10**9, help="how many rounds at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--kinds", nargs="*", choices=sorted({trial.kind for trial in TRIALS}))
    parser.add_argument("--how", nargs="*", choices=("alone", "ray"), default=("alone", "ray"))
    wanted = parser.parse_args()
    end = time.monotonic() + 60 * wanted.minutes
    trials = [
        t for t in TRIALS if t.stage in wanted.stages and t.how in wanted.how and t.kind in (wanted.kinds or t.kind)
    ]
    if os.geteuid() != 0:
        trials = [trial for trial in trials if trial.kind != "full"]
        print("only root mounts disks: none of them fills up", flush=True)
    done, breaches = read_rounds(FILE), []
    with stand(trials) as ground:
        for number, trial in plan_rounds(trials, done, wanted.seed, wanted.rounds):
            if time.monotonic() > end:
                break
            line = {"seed": wanted.seed, "number": number, **ground.run(trial, draw(wanted.seed, trial, number))}
            with FILE.open("a") as stream:
                stream.write(json.dumps(line | {"commit": read_commit()}) + "\n")
            print(line, flush=True)
            breaches += [(line, breach) for breach in name_breaches(line)]
    for line, breach in breaches:
        print(f"{breach}: {line}", flush=True)
    sys.exit(1 if breaches else 0)


def name_breaches(line: dict[str, Any]) -> list[str]:
    """Name what a round shows that may not be."""
    in_hand = IN_HAND.get((line["stage"], line["how"]), 1)
    wrong = {
        "not whole in the end": not line["survived"],
        "other bytes": not line["equal"],
        "rows lost or doubled": not line.get("rows", True),
        "the reason is not told": not line.get("named", True),
        "more work done again than was in hand": line.get("repeated", 0) > in_hand * line["faults"],
    }
    return [breach for breach, is_so in wrong.items() if is_so]


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Give the rounds that were carried out."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plan_rounds(trials: list[Trial], done: list[dict[str, Any]], seed: int, rounds: int) -> Iterator[tuple[int, Trial]]:
    """Give what to do next, and its number among those of its trial: always what was done least often."""
    counts = {trial: 0 for trial in trials}
    for line in done:
        trial = Trial(line["stage"], line["kind"], line["how"])
        if trial in counts and line["seed"] == seed:
            counts[trial] = max(counts[trial], line["number"] + 1)
    for _ in range(rounds):
        trial = min(trials, key=lambda each: counts[each])
        yield counts[trial], trial
        counts[trial] += 1


def draw(seed: int, trial: Trial, number: int) -> random.Random:
    """Give the chances of one round."""
    return random.Random(f"{seed} {trial} {number}")


@contextlib.contextmanager
def stand(trials: list[Trial]) -> Iterator[Ground]:
    """Have machines and a store, where they are needed, as long as the block lasts."""
    with contextlib.ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)))
        machines = store = None
        if any(trial.how == "ray" for trial in trials):
            machines = Machines()
            held.callback(machines.close)
        if any(trial.kind == "upload" for trial in trials):
            store = held.enter_context(start_store())
            for name, value in name_store(store).items():
                os.environ[name] = value
        yield Ground(folder, machines, store)


def name_store(store: Proxy) -> dict[str, str]:
    """Give the variables by which a process finds a store."""
    url = f"http://127.0.0.1:{store.server_port}"
    known = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true", **known}


class Ground:
    """Where rounds are carried out.

    Args:
        folder: for all files.
        machines: of Ray.
        store: that speaks S3.
    """

    def __init__(self, folder: Path, machines: Machines | None, store: Proxy | None) -> None:
        self._machines, self._store = machines, store
        address = machines.address if machines else ""
        self._yards = {"here": Yard(folder / "here", address)}
        if store:
            self._yards["far"] = Yard(folder / "far", address, place=f"s3://{BUCKET}/chaos")
        self._known: dict[tuple[str, str, str], Undisturbed] = {}
        for yard in self._yards.values():
            make_codebook(yard)
        for stage in ("encode", "build"):
            self.expect(Trial(stage, "none", "alone"))
            for yard in self._yards.values():
                shutil.copytree(self._yards["here"].out / MAKES[stage], yard.made / MAKES[stage])

    def expect(self, trial: Trial) -> Undisturbed:
        """Give what the stage of a trial makes that nobody disturbs; carried out once."""
        key = trial.stage, trial.how, _name_yard(trial)
        if key not in self._known:
            # What is only done the first time takes time of its own.
            for _ in range(2 if trial.how == "alone" else 1):
                attempt = self._attempt(trial, Trial(trial.stage, "none", trial.how), random.Random(0))
                seconds = attempt.pass_once()
            attempt.fetch()
            size = sum(path.stat().st_size for path in attempt.yard.out.rglob("*") if path.is_file())
            self._known[key] = Undisturbed(seconds, digest_files(attempt.yard.out), size)
            if trial.stage == "train":
                attempt.yard.keep("train")
        return self._known[key]

    def run(self, trial: Trial, rng: random.Random) -> dict[str, Any]:
        """Carry out one round, and give what came of it."""
        usual, attempt = self.expect(trial), self._attempt(trial, trial, rng)
        attempt.clear()
        with small_disk(attempt.yard.out) if trial.kind == "full" else contextlib.nullcontext() as resize:
            attempt.watch()
            start = time.monotonic()
            code = attempt.fill(resize, usual) if resize else attempt.besiege(usual)
            seconds = time.monotonic() - start
            attempt.fetch()
            found = attempt.judge(usual) if code == 0 else {"equal": False}
        counts = {"faults": attempt.struck, "launches": attempt.launches, "code": code, "survived": code == 0}
        times = {"seconds": round(seconds, 2), "undisturbed_s": round(usual.seconds, 2)}
        return asdict(trial) | counts | found | times

    def _attempt(self, place: Trial, trial: Trial, rng: random.Random) -> Attempt:
        name = _name_yard(place)
        return Attempt(self._yards[name], trial, rng, self._machines, self._store if name == "far" else None)


def _name_yard(trial: Trial) -> str:
    return "far" if trial.kind == "upload" else "here"


if __name__ == "__main__":
    main()
