"""Redraws docs/results/peers.md from what `peers.py` measured: curves, tables, and each claim with its verdict.

A time is the least of the rounds, all contenders in turn on one core. Between two points of a curve recall is taken to
rise evenly with the logarithm of the time. Nothing is measured here.

python benchmarks/draw_peers.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from claims import list_claims
from curves import CODES, Curve, read_cost, read_curves, split_groups
from record import RESULTS

from gsl_dist.storage import Folder

mpl.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs" / "results"
SHOWN = {
    "photos": "SIFT descriptors of photographs",
    "sift100k": "SIFT descriptors of photographs, the small set",
    "glove": "GloVe vectors of words",
    "cifar": "features of images by a pretrained network",
}
TARGETS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "gsl_dist"
    found = {data: curves for data in SHOWN if (curves := read_curves(data))}
    if not found:
        return
    lines = ["# Beside other systems, on real vectors\n"]
    lines += ["`benchmarks/peers.py`, drawn by `make results`; what it says of the claims is in"]
    lines += ["[the list of claims](indexes.md). One core; a time is the least of the rounds, in which all contenders"]
    lines += ["take turns. `kept` is what an index must hold for an item, its id apart.\n"]
    for data, curves in found.items():
        lines += draw_data(data, curves)
    Folder(DOCS).write_bytes("indexes.md", ("\n".join(list_claims(found, RESULTS)) + "\n").encode())
    Folder(DOCS).write_bytes("peers.md", ("\n".join(lines) + "\n").encode())


def draw_data(data: str, curves: list[Curve]) -> list[str]:
    rows = curves[0].facts["rows"]
    commits = sorted({curve.facts["commit"] for curve in curves})
    lines = [
        f"## {data}: {rows:,} {SHOWN[data]}\n",
        f"Built at {', '.join(commits)}; timed at {curves[0].facts['timed']}.",
    ]
    noise = [point["noise"] for curve in curves for point in curve.points if "noise" in point]
    if noise:
        lines += [f"The median of the rounds lies {100 * np.median(noise):.0f}% above the least.\n"]
        for title, group in split_groups(curves):
            name = f"peers-{data}-{'codes' if title == CODES else 'vectors'}.svg"
            draw_curves(title, group, name)
            lines += [f"![recall@10 by microseconds a query, {title}]({name})\n"]
            lines += table_targets(title, group)
    lines += table_facts(curves)
    return lines


def table_targets(title: str, group: list[Curve]) -> list[str]:
    """Give the microseconds a query that each takes for so much recall@10."""
    lines = [f"Microseconds a query, in batches of 100, for so much recall@10; {title}:\n"]
    lines += ["| | kept | " + " | ".join(f"{target:g}" for target in TARGETS) + " | most | one at a time |"]
    lines += ["|---" * (len(TARGETS) + 4) + "|"]
    for curve in group:
        if not (edge := curve.edge()):
            continue
        cells = [f"{at:.0f}" if (at := read_cost(edge, target)) is not None else "" for target in TARGETS]
        single = curve.edge(cost="single_us")
        alone = f"{single[-1][0]:.0f} for {single[-1][1]:.3f}" if single else ""
        kept = f"{curve.facts['bytes_per_item']:.0f} B"
        lines.append(f"| {curve.name} | {kept} | {' | '.join(cells)} | {edge[-1][1]:.3f} | {alone} |")
    return [*lines, ""]


def table_facts(curves: list[Curve]) -> list[str]:
    """Give what each takes to build and to hold, and the most it finds."""
    lines = ["What each finds at its highest effort, and what it takes to build and to keep:\n"]
    lines += ["| | recall@1 | recall@10 | recall@100 | codes scanned | kept | file | building | memory |"]
    lines += ["|---" * 9 + "|"]
    for curve in sorted(curves, key=lambda curve: (curve.keeps != "codes", curve.facts["bytes_per_item"], curve.name)):
        best = max(curve.points, key=lambda point: point["recall10"])
        shares = " | ".join(f"{best[f'recall{k}']:.3f}" for k in (1, 10, 100))
        scanned = f"{best['scanned']:.0f}" if "scanned" in best else ""
        facts = curve.facts
        built = f"{facts['build_s']:.0f} s" if facts["build_s"] else "as above"
        lines.append(
            f"| {curve.name} | {shares} | {scanned} | {facts['bytes_per_item']:.0f} B |"
            f" {facts['file_bytes'] / facts['rows']:.0f} B | {built} | {facts['peak_mb']:.0f} MB |"
        )
    return [*lines, ""]


def draw_curves(title: str, group: list[Curve], name: str) -> None:
    drawing, axes = plt.subplots(figsize=(9, 5))
    for place, curve in enumerate(sorted(group, key=lambda curve: (not curve.ours, curve.name))):
        if edge := curve.edge():
            style = {"ls": "-", "lw": 2} if curve.ours else {"ls": "--", "lw": 1}
            axes.plot(*zip(*edge, strict=True), label=curve.name, marker="o^sdv"[place // 10 % 5], ms=3, **style)
    axes.set(xscale="log", xlabel="microseconds a query, one core, batches of 100", ylabel="recall@10", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    with Folder(DOCS).whole(name) as draft:
        drawing.savefig(draft, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(drawing)


if __name__ == "__main__":
    main()
