"""What is left of a network with 4, 8 and 16 times fewer parameters: MICIK-style sharing beside layers alone.

A plain convolutional network of nine layers, eight of which have one shape, is trained on Fashion-MNIST as shipped, at
14 x 14 pixels; then it is compressed and trained on in the same loop. Arms differ in how weights are factored, at equal
parameters, and in whether similarities are preserved; the control is the whole network, trained on for as many steps.
Coded mAP, accuracy by the nearest proxy, bytes of the weights as they are stored, steps of training on.

`--network vgg16` has the thirteen convolutions of a VGG-16 at their widths instead, of which 16 times fewer parameters
without loss are claimed: minutes a run.

python benchmarks/crosslayer.py [--network nine] [--seeds 0 1 2 3 4] [--arm NAME ...] [--ratio N ...]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import Log, count_parameters, train
from torch.nn import functional as F

from gsl_dist.artefact import find_finished
from gsl_dist.cluster.model import WEIGHTS, load_encoder, save_model
from gsl_dist.cluster.train import TrainConfig, TrainingSet
from gsl_dist.config import check_config, fingerprint_config
from gsl_dist.data import Batch, CorpusConfig, fashion_folder, open_corpus
from gsl_dist.demo import Held, score_representations
from gsl_dist.fit import Training, embed
from gsl_dist.storage import Folder

SIDE = 14
WHOLE = "whole network, trained on"
ARMS: dict[str, dict[str, Any]] = {
    "layer by layer": {"method": "layerwise", "preserve": {"level": "none"}},
    "layer by layer, similarity": {"method": "layerwise"},
    "common and unique": {"preserve": {"level": "none"}},
    "common and unique, similarity": {},
    "common only, similarity": {"unique_share": 0.0},
}
PARTS = ("train", "database", "queries")
Parts = dict[str, Batch]


@dataclass(frozen=True)
class Network:
    """What is compressed, how long it is trained before and after, and how far it is compressed."""

    name: str
    layers: dict[str, Any]
    start: dict[str, Any]
    on: dict[str, Any]
    ratios: tuple[int, ...]
    compress: dict[str, Any]

    @property
    def models(self) -> Path:
        """Give where its models are."""
        return Path("build/bench") / self.name


NETWORKS = {
    "nine": Network(
        name="crosslayer",
        layers={"channels": [32, 32, 32], "depths": [1, 4, 4]},
        start={"epochs": 12, "warmup_epochs": 3, "batch_size": 128, "learning_rate": 2e-3},
        on={"epochs": 6, "warmup_epochs": 1, "batch_size": 128, "learning_rate": 2e-3},
        ratios=(4, 8, 16),
        compress={},
    ),
    # Layers whose shape no other has hold an eighth of its parameters: for more than 8x they are decomposed alone. With
    # a learning rate of 3e-4 from the first step on it learns nothing, and trained on with it, it forgets.
    "vgg16": Network(
        name="crosslayer-vgg16",
        layers={"channels": [64, 128, 256, 512, 512], "depths": [2, 2, 3, 3, 3]},
        start={"epochs": 12, "warmup_epochs": 3, "batch_size": 128, "learning_rate": 1e-4},
        on={"epochs": 8, "warmup_epochs": 1, "batch_size": 128, "learning_rate": 1e-4},
        ratios=(16, 8),
        compress={"lone": "factor"},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="nine")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--arm", nargs="*", default=[WHOLE, *ARMS])
    parser.add_argument("--ratio", nargs="*", type=int)
    wanted = parser.parse_args()
    network = NETWORKS[wanted.network]
    torch.set_num_threads(1)
    read = {part: open_corpus(corpus(part)).read_all() for part in PARTS}
    log = Log(network.name)
    for seed in wanted.seeds:
        begin_with(network, seed, read)
        for ratio in wanted.ratio or network.ratios:
            for arm in wanted.arm:
                words = {"arm": arm, "ratio": 1 if arm == WHOLE else ratio, "seed": seed}
                config = settings(network, seed, network.on, None if arm == WHOLE else ARMS[arm] | {"ratio": ratio})
                decided = config.model_dump(mode="json", exclude={"output", "resources", "corpus"})
                decided |= {"side": SIDE, "start": network.start, "seed": seed}
                decided["compress"] = decided["compress"] and {**decided["compress"], "model": seed}
                log.do(decided, words, lambda c=config, s=seed: carry_out(network, c, s, read))


def settings(network: Network, seed: int, fit: dict[str, Any], compress: dict[str, Any] | None) -> TrainConfig:
    model = str(network.models / f"start-{seed}")
    return check_config(
        TrainConfig,
        {
            "corpus": corpus("train").model_dump(),
            "output": model,
            "encoder": {"kind": "cnn", "dim": 32, **network.layers, "grid": 1},
            "loss": {"kind": "proxy", "temperature": 0.2},
            "quantizer": {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 16, "residual": False},
            "snap": {"variant": "spring", "weight": 1.0, "neighbours": 16},
            "fit": {**fit, "seed": seed},
            "compress": compress and {**network.compress, **compress, "model": model},
        },
    )


def corpus(part: str) -> CorpusConfig:
    tree = {
        "path": str(fashion_folder() / f"{part}.parquet"),
        "id_column": "id",
        "image_column": "image",
        "label_column": "label",
        "image": {"height": SIDE, "width": SIDE, "channels": 1},
    }
    return check_config(CorpusConfig, tree)


def begin_with(network: Network, seed: int, read: Parts) -> None:
    """Train the network that all arms of a seed begin with, once."""
    config = settings(network, seed, network.start, None)
    made_by = fingerprint_config(config.model_dump(mode="json", exclude={"output", "resources", "corpus"}))
    if not find_finished(Folder(config.output), "model", made_by):
        keep(train(config, rows_of(read)), config, Folder(config.output), made_by)


def keep(training: Training, config: TrainConfig, folder: Folder, made_by: str) -> int:
    """Write a model, and tell the bytes of its weights."""
    facts = {"item_shape": [SIDE, SIDE, 1]}
    dumped = config.model_dump(mode="json")
    card = save_model(folder, training.encoder, training.codebook, made_by=made_by, config=dumped, facts=facts)
    return card.entry(WEIGHTS).bytes


def carry_out(network: Network, config: TrainConfig, seed: int, read: Parts) -> dict[str, Any]:
    encoder, _ = load_encoder(str(network.models / f"start-{seed}"))

    def begin(training: Training) -> None:
        if config.compress is None:
            training.encoder.load_state_dict(encoder.state_dict())
        figures["accuracy_start"] = measure_start(training, read)

    figures: dict[str, Any] = {"parameters_before": count_parameters(encoder)}
    training = train(config, rows_of(read), begin)
    assert training.codebook is not None
    held = Held(read["database"], read["queries"])
    scored = score_representations(training.encoder, training.codebook, held)
    steps = len(read["train"]) // config.fit.batch_size * config.fit.epochs
    figures |= {"parameters": count_parameters(training.encoder), "steps": steps, "loss": training.history[-1].loss}
    figures["bytes"] = keep(training, config, Folder(network.models / "last"), "run")
    return figures | {"map": scored.map, "error": scored.error, "accuracy": measure_accuracy(training, read)}


def measure_accuracy(training: Training, read: Parts) -> float:
    """Give the share of queries whose nearest proxy is that of their class."""
    y_QD = F.normalize(embed(training.encoder, torch.from_numpy(read["queries"].items)))
    [proxies_DC] = training.loss.parameters()
    found = (y_QD @ F.normalize(proxies_DC.detach(), dim=0)).argmax(1).numpy()
    return float((found == read["queries"].labels).mean())


def measure_start(training: Training, read: Parts) -> float:
    """Give the share of queries whose nearest training row is of their class, before anything is trained on."""
    sample = torch.from_numpy(read["train"].items[:2000])
    y_ND, y_QD = embed(training.encoder, sample), embed(training.encoder, torch.from_numpy(read["queries"].items))
    labels = read["train"].labels
    assert labels is not None
    return float((labels[(y_QD @ y_ND.T).argmax(1).numpy()] == read["queries"].labels).mean())


def rows_of(read: Parts) -> TrainingSet:
    labels = read["train"].labels
    assert labels is not None
    return TrainingSet(read["train"].items, labels, list(range(10)))


if __name__ == "__main__":
    main()
