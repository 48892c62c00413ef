"""Damages artefacts of every kind, thousands of times each, and counts what is found before use, and what is not.

    OMP_NUM_THREADS=1 python benchmarks/corrupt.py [--mutants 5000] [--seed 0] [--limit-s 150]

Kinds, ways of damage and what counts as a fault are those of the tests (`tests/damage.py`, `tests/subjects.py`). What
was counted is kept after every so many mutants in benchmarks/results/corrupt.json; with a limit of time the next run
goes on where this one stopped, as long as commit and seed are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from record import RESULTS, write_result

# The tests' own artefacts and damage.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
from damage import Victim, count_outcomes

from gsl_dist.demo import read_commit

PART = 500
KEPT_REASONS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=5000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="stop after so long, to be gone on with")
    wanted = parser.parse_args()
    kinds, start = go_on(wanted.seed), time.monotonic()
    victim = Victim(wanted.seed)
    for name in victim.names:
        found = kinds.setdefault(name, {"mutants": 0, "outcomes": {}, "ways": {}, "faults": [], "seconds": 0.0})
        while found["mutants"] < wanted.mutants and time.monotonic() - start < wanted.limit_s:
            strike(victim, name, found, min(PART, wanted.mutants - found["mutants"]))
            write_result("corrupt", {"seed": wanted.seed, "kinds": kinds})
        print(name, found["mutants"], found["outcomes"], *found["faults"], flush=True)
    victim.close()


def go_on(seed: int) -> dict[str, Any]:
    """Give what was counted before, of the same code and seed."""
    path = RESULTS / "corrupt.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    is_same = (before.get("seed"), before.get("commit")) == (seed, read_commit())
    return dict(before["kinds"]) if is_same else {}


def strike(victim: Victim, name: str, found: dict[str, Any], count: int) -> None:
    """Use so many further mutants of a kind, and add up what came of them."""
    start = time.monotonic()
    outcomes = victim.strike(name, range(found["mutants"], found["mutants"] + count))
    counts, faults = count_outcomes(outcomes)
    found["mutants"] += count
    found["seconds"] = round(found["seconds"] + time.monotonic() - start, 2)
    found["outcomes"] = dict(sorted((Counter(found["outcomes"]) + counts).items()))
    found["ways"] = dict(sorted((Counter(found["ways"]) + Counter(way for _, way, *_ in outcomes)).items()))
    found["faults"] = [*found["faults"], *(list(fault) for fault in faults)][:KEPT_REASONS]


if __name__ == "__main__":
    main()
