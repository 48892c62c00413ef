"""Redraws docs/results from the finished runs: a table and a figure for every experiment.

Every cell is mean and standard deviation over the seeds that are there; differences are paired by seed against the arm
that trains in two steps, the one with the quantization loss tuned best, and two steps with codewords taught to rank,
with the 95% interval of Student's t (bold where it leaves out zero). Nothing is measured here.

python benchmarks/draw_results.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from experiment import Arm, Experiment, Run, grid, lay_over
from record import RESULTS
from scipy import stats

from gsl_dist.config import check_config
from gsl_dist.errors import ConfigError
from gsl_dist.storage import Folder

mpl.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "results"
BASES = ("two-step", "penalty", "two-step, taught")
SHOWN = {
    "map_coded": "coded mAP",
    "map_float": "float mAP",
    "recall10_coded": "recall@10",
    "recall1_coded": "recall@1",
    "recall100_coded": "recall@100",
    "error": "relative quantization error",
    "fallback_rate": "fallback rate",
    "usage": "code entropy, share of the most",
}
OTHERS = {
    "indexes.md": "What indexes were to reach",
    "peers.md": "Beside other systems, on real vectors",
    "plan.md": "Plans for large corpora",
    "scale.md": "How stages scale, and what a thousand machines would do",
    "corruption.md": "Artefacts that are damaged",
    "service.md": "The service under load and under attack",
    "chaos.md": "Faults at random moments, in every stage",
    "served-peers.md": "The service beside others, each over its own wire",
    "encoders.md": "Encoders for bulk work",
}
FAR = 0.05
CAUTION = (
    "Mean and standard deviation over seeds; the split and its queries are the same for all. Strengths were tuned on "
    "training rows; the base (head, loss, dropout), the same for all arms, how codewords are taught and how many "
    "neighbours a spring has were first looked at on queries of one or two seeds ([what was tried](tried.md))."
)
YARDS = ("train_error", "held_out_error", "train_s", "encode_s")
Runs = dict[tuple[str, int], dict[int, dict[str, Any]]]


def main() -> None:
    # The same names for the parts of a figure every time: a drawing that is drawn again is the same file.
    mpl.rcParams["svg.hashsalt"] = "gsl_dist"
    pages = [draw_experiment(path) for path in sorted((RESULTS / "experiments").glob("*.jsonl"))]
    if (RESULTS / "labelfree.jsonl").exists():
        pages.append(draw_labelfree(RESULTS / "labelfree.jsonl"))
    if (RESULTS / "quantizers.json").exists():
        pages.append(draw_yardstick(RESULTS / "quantizers.json"))
    write(
        "README.md",
        "# Results\n\nRedrawn by `make results`; runs are in `benchmarks/results/`.\n\n"
        + "".join(f"- [{title}]({name})\n" for name, title in OTHERS.items() if (DOCS / name).exists())
        + "".join(pages)
        + "- [What was tried](tried.md), written by hand\n",
    )


def draw_experiment(path: Path) -> str:
    """Write the page and the figure of one experiment; give its line in the list, nothing if it has yet to run."""
    runs, commits = read_runs(path)
    if not runs:
        print(f"{path.stem}: no run has the settings that it has now", flush=True)
        return ""
    settings = (HERE / "experiments" / f"{path.stem}.yaml").read_text()
    title = settings.splitlines()[0].lstrip("# ")
    parts = [f"# {title}\n", f"Commits {', '.join(sorted(commits))}. {CAUTION}\n"]
    figures = [name for name in SHOWN if any(name in run for cell in runs.values() for run in cell.values())]
    parts += [table(runs, name) for name in figures]
    main_figure = figures[0]
    parts += [table_differences(runs, main_figure, base) for base in BASES if any(arm == base for arm, _ in runs)]
    if draw_differences(runs, main_figure, DOCS / f"{path.stem}.svg"):
        parts.append(f"![What each arm adds to two steps in {SHOWN[main_figure]}]({path.stem}.svg)\n")
    parts.append(table_tuned(runs))
    parts.append(f"## Settings\n\n```yaml\n{settings}```\n")
    write(f"{path.stem}.md", "\n".join(parts))
    return f"- [{title}]({path.stem}.md)\n"


def draw_labelfree(path: Path) -> str:
    """Write the page of codes for embeddings: recall by data, method and ranking; give its line in the list."""
    cells: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    commits = set()
    for run in map(json.loads, path.read_text().splitlines()):
        data, count, method, size, seed = run["key"]
        cells[data, count, size, run["how"]][method][seed] = run
        commits.add(run["commit"])
    title = "Codes for embeddings without labels: recall of the true neighbours in the original space"
    lines = [
        f"# {title}\n",
        f"`benchmarks/labelfree.py`; commits {', '.join(sorted(commits))}. 1,000 queries that took",
        "no part in training; exhaustive search; mean and standard deviation over seeds. Differences are of recall@10,",
        "paired by seed, with the 95% interval, bold where it leaves out zero.\n",
    ]
    for key in sorted(cells, key=str):
        lines += [*table_recall(key, cells[key]), ""]
    write("labelfree.md", "\n".join(lines))
    return f"- [{title}](labelfree.md)\n"


def table_recall(key: tuple[Any, ...], methods: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Give the lines of one table, best method last."""
    data, count, size, how = key
    lines = [f"## {data}, {count:,} items, {size} bytes, ranked by {how}\n"]
    lines += ["| method | recall@1 | recall@10 | recall@100 | minus faiss opq | seeds |", "|---" * 6 + "|"]
    ordered = sorted(methods.items(), key=lambda item: np.mean([run["recall10"] for run in item[1].values()]))
    for method, runs in ordered:
        shown = [describe([run[f"recall{k}"] for run in runs.values()]) for k in (1, 10, 100)]
        base = methods.get("faiss opq", {}) if method != "faiss opq" else {}
        difference = describe_difference([runs[s]["recall10"] - base[s]["recall10"] for s in runs if s in base], 3)
        lines.append(f"| {method} | {' | '.join(shown)} | {difference} | {len(runs)} |")
    return lines


def draw_yardstick(path: Path) -> str:
    """Write the page that compares quantization errors with faiss's; give its line in the list."""
    result = json.loads(path.read_text())
    title = "The yardstick: quantization error at equal bytes on equal rows, ours and faiss's"
    lines = [f"# {title}\n", f"`benchmarks/quantizers.py`; commit {result['commit']}; {result['seeds']} seed(s),"]
    lines += [f"{result['threads']} thread. Relative to the variance; mean and standard deviation.\n"]
    for data, table in result["data"].items():
        lines += [
            f"## {data}: {table['rows']:,} rows trained on, {table['held_out']:,} held out, {table['dim']} dims\n"
        ]
        lines += ["| method, bytes | error, trained on | error, held out | training s | encoding s |", "|---" * 5 + "|"]
        for method, figures in sorted(table["methods"].items(), key=order_methods):
            errors = [describe(figures[name]["values"]) for name in YARDS[:2]]
            times = [f"{figures[name]['mean']:.1f}" for name in YARDS[2:]]
            lines.append(f"| {' | '.join([method, *errors, *times])} |")
        lines.append("")
    write("quantizers.md", "\n".join(lines))
    return f"- [{title}](quantizers.md)\n"


def order_methods(item: tuple[str, Any]) -> tuple[int, str, str]:
    """Put those of equal bytes together, and each beside faiss's own."""
    name, size = item[0].rsplit(" ", 1)
    return int(size), name.removeprefix("faiss "), name


def describe(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def describe_difference(pairs: list[float], digits: int) -> str:
    """Give the mean with its 95% interval, bold where that leaves out zero; nothing of a single pair."""
    if (found := difference_of(pairs)) is None:
        return ""
    mean, reach = found
    text = f"{mean:+.{digits}f} ± {reach:.{digits}f}"
    return f"**{text}**" if abs(mean) > reach else text


def difference_of(pairs: list[float]) -> tuple[float, float] | None:
    """Give the mean of paired differences and how far its 95% interval reaches; two pairs at least."""
    if len(pairs) < 2:
        return None
    reach = stats.t.ppf(0.975, len(pairs) - 1) * np.std(pairs, ddof=1) / np.sqrt(len(pairs))
    return float(np.mean(pairs)), float(reach)


def pair_up(runs: Runs, figure: str, arm: str, base: str, bits: int) -> list[float]:
    """Give what an arm adds to another, seed by seed."""
    mine, theirs = runs.get((arm, bits), {}), runs.get((base, bits), {})
    return [mine[seed][figure] - theirs[seed][figure] for seed in sorted(mine.keys() & theirs.keys())]


def read_runs(path: Path) -> tuple[Runs, set[str]]:
    """Give the finished runs by arm and bits, then by seed; those that only tuned are left out."""
    runs: Runs = defaultdict(dict)
    commits = set()
    experiment = check_config(Experiment, yaml.safe_load((HERE / "experiments" / f"{path.stem}.yaml").read_text()))
    for run in map(json.loads, path.read_text().splitlines()):
        if not run["tuning"] and is_current(run, experiment):
            runs[run["arm"], run["bits"]][run["seed"]] = run
            commits.add(run["commit"])
    order = list(experiment.arms)
    return dict(sorted(runs.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))), commits


def is_current(run: dict[str, Any], experiment: Experiment) -> bool:
    """Tell whether a run is of the settings as they now are, and of a strength that its arm may take."""
    arm = experiment.arms.get(run["arm"])
    if arm is None:
        return False
    try:
        config = check_config(Arm, run["config"])
    except ConfigError:
        return False
    allowed = [lay_over(arm, values) for values in grid(arm.tune)]
    return config in allowed and run["key"] == Run(run["arm"], run["bits"], run["seed"], config, experiment).key


def table(runs: Runs, figure: str) -> str:
    def cell(arm: str, bits: int) -> str:
        values = [run[figure] for run in runs.get((arm, bits), {}).values() if run.get(figure) is not None]
        if not values:
            return ""
        deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        return f"{np.mean(values):.4f}{deviation} ({len(values)})"

    return lay_table(runs, f"{raise_first(SHOWN[figure])} (number of seeds)", cell)


def table_differences(runs: Runs, figure: str, base: str) -> str:
    def cell(arm: str, bits: int) -> str:
        return "" if arm == base else describe_difference(pair_up(runs, figure, arm, base, bits), 4)

    return lay_table(runs, f"{raise_first(SHOWN[figure])} minus that of {base}, paired by seed, 95% interval", cell)


def table_tuned(runs: Runs) -> str:
    def cell(arm: str, bits: int) -> str:
        cells = runs.get((arm, bits), {}).values()
        return ", ".join(
            sorted({f"{run['config']['snap']['beta']:g} / {run['config']['snap']['weight']:g}" for run in cells})
        )

    return lay_table(runs, "Strength (beta / weight), as set or as tuned on held-out training rows", cell)


def lay_table(runs: Runs, title: str, cell: Any) -> str:
    arms, bits = list(dict.fromkeys(arm for arm, _ in runs)), sorted({bits for _, bits in runs})
    lines = [f"## {title}\n", "| arm | " + " | ".join(f"{b} bits" for b in bits) + " |", "|---" * (len(bits) + 1) + "|"]
    lines += [f"| {arm} | " + " | ".join(cell(arm, b) for b in bits) + " |" for arm in arms]
    return "\n".join(lines) + "\n"


def raise_first(text: str) -> str:
    return text[0].upper() + text[1:]


def draw_differences(runs: Runs, figure: str, path: Path) -> bool:
    """Draw what every arm adds to two steps, side by side at each number of bits; what is far below is not drawn.

    Tells whether there was anything to draw: two seeds make an interval.
    """
    arms, bits = list(dict.fromkeys(arm for arm, _ in runs)), sorted({bits for _, bits in runs})
    points = {(arm, b): difference_of(pair_up(runs, figure, arm, arms[0], b)) for arm in arms[1:] for b in bits}
    kept = {key: found for key, found in points.items() if found and found[0] > -FAR}
    drawn = list(dict.fromkeys(arm for arm, _ in kept))
    if not drawn:
        return False
    drawing, axes = plt.subplots(figsize=(9, 4.5))
    for place, arm in enumerate(drawn):
        at = [
            (i + 0.8 * (place + 0.5) / len(drawn) - 0.4, *kept[arm, b]) for i, b in enumerate(bits) if (arm, b) in kept
        ]
        color, marker = f"C{place % 10}", "os"[place // 10 % 2]
        axes.errorbar(*zip(*at, strict=True), label=arm, capsize=2, ls="", color=color, marker=marker, markersize=4)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="bits an item", ylabel=f"{SHOWN[figure]} minus that of {arms[0]}")
    axes.set_xticks(range(len(bits)), [str(b) for b in bits])
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3, axis="y")
    with Folder(DOCS).whole(path.name) as draft:
        drawing.savefig(draft, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(drawing)
    return True


def write(name: str, text: str) -> None:
    Folder(DOCS).write_bytes(name, text.encode())


if __name__ == "__main__":
    main()
