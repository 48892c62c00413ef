"""Redraws docs/results/service.md from what `load.py`, `kills.py` and `fuzz.py` measured, each claim with its verdict.

Nothing is measured here.

python benchmarks/draw_service.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from record import RESULTS

from gsl_dist.storage import Folder

mpl.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs" / "results"
HIGH, BUSY = 0.7, 0.2
COLUMNS = ("offered_per_s", "answered_per_s", "p50_ms", "p99_ms", "p99_over_median", "asked_late_p99_ms", "other")
ROUTES = {"reading": "that write nothing", "all": "all", "rpc": "the gRPC door"}
STATUSES = (("200", "OK"), ("400", "INVALID_ARGUMENT"), ("404", "NOT_FOUND"), ("None",))
TRIALS = {
    "copies": "two copies of every part, one of each killed",
    "alone": "one replica a part, one or all killed",
    "router": "the router killed",
    "writes": "replicas and router killed at once, while somebody writes",
}


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "gsl_dist"
    pages = {"load": show_load, "kills": show_kills, "fuzz": show_fuzz}
    paths = {name: RESULTS / f"{name}.json" for name in pages}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if not found:
        return
    lines = ["# The service under load and under attack\n"]
    lines += [
        "`benchmarks/load.py`, `kills.py` and `fuzz.py`, drawn by `make results`. Two cores that the service shares"
    ]
    lines += ["with those who ask it; times are of one run and compare within it alone.\n"]
    for name, result in found.items():
        lines += pages[name](result)
    Folder(DOCS).write_bytes("service.md", "\n".join(lines).encode())


def show_load(result: dict[str, Any]) -> list[str]:
    """Give the lines about load, the claims first, and draw the curves."""
    targets, services = result["targets"], result["services"]
    lines = [f"## Load: {result['rows']:,} vectors in {result['shards']} shards, commit {result['commit']}\n"]
    lines += ["| replicas, shards dealt out | one query over the echo, json, binary | batches over one process |"]
    lines += [f"| | at most {targets['ratio_to_echo']} | at least {targets['batches']} |", "|---" * 3 + "|"]
    lines[-2:] = [lines[-1], lines[-2]]
    for service, measured in services.items():
        ratios = [show_ratio(measured["single"][body]) for body in ("json", "binary")]
        lines.append(f"| {service} | {', '.join(ratios)} | {show_ratio(measured['batches'])} |")
    lines += ["\nMedians of the rounds, with the least and the most.\n"]
    lines += [
        f"At {HIGH:.0%} of saturation 99 of 100 queries should take at most {targets['p99_over_median']:g} times the"
    ]
    lines += [
        "median. `saturated`: what 32 connections without pause are answered a second. A question's time counts from"
    ]
    lines += ["when it was due, also where the asker was late (`asked_late_p99_ms`); `other`: refused or broken.\n"]
    for service, measured in services.items():
        for body, curve in measured["load"].items():
            lines += [f"### {service}, {body}: saturated at {curve['saturation_per_s']:,} a second\n"]
            if curve["cores_kept_by_others"] > BUSY:
                lines += [
                    f"Other jobs kept {curve['cores_kept_by_others']:.1f} of {result['machine']['cores']} cores busy:"
                ]
                lines += ["this is a machine that the service has not to itself, and says nothing of the claim.\n"]
            lines += [f"| share | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
            for point in curve["points"]:
                shown = " | ".join(
                    f"{point[name]:,g}" if point[name] < 100 else f"{point[name]:,.0f}" for name in COLUMNS
                )
                lines.append(f"| {point['share']:.0%} | {shown} |")
            lines += [""]
    draw_curves(services)
    return [*lines, "![Median and 99th percentile against offered load](service-load.svg)\n"]


def show_ratio(figures: dict[str, Any]) -> str:
    return f"{figures['ratio']:.2f} ({figures['ratio_min']:.2f} to {figures['ratio_max']:.2f})"


def draw_curves(services: dict[str, Any]) -> None:
    """Draw median and tail against offered load, a panel for each service."""
    figure, panels = plt.subplots(1, len(services), figsize=(4 * len(services), 3.4), sharey=True, squeeze=False)
    for panel, (service, measured) in zip(panels[0], services.items(), strict=True):
        for (body, curve), colour in zip(measured["load"].items(), ("tab:blue", "tab:orange"), strict=True):
            offered = [point["offered_per_s"] for point in curve["points"]]
            for name, style in (("p50_ms", "-"), ("p99_ms", "--")):
                times = [point[name] for point in curve["points"]]
                panel.plot(offered, times, style, color=colour, marker="o", markersize=3, label=f"{body} {name[:3]}")
        panel.set(title=f"{service}", xlabel="offered queries a second", yscale="log")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("ms")
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(DOCS / "service-load.svg", metadata={"Date": None})
    plt.close(figure)


def show_kills(result: dict[str, Any]) -> list[str]:
    """Give the lines about processes that were killed."""
    lines = [f"## Kills: SIGKILL at random moments under load, seed {result['seed']}\n"]
    commits = sorted({found["commit"] for found in result["trials"].values()})
    lines += [f"Commits {', '.join(commits)}. Every answer was compared with that of the same shards in one process."]
    lines += ["`partial` ones said so and were right for the shards that answered; `refused`: no shard answered;"]
    lines += ["`broken`: no router did.\n"]
    names = ("kills", "queries", "whole", "partial", "refused", "broken", "wrong")
    lines += [f"| what | {' | '.join(names)} | writes acknowledged | lost | whole again after |", "|---" * 11 + "|"]
    for trial, found in result["trials"].items():
        counts = " | ".join(f"{found[name]:,}" for name in names)
        written = f"{found['acknowledged']:,} | {found['lost']}" if "lost" in found else "- | -"
        lines.append(f"| {TRIALS[trial]} | {counts} | {written} | {found['whole_again_s']} s |")
    return [*lines, ""]


def show_fuzz(result: dict[str, Any]) -> list[str]:
    """Give the lines about mutants of valid requests."""
    lines = [f"## Mutants of valid requests, seed {result['seed']}, commit {result['commit']}\n"]
    lines += [
        "Bytes flipped, cut out, doubled and moved in requests of every route and kind of body. `failed`: answered"
    ]
    lines += [
        "with a 5xx that no page documents; one not answered within 20 s would have ended the run. `none`: what was"
    ]
    lines += ["no HTTP any more, and was hung up on.\n"]
    lines += [
        "| routes | requests | answered | refused | not found | none | failed | resident MB at each tenth |",
        "|---" * 8 + "|",
    ]
    for name, routes in ROUTES.items():
        if (found := result.get(name)) is None:
            continue
        counts = " | ".join(f"{sum(found['statuses'].get(status, 0) for status in kind):,}" for kind in STATUSES)
        memory = ", ".join(f"{size:.0f}" for size in found["resident_mb"])
        lines.append(f"| {routes} | {found['requests']:,} | {counts} | {found['failed']} | {memory} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
