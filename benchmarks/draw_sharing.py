"""Sections of docs/results/encoders.md on networks that share weights: between layers, and between modalities.

Each takes the file of finished runs and gives lines; `draw_encoders.py` puts them on the page.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from draw_results import describe_difference

MODALITIES = """Fashion-MNIST as shipped at 14 x 14 pixels: of every item the left half of the picture and the right
half of its edges, with noise; 4,000 items to learn from, 7,000 in the database, 1,000 queries, 16 bits an item. Equal
rows, steps and settings, 16 epochs. As large as two networks: wider, to have
as many parameters.
"""
ONE = """## Searching with one modality

The same networks, where they do with one; coded mAP, codebook and codes as above. In both: one modality asks, the
database holds whole items. Across: it asks a database that has the other modality alone.
"""
LAYERS = """A plain network of nine convolutions, eight of one shape, on Fashion-MNIST as shipped at 14 x 14 pixels,
trained for 12 epochs, compressed and trained on for 6; 4,000 images to learn from, 7,000 in the database, 1,000
queries, 16 bits an item. The ratio is of the whole encoder, with the first and the last layer as they were. Start: the
share of queries whose nearest training image is of their class, before the network was trained on.
"""
VGG = """The claim that goes with the idea is 16 times fewer parameters of a VGG-16 without loss. Here its thirteen
convolutions at their widths (64, 64, 128, 128, 3 x 256, 6 x 512) see the same images at 14 x 14 pixels, with groups of
channels normalized and one linear layer behind them, without the two wide ones that hold nine tenths of a VGG-16's
parameters; trained for 12 epochs, and on for 8. Layers whose shape no other has are decomposed alone. Start as above.
"""
BASES = ("two networks", "shared, normalization private")
LAYERWISE = {"common and unique": "layer by layer", "common and unique, similarity": "layer by layer, similarity"}
LAYERWISE |= {"common only, similarity": "layer by layer, similarity"}
Arm = dict[int, dict[str, Any]]
"""The runs of one arm, by seed."""


def show_modalities(path: Path) -> list[str]:
    """Give the lines on one network for two modalities."""
    arms: dict[str, Arm] = defaultdict(dict)
    for run in read(path):
        arms[run["arm"]][run["seed"]] = run
    lines = ["## One network for two modalities\n", f"`benchmarks/multimodal.py`, {show_commits(arms)}. {MODALITIES}"]
    head = ["network", "parameters", "coded mAP", *(f"minus {base}" for base in BASES), "quantization error", "seeds"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm, runs in arms.items():
        cells = [arm, f"{first(runs)['parameters']:,}", describe([run["map"] for run in runs.values()])]
        cells += [show_pairs(runs, arms.get(base, {}), "map") for base in BASES]
        cells += [describe([run["error"] for run in runs.values()], 3), str(len(runs))]
        lines.append(f"| {' | '.join(cells)} |")
    asked = {"map_image_in_both": "image in both", "map_edges_in_both": "edges in both"}
    asked |= {"map_image_across": "image across", "map_edges_across": "edges across"}
    lines += ["", ONE, f"| network | {' | '.join(asked.values())} |", "|---" * 5 + "|"]
    for arm, runs in arms.items():
        if "map_image_across" in first(runs):
            cells = [describe([run[name] for run in runs.values()], 3) for name in asked]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
    return [*lines, ""]


def show_layers(path: Path) -> list[str]:
    """Give the lines on compression across layers."""
    return show_compression(path, "MICIK-style compression across layers", "crosslayer.py", LAYERS)


def show_vgg(path: Path) -> list[str]:
    """Give the lines on compression of the convolutions of a VGG-16."""
    return show_compression(path, "The convolutions of a VGG-16", "crosslayer.py --network vgg16", VGG)


def show_compression(path: Path, title: str, script: str, words: str) -> list[str]:
    """Give the lines on the compression of one network."""
    tables: dict[int, dict[str, Arm]] = defaultdict(lambda: defaultdict(dict))
    for run in read(path):
        tables[run["ratio"]][run["arm"]][run["seed"]] = run
    if 1 not in tables:
        return []
    [(whole, control)] = tables.pop(1).items()
    steps = first(control)["steps"]
    lines = [f"## {title}\n"]
    lines += [f"`benchmarks/{script}`, {show_commits({whole: control})}; {steps} steps of training on. {words}"]
    head = ["fewer", "weights", "parameters", "file", "start", "accuracy", "coded mAP", "mAP minus layer by layer"]
    head += ["mAP minus the whole network", "seeds"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines.append(f"| | {whole} | {show_layer_run(control)} | | | {len(control)} |")
    for ratio, arms in sorted(tables.items()):
        for arm, runs in arms.items():
            base = arms.get(LAYERWISE.get(arm, ""), {})
            pairs = [show_pairs(runs, others, "map") for others in (base, control)]
            lines.append(f"| {ratio}x | {arm} | {show_layer_run(runs)} | {' | '.join(pairs)} | {len(runs)} |")
    return [*lines, ""]


def show_layer_run(runs: Arm) -> str:
    """Give the cells of parameters, bytes, start, accuracy and mAP."""
    cells = [f"{first(runs)['parameters']:,}", f"{first(runs)['bytes']:,} B"]
    cells.append(describe([run["accuracy_start"] for run in runs.values()], 3))
    return " | ".join([*cells, *(describe([run[name] for run in runs.values()]) for name in ("accuracy", "map"))])


def show_pairs(runs: Arm, others: Arm, figure: str) -> str:
    """Give a difference paired by seed; nothing of an arm with itself."""
    seeds = sorted(runs.keys() & others.keys())
    return "" if runs is others else describe_difference([runs[s][figure] - others[s][figure] for s in seeds], 4)


def show_commits(arms: dict[str, Arm]) -> str:
    return "commits " + ", ".join(sorted({run["commit"] for runs in arms.values() for run in runs.values()}))


def describe(values: list[float], digits: int = 4) -> str:
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def first(runs: Arm) -> dict[str, Any]:
    return next(iter(runs.values()))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
