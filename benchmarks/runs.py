"""Trainings in one process, without Ray, by the config of the train stage; finished ones are lines of a file.

A run that is there is not done again: an interrupted benchmark goes on where it stopped, and a changed setting runs
again. The loop is the library's own `fit`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from record import RESULTS

from gsl_dist.cluster.train import EpochBatches, TrainConfig, TrainingSet, make_training, plan
from gsl_dist.config import fingerprint_config
from gsl_dist.demo import read_commit
from gsl_dist.fit import Training, embed, fit
from gsl_dist.quantizers import Trained, make_quantizer, train_codebook


class Log:
    """Finished runs by a hash of all that decides them."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {line["key"]: line for line in map(json.loads, lines)}

    def do(self, decided: dict[str, Any], words: dict[str, Any], carry_out: Callable[[], dict[str, Any]]) -> Any:
        """Give what a run found, now or earlier; `words` name it in its line."""
        key = fingerprint_config(decided)
        if key not in self.done:
            started = time.perf_counter()
            figures = carry_out()
            line = {"key": key, **words, **figures, "seconds": time.perf_counter() - started, "commit": read_commit()}
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            self.done[key] = line
            print(line, flush=True)
        return self.done[key]


def train(
    config: TrainConfig, rows: TrainingSet, begin: Callable[[Training], None] = lambda training: None
) -> Training:
    """Train as the stage does with one worker; `begin` may change what it begins with."""
    training = make_training(config, rows)
    begin(training)
    quantizer = make_quantizer(config.quantizer, training.encoder.dim)

    def batches(epoch: int) -> EpochBatches:
        return EpochBatches(rows, plan(config.fit, rows, epoch), 0, 1)

    def refresh(training: Training) -> Trained:
        y_ND = embed(training.encoder, torch.from_numpy(rows.items))
        return train_codebook(y_ND, quantizer, config.lloyd, seed=config.fit.seed, start=training.codebook)

    fit(training, batches, refresh)
    return training


def count_parameters(encoder: torch.nn.Module) -> int:
    """Count the numbers that are learned, each once."""
    return sum(parameter.numel() for parameter in encoder.parameters())
