"""Redraws docs/results/encoders.md from what the benchmarks of encoders left: a section for each file that is there.

Nothing is measured here.

python benchmarks/draw_encoders.py
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from draw_results import describe_difference
from draw_sharing import show_layers, show_modalities, show_vgg
from record import RESULTS

from gsl_dist.storage import Folder

DOCS = Path(__file__).parent.parent / "docs" / "results"
OPENING = """Drawn by `make results`; what the methods are, and whose, is in [encoders.md](../encoders.md),
[crosslayer.md](../crosslayer.md) and [multimodal.md](../multimodal.md). Mean and
standard deviation over seeds; differences are paired by seed, with the 95% interval of Student's t, bold where it
leaves out zero.
"""
STOCHASTIC = """The demo's CNN on 4,000 images,
snapped; a stage has 8 epochs of one schedule of learning rates. Plain: all weights are quantized from the first step
on, in one stage (what the published comparison is with), in four that restart the schedule as stochastic quantization
does, and in one schedule as long as the four. Stochastic: ratios .5, .75, .875, 1, by three rules. Accuracy: of 8,000
images outside of training, by the nearest proxy; coded mAP at 16 bits.
"""
INCREMENTAL = """From the same float network on,
half, 3/4 and 7/8 of the weights are frozen at powers of two, the rest is trained after each, and then frozen too. The
control takes the same steps and restarts in float. Accuracy and mAP as above.
"""
PIPELINE = """One seed: train, codebook, encode, build and evaluate on
the demo's corpus, by config; float is trained for 20 epochs, stochastic for 4 x 10, powers of two for 15 after the 20
of float, so that mAP is not at equal training. Eight of nine layers have one shape, which the demo's three do not; they
are trained for 12 epochs and, with 4 times fewer parameters, for 6 more. After a colon: `execution`, where it is not
torch; queries always go through torch in float32. Shipped: weights and card, what a worker fetches besides the codebook
(and besides the graph, of the size that the weights have in float32, or in bytes). Rows a second, where they were
timed: of one worker that holds the encoder, reading, decoding of images, codes and writing included; the best of
the rounds, arms turn by turn. Equal codes: the share of their bytes that is the same as by torch.
"""
WAYS = """Rows a second of one core,
by the clock of the process, median of rounds, ways turn by turn; 28 x 28 pixels, 64 images at a time, but for "at
once", 1,024. Agreement is with torch's float32, of networks as they begin. Ready: seconds until the first row: export
and calibration on 512 rows, or compiling; every worker compiles for itself, graphs are made once.

"""
TRAINED = """The demo's network as it was trained, its 7,000 images coded by each way, asked
by 1,000 queries that go through torch; cells and codewords as trained, 16 bits an item.

"""
NETWORKS = {
    "demo": "the demo's CNN, 16, 32, 64 channels",
    "shared": "nine convolutions of 32 channels",
    "deep": "seven convolutions of 64 to 256 channels",
    "residual": "residual blocks of 64 to 256 channels, normalized over the batch",
}
Arm = dict[int, dict[str, Any]]
"""The runs of one arm, by seed."""


def main() -> None:
    found = {name: RESULTS / name for name in SECTIONS if (RESULTS / name).exists()}
    if not found:
        return
    lines = ["# Encoders for bulk work\n"]
    lines += [OPENING]
    for name, path in found.items():
        lines += SECTIONS[name](path)
    Folder(DOCS).write_bytes("encoders.md", "\n".join(lines).encode())


def show_lowbit(path: Path) -> list[str]:
    """Give the lines on stochastic and incremental quantization."""
    tables: dict[tuple[str, int], dict[str, Arm]] = defaultdict(lambda: defaultdict(dict))
    for run in map(json.loads, path.read_text().splitlines()):
        tables[run["table"], run["rows"]][run["arm"]][run["seed"]] = run
    lines = []
    if stochastic := [arms for (table, _), arms in tables.items() if table == "stochastic"]:
        lines += show_stochastic(stochastic[0])
    for (table, rows), arms in sorted(tables.items()):
        if table == "incremental":
            lines += show_incremental(arms, rows)
    return lines


def show_stochastic(arms: dict[str, Arm]) -> list[str]:
    lines = ["## Stochastic quantization against plain low-bit training\n"]
    lines += [f"`benchmarks/lowbit.py stochastic`, {show_commits(arms)}. {STOCHASTIC}"]
    head = ["weights, training", "accuracy", "coded mAP", "file", "seeds"]
    head += ["accuracy minus plain, four stages", "coded mAP minus that", "accuracy minus plain, one stage"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, runs in arms.items():
        kind = arm.split(",")[0]
        equal, short = (arms.get(f"{kind}, {name}", {}) for name in ("four stages", "one stage"))
        figures = [show_pairs(runs, equal, "accuracy"), show_pairs(runs, equal, "map")]
        figures.append(show_pairs(runs, short, "accuracy"))
        lines.append(f"| {arm} | {show_run(runs)} | {' | '.join(figures)} |")
    return [*lines, ""]


def show_incremental(arms: dict[str, Arm], rows: int) -> list[str]:
    lines = [f"## Incremental quantization to powers of two, {rows:,} training images\n"]
    lines += [f"`benchmarks/lowbit.py incremental`, {show_commits(arms)}. {INCREMENTAL}"]
    head = ["weights", "accuracy", "coded mAP", "file", "seeds", "accuracy minus control", "coded mAP minus control"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, runs in arms.items():
        control = arms.get("control", {})
        figures = [show_pairs(runs, control, name) for name in ("accuracy", "map")]
        lines.append(f"| {arm} | {show_run(runs)} | {' | '.join(figures)} |")
    return [*lines, ""]


def show_run(runs: Arm) -> str:
    """Give the cells of accuracy, mAP, bytes and seeds."""
    figures = [describe([run[name] for run in runs.values()]) for name in ("accuracy", "map")]
    return " | ".join([*figures, f"{next(iter(runs.values()))['bytes']:,} B", str(len(runs))])


def show_pairs(runs: Arm, others: Arm, figure: str) -> str:
    """Give a difference paired by seed; nothing of an arm with itself."""
    seeds = sorted(runs.keys() & others.keys())
    return "" if runs is others else describe_difference([runs[s][figure] - others[s][figure] for s in seeds], 4)


def show_execution(path: Path) -> list[str]:
    """Give the lines on ways of computing an encoder."""
    results = {name: path.with_name(f"execution-{name}.json") for name in NETWORKS}
    found = {name: json.loads(other.read_text()) for name, other in results.items() if other.exists()}
    commits = ", ".join(sorted({result["commit"] for result in found.values()}))
    setting = next(iter(found.values()))["setting"]
    lines = ["## Ways of computing an encoder\n"]
    lines += [f"`benchmarks/execution.py`, commits {commits}, {setting['runtime']}, {setting['processor']}. {WAYS}"]
    head = ["network", "way", "rows a second", "over torch", "mean cosine", "squared error of the variance", "ready, s"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, result in found.items():
        for way, figures in result["ways"].items():
            ready = f"{figures['start_s']:.1f}" if "start_s" in figures else ""
            cells = [f"{NETWORKS[name]}; {result['setting']['parameters']:,}", way, f"{figures['rows_per_s']:,.0f}"]
            cells += [f"{figures['over_torch']:.2f}", f"{figures['cosine']:.5f}", f"{figures['error']:.1e}", ready]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *show_trained(path.with_name("execution-trained.json"))]


def show_trained(path: Path) -> list[str]:
    """Give the lines on what codes by other ways than torch are worth."""
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    lines = [f"`benchmarks/execution.py --trained`, commit {result['commit']}. {TRAINED}"]
    head = ["database coded by", "coded mAP", "quantization error", "mean cosine", "least cosine", "mean distance"]
    head += ["equal bytes of codes", "equal cells"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for way, found in sorted(result["ways"].items(), key=lambda item: -item[1]["cosine"]):
        cells = [way, f"{found['map_coded']:.5f}", f"{found['error']:.5f}"]
        cells += [f"{found[name]:.5f}" for name in ("cosine", "least_cosine", "distance", "equal_codes", "equal_cells")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def show_pipeline(path: Path) -> list[str]:
    """Give the lines on encoders that went through the whole pipeline."""
    result = json.loads(path.read_text())
    lines = ["## Through the whole pipeline\n"]
    lines += [f"`benchmarks/pipeline.py`, commit {result['commit']}. {PIPELINE}"]
    head = ["encoder", "weights file", "of float", "its ideal", "shipped", "rows a second", "over float", "coded mAP"]
    head += ["equal codes"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, found in sorted(result["arms"].items(), key=lambda item: not item[0].startswith("float")):
        sizes = [f"{found['file_bytes']:,} B", f"{found['of_float']:.3f}", f"{found['ideal_bytes']:,} B"]
        timed = "rows_per_s" in found
        speed = [f"{found['rows_per_s']:,.0f}", f"{found['over_float']:.2f}"] if timed else ["", ""]
        name = f"{arm}, which was {found['decided']}" if arm.endswith("fastest") else arm
        equal = f"{found['equal_codes']:.4f}" if "equal_codes" in found else ""
        cells = [name, *sizes, f"{found['shipped_bytes']:,} B", *speed, f"{found['map_coded']:.4f}", equal]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def show_commits(arms: dict[str, Arm]) -> str:
    return "commits " + ", ".join(sorted({run["commit"] for runs in arms.values() for run in runs.values()}))


def describe(values: list[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{deviation}"


SECTIONS: dict[str, Callable[[Path], list[str]]] = {
    "lowbit.jsonl": show_lowbit,
    "crosslayer.jsonl": show_layers,
    "crosslayer-vgg16.jsonl": show_vgg,
    "multimodal.jsonl": show_modalities,
    "execution-demo.json": show_execution,
    "pipeline.json": show_pipeline,
}


if __name__ == "__main__":
    main()
