"""The train stage: `fit` on Ray Train, any number of workers, a codebook trained by the coordinator between epochs.

Every worker draws the same plan of batches and takes its slice. The training set lies once on each node, in Ray's
object store. After each epoch a checkpoint holds network, optimizer, codebook, history and random state; a killed
worker costs at most the epoch it was in. When the last epoch is done the driver publishes the model folder, with codes
for weights where they became low-bit.

A corpus of vectors needs no labels if the loss is that of neighbours: one task finds the true neighbours of the rows to
learn from, before the workers start, and they travel with the training set.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer

from gsl_dist.artefact import Card, find_finished, open_card
from gsl_dist.cluster.checkpoint import read_state, write_state
from gsl_dist.cluster.compress import compress_encoder, plan_model
from gsl_dist.cluster.coordinator import Agenda, Seat, check_rows, start_coordinator
from gsl_dist.cluster.model import pick_device, save_model
from gsl_dist.cluster.network import Reachable
from gsl_dist.cluster.session import Progress, own_errors, start_session, stay_quiet, watch_remarks
from gsl_dist.codebook import Codebook
from gsl_dist.config import Location, Resources, Strict, fingerprint_config
from gsl_dist.data import Corpus, CorpusConfig, open_corpus
from gsl_dist.encoders import (
    Encoder,
    EncoderConfig,
    FusedEncoder,
    FusionConfig,
    Head,
    LowbitConfig,
    Progression,
    Stage,
    TableConfig,
    make_encoder,
)
from gsl_dist.encoders.crosslayer import CompressConfig
from gsl_dist.errors import ArtefactError, ConfigError, DataError, GslError, Unwritable
from gsl_dist.fit import Batch, Diverged, FitConfig, Training, embed, fit
from gsl_dist.losses import LossConfig, NeighbourConfig, level_rows, make_loss
from gsl_dist.quantizers import LloydConfig, QuantizerConfig, Rows, Trained, make_quantizer
from gsl_dist.ranked import POSITIVES, Mined, RankedConfig, Viewed, find_neighbours, learn_ranked
from gsl_dist.sampling import check_batches, check_meetings, plan_epoch, plan_neighbours
from gsl_dist.snap import SnapConfig, SnappingLayer
from gsl_dist.storage import Folder, naming_what_cannot_be_written

_START_ROWS = 16_384
_NOTED = "checkpoint_manager_snapshot.json"


class TrainConfig(Strict):
    """Trains an encoder and the codebook it lands on."""

    corpus: CorpusConfig
    output: Location = Field(description="the model folder to make")
    encoder: EncoderConfig
    loss: LossConfig
    quantizer: QuantizerConfig
    lloyd: LloydConfig = LloydConfig()
    snap: SnapConfig = SnapConfig()
    fit: FitConfig = FitConfig()
    lowbit: LowbitConfig | None = Field(default=None, description="quantize the weights by stages; None: stay float")
    ranked: RankedConfig | None = Field(default=None, description="teach the last codebook to rank; None: leave it")
    compress: CompressConfig | None = Field(
        default=None, description="begin with a trained network, compressed across layers; None: with a new one"
    )
    resources: Resources = Resources()
    max_failures: int = Field(default=3, ge=-1, description="restarts after a lost worker; -1: without end")

    @model_validator(mode="after")
    def _can_be_landed_on(self) -> TrainConfig:
        if self.quantizer.kind == "rabitq":
            raise ValueError("quantizer.kind: rabitq has no codewords to land on; it is for the codebook stage")
        return self

    @model_validator(mode="after")
    def _has_views(self) -> TrainConfig:
        if self.fit.views and isinstance(self.encoder, FusionConfig):
            raise ValueError("fit.views are rows as dropout spreads them: asymfusion has none, it must be 0")
        return self

    @model_validator(mode="after")
    def _can_be_compressed(self) -> TrainConfig:
        if self.compress and self.corpus.partial:
            raise ValueError("compress compares items layer by layer: corpus.partial must be false")
        if self.compress and self.lowbit:
            raise ValueError("lowbit quantizes convolutions and linear maps, not what layers share: leave out compress")
        return self

    @model_validator(mode="after")
    def _can_be_taught(self) -> TrainConfig:
        if self.ranked is None:
            return self
        if self.snap.variant == "none":
            raise ValueError("ranked teaches the codebook that the network landed on: snap.variant may not be none")
        if self.ranked.scores == "tables" and self.quantizer.residual and self.quantizer.cells > 1:
            raise ValueError("ranked.scores: tables needs codes of whole vectors: quantizer.residual must be false")
        if not isinstance(self.loss, NeighbourConfig) and self.fit.views < 2:
            raise ValueError("ranked learns from rows as dropout spreads them: fit.views must be at least 2")
        return self


@dataclass(frozen=True)
class TrainingSet:
    """The rows to train on, as every worker sees them.

    Args:
        items: all rows.
        labels: count from 0. Where neighbours are learned: the number of each row among those learned from, -1 for
            the others, which only the codebook sees.
        classes: what the labels stand for; none where neighbours are learned.
        near: the neighbours of the rows learned from, nearest first, as their numbers among these.

    Shapes: items (N, ...) uint8 or float32; labels (N,) int64; near (n, k) int64.
    """

    items: NDArray[Any]
    labels: NDArray[np.int64]
    classes: list[int]
    near: NDArray[np.int64] | None = None

    @cached_property
    def learned(self) -> NDArray[np.int64]:
        """Give the numbers of the rows learned from."""
        return np.flatnonzero(self.labels >= 0)

    @cached_property
    def mined(self) -> Mined | None:
        """Give the rows learned from and their neighbours, as the loss sees them; None where labels are learned."""
        if self.near is None:
            return None
        return Mined(level_rows(torch.from_numpy(self.items[self.learned])), torch.tensor(self.near))


class EpochBatches:
    """The batches of one epoch for one worker: its slice of every step of the plan."""

    def __init__(self, rows: TrainingSet, plan: NDArray[np.int64], rank: int, workers: int) -> None:
        self._rows = rows
        self._plan = np.split(plan, workers, axis=1)[rank]

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        for chosen in self._plan:
            yield torch.from_numpy(self._rows.items[chosen]), torch.from_numpy(self._rows.labels[chosen])


def run_train(config: TrainConfig, progress: Progress = stay_quiet) -> Card:
    """Make the model folder that a config describes; a relaunch goes on where the last one stopped.

    Raises:
        ConfigError, DataError: settings or corpus cannot be used; nothing was started.
        Diverged: the loss is no longer finite; the run folder keeps the last good checkpoint.
    """
    corpus = open_corpus(config.corpus)
    _check_settings(config, corpus)
    made_by = fingerprint_config(_deciding(config), corpus.fingerprint, *_teachers(config))
    folder = Folder(config.output)
    if done := find_finished(folder, "model", made_by):
        return done
    start_session(config.resources.workers * config.resources.cpus)
    with own_errors():
        rows = _collect_rows(config, progress)
        result = _train(config, ray.put(rows), folder, made_by, progress)
    if isinstance(error := result.return_value, Diverged) and result.checkpoint:
        raise Diverged(error.epoch, result.checkpoint.path)
    if isinstance(error, GslError):
        raise error
    return _publish(config, corpus, rows, folder, made_by, result)


def _deciding(config: TrainConfig) -> dict[str, Any]:
    # How many workers there are and where the result goes does not change what is trained; nor does what is not asked
    # for, so that models made before it could be asked for are found again.
    dumped = config.model_dump(mode="json", exclude={"output", "resources", "max_failures"})
    return {key: value for key, value in dumped.items() if key not in ("compress", "lowbit") or value is not None}


def _teachers(config: TrainConfig) -> list[str]:
    return [open_card(Folder(config.compress.model), "model").made_by] if config.compress else []


def _check_settings(config: TrainConfig, corpus: Corpus) -> None:
    if isinstance(config.encoder, TableConfig):
        raise ConfigError(
            "encoder.kind", "table", "there is nothing to train in a table; go on with the codebook stage"
        )
    if isinstance(config.loss, NeighbourConfig):
        _check_neighbours(config, config.loss, corpus)
    elif not corpus.has_labels:
        raise ConfigError("corpus.label_column", config.corpus.label_column, "training needs a column of labels")
    encoder = make_encoder(config.encoder, corpus.item_shape, config.corpus.channels)
    if isinstance(encoder, FusedEncoder):
        _check_modalities(config.corpus, encoder)
    if config.compress:
        plan_model(config.compress, config.encoder, corpus.item_shape)
    _lead(encoder, config)
    check_rows(corpus.rows, config.lloyd, make_quantizer(config.quantizer, encoder.dim))


def _check_modalities(corpus: CorpusConfig, encoder: FusedEncoder) -> None:
    absent = [part.column for part in corpus.modalities if part.absent]
    if absent:
        raise ConfigError("corpus.modalities", f"{absent[0]} absent", "training needs items that have every modality")
    if corpus.partial and not encoder.backbone.does_with_one:
        wanted = "items that lack a modality can be learned from with encoder.modality_dropout above 0 only"
        raise ConfigError("corpus.partial", True, wanted)


def _check_neighbours(config: TrainConfig, loss: NeighbourConfig, corpus: Corpus) -> None:
    if corpus.kind != "vectors":
        raise ConfigError("loss.kind", loss.kind, "it compares the vectors of a corpus, and this one holds images")
    if corpus.rows <= loss.neighbours:
        wanted = f"to mine {loss.neighbours} neighbours of each (loss.neighbours), more are needed"
        raise DataError("corpus", f"{corpus.rows} rows", wanted)
    check_meetings(
        min(corpus.rows, loss.sample_rows),
        batch_size=config.fit.batch_size,
        samples_per_class=config.fit.samples_per_class,
        workers=config.resources.workers,
    )


def _collect_rows(config: TrainConfig, progress: Progress) -> TrainingSet:
    needs = {"num_cpus": config.resources.cpus, "num_gpus": config.resources.gpus}
    if isinstance(config.loss, NeighbourConfig):
        progress("neighbours", 0, 1, f"mining {config.loss.neighbours} of each row")
        rows: TrainingSet = ray.get(_mine_rows.options(**needs).remote(config, config.loss))
        progress("neighbours", 1, 1, f"{len(rows.learned)} rows to learn from")
        return rows
    rows = ray.get(_read_rows.remote(config.corpus))
    _check_rows(config, rows)
    return rows


def _check_rows(config: TrainConfig, rows: TrainingSet) -> None:
    if len(rows.classes) < 2:
        raise DataError(f"column {config.corpus.label_column}", rows.classes, "training needs at least two classes")
    check_batches(
        len(rows.labels),
        len(rows.classes),
        batch_size=config.fit.batch_size,
        samples_per_class=config.fit.samples_per_class,
        workers=config.resources.workers,
    )


@ray.remote
def _read_rows(config: CorpusConfig) -> TrainingSet:
    batch = open_corpus(config).read_all()
    assert batch.labels is not None, "settings were checked"
    classes, labels = np.unique(batch.labels, return_inverse=True)
    return TrainingSet(batch.items, labels.astype(np.int64), classes.tolist())


@ray.remote
def _mine_rows(config: TrainConfig, loss: NeighbourConfig) -> TrainingSet:
    torch.set_num_threads(config.resources.threads)
    return mine_rows(open_corpus(config.corpus).read_all().items, loss, device=pick_device(config.resources.gpus))


def mine_rows(items: NDArray[np.float32], loss: NeighbourConfig, *, device: torch.device | None = None) -> TrainingSet:
    """Find the true neighbours of the rows to learn from: all, or as many as the loss says, evenly spread.

    Raises:
        DataError: most of them are copies of others.
    """
    learned = spread_rows(len(items), loss.sample_rows)
    _check_copies(items[learned])
    near_Nk = find_neighbours(level_rows(torch.from_numpy(items[learned])).to(device), loss.neighbours)
    labels = np.full(len(items), -1)
    labels[learned] = np.arange(len(learned))
    return TrainingSet(items, labels, [], near_Nk.cpu().numpy())


def spread_rows(rows: int, most: int) -> NDArray[np.int64]:
    """Give so many row numbers at most, evenly spread, in ascending order."""
    return np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.int64))


def _check_copies(x_ND: NDArray[np.float32]) -> None:
    # A row with so many copies has no other neighbours. A few such rows do no harm; of most nothing can be learned.
    whole = np.ascontiguousarray(x_ND).view(np.dtype((np.void, x_ND.dtype.itemsize * x_ND.shape[1])))[:, 0]
    _, which, counts = np.unique(whole, return_inverse=True, return_counts=True)
    if (crowded := float((counts[which] > POSITIVES).mean())) > 0.5:
        wanted = f"most rows must have neighbours other than {POSITIVES} copies of themselves"
        raise DataError("corpus", f"{crowded:.0%} copies", wanted)


def _train(config: TrainConfig, rows: Any, folder: Folder, made_by: str, progress: Progress) -> ray.train.Result:
    # A report waits for the controller's next look at the workers; Ray's two seconds would cost that in every epoch
    # (a demo training takes 48 s with this, 69 s without).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    coordinator = start_coordinator()
    resources = {"CPU": config.resources.cpus} | ({"GPU": config.resources.gpus} if config.resources.gpus else {})
    store, base = folder.child("runs").store
    trainer = TorchTrainer(
        _train_worker,
        # Ray Train copies and logs this dict: the rows travel as a reference in a list, which it leaves alone.
        train_loop_config={"config": config.model_dump(mode="json"), "rows": [rows], "coordinator": coordinator},
        torch_config=Reachable(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.resources.workers, use_gpu=config.resources.gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=f"train-{made_by}",
            storage_path=base,
            storage_filesystem=None if folder.is_local else store,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    stages = config.lowbit.plan_stages(config.fit.epochs) if config.lowbit else [Stage(0.0, config.fit.epochs)]
    with watch_remarks(coordinator, lambda record: _draw_epoch(record, stages, progress)):
        try:
            return trainer.fit()
        except ray.exceptions.ActorDiedError as error:
            raise _find_damage(folder.child(f"runs/train-{made_by}"), error) or error from None


def _find_damage(run: Folder, error: Exception) -> ArtefactError | None:
    # Ray notes which checkpoints there are, and starts nothing where it cannot read that.
    if "creation task" in str(error) and run.exists(_NOTED):
        return ArtefactError(run.path(_NOTED), "it is damaged; without this folder the training begins anew")
    return None


def _draw_epoch(record: dict[str, Any], stages: list[Stage], progress: Progress) -> None:
    error = record["quantization_error"]
    remark = f"loss {record['loss']:.3f}" + (f", quantization error {error:.3f}" if error is not None else "")
    if record["stage"] is not None:
        remark += f", stage {record['stage']} of {len(stages)}, {record['ratio']:.1%} of the weights low-bit"
    progress(record["phase"], record["epoch"] + 1, sum(stage.epochs for stage in stages), remark)


def _train_worker(settings: dict[str, Any]) -> GslError | None:
    # A mistake of ours or of the caller would only be repeated: it is given back, while a lost worker is restarted.
    try:
        _join_training(settings)
    except GslError as error:
        return error
    return None


def _join_training(settings: dict[str, Any]) -> None:
    config = TrainConfig.model_validate(settings["config"])
    rows: TrainingSet = ray.get(settings["rows"][0])
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.resources.threads)
    training = _start_training(config, rows)
    attempt = broadcast_from_rank_zero(uuid.uuid4().hex)
    seat = Seat(settings["coordinator"], attempt, rank, workers)

    def batches(epoch: int) -> EpochBatches:
        return EpochBatches(rows, plan(config.fit, rows, epoch), rank, workers)

    def refresh(training: Training) -> Trained:
        return _refresh(training, config, rows, seat)

    def report(training: Training) -> None:
        _report(training, config, seat)

    fit(training, batches, refresh, report)


def plan(config: FitConfig, rows: TrainingSet, epoch: int) -> NDArray[np.int64]:
    """Give the row numbers of every step of an epoch, (steps, batch_size)."""
    if rows.mined is not None:
        return rows.learned[plan_neighbours(rows.mined.near_Nk, config.batch_size, seed=config.seed, epoch=epoch)]
    return plan_epoch(
        rows.labels, config.batch_size, seed=config.seed, epoch=epoch, samples_per_class=config.samples_per_class
    )


def _start_training(config: TrainConfig, rows: TrainingSet) -> Training:
    """Give a training as the last checkpoint left it, or at its start."""
    training = make_training(config, rows)
    if isinstance(head := training.encoder.backbone, Head) and not config.compress:
        head.start_from(torch.from_numpy(rows.items[spread_rows(len(rows.items), _START_ROWS)]))
    _restore(training)
    return training


def make_training(config: TrainConfig, rows: TrainingSet) -> Training:
    """Give a training that has not begun: network, loss and snapping layer, drawn by the seed."""
    torch.manual_seed(config.fit.seed)
    encoder, further = make_encoder(config.encoder, rows.items.shape[1:], config.corpus.channels), None
    if config.compress:
        encoder, further = compress_encoder(config.compress, config.encoder, rows.items.shape[1:])
    loss = make_loss(config.loss, classes=len(rows.classes), dim=encoder.dim, mined=rows.mined)
    device, progression = pick_device(config.resources.gpus), _lead(encoder, config)
    snapping = SnappingLayer(config.snap)
    return Training(encoder, loss, snapping, config.fit, device, further=further, progression=progression)


def _lead(encoder: Encoder, config: TrainConfig) -> Progression | None:
    return Progression(encoder, config.lowbit, seed=config.fit.seed) if config.lowbit else None


def _restore(training: Training) -> None:
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            training.load_state(read_state(folder))


def _refresh(training: Training, config: TrainConfig, rows: TrainingSet, seat: Seat) -> Trained:
    sample = spread_rows(len(rows.items), config.lloyd.sample_rows)
    bounds = np.linspace(0, len(sample), seat.workers + 1).astype(int)
    start, stop = bounds[seat.rank], bounds[seat.rank + 1]
    settles = training.epoch == training.epochs
    views, times = config.fit.views * settles, max(1, config.fit.views * settles)
    y_ND = embed(training.encoder, torch.from_numpy(rows.items[sample[start:stop]]), views=views)
    agenda = Agenda(config.quantizer, training.encoder.dim, config.lloyd, config.fit.seed, training.codebook)
    trained = seat.attend(training.epoch, agenda, Rows(y_ND.cpu(), int(start) * times, len(sample) * times))
    # Only the first worker's codebook is kept.
    if settles and config.ranked and seat.rank == 0:
        trained = replace(trained, codebook=_teach(training, trained.codebook, config.ranked, rows))
    return trained


def _teach(training: Training, codebook: Codebook, config: RankedConfig, rows: TrainingSet) -> Codebook:
    """Give the codebook with codewords that learned to rank; its landing is the one given."""
    taught: Mined | Viewed
    if rows.mined is not None:
        y_ND = embed(training.encoder, torch.from_numpy(rows.items[rows.learned])).cpu()
        taught = Mined(y_ND, rows.mined.near_Nk)
    else:
        sample, views = spread_rows(len(rows.items), config.sample_rows), training.config.views
        y_ND = embed(training.encoder, torch.from_numpy(rows.items[sample]), views=views).cpu()
        taught = Viewed(y_ND.unflatten(0, (views, -1)), torch.from_numpy(rows.labels[sample]))
    return learn_ranked(taught, codebook, config, seed=training.config.seed)


def _report(training: Training, config: TrainConfig, seat: Seat) -> None:
    record = asdict(training.history[-1])
    if seat.rank:
        ray.train.report(record)
    failed = None if seat.rank else _keep(training, record, config, seat)
    # All end together: for one that ended alone the others would wait.
    if failed := broadcast_from_rank_zero(failed):
        raise failed


def _keep(training: Training, record: dict[str, Any], config: TrainConfig, seat: Seat) -> Unwritable | None:
    """Leave a checkpoint; or give why that cannot be, which other attempts would not change."""
    seat.coordinator.remark.remote(record)
    try:
        with tempfile.TemporaryDirectory() as folder, naming_what_cannot_be_written(Folder(config.output).path("runs")):
            write_state(folder, training.state())
            ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))
    except Unwritable as error:
        return error
    return None


def _publish(
    config: TrainConfig, corpus: Corpus, rows: TrainingSet, folder: Folder, made_by: str, result: ray.train.Result
) -> Card:
    training = make_training(config, rows)
    with result.checkpoint.as_directory() as kept:
        training.load_state(read_state(kept))
    snapped = config.snap.variant != "none"
    facts = {
        "item_shape": list(corpus.item_shape),
        "classes": rows.classes,
        "rows": len(rows.items),
        "history": [asdict(record) for record in training.history],
    }
    if config.compress:
        facts["compressed"] = plan_model(config.compress, config.encoder, corpus.item_shape)[1].model_dump(mode="json")
    dumped = json.loads(config.model_dump_json())
    card = save_model(
        folder, training.encoder, training.codebook if snapped else None, made_by=made_by, config=dumped, facts=facts
    )
    folder.clear("runs")
    return card
