"""Redraws docs/results/chaos.md from the rounds of `chaos.py`: what struck, what was left, and what it cost.

Nothing is measured here.

python benchmarks/draw_chaos.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from chaos import FILE, TRIALS, name_breaches
from stages import EPOCHS, ROWS, SHARDS

from gsl_dist.storage import Folder

DOCS = Path(__file__).parent.parent / "docs" / "results"
STAGES = ("train", "codebook", "encode", "build", "pipeline")
WORDS = {
    "worker": "a process that does a task is killed",
    "driver": "the process of the stage is killed",
    "job": "the pipeline is killed, and its stage ends with it",
    "coordinator": "the coordinator is killed",
    "node": "a node is killed with all its workers",
    "pause": "a process stands still for a while",
    "full": "no room is left on the disk",
    "slow": "the disk syncs and renames slowly",
    "upload": "a store cuts uploads short",
    "clock": "the process lives at another time",
}
PLACES = {"alone": "one process", "ray": "three nodes"}


def main() -> None:
    rounds = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    rounds = [line for line in rounds if line["faults"]]
    if rounds:
        Folder(DOCS).write_bytes("chaos.md", "\n".join(show_rounds(rounds)).encode())


def show_rounds(rounds: list[dict[str, Any]]) -> list[str]:
    """Give the lines of the page."""
    struck, breaches = sum(line["faults"] for line in rounds), [line for line in rounds if name_breaches(line)]
    seeds, commits = ({str(line[name]) for line in rounds} for name in ("seed", "commit"))
    lines = [
        "# Faults at random moments\n",
        f"**{struck:,} faults** in {len(rounds):,} rounds of `make chaos`, drawn by",
    ]
    lines += [f"`make results`; seeds {', '.join(sorted(seeds))}, commits {', '.join(sorted(commits))}."]
    survived = sum(line["faults"] for line in rounds if line not in breaches)
    lines += [f"{survived:,} of them left nothing behind: the artefact was whole in the end, with the bytes of an"]
    lines += [
        "undisturbed run (of manifests less the time at which they were made; of trained numbers within 1e-4), with"
    ]
    lines += [f"the ids of all {ROWS:,} rows, each once, and no more work was done again than was in hand.\n"]
    lines += show_breaches(breaches)
    lines += [
        f"A round makes one artefact, of {SHARDS} shards, {EPOCHS} epochs or one codebook, while faults strike until"
    ]
    lines += [
        "it is whole. `again`: how often a stage was started anew; `units`: shards or epochs begun in vain, and the"
    ]
    lines += ["most by fault; `s lost`: seconds over an undisturbed round, by fault, median and most. Others used the"]
    lines += [
        "machine: some seconds say nothing. `one process`: a stage whose tasks run in its own process, without Ray.\n"
    ]
    lines += ["What kills of replicas and routers do to a service is on [its own page](service.md).\n"]
    lines += ["## By stage and kind\n"]
    lines += ["| stage | what | where | faults | rounds | survived | equal | again | units, most | s lost, most |"]
    lines += ["|---" * 10 + "|"]
    order = {(trial.stage, trial.kind, trial.how): at for at, trial in enumerate(TRIALS)}
    for stage in STAGES:
        found = group(rounds, stage)
        for key in sorted(found, key=lambda key: order[key]):
            lines.append(show_trial(key, found[key]))
    return [*lines, "", *show_kinds(rounds), ""]


def group(rounds: list[dict[str, Any]], stage: str) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Give the rounds of a stage by their trials."""
    found = defaultdict(list)
    for line in rounds:
        if line["stage"] == stage:
            found[line["stage"], line["kind"], line["how"]].append(line)
    return found


def show_trial(key: tuple[str, str, str], rounds: list[dict[str, Any]]) -> str:
    """Give the row of one trial."""
    stage, kind, how = key
    struck = sum(line["faults"] for line in rounds)
    survived = sum(line["faults"] for line in rounds if line["survived"])
    equal = sum(line["faults"] for line in rounds if line["equal"])
    again = sum(line["launches"] - 1 for line in rounds)
    vain = [line["repeated"] / line["faults"] for line in rounds if "repeated" in line]
    units = f"{sum(line.get('repeated', 0) for line in rounds):g}, {max(vain):.2g}" if vain else "-"
    lost = [(line["seconds"] - line["undisturbed_s"]) / line["faults"] for line in rounds]
    times = f"{max(0.0, float(np.median(lost))):.1f}, {max(0.0, max(lost)):.1f}"
    counts = f"{struck} | {len(rounds)} | {survived} | {equal} | {again}"
    return f"| {stage} | {WORDS[kind]} | {PLACES[how]} | {counts} | {units} | {times} |"


def show_kinds(rounds: list[dict[str, Any]]) -> list[str]:
    """Give the table of kinds over all stages."""
    lines = ["## By kind\n", "| what | faults | without a trace |", "|---" * 3 + "|"]
    for kind, words in WORDS.items():
        found = [line for line in rounds if line["kind"] == kind]
        sound = sum(line["faults"] for line in found if not name_breaches(line))
        lines += [f"| {words} | {sum(line['faults'] for line in found)} | {sound} |"] if found else []
    return lines


def show_breaches(breaches: list[dict[str, Any]]) -> list[str]:
    """Name each round that did leave something behind."""
    lines = []
    for line in breaches:
        what = f"{line['stage']}, {line['kind']}, {line['how']}, seed {line['seed']}, number {line['number']}"
        lines.append(f"- {what}: {', '.join(name_breaches(line))}")
    return [*lines, ""] if lines else []


if __name__ == "__main__":
    main()
