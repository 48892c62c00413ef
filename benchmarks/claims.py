"""What the curves say of the claims: ours against each rival, point by point, in words worked out from figures.

A rival is met by those of ours that hold no more bytes for an item than it does. Of each point on a rival's edge it is
asked how long ours take to find as much: the claim that ours are never below holds where no ratio is above 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from curves import Curve, read_cost, read_recall, split_groups

MARGIN = 1.05  # times closer than this are not told apart
COUNTS = (250, 500, 1000, 2000, 5000, 10_000)


def list_claims(found: dict[str, list[Curve]], results: Path) -> list[str]:
    """Give the page of claims, as lines."""
    lines = ["# What indexes were to reach, and what was measured\n"]
    lines += ["Worked out from the runs by `make results`; curves and tables are on [the page of peers](peers.md).\n"]
    lines += ["## 1. Our best curve is never below another's\n"]
    lines += ["How many times as long ours take for the recall@10 of each point of a rival's curve, holding no more"]
    lines += ["bytes an item than it does (batches of 100; below 1 is faster). `-` where ours do not get there.\n"]
    for data, curves in found.items():
        lines += [f"### {data}\n", *meet_rivals(curves)]
    lines += ["## 2. VLQ finds more than IVF-PQ at as many codes looked at, and in as much time\n"]
    lines += ["A code of `vlq` has a byte for its level, and four for its squared length, beside those of its name.\n"]
    for data, curves in found.items():
        lines += [f"### {data}\n", *compare_lines(curves)]
    lines += [
        "## 3. The scan of VLQ reads at least as many codes a second as faiss's IVF-PQ\n",
        *tell_scanning(results),
    ]
    lines += ["## 4. With codewords that learned to rank, more is found than by any that keeps no vectors\n"]
    for data, curves in found.items():
        lines += [f"### {data}\n", *rank_codes(curves)]
    lines += ["## 5. Building from raw vectors with two workers takes no longer than faiss on both cores\n"]
    lines += tell_ingest(results)
    lines += ["## 6. What a query costs by the size of the corpus\n", *tell_growth(results)]
    return lines


def meet_rivals(curves: list[Curve]) -> list[str]:
    lines = ["| rival | keeps | bytes an item | least | median | most | ours is never below |", "|---" * 7 + "|"]
    for _, group in split_groups(curves):
        for rival in group:
            if rival.ours or not (edge := rival.edge()):
                continue
            ratios = [find_ratio(curves, rival, *point) for point in edge]
            told = [ratio for ratio in ratios if ratio is not None]
            shown = [f"{f(told):.2f}" if told else "-" for f in (np.min, np.median)]
            most = f"{max(told):.2f}" if len(told) == len(ratios) else "-"
            verdict = "yes" if len(told) == len(ratios) and max(told) <= MARGIN else "no"
            kept = f"{rival.facts['bytes_per_item']:.0f}"
            lines.append(f"| {rival.name} | {rival.keeps} | {kept} | {' | '.join(shown)} | {most} | {verdict} |")
    return [*lines, ""]


def find_ratio(curves: list[Curve], rival: Curve, cost: float, recall: float) -> float | None:
    """Give how many times as long the fastest of ours takes for so much recall; None if none finds as much."""
    least = rival.facts["bytes_per_item"]
    ours = [
        read_cost(curve.edge(), recall) for curve in curves if curve.ours and curve.facts["bytes_per_item"] <= least
    ]
    reached = [at for at in ours if at is not None]
    return min(reached) / cost if reached else None


def compare_lines(curves: list[Curve]) -> list[str]:
    """Give recall@1 and @10 of lines less that of IVF-PQ with as many bytes of codewords."""
    lines = ["In as much time: the mean, and the least, over the points of the rival's curve.\n"]
    lines += ["| | minus | by codes looked at: recall@1, recall@10 | more? | by time | more? |", "|---" * 6 + "|"]
    for mine in curves:
        if "vlq" in mine.name and mine.keeps == "codes":
            size = mine.name.split()[2]
            for rival in curves:
                if rival.name.startswith("faiss ivf-pq") and rival.name.split()[2] == size:
                    cells = [*by_codes(mine, rival), *by_time(mine, rival)]
                    lines.append(f"| {mine.name} | {rival.name} | {' | '.join(cells)} |")
    return [*lines, ""]


def by_codes(mine: Curve, rival: Curve) -> tuple[str, str]:
    told, found = [], []
    for count in COUNTS:
        pairs = [compare_at(mine, rival, recall, "scanned", count) for recall in ("recall1", "recall10")]
        kept = [pair for pair in pairs if pair is not None]
        if len(kept) == len(pairs):
            told.append(f"{count:,}: " + ", ".join(f"{pair:+.3f}" for pair in kept))
            found += kept
    return "; ".join(told), tell_whether(found)


def by_time(mine: Curve, rival: Curve) -> tuple[str, str]:
    told, found = [], []
    for recall in ("recall1", "recall10"):
        pairs = [compare_at(mine, rival, recall, "batch_us", cost) for cost, _ in rival.edge(recall)]
        kept = [pair for pair in pairs if pair is not None]
        told += [f"{np.mean(kept):+.3f} ({min(kept):+.3f})"] if kept else []
        found += kept
    return ", ".join(told), tell_whether(found)


def tell_whether(found: list[float]) -> str:
    """Say whether all differences are above 0, or how many are."""
    more = sum(one > 0 for one in found)
    return ("yes" if more == len(found) else f"at {more} of {len(found)}") if found else ""


def compare_at(mine: Curve, rival: Curve, recall: str, cost: str, at: float) -> float | None:
    """Give the recall of one less that of another at a cost; None outside of either curve."""
    edges = [curve.edge(recall, cost) for curve in (mine, rival)]
    if not all(edges) or (at > min(edge[-1][0] for edge in edges) and cost == "scanned"):
        return None
    one, other = (read_recall(edge, at) for edge in edges)
    return None if one is None or other is None else one - other


def rank_codes(curves: list[Curve]) -> list[str]:
    """List all that keep codes alone by the most that they find."""
    group = [curve for curve in curves if curve.keeps == "codes"]

    def most(curve: Curve, k: int) -> float:
        return max(point[f"recall{k}"] for point in curve.points)

    group.sort(key=lambda curve: -most(curve, 10))
    others = [curve for curve in group if not curve.ours]
    lines = []
    for size in sorted({curve.facts["bytes_per_item"] for curve in group if curve.ours and "ranked" in curve.name}):
        mine = max(
            most(curve, 10)
            for curve in group
            if curve.ours and "ranked" in curve.name and curve.facts["bytes_per_item"] <= size
        )
        above = [c.name for c in others if most(c, 10) >= mine and c.facts["bytes_per_item"] <= size]
        longer = [c.name for c in others if most(c, 10) >= mine and c.facts["bytes_per_item"] > size]
        told = f"below {', '.join(above)}" if above else "above all of others that hold no more"
        told += f"; of longer codes, {', '.join(longer)} find as much" if longer else ""
        lines.append(f"- {size:.0f} bytes: our ranked codes find {mine:.3f} at 10, {told}.")
    lines += ["", "| | bytes an item | most recall@1 | recall@10 | recall@100 |", "|---" * 5 + "|"]
    for curve in group:
        shares = " | ".join(f"{most(curve, k):.3f}" for k in (1, 10, 100))
        lines.append(f"| {curve.name} | {curve.facts['bytes_per_item']:.0f} | {shares} |")
    return [*lines, ""]


def tell_scanning(results: Path) -> list[str]:
    lines = ["Millions of codes a second, one core, median of the rounds (`benchmarks/scanning.py`):\n"]
    lines += ["| bytes of codewords | faiss IVF-PQ of residuals | vlq | ratio |", "|---" * 4 + "|"]
    for path in sorted(results.glob("scanning*.json")):
        result = json.loads(path.read_text())
        speeds = result.get("million_codes_a_second", {})
        if "vlq" in speeds and "residual pq" in speeds:
            theirs, ours = (float(np.median(speeds[kind]["values"])) for kind in ("residual pq", "vlq"))
            books = result["setting"]["books"]
            lines.append(f"| {books} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.2f} |")
    return [*lines, ""]


def tell_ingest(results: Path) -> list[str]:
    return list(_tell_ingest(sorted(results.glob("ingest-*.json")))) or ["Not measured yet.\n"]


def _tell_ingest(paths: list[Path]) -> Iterable[str]:
    for path in paths:
        result: dict[str, Any] = json.loads(path.read_text())
        setting = result["setting"]
        yield (
            f"{setting['data']}, {setting['rows']:,} rows, {setting['cells']:,} cells, {setting['bytes']} bytes; "
            f"seconds, least of {result['rounds']} rounds:\n"
        )
        yield "| | " + " | ".join(parts := ("codebook", "encode", "build", "all", "process")) + " | recall@10 |"
        yield "|---" * 7 + "|"
        for name, spent in result["seconds"].items():
            cells = [f"{min(spent[part]['values']):.1f}" if part in spent else "" for part in parts]
            yield f"| {name} | {' | '.join(cells)} | {result['recall10'][name]:.3f} |"
        yield ""


def tell_growth(results: Path) -> list[str]:
    path = results / "growth.json"
    if not path.exists():
        return ["Not measured yet.\n"]
    result = json.loads(path.read_text())
    lines = ["Microseconds a query, batches of 100, at the same number of probes, by the number of codes:\n"]
    lines += ["| | " + " | ".join(f"{int(size):,}" for size in result["cells"]) + " | slope |"]
    lines += ["|---" * (len(result["cells"]) + 2) + "|"]
    for kind, told in result["by_kind"].items():
        cells = " | ".join(f"{told['least_us'][size]:.0f}" for size in result["cells"])
        lines.append(f"| {kind} | {cells} | {told['slope']:.2f} |")
    return [*lines, ""]
