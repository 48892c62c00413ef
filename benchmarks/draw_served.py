"""Redraws docs/results/served-peers.md from what `served.py` measured: curves, tables, ours beside each of the others.

Nothing is measured here, and nothing is read between points: what reaches a recall is the cheapest measured point with
at least so much.

python benchmarks/draw_served.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from record import RESULTS

from gsl_dist.storage import Folder

mpl.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs" / "results"
# What is measured, what it is called, and whether less of it is better.
MEASURES = {
    "p50_ms": ("one query at a time, one client: the median in ms", True),
    "p99_ms": ("one query at a time, one client: 99 of 100 within, in ms", True),
    "crowd_qps": ("one query at a time, four clients: queries a second", False),
    "batch_qps": ("1,024 queries by one call: queries a second", False),
}
CODES = "codes alone"
GROUPS = {CODES: (0.4, 0.5, 0.6, 0.65), "vectors kept as well": (0.6, 0.8, 0.9, 0.95, 0.99)}


@dataclass(frozen=True, eq=False)
class Curve:
    """What was measured of one system, round by round.

    Args:
        facts: what was noted when it was built.
        rounds: by round, the points in the order of efforts.
    """

    name: str
    facts: dict[str, Any]
    rounds: dict[int, list[dict[str, Any]]]

    @property
    def ours(self) -> bool:
        """Tell whether it is of this project and asked by its own client."""
        return self.name.startswith("ours") and "," not in self.name

    @property
    def codes_alone(self) -> bool:
        """Tell whether it keeps no vectors to rank by."""
        return self.facts["keeps"] == "codes"

    @cached_property
    def recalls(self) -> list[float]:
        """Give recall@10 by effort."""
        return [median(point["recall10"] for point in points) for points in zip(*self.rounds.values(), strict=True)]

    def costs(self, measure: str) -> list[float]:
        """Give the best of the rounds by effort: whatever else a machine does makes a time longer, never shorter."""
        choose = min if MEASURES[measure][1] else max
        return [choose(point[measure] for point in points) for points in zip(*self.rounds.values(), strict=True)]

    def has(self, measure: str) -> bool:
        """Tell whether it can be asked so."""
        return all(measure in point for points in self.rounds.values() for point in points)

    def cheapest(self, measure: str, recall: float) -> int | None:
        """Give the place of the best point with at least so much recall; None if it never has."""
        sign = 1 if MEASURES[measure][1] else -1
        costs = self.costs(measure)
        reaching = [place for place, share in enumerate(self.recalls) if share >= recall]
        return min(reaching, key=lambda place: sign * costs[place], default=None)


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "gsl_dist"
    found = {rows: curves for rows in (100_000, 1_000_000) if (curves := read_curves(rows))}
    if not found:
        return
    lines = ["# The service beside others, each over its own wire\n"]
    lines += [
        "`benchmarks/served.py`, drawn by `make results`. Servers and those who ask share two cores; what a client"
    ]
    lines += [
        "does to ask and to read the answer counts. `pickled` is a service of faiss indexes asked by pickles over"
    ]
    lines += [
        "sockets, the shape of distributed-faiss, written anew (`benchmarks/pickled.py`). LanceDB has no wire: its"
    ]
    lines += [
        "table is opened by the process that asks. Recall is recall@10. For each recall the cheapest measured point"
    ]
    lines += ["with at least so much is taken; nothing is read between points. A figure is the best of the rounds, in"]
    lines += ["which all systems take turns.\n"]
    for rows, curves in found.items():
        lines += draw_size(rows, curves)
    Folder(DOCS).write_bytes("served-peers.md", ("\n".join(lines).rstrip("\n") + "\n").encode())


def read_lines(rows: int) -> list[dict[str, Any]]:
    path = RESULTS / f"served-{rows}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_curves(rows: int) -> list[Curve]:
    """Give the systems that were measured among so many rows."""
    facts, rounds = dict[str, dict[str, Any]](), dict[str, dict[int, list[dict[str, Any]]]]()
    for line in read_lines(rows):
        what, name, number = line["key"]
        if what == "build":
            facts[name] = line
        elif what == "time":
            rounds.setdefault(name, {})[number] = line["points"]
            # The first lines were written before this was noted.
            kept, noted = facts[name], [line[word] for word in ("cores_kept_by_others",) if word in line]
            facts[name] = kept | {
                "timed": kept.get("timed", set()) | {line["commit"]},
                "others": [*kept.get("others", []), *noted],
            }
    found = [Curve(name, facts[name], dict(sorted(kept.items()))) for name, kept in rounds.items()]
    return sorted(found, key=lambda curve: (not curve.name.startswith("ours"), curve.name))


def draw_size(rows: int, curves: list[Curve]) -> list[str]:
    """Give the lines about one number of rows, and draw its curves."""
    timed = sorted(set[str]().union(*(curve.facts["timed"] for curve in curves)))
    lines = [f"## {rows:,} vectors of 128 dims, {curves[0].facts['vectors']}\n"]
    lines += [f"Timed at {', '.join(timed)}."]
    busy = [share for curve in curves for share in curve.facts["others"]]
    if busy:
        lines += [
            f"Other jobs kept up to {max(busy):.1f} of the two cores busy meanwhile: differences below a third say"
        ]
        lines += ["nothing."]
    lines += [""]
    lines += table_facts(rows, curves)
    lines += list_missing(rows, curves)
    for title, targets in GROUPS.items():
        group = [curve for curve in curves if curve.codes_alone == (title == CODES)]
        name = f"served-peers-{rows}-{'codes' if title == CODES else 'vectors'}.svg"
        draw_curves(group, name)
        lines += [f"### {rows:,} vectors, {title}\n", f"![Recall against latency and throughput, {title}]({name})\n"]
        for measure in MEASURES:
            lines += table_measure(group, measure, targets)
        lines += table_ratios(group, targets)
    return lines


def table_facts(rows: int, curves: list[Curve]) -> list[str]:
    lines = ["| | asked by | runs | lists | kept of an item | on disk an item | building | rounds |", "|---" * 8 + "|"]
    for curve in curves:
        facts = curve.facts
        lines.append(
            f"| {curve.name} | {facts['wire']} | {facts['software']} | {facts['cells'] or 'graph'} |"
            f" {facts['bytes_per_item']:.0f} B ({facts['keeps']}) | {facts['file_bytes'] / rows:.0f} B |"
            f" {facts['build_s']:.0f} s | {len(curve.rounds)} |"
        )
    return [*lines, ""]


def list_missing(rows: int, curves: list[Curve]) -> list[str]:
    """Say what could not be measured, and why."""
    measured = {curve.name for curve in curves}
    reasons = {line["key"][1]: line["reason"] for line in read_lines(rows) if line["key"][0] == "missing"}
    told = [f"- {name}: not measured: {reason}" for name, reason in reasons.items() if name not in measured]
    return [*told, ""] if told else []


def table_measure(group: list[Curve], measure: str, targets: Sequence[float]) -> list[str]:
    """Give what each takes for so much recall."""
    asked = [curve for curve in group if curve.has(measure)]
    lines = [f"{MEASURES[measure][0].capitalize()}, by recall:\n"]
    lines += [f"| | {' | '.join(f'{target:g}' for target in targets)} | most |", "|---" * (len(targets) + 2) + "|"]
    for curve in asked:
        costs, most = curve.costs(measure), max(curve.recalls)
        places = [curve.cheapest(measure, target) for target in targets]
        cells = ["" if place is None else show(costs[place]) for place in places]
        lines.append(f"| {curve.name} | {' | '.join(cells)} | {show(best(costs, measure, curve))} for {most:.3f} |")
    return [*lines, ""]


def best(costs: list[float], measure: str, curve: Curve) -> float:
    """Give what the highest recall takes."""
    place = curve.cheapest(measure, max(curve.recalls))
    assert place is not None, "it was measured"
    return costs[place]


def table_ratios(group: list[Curve], targets: Sequence[float]) -> list[str]:
    """Give how many times as fast as each of the others ours is, at no less recall than theirs."""
    lines = [
        "How many times as fast ours is: the other's cheapest point of so much recall against the cheapest of ours"
    ]
    lines += ["with no less than that point has: the best of the rounds (least to most within one). Below 1: slower.\n"]
    ours = [curve for curve in group if curve.ours]
    for measure, (title, _) in MEASURES.items():
        others = [curve for curve in group if not curve.name.startswith("ours") and curve.has(measure)]
        lines += [f"| {title} |"]
        lines[-1] += f" {' | '.join(f'{target:g}' for target in targets)} |"
        lines += ["|---" * (len(targets) + 1) + "|"]
        for other in others:
            cells = [show_ratio(ours, other, measure, target) for target in targets]
            lines.append(f"| {other.name} | {' | '.join(cells)} |")
        lines += [""]
    return lines


def show_ratio(ours: list[Curve], other: Curve, measure: str, target: float) -> str:
    """Give one cell of the table of ratios, nothing where the other does not get so far."""
    theirs = other.cheapest(measure, target)
    if theirs is None:
        return ""
    matched = other.recalls[theirs]
    places = {curve: place for curve in ours if (place := curve.cheapest(measure, matched)) is not None}
    if not places:
        return f"none of ours finds {matched:.3f}"
    less = MEASURES[measure][1]
    chosen = min(places, key=lambda curve: (1 if less else -1) * curve.costs(measure)[places[curve]])
    pairs = [(other.costs(measure)[theirs], chosen.costs(measure)[places[chosen]])] + [
        (other.rounds[number][theirs][measure], chosen.rounds[number][places[chosen]][measure])
        for number in sorted(set(other.rounds) & set(chosen.rounds))
    ]
    first, *within = (their / own if less else own / their for their, own in pairs)
    return f"{first:.2f} ({min(within):.2f} to {max(within):.2f})"


def show(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_curves(group: list[Curve], name: str) -> None:
    """Draw a panel for each measure."""
    drawing, panels = plt.subplots(2, 2, figsize=(11, 8))
    for panel, (measure, (title, less)) in zip(panels.flat, MEASURES.items(), strict=True):
        for place, curve in enumerate(group):
            if curve.has(measure):
                edge = list(find_edge(curve, measure, less))
                style = {"ls": "-", "lw": 2} if curve.name.startswith("ours") else {"ls": "--", "lw": 1}
                panel.plot(*zip(*edge, strict=True), color=f"C{place}", marker="o", ms=3, label=curve.name, **style)
        panel.set(yscale="log", xlabel="recall@10")
        panel.set_title(title, fontsize=9)
        panel.grid(alpha=0.3, which="both")
    panels[0, 0].legend(fontsize=7)
    drawing.tight_layout()
    with Folder(DOCS).whole(name) as draft:
        drawing.savefig(draft, format="svg", metadata={"Date": None})
    plt.close(drawing)


def find_edge(curve: Curve, measure: str, less: bool) -> Iterable[tuple[float, float]]:
    """Give the points that no other beats, (recall, cost), by falling recall."""
    best_so_far: float | None = None
    for share, cost in sorted(zip(curve.recalls, curve.costs(measure), strict=True), reverse=True):
        if best_so_far is None or (cost < best_so_far if less else cost > best_so_far):
            best_so_far = cost
            yield share, cost


if __name__ == "__main__":
    main()
