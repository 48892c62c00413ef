"""The training loop: the network and the codebook take turns.

Warm-up epochs follow the similarity loss alone. Then, before every snapping epoch (or every few), the codebook is
refitted to what the network gives now, and while the network moves on, the snapping layer bends its gradient toward
the codewords. After the last epoch the codebook settles: it is refined once more, on what the network gives now and
will give from then on. That is the codebook that the network landed on. A network that was trained with dropout
spreads the rows it learned from less than others; with `views`, the codebook settles on what dropout makes of them.

A network for several modalities gives a view of its items by each, and one of the whole: the loss is the sum over all.
`further` terms may stand beside it, such as those that hold a compressed network to the one that it was made of.

A network that becomes low-bit does so in stages, each the whole schedule of learning rates with a new optimizer. The
codebook goes on through them, refitted as before, and settles when the last weight is quantized.

`fit` takes an iterable of batches an epoch and two callables; it knows neither files, nor Ray, nor how many workers
there are. In a process group every worker sees its rows of each batch, the loss sees all of them, and gradients are
summed: any number of workers takes the same steps at an equal global batch.
"""

# Shapes: N rows of this worker, D dims

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict
from gsl_dist.encoders import Encoder, Progression, Stage, Views
from gsl_dist.errors import GslError
from gsl_dist.losses import SimilarityLoss
from gsl_dist.quantizers import Trained
from gsl_dist.snap import SnappingLayer

IMAGES_AT_ONCE = 64
"""Images that a CPU sends through a network together: what lies between layers for more of them leaves its caches."""

Batch = tuple[Tensor, Tensor]
Refresh = Callable[["Training"], Trained]


class Further(Protocol):
    """Terms beside the similarity loss, of the batch that the network has just seen."""

    @property
    def teacher(self) -> nn.Module:
        """Give the network that they hold to."""

    def terms(self, items: Tensor, gather: Callable[[Tensor], Tensor], workers: int) -> Tensor:
        """Give their sum; what no row decides is counted by every worker and so divided among them."""


class FitConfig(Strict):
    """How long and how fast a network is trained."""

    epochs: int = Field(default=20, ge=1, description="of one schedule of learning rates; low-bit stages have one each")
    warmup_epochs: int = Field(default=5, ge=0, description="epochs of the similarity loss alone")
    refresh_epochs: int = Field(default=1, ge=1, description="snapping epochs between two fits of the codebook")
    batch_size: int = Field(default=256, ge=2, description="rows of a step, all workers together")
    samples_per_class: int | None = Field(
        default=None, ge=2, description="rows of each class in a batch; None: as drawn"
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="at first; it falls as half a cosine")
    proxy_learning_rate: float = Field(default=1e-2, gt=0, description="for the parameters of the loss, if it has any")
    weight_decay: float = Field(default=1e-4, ge=0, description="decoupled from the gradient")
    views: int = Field(
        default=0, ge=0, description="times the last codebook sees each row, with dropout; 0: once, as it is encoded"
    )
    seed: int = Field(default=0, ge=0, description="of everything drawn")

    @model_validator(mode="after")
    def _warm_up_ends(self) -> FitConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be fewer than epochs ({self.epochs})")
        return self


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did; `quantization_error` is relative to the variance, None in warm-up epochs.

    `stage` counts from 1, and `ratio` is the share of the weights that was quantized; None where none ever is.
    """

    epoch: int
    phase: str
    loss: float
    quantization_error: float | None = None
    fallback_rate: float | None = None
    cosine: float | None = None
    energy: float | None = None
    stage: int | None = None
    ratio: float | None = None


class Diverged(GslError):  # noqa: N818
    """The loss is no longer a number.

    Args:
        epoch: the one that it happened in.
        checkpoint: where the state of the epoch before it is kept; None if it is not.
    """

    def __init__(self, epoch: int, checkpoint: str | None = None) -> None:
        self.epoch, self.checkpoint = epoch, checkpoint
        kept = f", kept in {checkpoint}" if checkpoint else ""
        last = f"the last good state is that of epoch {epoch - 1}{kept}" if epoch else "no epoch before it was good"
        super().__init__(
            f"training diverged in epoch {epoch}: the loss is not finite; {last}; try a lower fit.learning_rate or "
            f"snap.beta"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Diverged, (self.epoch, self.checkpoint)


@dataclass
class Training:
    """Everything that moves during training, and what a checkpoint holds of it."""

    encoder: Encoder
    loss: SimilarityLoss
    snapping: SnappingLayer
    config: FitConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    codebook: Codebook | None = None
    history: list[EpochRecord] = field(default_factory=list)
    further: Further | None = None
    progression: Progression | None = None

    def __post_init__(self) -> None:
        self.encoder.to(self.device)
        self.loss.to(self.device)
        if self.further is not None:
            self.further.teacher.to(self.device)
        epochs = self.config.epochs
        self.stages = self.progression.plan_stages(epochs) if self.progression else [Stage(0.0, epochs)]
        self.start_optimizer()

    def start_optimizer(self) -> None:
        """Take a new optimizer, which knows nothing of the steps before."""
        groups = [{"params": list(self.encoder.parameters()), "lr": self.config.learning_rate}]
        if extra := list(self.loss.parameters()):
            groups.append({"params": extra, "lr": self.config.proxy_learning_rate})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=self.config.weight_decay)
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def epoch(self) -> int:
        """Give the number of epochs that are done."""
        return len(self.history)

    @property
    def epochs(self) -> int:
        """Give the number of epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)

    def find_stage(self, epoch: int) -> tuple[int, int]:
        """Give the stage that an epoch lies in, from 0, and how many of its epochs come before."""
        for number, stage in enumerate(self.stages):
            if epoch < stage.epochs:
                return number, epoch
            epoch -= stage.epochs
        return len(self.stages) - 1, self.stages[-1].epochs

    def begin_epoch(self) -> None:
        """Enter the stage that begins here, if one does, and draw what its first step quantizes."""
        if self.progression is None:
            return
        number, done = self.find_stage(self.epoch)
        if done == 0:
            self.progression.enter(self.stages[number].ratio)
            self.start_optimizer()
        self.progression.draw(self.epoch, 0)

    def state(self) -> dict[str, Any]:
        """Give all that is needed to go on from here, as tensors and plain values."""
        codebook = self.codebook
        return {
            "encoder": self.encoder.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "history": [asdict(record) for record in self.history],
            "codebook": codebook and {name: torch.tensor(array) for name, array in codebook.arrays().items()},
            "codebook_flags": codebook and {"kind": codebook.kind, "residual": codebook.residual},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state given by `state`."""
        self.encoder.load_state_dict(state["encoder"])
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.history = [EpochRecord(**record) for record in state["history"]]
        if state["codebook"]:
            arrays = {name: array.numpy() for name, array in state["codebook"].items()}
            self.codebook = Codebook(**arrays, **state["codebook_flags"])
        if self.progression and self.history:
            last = self.stages[-1].ratio if self.epoch == self.epochs else self.history[-1].ratio
            self.progression.go_on(last or 0.0)

    def set_rates(self, step: float) -> None:
        """Set the learning rates for a place in the stage, from 0 to 1: half a cosine down to zero."""
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * 0.5 * (1 + math.cos(math.pi * step))


def fit(
    training: Training,
    batches: Callable[[int], Iterable[Batch]],
    refresh: Refresh,
    on_epoch: Callable[[Training], None] = lambda training: None,
) -> None:
    """Train until the epochs of all stages are done, from wherever `training` stands.

    Args:
        training: the network, the loss, the snapping layer and how far they are.
        batches: gives the batches of an epoch: this worker's rows of each global batch, in the same order everywhere.
        refresh: fits a codebook to what the network gives now.
        on_epoch: called after every epoch, with the training as it then stands.

    Raises:
        Diverged: the loss of an epoch is not finite.
    """
    config = training.config
    network = _distribute(training.encoder)
    training.snapping.workers = dist.get_world_size() if _is_group() else 1
    while training.epoch < training.epochs:
        training.begin_epoch()
        snapping_epoch = training.epoch - config.warmup_epochs
        error = None
        if snapping_epoch >= 0 and snapping_epoch % config.refresh_epochs == 0:
            trained = _refit(training, refresh)
            training.codebook, error = trained.codebook, trained.relative_error
        training.snapping.set_codebook(training.codebook if snapping_epoch >= 0 else None)
        loss = _run_epoch(training, network, batches(training.epoch))
        training.history.append(_record(training, loss, error))
        if not math.isfinite(loss):
            raise Diverged(training.epoch - 1)
        if training.epoch == training.epochs:
            training.begin_epoch()  # a stage without epochs quantizes what is left
            training.codebook = _refit(training, refresh).codebook
        on_epoch(training)


def embed(encoder: nn.Module, items: Tensor, *, batch_rows: int | None = None, views: int = 0) -> Tensor:
    """Give the representations of items, without gradients.

    Args:
        encoder: the network.
        items: what it takes.
        batch_rows: items that it takes at once; None: 1,024, but of images on a CPU as many as its caches hold.
        views: times each item is seen as in training, with dropout: rows that were learned from then spread as other
            rows will. 0: once, as it is encoded.

    Shapes: (N, ...) -> (N, D) float32, or (views x N, D).
    """
    was_training = encoder.training
    encoder.train(views > 0)
    device = next(encoder.parameters(), items).device
    if batch_rows is None:
        few = device.type == "cpu" and items.ndim > 2 and not views
        batch_rows = IMAGES_AT_ONCE if few else 1024
    with torch.inference_mode():
        parts = [encoder(part.to(device)).float() for _ in range(views or 1) for part in items.split(batch_rows)]
    encoder.train(was_training)
    return torch.cat(parts).clone()


def gather_rows(y_ND: Tensor) -> Tensor:
    """Give the rows of all workers in the order of their ranks; gradients come back to the rows of this one.

    Shapes: (N, D) of each worker -> (N x workers, D).
    """
    if not _is_group():
        return y_ND
    rows: Tensor = _GatherRows.apply(y_ND)
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor) -> Tensor:
        ctx.rows = len(y_ND)
        parts = [torch.empty_like(y_ND) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, y_ND.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # Every worker evaluates the whole loss, so its own slice is already the whole gradient of its rows.
        return grad[dist.get_rank() * ctx.rows :][: ctx.rows]


def _refit(training: Training, refresh: Refresh) -> Trained:
    with training.progression.look() if training.progression else contextlib.nullcontext():
        return refresh(training)


def _run_epoch(training: Training, network: nn.Module, batches: Iterable[Batch]) -> float:
    training.encoder.train()
    training.snapping.train()
    total, steps = 0.0, 0
    planned = list(batches) if not hasattr(batches, "__len__") else batches
    number, done = training.find_stage(training.epoch)
    for step, (items, labels_N) in enumerate(planned):
        training.set_rates((done + step / len(planned)) / training.stages[number].epochs)  # type: ignore[arg-type]
        if training.progression:
            training.progression.draw(training.epoch, step)
        total, steps = total + _take_step(training, network, items, labels_N), steps + 1
    return total / max(1, steps)


def _take_step(training: Training, network: nn.Module, items: Tensor, labels_N: Tensor) -> float:
    items = items.to(training.device)
    learned = network(items)
    labels_N = gather_rows(labels_N.to(training.device))
    if isinstance(learned, Views):
        loss = _sum_views(training, learned, labels_N)
    else:
        loss = training.loss(gather_rows(training.snapping(learned)), labels_N)
    if training.further is not None:
        loss = loss + training.further.terms(items, gather_rows, training.snapping.workers)
    training.optimizer.zero_grad()
    loss.backward()
    training.optimizer.step()
    if training.progression:
        training.progression.restore()
    return float(loss.detach())


def _sum_views(training: Training, views: Views, labels_N: Tensor) -> Tensor:
    """Give the sum of the losses of all views; that of the last, the fused one, teaches what joined it and no more."""
    terms = []
    for place, (y_ND, there_N) in enumerate(zip(*views, strict=True), 1):
        snapped_ND = y_ND
        if there_N.any():
            snapped_ND = torch.zeros_like(y_ND).masked_scatter(there_N[:, None], training.snapping(y_ND[there_N]))
        there_N = gather_rows(there_N.int()) > 0
        y_ND = gather_rows(snapped_ND)[there_N]
        if not len(y_ND):
            terms.append(y_ND.sum())
        elif place < len(views.y_VND):
            terms.append(training.loss(y_ND, labels_N[there_N]))
        else:
            held = {name: value.detach() for name, value in training.loss.named_parameters()}
            terms.append(torch.func.functional_call(training.loss, held, (y_ND, labels_N[there_N])))
    return torch.stack(terms).sum()


def _record(training: Training, loss: float, error: float | None) -> EpochRecord:
    health = training.snapping.take_health()
    phase = "warm-up" if training.epoch < training.config.warmup_epochs else "snap"
    figures = asdict(health) if health else {}
    if training.progression:
        number, _ = training.find_stage(training.epoch)
        figures |= {"stage": number + 1, "ratio": training.stages[number].ratio}
    return EpochRecord(training.epoch, phase, loss, error, **figures)


def _distribute(encoder: Encoder) -> nn.Module:
    if not _is_group() or not any(True for _ in encoder.parameters()):
        return encoder
    network = DistributedDataParallel(encoder)
    network.register_comm_hook(None, _sum_gradients)
    return network


def _sum_gradients(state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - torch checks these at run time
    # The loss is that of the whole batch, so the workers' gradients add; the usual mean would shrink them.
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    done: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return done


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
