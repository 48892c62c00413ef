"""Gradient snapping: the network is pulled toward codewords by bending its gradient, with no loss added.

Forward is the identity: y -> y. Backward, each block of each row is handled by itself: the sub-vectors of a product
codebook, or the whole vector where codewords add up. With the block's gradient g, the k nearest codewords c (of an
additive codebook: the k best sums that a beam search holds) and the pulls d_c = c - y:

    c*  = the c with the largest cos(-g, d_c)          (the neighbour that the descent already heads for)
    d   = d_{c*},  s = cos(-g, d)

and, where s > 0, the gradient that goes on is

    project   g~ = (<g, d> / |d|^2) d                  its projection on the line to c*
    norm      g~ = -|g| d / |d|                        the same direction with all of the length
    clamp     g~ = project, but a step of `step` x g~ stops at c*
    rescale   g~ = (|G| / |P|) project                 G: every g of the batch; P: every project, 0 where s <= 0
    blend     g~ = (1 - beta) g + beta project         beta at most 1
    add       g~ = g - beta |g| d / |d|                all of g, and a pull beta times as large
    spring    g~ = g - (2 weight / N) d                all of g, and a pull that grows with the distance to c*, N the
                                                       rows of the whole batch: a quantization loss toward c*

Where s <= 0 (no neighbour lies downhill), the `fallback` says what goes on: `pass` g, `zero` nothing, `widen` looks
among all codewords (or as many sums as the widest beam holds) before it gives nothing, `orthogonal` the part of g that
does not change the distance to the nearest codeword. There a spring pulls to the nearest codeword, without what goes
against g (r' below, block by block); it takes no fallback but `widen` beside that.

Properties, for every variant above and every fallback, P3 but for the spring:

    P1  <g, g~> >= 0: to first order, a step along -g~ never raises the similarity loss.
    P2  where s > 0, <-g~, d> > 0: a step along -g~ brings y strictly nearer to c* if it is shorter than
        2 <-g~, d> / |g~|. Steps of project, norm, clamp and rescale stay on the line through y and c*; those of blend,
        add and spring are a part of -g and a part that points to c*.
    P3  g = 0 gives g~ = 0: where the loss is satisfied, nothing is pulled. A spring pulls to the nearest codeword.

The opponents, in the same place of the same loop, with the nearest decoded vector q and r = y - q:

    none      g~ = g                                   nothing couples network and codebook: training in two steps
    penalty   g~ = g + (2 weight / N) r                as if weight x the mean of |r|^2 were added to the loss
    surgery   g~ = g + (2 weight / N) r'               r' is r without its part against g: <g, r'> >= 0, so P1 holds

A spring is a penalty that knows where the descent heads. `forward: decoded` gives q to the loss instead of y, and the
gradient comes back as if it had been y (straight through); it goes with every variant.

All but surgery, which weighs the row as a whole, and rescale treat each block by itself. Rescale looks at the rows of
this process, so that its steps, and no other's, depend on how many workers share a batch.

Source: the idea is Liu and Lu, Accurate Deep Representation Quantization with Gradient Snapping Layer for Similarity
Search, arXiv 1610.09645, of which only the abstract could be read; the formulas are this project's reading of it.
This module does not know how the codebook came about or what the loss is.
"""

# Shapes: N rows, D dims, G blocks of d dims, k neighbours

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict
from gsl_dist.quantizers import Coder, leave_over, open_quantizer
from gsl_dist.quantizers.base import as_tensor

FindNear = Callable[[int], Tensor]
"""Gives the k nearest codewords of every block, nearest first: k -> (N, G, k, d), fewer where there are no more."""

_TINY = 1e-12
_ALL = 1 << 16


class SnapConfig(Strict):
    """How gradients are bent toward codewords; `variant: none` leaves them alone."""

    variant: Literal["none", "project", "norm", "clamp", "rescale", "blend", "add", "spring", "penalty", "surgery"] = (
        Field(default="add", description="how the gradient is bent, or which loss stands in its place")
    )
    neighbours: int = Field(default=4, ge=1, description="k nearest codewords to choose from in each block")
    beta: float = Field(default=0.5, ge=0, description="strength of add; share of project in blend (at most 1)")
    step: float = Field(default=1.0, gt=0, description="assumed step in y, for clamp")
    weight: float = Field(default=0.1, ge=0, description="of the quantization loss, for spring, penalty and surgery")
    fallback: Literal["pass", "zero", "widen", "orthogonal"] = Field(
        default="pass", description="what goes on where no codeword lies downhill"
    )
    forward: Literal["identity", "decoded"] = Field(
        default="identity", description="what the loss is given: the representation, or what its code stands for"
    )

    @model_validator(mode="after")
    def _blend_is_share(self) -> SnapConfig:
        if self.variant == "blend" and self.beta > 1:
            raise ValueError(f"beta ({self.beta}) is a share in blend: it must be 0 to 1")
        return self

    @model_validator(mode="after")
    def _spring_falls_back_by_itself(self) -> SnapConfig:
        if self.variant == "spring" and self.fallback in ("zero", "orthogonal"):
            raise ValueError(f"fallback ({self.fallback}) must be pass or widen with variant spring")
        return self


@dataclass(frozen=True)
class SnapHealth:
    """How far snapping bends: means over the rows with a gradient, since the last look.

    Args:
        fallback_rate: share of blocks in which no codeword that was looked at lay downhill.
        cosine: of the kept to the raw gradient of the whole row.
        energy: squared length of the kept over that of the raw gradient.
    """

    fallback_rate: float
    cosine: float
    energy: float


def snap_gradient(
    grad_NGd: Tensor, y_NGd: Tensor, find_near: FindNear, config: SnapConfig, *, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Bend gradients by the formulas above.

    Args:
        grad_NGd: the gradient of each block.
        y_NGd: the blocks.
        find_near: gives their nearest codewords.
        config: the variant and its numbers.
        rows: those of the whole batch, if this is only a part of it.

    Shapes: grad_NGd, y_NGd (N, G, d) -> bent (N, G, d), aligned (N, G) bool.
    """
    if config.variant in ("none", "penalty", "surgery"):
        return _couple(grad_NGd, y_NGd, find_near, config, rows or len(grad_NGd))
    near_NGkd = find_near(config.neighbours)
    pull_NGd, cosine_NG = _choose_codeword(grad_NGd, y_NGd, near_NGkd)
    if config.fallback == "widen":
        wide_NGd, wide_NG = _choose_codeword(grad_NGd, y_NGd, find_near(_ALL))
        lost_NG = cosine_NG <= 0
        pull_NGd = torch.where(lost_NG[..., None], wide_NGd, pull_NGd)
        cosine_NG = torch.where(lost_NG, wide_NG, cosine_NG)
    aligned_NG = cosine_NG > 0
    if config.variant == "spring":
        beside_NGd = _drop_against(y_NGd - near_NGkd[:, :, 0], grad_NGd, (-1,))
        away_NGd = torch.where(aligned_NG[..., None], -pull_NGd, beside_NGd)
        return grad_NGd + 2 * config.weight / (rows or len(grad_NGd)) * away_NGd, aligned_NG
    bent_NGd = _bend(grad_NGd, pull_NGd, cosine_NG.clamp_min(0), config)
    rest_NGd = _fall_back(grad_NGd, y_NGd, near_NGkd[:, :, 0], config.fallback)
    return torch.where(aligned_NG[..., None], bent_NGd, rest_NGd), aligned_NG


class SnapGradient(torch.autograd.Function):
    """The identity, or the decoded row, whose backward pass is `snap_gradient`."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, layer: SnappingLayer) -> Tensor:
        """Give y as it is, or what its code stands for."""
        rest_ND = leave_over(y_ND, layer.codebook)[1]
        ctx.save_for_backward(rest_ND)
        ctx.layer = layer
        return y_ND.view_as(y_ND) if layer.config.forward == "identity" else layer.decode(y_ND, rest_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Give the bent gradient for y."""
        (rest_ND,) = ctx.saved_tensors
        return ctx.layer.bend(grad_ND, rest_ND), None


class SnappingLayer(nn.Module):
    """Passes representations on and bends the gradient that comes back.

    Without a codebook or in evaluation mode it does nothing. The codebook is held constant while the network moves;
    `set_codebook` replaces it between epochs.

    Args:
        config: the variant and its numbers.
        workers: those that share a batch; only those whose force is a mean over the batch ask.
    """

    def __init__(self, config: SnapConfig, *, workers: int = 1) -> None:
        super().__init__()
        self.config, self.workers = config, workers
        self._codebook: Codebook | None = None
        self._quantizer: Coder | None = None
        self._sums = torch.zeros(4, dtype=torch.float64)

    @property
    def codebook(self) -> Codebook:
        """Give the codewords to land on."""
        assert self._codebook is not None
        return self._codebook

    def set_codebook(self, codebook: Codebook | None) -> None:
        """Take the codewords to land on, or none."""
        self._codebook = codebook
        self._quantizer = None if codebook is None else open_quantizer(codebook)

    def forward(self, y_ND: Tensor) -> Tensor:
        """Give y unchanged, or decoded.

        Shapes: (N, D) -> (N, D).
        """
        idle = self.config.variant == "none" and self.config.forward == "identity"
        if self._codebook is None or idle or not self.training:
            return y_ND
        snapped: Tensor = SnapGradient.apply(y_ND, self)
        return snapped

    def bend(self, grad_ND: Tensor, rest_ND: Tensor) -> Tensor:
        """Bend the gradient of a batch and note how far.

        Shapes: grad_ND (N, D); rest_ND (N, D), what the codewords stand for of each row -> (N, D).
        """
        blocks = (1 if self.codebook.additive else self.codebook.sub_vectors, -1)
        grad_NGd = _turn(grad_ND, self.codebook).unflatten(1, blocks)
        bent_NGd, aligned_NG = snap_gradient(
            grad_NGd,
            rest_ND.unflatten(1, blocks),
            lambda k: self._find_near(rest_ND, k),
            self.config,
            rows=len(grad_ND) * self.workers,
        )
        self._note(grad_NGd, bent_NGd, aligned_NG)
        return _turn(bent_NGd.reshape_as(grad_ND), self.codebook, back=True)

    def decode(self, y_ND: Tensor, rest_ND: Tensor) -> Tensor:
        """Give what the nearest code of each row stands for: the row, with another rest.

        Shapes: y_ND (N, D); rest_ND (N, D), what the codewords stand for of each row -> (N, D).
        """
        missed_ND = rest_ND - self._find_near(rest_ND, 1)[:, :, 0].flatten(1)
        return y_ND - _turn(missed_ND, self.codebook, back=True)

    def _find_near(self, rest_ND: Tensor, k: int) -> Tensor:
        assert self._quantizer is not None
        return self._quantizer.neighbours(rest_ND, self.codebook, k)

    def take_health(self) -> SnapHealth | None:
        """Give the health since the last call, and start anew; None if nothing was snapped."""
        rows, aligned, cosine, energy = self._sums.tolist()
        self._sums.zero_()
        return SnapHealth(1 - aligned / rows, cosine / rows, energy / rows) if rows else None

    def _note(self, grad_NGd: Tensor, bent_NGd: Tensor, aligned_NG: Tensor) -> None:
        raw, kept = grad_NGd.flatten(1), bent_NGd.flatten(1)
        lengths = raw.norm(dim=1), kept.norm(dim=1)
        live = lengths[0] > _TINY
        cosine = (raw * kept).sum(1) / (lengths[0] * lengths[1]).clamp_min(_TINY)
        energy = lengths[1].square() / lengths[0].square().clamp_min(_TINY)
        sums = [live.sum(), (aligned_NG.to(raw).mean(1) * live).sum(), (cosine * live).sum(), (energy * live).sum()]
        self._sums += torch.stack([value.double() for value in sums]).cpu()


def _turn(grad_ND: Tensor, codebook: Codebook, *, back: bool = False) -> Tensor:
    """Turn gradients into the codewords' frame, or back; lengths and angles stay."""
    if codebook.rotation is None:
        return grad_ND
    rotation_DD = as_tensor(codebook.rotation, grad_ND)
    return grad_ND @ (rotation_DD if back else rotation_DD.T)


def _couple(
    grad_NGd: Tensor, y_NGd: Tensor, find_near: FindNear, config: SnapConfig, rows: int
) -> tuple[Tensor, Tensor]:
    """Give the gradient with that of a quantization loss added, as it is or without what goes against the first."""
    everywhere = torch.ones(grad_NGd.shape[:2], dtype=torch.bool, device=grad_NGd.device)
    if config.variant == "none":
        return grad_NGd, everywhere
    rest_NGd = y_NGd - find_near(1)[:, :, 0]
    if config.variant == "surgery":
        rest_NGd = _drop_against(rest_NGd, grad_NGd, (1, 2))
    return grad_NGd + 2 * config.weight / rows * rest_NGd, everywhere


def _drop_against(rest_NGd: Tensor, grad_NGd: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Give what codewords leave over without its part against the gradient, over whole rows or block by block."""
    against = (rest_NGd * grad_NGd).sum(dims, keepdim=True).clamp_max(0)
    return rest_NGd - against / grad_NGd.square().sum(dims, keepdim=True).clamp_min(_TINY) * grad_NGd


def _choose_codeword(grad_NGd: Tensor, y_NGd: Tensor, near_NGkd: Tensor) -> tuple[Tensor, Tensor]:
    """Give the pull to the best aligned of the near codewords and its cosine with the descent direction."""
    pulls_NGkd = near_NGkd - y_NGd[:, :, None]
    lengths_NGk = pulls_NGkd.norm(dim=-1)
    along_NGk = -(pulls_NGkd * grad_NGd[:, :, None]).sum(-1)
    # A row that sits on its codeword has no direction to it: such a codeword is never chosen.
    cosine_NGk = torch.where(lengths_NGk > _TINY, along_NGk / lengths_NGk.clamp_min(_TINY), -torch.inf)
    best_NG, where_NG = cosine_NGk.max(dim=-1)
    chosen_NGd = pulls_NGkd.gather(2, where_NG[..., None, None].expand(-1, -1, 1, y_NGd.shape[2])).squeeze(2)
    return chosen_NGd, best_NG / grad_NGd.norm(dim=-1).clamp_min(_TINY)


def _bend(grad_NGd: Tensor, pull_NGd: Tensor, cosine_NG: Tensor, config: SnapConfig) -> Tensor:
    length_NG = pull_NGd.norm(dim=-1).clamp_min(_TINY)
    unit_NGd = pull_NGd / length_NG[..., None]
    size_NG = grad_NGd.norm(dim=-1)
    if config.variant == "add":
        return grad_NGd - config.beta * size_NG[..., None] * unit_NGd
    if config.variant == "norm":
        return -size_NG[..., None] * unit_NGd
    kept_NG = size_NG * cosine_NG
    if config.variant == "clamp":
        kept_NG = torch.minimum(kept_NG, length_NG / config.step)
    projected_NGd = -kept_NG[..., None] * unit_NGd
    if config.variant == "blend":
        return grad_NGd + config.beta * (projected_NGd - grad_NGd)
    if config.variant == "rescale":
        return projected_NGd * (grad_NGd.norm() / projected_NGd.norm().clamp_min(_TINY))
    return projected_NGd


def _fall_back(grad_NGd: Tensor, y_NGd: Tensor, nearest_NGd: Tensor, fallback: str) -> Tensor:
    if fallback == "pass":
        return grad_NGd
    if fallback != "orthogonal":
        return torch.zeros_like(grad_NGd)
    rest_NGd = y_NGd - nearest_NGd
    squared_NG = rest_NGd.square().sum(-1, keepdim=True).clamp_min(_TINY)
    return grad_NGd - (grad_NGd * rest_NGd).sum(-1, keepdim=True) / squared_NG * rest_NGd
