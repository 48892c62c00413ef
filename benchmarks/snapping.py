"""What snapping buys on the demo's task: coded mAP and quantization error against two steps, seed by seed.

Both arms share network, loss, steps and seed (and so the same initial weights and batches); the two-step codebook is
fitted after training. The loop is the library's own `fit` in one process, without Ray. Runs are cached one by one, so
an interrupted benchmark goes on where it stopped.

python benchmarks/snapping.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, spread, write_result

from gsl_dist.cluster.train import EpochBatches, TrainConfig, TrainingSet
from gsl_dist.codebook import Codebook
from gsl_dist.config import check_config
from gsl_dist.data import open_corpus
from gsl_dist.demo import (
    MAIN_BITS,
    OTHER_BITS,
    SNAPPED,
    TWO_STEP,
    Demo,
    Held,
    images,
    score_representations,
    train_settings,
)
from gsl_dist.encoders import make_encoder
from gsl_dist.fit import Training, embed, fit
from gsl_dist.losses import make_loss
from gsl_dist.quantizers import LloydConfig, make_quantizer, train_codebook
from gsl_dist.sampling import plan_epoch
from gsl_dist.snap import SnappingLayer
from gsl_dist.storage import Folder

BITS = tuple(sorted((MAIN_BITS, *OTHER_BITS)))
CACHE = RESULTS / "snapping"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    rows = read_rows()
    held = Held(open_corpus(images("database")).read_all(), open_corpus(images("queries")).read_all())
    runs = [run_seed(seed, rows, held) for seed in seeds]
    write_result("snapping", {"bits": {str(bits): compare(runs, bits) for bits in BITS}, "step": measure_step(rows)})


def read_rows() -> TrainingSet:
    batch = open_corpus(images("train")).read_all()
    return TrainingSet(batch.items, batch.labels, list(range(10)))


def run_seed(seed: int, rows: TrainingSet, held: Held) -> dict[str, Any]:
    two_step = None
    scores: dict[str, Any] = {}
    for bits in BITS:
        key = {"seed": seed, "bits": bits, "settings": settings(seed, bits, SNAPPED).model_dump(mode="json")}
        name = f"seed{seed}-bits{bits}.json"
        cache = Folder(CACHE)
        if cache.exists(name) and (kept := cache.read_json(name))["key"] == key:
            scores[str(bits)] = kept["scores"]
            continue
        if two_step is None:
            two_step = train(settings(seed, bits, TWO_STEP), rows)
        snapped = train(settings(seed, bits, SNAPPED), rows)
        scores[str(bits)] = {
            "snapped": score(snapped, snapped.codebook, held),
            "two_step": score(two_step, fit_after(two_step, bits, rows, seed), held),
        }
        cache.write_json(name, {"key": key, "scores": scores[str(bits)]})
        print(seed, bits, scores[str(bits)], flush=True)
    return scores


def settings(seed: int, bits: int, snap: dict[str, Any]) -> TrainConfig:
    return check_config(TrainConfig, train_settings(Demo(Path("unused"), seed, print), bits, snap, "unused"))


def train(config: TrainConfig, rows: TrainingSet) -> Training:
    training = prepare(config)
    quantizer = make_quantizer(config.quantizer, training.encoder.dim)

    def batches(epoch: int) -> EpochBatches:
        return EpochBatches(
            rows, plan_epoch(rows.labels, config.fit.batch_size, seed=config.fit.seed, epoch=epoch), 0, 1
        )

    def refresh(training: Training) -> Any:
        y_ND = embed(training.encoder, torch.from_numpy(rows.items))
        return train_codebook(y_ND, quantizer, config.lloyd, seed=config.fit.seed, start=training.codebook)

    fit(training, batches, refresh)
    return training


def prepare(config: TrainConfig) -> Training:
    torch.manual_seed(config.fit.seed)
    encoder = make_encoder(config.encoder, (28, 28, 1))
    loss = make_loss(config.loss, classes=10, dim=encoder.dim)
    return Training(encoder, loss, SnappingLayer(config.snap), config.fit)


def fit_after(training: Training, bits: int, rows: TrainingSet, seed: int) -> Codebook:
    quantizer = make_quantizer(settings(seed, bits, TWO_STEP).quantizer, training.encoder.dim)
    y_ND = embed(training.encoder, torch.from_numpy(rows.items))
    return train_codebook(y_ND, quantizer, LloydConfig(iterations=25), seed=seed).codebook


def score(training: Training, codebook: Codebook, held: Held) -> dict[str, float]:
    scored = score_representations(training.encoder, codebook, held)
    return {"map": scored.map, "error": scored.error}


def compare(runs: list[dict[str, Any]], bits: int) -> dict[str, Any]:
    rows = [run[str(bits)] for run in runs]
    table: dict[str, Any] = {}
    for figure in ("map", "error"):
        for arm in ("snapped", "two_step"):
            table[f"{figure}_{arm}"] = spread([row[arm][figure] for row in rows])
        table[f"{figure}_difference"] = spread([row["snapped"][figure] - row["two_step"][figure] for row in rows])
    return table


def measure_step(rows: TrainingSet, rounds: int = 40) -> dict[str, Any]:
    """Time a whole training step with and without snapping, turn by turn, and give the ratio."""
    arms = {name: prepare(settings(0, MAIN_BITS, snap)) for name, snap in (("snap", SNAPPED), ("plain", TWO_STEP))}
    quantizer = make_quantizer(settings(0, MAIN_BITS, SNAPPED).quantizer, arms["snap"].encoder.dim)
    y_ND = embed(arms["snap"].encoder, torch.from_numpy(rows.items[:1024]))
    arms["snap"].snapping.set_codebook(train_codebook(y_ND, quantizer, LloydConfig(iterations=2)).codebook)
    chosen = np.arange(256)
    items, labels = torch.from_numpy(rows.items[chosen]), torch.from_numpy(rows.labels[chosen])
    spent: dict[str, list[float]] = {"snap": [], "plain": []}
    for _ in range(rounds):
        for name, training in arms.items():
            training.encoder.train()
            start = time.perf_counter()
            loss = training.loss(training.snapping(training.encoder(items)), labels)
            training.optimizer.zero_grad()
            loss.backward()
            training.optimizer.step()
            spent[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(taken[5:])) for name, taken in spent.items()}
    ratios = [snap / plain for snap, plain in zip(spent["snap"][5:], spent["plain"][5:], strict=True)]
    return {
        "plain_ms": medians["plain"] * 1e3,
        "snap_ms": medians["snap"] * 1e3,
        "ratio_of_medians": medians["snap"] / medians["plain"],
        "ratio": spread(ratios),
    }


if __name__ == "__main__":
    main()
