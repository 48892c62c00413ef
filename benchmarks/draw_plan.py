"""Redraws docs/results/plan.md: plans for 10^8, 10^9 and 10^10 vectors, and how far off `gsl plan` was where measured.

python benchmarks/draw_plan.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from record import RESULTS

from gsl_dist.plan import Task, load_costs, make_plan
from gsl_dist.storage import Folder

DOCS = Path(__file__).parent.parent / "docs" / "results"
DIM, CORES, MEMORY_GB = 128, 16, 64
MACHINES = {10**8: 2, 10**9: 10, 10**10: 100}
SETTINGS = [(code_bytes, recall, vectors) for code_bytes in (8, 16, 32) for recall, vectors in ((0.9, 0), (0.95, 1))]
COLUMNS = {
    "cells": lambda plan: f"{plan.cells:,}",
    "probes": lambda plan: f"{plan.probes:,}",
    "memory a machine": lambda plan: f"{plan.memory_gb:.1f} GB" + ("" if plan.fits else ", too much"),
    "mapped": lambda plan: f"{plan.mapped_gb:.0f} GB",
    "disk": lambda plan: f"{plan.disk_gb:,.0f} GB",
    "sample": lambda plan: f"{plan.sample_rows:,}",
    "codebook": lambda plan: f"{plan.codebook_hours:.2f} h",
    "encode": lambda plan: f"{plan.encode_hours:.2f} h",
    "build": lambda plan: f"{60 * plan.build_hours:.1f} min",
    "one query": lambda plan: f"{plan.query_ms:.2f} ms",
    "queries a second": lambda plan: f"{plan.queries_per_s:,.0f}",
}


def main() -> None:
    costs = load_costs()
    lines = ["# Plans for large corpora, and how far off they were where it was measured\n"]
    lines += [f"`gsl plan` with the costs of the package, measured on {costs.made_on}; `benchmarks/costs.py` measures"]
    lines += [f"them anew. Vectors of {DIM} dimensions, machines of {CORES} such cores and {MEMORY_GB} GB; `recall` is"]
    lines += ["the share of true neighbours in the lists looked into, as descriptors of photographs have them. Vectors"]
    lines += ["kept as int8 rank four candidates for each of ten hits.\n"]
    for rows, machines in MACHINES.items():
        lines += [f"## {rows:,} vectors on {machines} machines\n"]
        lines += [f"| bytes, recall | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [show_row(rows, machines, *setting) for setting in SETTINGS]
        lines += [""]
    if (path := RESULTS / "costs.json").exists():
        lines += show_checks(json.loads(path.read_text()))
    Folder(DOCS).write_bytes("plan.md", "\n".join(lines).encode())


def show_row(rows: int, machines: int, code_bytes: int, recall: float, vectors: int) -> str:
    size = {"rows": rows, "dim": DIM, "code_bytes": code_bytes, "recall": recall, "vectors": vectors}
    plan = make_plan(Task(**size, machines=machines, cores=CORES, memory_gb=MEMORY_GB), load_costs())
    named = f"{code_bytes}, {recall}" + (", int8 kept" if vectors else "")
    return f"| {named} | {' | '.join(show(plan) for show in COLUMNS.values())} |"


def show_checks(measured: dict[str, Any]) -> list[str]:
    """Give the lines that compare a run with what was predicted for it."""
    last = measured["run"]
    shape = f"{last['rows']:,} vectors of {last['dim']} dimensions, {last['code_bytes']} bytes, {last['cells']} cells"
    lines = ["## A run of ten times the rows\n"]
    lines += [
        f"Costs were fitted to runs of at most {measured['fitted_rows']:,} rows of other shapes; then {shape}, one"
    ]
    lines += [f"thread, commit {measured['commit']}:\n"]
    lines += ["| | predicted | measured | off |", "|---" * 4 + "|"]
    for name, figures in measured["check"].items():
        lines.append(f"| {name} | {figures['predicted']:.4g} | {figures['measured']:.4g} | {figures['off']:+.1%} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
