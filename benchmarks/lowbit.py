"""What low-bit weights cost and win on the demo's task: accuracy, coded mAP and bytes of the encoder, seed by seed.

`stochastic`: stochastic quantization against the same levels everywhere from the first step on, at equal total
training: in four stages of which each restarts the learning rate, and in one schedule four times as long; against float
likewise; and against one short schedule, as the published comparison is. `incremental`: powers of two at 4, 5 and 7
bits against the float network trained for the same extra steps, with all 4,000 rows and with 200.

All arms share network, loss, snapping, seed, first weights and batches; 200 rows are drawn by the seed. `accuracy` is
the share of the 8,000 images outside of training whose nearest class proxy is that of their class; `map` is of 16-bit
codes of the codebook landed on, every query against the whole database. The loop is the library's own `fit` in one
process. A finished run is a line of `results/lowbit.jsonl`; an interrupted benchmark goes on where it stopped.

python benchmarks/lowbit.py [stochastic incremental] [--seeds 5] [--arms four paper]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS
from safetensors.torch import save
from snapping import read_rows
from torch.nn import functional as F

from gsl_dist.cluster.train import EpochBatches, TrainConfig, TrainingSet, plan
from gsl_dist.config import check_config, fingerprint_config
from gsl_dist.data import open_corpus
from gsl_dist.demo import (
    MAIN_BITS,
    SNAPPED,
    Demo,
    Held,
    images,
    labels_of,
    read_commit,
    score_representations,
    train_settings,
)
from gsl_dist.encoders import Progression, make_encoder
from gsl_dist.encoders.lowbit import export_weights
from gsl_dist.fit import Training, embed, fit
from gsl_dist.losses import make_loss
from gsl_dist.quantizers import Trained, make_quantizer, train_codebook
from gsl_dist.snap import SnappingLayer

LOG = RESULTS / "lowbit.jsonl"
STAGE, STAGES, WARMUP, FEW = 8, 4, 2, 200
Arms = dict[str, tuple[int, dict[str, Any] | None]]
"""Epochs of a schedule and the `lowbit` section of each arm."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=["stochastic", "incremental"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", default=[""], help="those whose names hold one of these")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_rows()
    held = Held(open_corpus(images("database")).read_all(), open_corpus(images("queries")).read_all())
    done = {run["key"] for run in map(json.loads, LOG.read_text().splitlines())} if LOG.exists() else set()
    for seed in range(wanted.seeds):
        for table, few in [(name, few) for name in wanted.tables for few in CHOICES[name]]:
            chosen = pick_rows(rows, seed) if few else rows
            for arm, (epochs, lowbit) in ARMS[table](few).items():
                if not any(part in arm for part in wanted.arms):
                    continue
                config = settle(seed, epochs, lowbit, few=few)
                key = fingerprint_config(config.model_dump(mode="json", exclude={"corpus", "output"}), table, few, seed)
                if key not in done:
                    line = {"key": key, "table": table, "rows": len(chosen.items), "arm": arm, "seed": seed}
                    note(line | carry_out(config, chosen, held) | {"commit": read_commit()})


def stochastic_arms(few: bool) -> Arms:
    assert not few, "with all rows alone"
    arms: Arms = {
        "float, one stage": (STAGE, None),
        "float, four stages": (STAGE, stages("binary", [1.0] * STAGES, control=True)),
        "float, one long": (STAGE * STAGES, None),
    }
    for kind in ("binary", "ternary"):
        arms |= {
            f"{kind}, one stage": (STAGE, stages(kind, [1.0])),
            f"{kind}, four stages": (STAGE, stages(kind, [1.0] * STAGES)),
            f"{kind}, one long": (STAGE * STAGES, stages(kind, [1.0])),
            **{
                f"{kind}, {select} rule": (STAGE, stages(kind, [0.5, 0.75, 0.875, 1.0], select=select))
                for select in ("paper", "released", "random")
            },
        }
    return arms


def incremental_arms(few: bool) -> Arms:
    # With 200 rows an epoch has 4 steps: as many steps as 4,000 rows give would be 75 epochs.
    epochs, extra = (60, 20) if few else (10, 4)
    own = {"ratios": [0.5, 0.75, 0.875, 1.0], "epochs": extra}
    arms: Arms = {"float": (epochs, None), "control": (epochs, {"kind": "power", "bits": 5, "control": True} | own)}
    return arms | {f"{bits} bits": (epochs, {"kind": "power", "bits": bits} | own) for bits in (7, 5, 4)}


def stages(kind: str, ratios: list[float], **others: Any) -> dict[str, Any]:
    return {"kind": kind, "ratios": ratios} | others


ARMS = {"stochastic": stochastic_arms, "incremental": incremental_arms}
CHOICES = {"stochastic": (False,), "incremental": (True, False)}


def settle(seed: int, epochs: int, lowbit: dict[str, Any] | None, *, few: bool) -> TrainConfig:
    tree = train_settings(Demo(Path("unused"), seed, print), MAIN_BITS, SNAPPED, "unused")
    tree["fit"] |= {"epochs": epochs, "warmup_epochs": WARMUP * (5 if few else 1), "batch_size": 50 if few else 256}
    return check_config(TrainConfig, tree | {"lowbit": lowbit})


def pick_rows(rows: TrainingSet, seed: int) -> TrainingSet:
    """Give a few rows, as many of each class."""
    rng, classes = np.random.default_rng(seed), rows.classes
    each = [rng.permutation(np.flatnonzero(rows.labels == label))[: FEW // len(classes)] for label in classes]
    chosen = np.sort(np.concatenate(each))
    return TrainingSet(rows.items[chosen], rows.labels[chosen], classes)


def carry_out(config: TrainConfig, rows: TrainingSet, held: Held) -> dict[str, Any]:
    """Train and score."""
    started = time.perf_counter()
    training = train(config, rows)
    tensors, header = export_weights(training.encoder)
    scored = score_representations(training.encoder, training.codebook, held)
    return {
        "accuracy": classify(training, held),
        "map": scored.map,
        "error": scored.error,
        "loss": training.history[-1].loss,
        "bytes": len(save(tensors, metadata=header or None)),
        "epochs": training.epochs,
        "lowbit": config.model_dump(mode="json")["lowbit"],
        "seconds": time.perf_counter() - started,
    }


def train(config: TrainConfig, rows: TrainingSet) -> Training:
    seed = config.fit.seed
    torch.manual_seed(seed)
    encoder = make_encoder(config.encoder, rows.items.shape[1:])
    loss = make_loss(config.loss, classes=len(rows.classes), dim=encoder.dim)
    progression = Progression(encoder, config.lowbit, seed=seed) if config.lowbit else None
    training = Training(encoder, loss, SnappingLayer(config.snap), config.fit, progression=progression)
    quantizer, items = make_quantizer(config.quantizer, encoder.dim), torch.from_numpy(rows.items)

    def batches(epoch: int) -> EpochBatches:
        return EpochBatches(rows, plan(config.fit, rows, epoch), 0, 1)

    def refresh(training: Training) -> Trained:
        y_ND = embed(training.encoder, items)
        return train_codebook(y_ND, quantizer, config.lloyd, seed=seed, start=training.codebook)

    fit(training, batches, refresh)
    return training


def classify(training: Training, held: Held) -> float:
    """Give the share of held images whose nearest proxy is that of their class."""
    proxies_DC = F.normalize(next(training.loss.parameters()).detach(), dim=0)
    right = [
        (embed(training.encoder, torch.from_numpy(part.items)) @ proxies_DC).argmax(1).numpy() == labels_of(part)
        for part in (held.database, held.queries)
    ]
    return float(np.concatenate(right).mean())


def note(line: dict[str, Any]) -> None:
    print(line["table"], line["rows"], line["seed"], line["arm"], round(line["accuracy"], 4), flush=True)
    with LOG.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
