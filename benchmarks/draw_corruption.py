"""Redraws docs/results/corruption.md from what `corrupt.py` counted.

python benchmarks/draw_corruption.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from record import RESULTS

from gsl_dist.storage import Folder

DOCS = Path(__file__).parent.parent / "docs" / "results"
GOOD = ("found", "again", "harmless")
ABOUT = """\
of an artefact is damaged: bits flipped, cut short, made longer, runs zeroed or replaced, emptied, or swapped for that
of another artefact of its kind. Then the artefact is used as a stage or a replica would, in a process that is watched.
`named`: refused by an error that names the file or the setting. `again`: it counts as not there, and is made or fetched
again. `same meaning`: other bytes of JSON or YAML that mean the same. A fault would be another answer, a change that
nobody saw, an error without a name or none of ours, a library (faiss, torch, pyarrow, safetensors) that was given the
damaged bytes, a crash, or a hang.
"""
LIMITS = """\
What cannot be told: a file that is whole by itself (pointer, tokens, config) in the place of another that is; a last
commit of the write log that is gone as a whole; and what is damaged after it was opened.
"""


def main() -> None:
    if (path := RESULTS / "corrupt.json").exists():
        Folder(DOCS).write_bytes("corruption.md", "\n".join(show(json.loads(path.read_text()))).encode())


def show(result: dict[str, Any]) -> list[str]:
    """Give the lines of the page."""
    kinds: dict[str, Any] = result["kinds"]
    total = sum(found["mutants"] for found in kinds.values())
    lines = [f"# Corruption: {total:,} damaged artefacts, {sum(map(count_faults, kinds.values()))} faults\n"]
    lines += [
        f"`benchmarks/corrupt.py`, seed {result['seed']}, commit {result['commit']}, drawn by `make results`. A file"
    ]
    lines += [ABOUT, "| artefact | damaged | named | again | same meaning | faults |", "|---" * 6 + "|"]
    ways = Counter[str]()
    for name, found in kinds.items():
        counts = " | ".join(f"{found['outcomes'].get(outcome, 0):,}" for outcome in GOOD)
        lines.append(f"| {name} | {found['mutants']:,} | {counts} | {count_faults(found)} |")
        ways += Counter(found["ways"])
    shown = ", ".join(f"{way} {count:,}" for way, count in sorted(ways.items()))
    return [*lines, f"\nBy the way of damage: {shown}.\n", LIMITS]


def count_faults(found: dict[str, Any]) -> int:
    return sum(count for outcome, count in found["outcomes"].items() if outcome not in GOOD)


if __name__ == "__main__":
    main()
