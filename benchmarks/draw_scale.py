"""Redraws docs/results/scale.md from what `scaling.py` measured and `simulate.py` worked out.

python benchmarks/draw_scale.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from record import RESULTS

from gsl_dist.storage import Folder

mpl.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs" / "results"
STAGES = ("codebook", "encode", "build", "serve")
TARGET = 1.6
PLACES = {
    "computing": "the workers' cores",
    "reading": "the store, as a whole",
    "driver": "the driver, a task at a time",
    "sending": "sending the codebook out",
    "answers": "adding up answers",
    "fetching": "the store, as a whole",
    "checking": "checksums on each machine",
    "manifest": "reading the manifest",
}
SHOWN = (1, 10, 50, 100, 1000)
FEWER = """\
Beyond some tens of parts a query waits for the slowest of them, and for the core of its router, which asks each
part by itself. So further machines are better copies than parts: they answer other queries, and stand in where one is
slow or gone. Several routers share the queries; none of them asks fewer parts.
"""


def main() -> None:
    mpl.rcParams["svg.hashsalt"] = "gsl_dist"
    lines = ["# How stages scale, and what a thousand machines would do\n"]
    if (path := RESULTS / "scaling.jsonl").exists():
        lines += show_scaling([json.loads(line) for line in path.read_text().splitlines()])
    if (path := RESULTS / "simulate.json").exists():
        result = json.loads(path.read_text())
        lines += [*show_assumed(result), *show_stages(result), *show_traffic(result), *show_queries(result)]
        lines += show_checks(result)
        draw_stages(result)
        draw_queries(result)
    Folder(DOCS).write_bytes("scale.md", "\n".join(lines).encode())


def show_scaling(rounds: list[dict[str, Any]]) -> list[str]:
    """Give the lines about one and two workers."""
    commits = ", ".join(dict.fromkeys(line["commit"] for line in rounds))
    lines = ["## One worker and two, measured\n"]
    lines += [
        f"`benchmarks/scaling.py`, commits {commits}: two cores, a worker one of them, warm processes; medians of"
    ]
    lines += ["the rounds, with the least and the most. `strong`: the time of one over that of two on the same work."]
    lines += ["`weak`: the time of one on half of it over that of two on all. `before`: what starting takes, cold. Two"]
    lines += [f"workers should encode at least {TARGET} times as fast as one.\n"]
    lines += [
        "`others`: cores that other jobs of the machine kept while two worked, which they do not share evenly. Build"
    ]
    lines += ["was measured in memory: on a disk, waiting for it is most of its time.\n"]
    lines += ["| stage | rounds | one | two | strong | weak | before | others |", "|---" * 8 + "|"]
    for stage in dict.fromkeys(line["stage"] for line in rounds):
        own = [line for line in rounds if line["stage"] == stage]
        times = " | ".join(f"{statistics.median(line[name] for line in own):.3g} s" for name in ("one_s", "two_s"))
        ratios = " | ".join(show_spread([line[name] for line in own]) for name in ("strong", "weak"))
        before = statistics.median(line["startup_s"] for line in own)
        others = statistics.median(line["cores_kept_by_others"] for line in own)
        lines.append(f"| {stage} | {len(own)} | {times} | {ratios} | {before:.1f} s | {others:.2f} |")
    return [*lines, ""]


def show_spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show_assumed(result: dict[str, Any]) -> list[str]:
    """Give the lines about what the simulation goes by."""
    assumed, measured = result["assumed"], result["measured"]
    lines = [f"## {result['rows']:,} vectors on up to 1,000 machines, simulated\n"]
    lines += [
        f"`benchmarks/simulate.py`, commit {result['commit']}: {result['dim']} dims, {result['code_bytes']} bytes,"
    ]
    lines += [
        f"{result['cells']:,} cells, vectors kept. Assumed of a machine: {assumed['cores']} cores like the one that"
    ]
    lines += [
        f"was measured, {assumed['network_gb_s']} GB/s to others, {assumed['store_gb_s']} GB/s to a store that gives"
    ]
    lines += [
        f"{assumed['store_limit_gb_s']:.0f} GB/s to all together. Measured here: {measured['task_ms']:.2f} ms of the"
    ]
    lines += [f"driver for a task, {measured['hash_gb_s']:.2f} GB/s of checksums, {measured['add_gb_s']:.1f} GB/s of"]
    lines += [
        f"statistics added and {measured['unpack_gb_s']:.1f} unpacked, {measured['call_us']:.0f} us of a router for"
    ]
    lines += [f"each replica that it asks and {measured['route_us']:.0f} us for a query itself.\n"]
    return lines


def show_stages(result: dict[str, Any]) -> list[str]:
    """Give the lines about the time of each stage and what decides it."""
    lines = ["| machines | " + " | ".join(f"{stage} | decided by" for stage in STAGES) + " |", "|---" * 9 + "|"]
    for told in result["stages"]:
        if told["machines"] in SHOWN:
            cells = [f"{show_time(told[s]['seconds'])} | {PLACES[told[s]['bottleneck']]}" for s in STAGES]
            lines.append(f"| {told['machines']:,} | {' | '.join(cells)} |")
    return [*lines, "\n![Time of each stage against machines](scale-stages.svg)\n"]


def show_time(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def show_bytes(count: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def show_traffic(result: dict[str, Any]) -> list[str]:
    """Give the lines about what goes through one process."""
    lines = ["### Through one process\n"]
    lines += [
        "Of the coordinator what it takes in and holds in one iteration; of the driver what it reads in all. `before`"
    ]
    lines += [
        "is how it was: every worker's statistics went to the coordinator, and the driver of encode read all files of"
    ]
    lines += ["codes to check them. Neither grows with the corpus now, which tests hold (`test_whole.py`,"]
    lines += ["`test_coordinate.py`); with shards, which machines ask for, the driver's notes do.\n"]
    lines += ["| machines | coordinator before | now | driver of encode before | now | time of its tasks | manifest |"]
    lines += ["|---" * 7 + "|"]
    for told in result["stages"]:
        if told["machines"] in SHOWN:
            codebook, encode, build = (told[stage] for stage in ("codebook", "encode", "build"))
            sizes = [codebook["coordinator_bytes_flat"], codebook["coordinator_bytes"]]
            sizes += [encode["driver_bytes_before"], encode["driver_bytes"]]
            shown = [*map(show_bytes, sizes), show_time(encode["driver_s"]), show_bytes(build["manifest_bytes"])]
            lines.append(f"| {told['machines']:,} | {' | '.join(shown)} |")
    flat = result["stages"][-1]["codebook"]["flat_answers"]
    joined = result["stages"][-1]["codebook"]["answers_s"]
    checked = result["stages"][-1]["encode"]["checking_in_the_driver"]
    lines += [
        f"\nOn 1,000 machines answers took {show_time(flat)} in all iterations and take {show_time(joined)}; checking"
    ]
    return [*lines, f"in the driver took {show_time(checked)} whatever the number of machines, and nothing now.\n"]


def show_queries(result: dict[str, Any]) -> list[str]:
    """Give the lines about a query that asks many parts."""
    assumed = result["assumed"]
    lines = ["### One query and its slowest part\n"]
    lines += [
        "The index cut into so many parts, a machine each. What a replica takes is worked out by `gsl plan` and drawn"
    ]
    lines += [f"from how answers were measured to spread; {assumed['slow_share']:.1%} of machines are"]
    lines += [
        f"{assumed['slow_times']:g} times as slow all the time. Hedged: where an answer takes longer than 95 of 100 do,"
    ]
    lines += [
        "a copy is asked too. `router`: what one router can answer a second. `partial`: of a million queries those that"
    ]
    lines += [
        f"lack a part, where a machine fails every {assumed['days_between_failures']:g} days and is replaced after"
    ]
    lines += [
        f"{assumed['replaced_after_s']:g} s and the fetching of its shards, with one copy of each part and with two.\n"
    ]
    lines += ["| parts | dealt out | asked | p50 | p99 | p99 hedged | p99.9 | p99.9 hedged | router | partial, 1 | 2 |"]
    lines += ["|---" * 11 + "|"]
    for told in result["fan_out"]:
        if told["parts"] in SHOWN:
            lines += [show_query(told["parts"], sharding, told[sharding]) for sharding in ("by id", "by cell")]
    return [*lines, "\n![The slowest of many answers](scale-queries.svg)\n", FEWER]


def show_query(parts: int, sharding: str, told: dict[str, Any]) -> str:
    alone, hedged = told["alone"], told["hedged after 95%"]
    times = [alone["p50_ms"], alone["p99_ms"], hedged["p99_ms"], alone["p99.9_ms"], hedged["p99.9_ms"]]
    shown = " | ".join(f"{value:.0f} ms" for value in times)
    partial = " | ".join(f"{1e6 * told[name]:,.3f}".rstrip("0") for name in ("partial_alone", "partial_of_two"))
    return f"| {parts:,} | {sharding} | {told['asked']:.0f} | {shown} | {told['router_per_s']:,.0f} | {partial} |"


def show_checks(result: dict[str, Any]) -> list[str]:
    """Give the lines that compare the sums with measured points."""
    if not result["checks"]:
        return []
    lines = ["## How far off the sums are where it was measured\n"]
    lines += [
        "By the costs of `gsl plan` alone, of other shapes and sizes; or from one worker on half of the work, which"
    ]
    lines += ["two should need for all of it.\n"]
    lines += ["| stage | workers | from | predicted | measured | off |", "|---" * 6 + "|"]
    for told in result["checks"]:
        off = told["predicted_s"] / told["measured_s"] - 1
        times = f"{told['predicted_s']:.3g} s | {told['measured_s']:.3g} s"
        lines.append(f"| {told['stage']} | {told['workers']} | {told.get('from', 'costs')} | {times} | {off:+.0%} |")
    return [*lines, ""]


def draw_stages(result: dict[str, Any]) -> None:
    """Draw the time of each stage against machines, and what it was where one process did what many do now."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    machines = [told["machines"] for told in result["stages"]]
    for place, stage in enumerate(STAGES):
        times = [told[stage]["seconds"] for told in result["stages"]]
        axes.plot(machines, times, color=f"C{place}", marker="o", markersize=3, label=stage)
    before = {
        "codebook": [max(t["codebook"]["seconds"], t["codebook"]["flat_answers"]) for t in result["stages"]],
        "encode": [t["encode"]["seconds"] + t["encode"]["checking_in_the_driver"] for t in result["stages"]],
    }
    for stage, times in before.items():
        axes.plot(machines, times, "--", color=f"C{STAGES.index(stage)}", label=f"{stage}, before")
    axes.set(xscale="log", yscale="log", xlabel="machines", ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, "scale-stages.svg")


def draw_queries(result: dict[str, Any]) -> None:
    """Draw median and tail of a query against the parts that it asks, with and without hedging."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    parts = [told["parts"] for told in result["fan_out"]]
    styles = {"alone": ("C0", "-"), "hedged after 99%": ("C1", "-"), "hedged after 95%": ("C2", "-")}
    for panel, sharding in zip(panels, ("by id", "by cell"), strict=True):
        for policy, (colour, style) in styles.items():
            tail = [told[sharding][policy]["p99_ms"] for told in result["fan_out"]]
            panel.plot(parts, tail, style, color=colour, marker="o", markersize=3, label=f"99th percentile, {policy}")
        middle = [told[sharding]["alone"]["p50_ms"] for told in result["fan_out"]]
        own = [told[sharding]["router_ms"] for told in result["fan_out"]]
        panel.plot(parts, middle, "--", color="C0", label="median, alone")
        panel.plot(parts, own, ":", color="black", label="of it, the router")
        panel.set(xscale="log", yscale="log", xlabel=f"parts, dealt out {sharding}")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="ms", ylim=(0.1, None))
    panels[0].legend(fontsize=7)
    save(figure, "scale-queries.svg")


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    with Folder(DOCS).whole(name) as draft:
        figure.savefig(draft, format="svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
