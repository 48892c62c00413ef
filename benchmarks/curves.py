"""Curves of what `peers.py` measured, and how they are read between their points.

Between two points of a curve recall is taken to rise evenly with the logarithm of the cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from record import RESULTS

FILES = RESULTS / "peers"
CODES, VECTORS = "codes alone", "vectors kept as well"


@dataclass(frozen=True)
class Curve:
    """What was measured of one contender: points by effort, each with recall, and times where these were taken."""

    name: str
    keeps: str
    facts: dict[str, Any]
    points: list[dict[str, Any]]

    @property
    def ours(self) -> bool:
        """Tell whether it is of this project."""
        return self.name.startswith("ours")

    def edge(self, recall: str = "recall10", cost: str = "batch_us") -> list[tuple[float, float]]:
        """Give the points that no other point of the curve beats, (cost, recall), both rising."""
        found: list[tuple[float, float]] = []
        for at, share in sorted((point[cost], point[recall]) for point in self.points if cost in point):
            if not found or share > found[-1][1]:
                found.append((at, share))
        return found


def read_curves(data: str) -> list[Curve]:
    """Give the contenders of some data, of the first seed, with times where they were measured."""
    path = FILES / f"{data}.jsonl"
    if not path.exists():
        return []
    times_path = FILES / f"{data}-times.json"
    times = json.loads(times_path.read_text()) if times_path.exists() else {"times": {}}
    runs = {tuple(run["key"])[1:]: run for run in map(json.loads, path.read_text().splitlines())}
    curves = []
    for (name, seed), run in runs.items():
        if seed == 0:
            spent = {tuple(point["effort"]): point for point in times["times"].get(name, [])}
            points = [point | least(spent.get(tuple(point["effort"]), {})) for point in run["points"]]
            curves.append(Curve(name, run["keeps"], run | {"timed": times.get("commit")}, points))
    return curves


def least(spent: dict[str, Any]) -> dict[str, float]:
    """Give the least of the rounds, and how far the median lies above it."""
    found = {name: min(values) for name, values in spent.items() if name.endswith("_us") and values}
    if "batch_us" in found:
        found["noise"] = float(np.median(spent["batch_us"])) / found["batch_us"] - 1
    return found


def split_groups(curves: list[Curve]) -> Iterable[tuple[str, list[Curve]]]:
    """Tell those that keep codes alone from those that keep vectors as well."""
    for title in (CODES, VECTORS):
        group = [curve for curve in curves if (curve.keeps == "codes") == (title == CODES)]
        if group:
            yield title, sorted(group, key=lambda curve: (curve.facts["bytes_per_item"], curve.name))


def read_cost(edge: list[tuple[float, float]], recall: float) -> float | None:
    """Give the cost at which a curve reaches so much recall; None if it never does."""
    if not edge or edge[-1][1] < recall:
        return None
    costs, shares = zip(*edge, strict=True)
    return float(np.exp(np.interp(recall, shares, np.log(costs))))


def read_recall(edge: list[tuple[float, float]], cost: float) -> float | None:
    """Give the recall of a curve at a cost; None if it has no point as cheap."""
    if not edge or edge[0][0] > cost:
        return None
    costs, shares = zip(*edge, strict=True)
    return float(np.interp(np.log(cost), np.log(costs), shares))
