"""One harness for every experiment on learned codes: a YAML names data, network, loss, quantizers, bits, arms, seeds.

All arms of an experiment share data, network, loss, steps and seeds; an arm says how network and codebook are coupled.
What an arm may `tune` is chosen on a split of the training rows alone (`Split.held_out`), once per number of bits,
never by looking at queries or database. A finished run is one line of `results/<experiment>.jsonl`, keyed by all
settings that decide it: an interrupted experiment goes on where it stopped, and a changed setting runs again. The loop
is the library's own `fit`, in one process, without Ray.

python benchmarks/experiment.py benchmarks/experiments/fashion.yaml [--arm NAME ...] [--bits N ...] [--seeds N] [--show]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import yaml
from prepare import Split, cut, open_split
from pydantic import Field
from record import RESULTS
from scoring import score_labels, score_neighbours

from gsl_dist.cluster.train import TrainingSet, mine_rows, plan
from gsl_dist.config import Strict, check_config, fingerprint_config
from gsl_dist.demo import read_commit
from gsl_dist.encoders import EncoderConfig, Head, make_encoder
from gsl_dist.fit import FitConfig, Training, embed, fit
from gsl_dist.losses import LossConfig, NeighbourConfig, make_loss
from gsl_dist.quantizers import LloydConfig, QuantizerConfig, make_quantizer, train_codebook
from gsl_dist.ranked import Mined, RankedConfig, Viewed, learn_ranked
from gsl_dist.snap import SnapConfig, SnappingLayer

TUNING_SEED = 1000
BITS_A_BOOK = 8
ALONE: dict[tuple[str, int], Training] = {}
MINED: dict[tuple[str, int], TrainingSet] = {}


class Arm(Strict):
    """How network and codebook are coupled; dotted keys of `tune` are laid over the arm."""

    quantizer: str = "pq"
    snap: SnapConfig = SnapConfig()
    loss: LossConfig | None = None
    codes: Literal["trained", "refitted", "classifier"] = Field(
        default="trained", description="the codebook landed on, one fitted after training, or the predicted class"
    )
    views: int = Field(default=0, description="fit.views, for the last codebook")
    bits: list[int] | None = Field(default=None, description="those that this arm has a say at")
    ranked: RankedConfig | None = Field(default=None, description="teach the last codebook by labels, from the views")
    tune: dict[str, list[float]] = {}


class Experiment(Strict):
    """A table of runs: every arm at every number of bits with every seed."""

    data: str
    rows: int | None = Field(default=None, description="the first so many rows of a database without labels; None: all")
    encoder: EncoderConfig
    loss: LossConfig
    fit: FitConfig
    lloyd: LloydConfig = LloydConfig()
    quantizers: dict[str, dict[str, Any]] = {"pq": {"kind": "pq"}}
    bits: list[int]
    seeds: int = 5
    arms: dict[str, Arm]


@dataclass(frozen=True)
class Run:
    """One cell of the table, settled: nothing is left to tune."""

    arm: str
    bits: int
    seed: int
    config: Arm
    experiment: Experiment

    @property
    def key(self) -> str:
        """Give a hash of everything that decides the outcome."""
        shared = self.experiment.model_dump(mode="json", exclude={"arms", "bits", "seeds", "quantizers", "rows"})
        if self.experiment.rows:
            shared["rows"] = self.experiment.rows
        quantizer = self.quantizer.model_dump(mode="json")
        return fingerprint_config(shared, quantizer, self.config.model_dump(mode="json"), self.bits, self.seed)

    @property
    def coupled(self) -> bool:
        """Tell whether the network sees a codebook."""
        return self.config.snap.variant != "none" or self.config.snap.forward == "decoded"

    def without_codes(self) -> Run:
        """Give the run of the same network and seed, whatever its codes are to be."""
        any_will_do = next(iter(self.experiment.quantizers))
        alone = Arm(quantizer=any_will_do, loss=self.config.loss, snap=SnapConfig(variant="none"))
        return replace(self, bits=BITS_A_BOOK, config=alone)

    @property
    def quantizer(self) -> QuantizerConfig:
        """Give the quantizer at this number of bits: as few choices as may be, of 8 bits or less."""
        shape, dim = dict(self.experiment.quantizers[self.config.quantizer]), self.experiment.encoder.dim
        additive = shape["kind"] in ("rq", "lsq")
        counts = range(-(-self.bits // BITS_A_BOOK), self.bits)
        count = next(n for n in counts if self.bits % n == 0 and (additive or dim % n == 0))
        shape |= {"books" if additive else "sub_vectors": count, "bits": self.bits // count}
        return check_config(Shaped, {"quantizer": shape}).quantizer


class Shaped(Strict):
    """A quantizer alone, to read one by its kind."""

    quantizer: QuantizerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--arm", nargs="*", help="these arms only")
    parser.add_argument("--bits", nargs="*", type=int, help="these bits only")
    parser.add_argument("--seeds", type=int, help="the first so many seeds only")
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    experiment = check_config(Experiment, yaml.safe_load(wanted.experiment.read_text()))
    split = cut(open_split(experiment.data), experiment.rows)
    log = Log(RESULTS / "experiments" / f"{wanted.experiment.stem}.jsonl")
    seeds = range(wanted.seeds or experiment.seeds)
    # Seed by seed, so that whatever is finished when it stops compares all arms on the same seeds.
    for seed, bits, name in itertools.product(seeds, wanted.bits or experiment.bits, wanted.arm or experiment.arms):
        if bits not in (experiment.arms[name].bits or experiment.bits):
            continue
        arm = tune_arm(Run(name, bits, TUNING_SEED, experiment.arms[name], experiment), split, log)
        finished = log.do(Run(name, bits, seed, arm, experiment), split)
        print(name, bits, seed, {k: v for k, v in finished.items() if isinstance(v, float)}, flush=True)


class Log:
    """Finished runs, a line each; a run that is there is not done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.done = {line["key"]: line for line in map(json.loads, lines)}

    def do(self, run: Run, split: Split, *, tuning: bool = False) -> dict[str, Any]:
        """Give what a run found, now or earlier."""
        if run.key not in self.done:
            started = time.perf_counter()
            figures = carry_out(run, split)
            line = {"key": run.key, "arm": run.arm, "bits": run.bits, "seed": run.seed, "tuning": tuning}
            line |= {"config": run.config.model_dump(mode="json"), "commit": read_commit()}
            line |= figures | {"seconds": time.perf_counter() - started}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")
            self.done[run.key] = line
        return self.done[run.key]


def tune_arm(run: Run, split: Split, log: Log) -> Arm:
    """Choose what an arm may tune, on training rows alone."""
    if not run.config.tune:
        return run.config
    held = split.held_out
    tried = [lay_over(run.config, values) for values in grid(run.config.tune)]
    scores = [log.do(replace(run, config=arm), held, tuning=True)[held.figure] for arm in tried]
    return tried[int(np.argmax(scores))]


def grid(tune: dict[str, list[float]]) -> list[dict[str, float]]:
    return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]


def lay_over(arm: Arm, values: dict[str, float]) -> Arm:
    tree = arm.model_dump(mode="json", exclude={"tune"})
    for key, value in values.items():
        part, _, leaf = key.partition(".")
        tree[part][leaf] = value
    return check_config(Arm, tree)


def carry_out(run: Run, split: Split) -> dict[str, Any]:
    """Train, code and score."""
    training = train(run, split) if run.coupled else train_alone(run.without_codes(), split)
    items = torch.from_numpy(split.train)
    rest = [embed(training.encoder, torch.from_numpy(x)) for x in (split.database, split.queries)]
    last = training.history[-1]
    figures = {"loss": last.loss, "fallback_rate": last.fallback_rate, "cosine": last.cosine}
    if run.config.codes == "classifier":
        return figures | score_labels(split, *rest, classes=next(training.loss.parameters()).detach())
    torch.manual_seed(run.seed)  # views are drawn at random
    codebook, quantizer = training.codebook, make_quantizer(run.quantizer, training.encoder.dim)
    if run.config.codes == "refitted" or codebook is None:
        seen_ND = embed(training.encoder, items, views=run.config.views)
        codebook = train_codebook(seen_ND, quantizer, LloydConfig(iterations=25), seed=run.seed).codebook
    if run.config.ranked:
        codebook = learn_ranked(see(training, run, split), codebook, run.config.ranked, seed=run.seed)
    if split.labelled:
        return figures | score_labels(split, *rest, codebook=codebook, quantizer=quantizer)
    return figures | score_neighbours(split, *rest, codebook=codebook)


def see(training: Training, run: Run, split: Split) -> Mined | Viewed:
    """Give the training rows as codewords learn from them."""
    y_ND = embed(training.encoder, torch.from_numpy(split.train), views=run.config.views)
    if split.train_labels is None:
        return Mined(y_ND, mine(split, run.experiment.loss).mined.near_Nk)
    return Viewed(y_ND.unflatten(0, (run.config.views, -1)), torch.from_numpy(split.train_labels))


def label(split: Split) -> TrainingSet:
    classes, labels = np.unique(split.train_labels, return_inverse=True)
    return TrainingSet(split.train, labels.astype(np.int64), classes.tolist())


def mine(split: Split, loss: LossConfig) -> TrainingSet:
    """Find the neighbours of training rows, once a split."""
    assert isinstance(loss, NeighbourConfig), "rows without labels have nothing but neighbours"
    key = (loss.model_dump_json(), id(split))
    if key not in MINED:
        MINED[key] = mine_rows(split.train, loss)
    return MINED[key]


def train_alone(run: Run, split: Split) -> Training:
    """Train a network that no codebook is coupled to, once: it is the same for every kind and length of code."""
    key = (run.key, id(split))
    if key not in ALONE:
        ALONE[key] = train(run, split)
    return ALONE[key]


def train(run: Run, split: Split) -> Training:
    experiment, config = run.experiment, run.experiment.fit.model_copy(update={"seed": run.seed})
    torch.manual_seed(run.seed)
    encoder = make_encoder(experiment.encoder, split.train.shape[1:])
    loss_config, items = run.config.loss or experiment.loss, torch.from_numpy(split.train)
    rows = label(split) if split.labelled else mine(split, loss_config)
    loss = make_loss(loss_config, classes=len(rows.classes), dim=encoder.dim, mined=rows.mined)
    if isinstance(encoder.backbone, Head):
        encoder.backbone.start_from(items)
    training = Training(encoder, loss, SnappingLayer(run.config.snap), config)
    targets = torch.from_numpy(rows.labels)
    quantizer = make_quantizer(run.quantizer, encoder.dim)

    def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(items[chosen], targets[chosen]) for chosen in torch.from_numpy(plan(config, rows, epoch))]

    def refresh(training: Training) -> Any:
        if not run.coupled:
            return SimpleNamespace(codebook=None, relative_error=None)  # nothing would read it
        y_ND = embed(training.encoder, items, views=run.config.views * (training.epoch == config.epochs))
        return train_codebook(y_ND, quantizer, experiment.lloyd, seed=run.seed, start=training.codebook)

    fit(training, batches, refresh)
    return training


if __name__ == "__main__":
    main()
