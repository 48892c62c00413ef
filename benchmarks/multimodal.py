"""What sharing one network between modalities costs and what fusion without parameters adds: coded mAP, run by run.

Fashion-MNIST as shipped, at 14 x 14 pixels: of every item the left half of the picture and the right half of its edges
(Sobel's, of the whole picture), both with light noise, so that neither says all. All arms share rows, steps, seeds,
loss and codebook settings; they differ in how the network is shared and what it fuses. The corpora are Parquet with two
columns of images, read as the train stage reads them; the loop is the library's own, in one process.

python benchmarks/multimodal.py [--seeds 0 1 2 3 4] [--arm NAME ...]
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from runs import Log, count_parameters, train

from gsl_dist.cluster.train import TrainConfig, TrainingSet
from gsl_dist.config import check_config
from gsl_dist.data import Batch, fashion_folder, open_corpus
from gsl_dist.demo import Held, score_representations
from gsl_dist.encoders import FusedEncoder
from gsl_dist.fit import Training

PAIRS = Path("build/bench/pairs")
MODALITIES = ("image", "edges")
SIDE, NOISE = 14, 12.0
PLAIN = {"shuffle": False, "shift": False}
ARMS: dict[str, dict[str, Any]] = {
    "image alone": {**PLAIN},
    "edges alone": {**PLAIN},
    "two networks": {"sharing": "none", **PLAIN},
    "shared, normalization too": {"sharing": "all", **PLAIN},
    "shared, normalization private": {**PLAIN},
    "+ shuffle": {"shift": False},
    "+ shift": {"shuffle": False},
    "+ shuffle and shift": {},
    "+ both, modality dropout .3": {"modality_dropout": 0.3},
    "+ both, as large as two networks": {"channels": [30, 60]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--arm", nargs="*", default=list(ARMS))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    make_pairs()
    log = Log("multimodal")
    for seed in wanted.seeds:
        for arm in wanted.arm:
            config = settings(arm, seed)
            decided = config.model_dump(mode="json", exclude={"output", "resources", "corpus"})
            words = {"arm": arm, "seed": seed}
            log.do({"arm": arm, "side": SIDE, "noise": NOISE, **decided}, words, lambda c=config: carry_out(c))


def settings(arm: str, seed: int) -> TrainConfig:
    columns = [name for name in MODALITIES if name in arm.split()[0]] if arm.endswith("alone") else MODALITIES
    return check_config(
        TrainConfig,
        {
            "corpus": corpus("train", columns),
            "output": "unused",
            "encoder": {"kind": "asymfusion", "dim": 48, "channels": [20, 40], **ARMS[arm]},
            "loss": {"kind": "proxy", "temperature": 0.2},
            "quantizer": {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 16, "residual": False},
            "snap": {"variant": "spring", "weight": 1.0, "neighbours": 16},
            "fit": {"epochs": 16, "warmup_epochs": 4, "batch_size": 128, "learning_rate": 2e-3, "seed": seed},
        },
    )


def corpus(part: str, columns: Any) -> dict[str, Any]:
    return {
        "path": str(PAIRS / f"{part}.parquet"),
        "id_column": "id",
        "label_column": "label",
        "image": {"height": SIDE, "width": SIDE},
        "modalities": [{"column": name, "channels": 1} for name in columns],
    }


def carry_out(config: TrainConfig) -> dict[str, Any]:
    rows = config.corpus.model_copy
    read = {part: open_corpus(rows(update={"path": str(PAIRS / f"{part}.parquet")})).read_all() for part in PARTS}
    learned = read["train"]
    training = train(config, TrainingSet(learned.items, learned.labels, list(range(10))))
    figures: dict[str, Any] = {"parameters": count_parameters(training.encoder), "loss": training.history[-1].loss}
    backbone = training.encoder.backbone
    figures["alpha"] = torch.softmax(backbone.alpha, 0).tolist()
    figures |= score(training, read["database"], read["queries"], "map")
    if len(MODALITIES) == len(backbone.names) and backbone.does_with_one:
        figures |= score_alone(training, read["database"], read["queries"])
    return figures


def score_alone(training: Training, database: Batch, queries: Batch) -> dict[str, Any]:
    """Search with one modality: among whole items, and across, one modality among items of the other alone."""
    figures: dict[str, Any] = {}
    for bit, name in enumerate(MODALITIES):
        figures |= score(training, database, keep_one(queries, bit), f"map_{name}_in_both")
        figures |= score(training, keep_one(database, 1 - bit), keep_one(queries, bit), f"map_{name}_across")
    return figures


def keep_one(batch: Batch, bit: int) -> Batch:
    items = batch.items.copy()
    items[..., -1] = 1 << bit
    return Batch(batch.ids, items, batch.labels)


def score(training: Training, database: Batch, queries: Batch, name: str) -> dict[str, float]:
    assert isinstance(training.encoder, FusedEncoder) and training.codebook is not None
    scored = score_representations(training.encoder, training.codebook, Held(database, queries))
    return {name: scored.map} | ({"error": scored.error} if name == "map" else {})


PARTS = ("train", "database", "queries")


def make_pairs() -> None:
    """Write the corpora of two modalities, the same every time."""
    PAIRS.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(PARTS):
        path = PAIRS / f"{part}.parquet"
        if path.exists():
            continue
        table = pq.read_table(fashion_folder() / f"{part}.parquet")
        rng = np.random.default_rng(seed)
        pixels = [
            np.asarray(Image.open(io.BytesIO(png)).convert("L"), np.float64) for png in table["image"].to_pylist()
        ]
        columns = {
            "image": [hide(picture, "right", rng) for picture in pixels],
            "edges": [hide(find_edges(picture), "left", rng) for picture in pixels],
        }
        pq.write_table(pa.table({"id": table["id"], "label": table["label"], **columns}), path)


def find_edges(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the length of Sobel's gradient, 255 at most."""
    wide = np.pad(pixels, 1, mode="edge")
    smooth = [wide[:-2] + 2 * wide[1:-1] + wide[2:], wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]]
    across, down = smooth[0][:, 2:] - smooth[0][:, :-2], smooth[1][2:] - smooth[1][:-2]
    return np.minimum(np.hypot(across, down) / 4, 255)


def hide(pixels: NDArray[np.float64], half: str, rng: np.random.Generator) -> bytes:
    """Black out one half, add noise everywhere, and encode."""
    seen, middle = pixels.copy(), pixels.shape[1] // 2
    seen[:, middle:] *= half != "right"
    seen[:, :middle] *= half != "left"
    seen += rng.normal(0, NOISE, seen.shape)
    stream = io.BytesIO()
    Image.fromarray(seen.clip(0, 255).round().astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main()
