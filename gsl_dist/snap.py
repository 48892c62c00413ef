"""Gradient snapping: the network is pulled toward codewords by bending its gradient, with no loss added.

Forward is the identity: y -> y. Backward, each sub-vector of each row is handled by itself. With its gradient g, its
k nearest codewords c and the pulls d_c = c - y:

    c*  = the c with the largest cos(-g, d_c)          (the neighbour that the descent already heads for)
    d   = d_{c*},  s = cos(-g, d)

and, where s > 0, the gradient that goes on is

    project   g~ = (<g, d> / |d|^2) d                  its projection on the line to c*
    norm      g~ = -|g| d / |d|                        the same direction with all of the length
    clamp     g~ = project, but a step of `step` x g~ stops at c*
    rescale   g~ = (|G| / |P|) project                 G: every g of the batch; P: every project, 0 where s <= 0
    blend     g~ = (1 - beta) g + beta project         beta at most 1
    add       g~ = g - beta |g| d / |d|                all of g, and a pull beta times as large

Where s <= 0 (no neighbour lies downhill), the `fallback` says what goes on: `pass` g, `zero` nothing, `widen` looks
among all codewords before it gives nothing, `orthogonal` the part of g that does not change the distance to the
nearest codeword. Properties, for every variant and fallback:

    P1  <g, g~> >= 0: to first order, a step along -g~ never raises the similarity loss.
    P2  where s > 0, <-g~, d> > 0: a step along -g~ brings y strictly nearer to c* if it is shorter than
        2 <-g~, d> / |g~|. Steps of project, norm, clamp and rescale stay on the line through y and c*; those of blend
        and add are a part of -g and a part that points to c*.
    P3  g = 0 gives g~ = 0: where the loss is satisfied, nothing is pulled.

All but rescale treat each sub-vector by itself. Rescale looks at the rows of this process, so that its steps, and no
other's, depend on how many workers share a batch.

Source: the idea is Liu and Lu, Accurate Deep Representation Quantization with Gradient Snapping Layer for Similarity
Search, arXiv 1610.09645, of which only the abstract could be read; the formulas are this project's reading of it.
This module does not know how the codebook came about or what the loss is.
"""

# Shapes: N rows, D dims, C cells, M sub-vectors, K codewords, d = D // M, k neighbours

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict

_TINY = 1e-12


class SnapConfig(Strict):
    """How gradients are bent toward codewords; `variant: none` leaves them alone."""

    variant: Literal["none", "project", "norm", "clamp", "rescale", "blend", "add"] = "add"
    neighbours: int = Field(default=4, ge=1, description="k nearest codewords to choose from in each sub-vector")
    beta: float = Field(default=0.5, ge=0, description="strength of add; share of project in blend (at most 1)")
    step: float = Field(default=1.0, gt=0, description="assumed step in y, for clamp")
    fallback: Literal["pass", "zero", "widen", "orthogonal"] = "pass"

    @model_validator(mode="after")
    def _blend_is_share(self) -> SnapConfig:
        if self.variant == "blend" and self.beta > 1:
            raise ValueError(f"beta ({self.beta}) is a share in blend: it must be 0 to 1")
        return self

    @model_validator(mode="after")
    def _blend_stays_downhill(self) -> SnapConfig:
        if self.variant == "blend" and self.beta > 1:
            raise ValueError(f"beta ({self.beta}) is a share in blend: at most 1")
        return self


@dataclass(frozen=True)
class SnapHealth:
    """How far snapping bends: means over the rows with a gradient, since the last look.

    Args:
        fallback_rate: share of sub-vectors in which no codeword that was looked at lay downhill.
        cosine: of the kept to the raw gradient of the whole row.
        energy: squared length of the kept over that of the raw gradient.
    """

    fallback_rate: float
    cosine: float
    energy: float


def snap_gradient(grad_NMd: Tensor, y_NMd: Tensor, books_MKd: Tensor, config: SnapConfig) -> tuple[Tensor, Tensor]:
    """Bend gradients toward codewords by the formulas above.

    Shapes: grad_NMd, y_NMd (N, M, d), books_MKd (M, K, d) -> bent (N, M, d), aligned (N, M) bool.
    """
    if config.variant == "none":
        return grad_NMd, torch.ones(grad_NMd.shape[:2], dtype=torch.bool, device=grad_NMd.device)
    distances_NMK = measure_blocks(y_NMd, books_MKd)
    k = min(config.neighbours, books_MKd.shape[1])
    near_NMk = distances_NMK.topk(k, dim=-1, largest=False).indices
    pull_NMd, cosine_NM = _choose_codeword(grad_NMd, y_NMd, books_MKd, near_NMk)
    if config.fallback == "widen":
        wide_NMd, wide_NM = _choose_any(grad_NMd, y_NMd, books_MKd, distances_NMK)
        lost_NM = cosine_NM <= 0
        pull_NMd = torch.where(lost_NM[..., None], wide_NMd, pull_NMd)
        cosine_NM = torch.where(lost_NM, wide_NM, cosine_NM)
    aligned_NM = cosine_NM > 0
    bent_NMd = _bend(grad_NMd, pull_NMd, cosine_NM.clamp_min(0), config)
    rest_NMd = _fall_back(grad_NMd, y_NMd, books_MKd, near_NMk, config.fallback)
    return torch.where(aligned_NM[..., None], bent_NMd, rest_NMd), aligned_NM


def measure_blocks(y_NMd: Tensor, books_MKd: Tensor) -> Tensor:
    """Give squared distances of every sub-vector to its codewords, up to a constant of the sub-vector.

    Shapes: (N, M, d), (M, K, d) -> (N, M, K).
    """
    norms_MK = books_MKd.square().sum(-1)
    dots_MNK = torch.baddbmm(norms_MK[:, None], y_NMd.transpose(0, 1), books_MKd.transpose(1, 2), alpha=-2)
    return dots_MNK.transpose(0, 1)


class SnapGradient(torch.autograd.Function):
    """The identity, whose backward pass is `snap_gradient`."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, rest_ND: Tensor, layer: SnappingLayer) -> Tensor:
        """Give y unchanged; `rest_ND` is what the quantizer codes of it (y, or y less its cell's centroid)."""
        ctx.save_for_backward(rest_ND)
        ctx.layer = layer
        return y_ND.view_as(y_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """Give the bent gradient for y."""
        (rest_ND,) = ctx.saved_tensors
        return ctx.layer.bend(grad_ND, rest_ND), None, None


class SnappingLayer(nn.Module):
    """Passes representations on and bends the gradient that comes back.

    Without a codebook, in evaluation mode, or with `variant: none` it does nothing. The codebook is held constant
    while the network moves; `set_codebook` replaces it between epochs.
    """

    def __init__(self, config: SnapConfig) -> None:
        super().__init__()
        self.config = config
        self._books_MKd: Tensor | None = None
        self._coarse_CD: Tensor | None = None
        self._sums = torch.zeros(4, dtype=torch.float64)

    def set_codebook(self, codebook: Codebook | None) -> None:
        """Take the codewords to land on, or none."""
        self._books_MKd = None if codebook is None else torch.tensor(codebook.books)
        keep_cells = codebook is not None and codebook.residual
        self._coarse_CD = torch.tensor(codebook.coarse) if codebook is not None and keep_cells else None

    def forward(self, y_ND: Tensor) -> Tensor:
        """Give y unchanged.

        Shapes: (N, D) -> (N, D).
        """
        if self._books_MKd is None or self.config.variant == "none" or not self.training:
            return y_ND
        snapped: Tensor = SnapGradient.apply(y_ND, self._leave_over(y_ND.detach()), self)
        return snapped

    def bend(self, grad_ND: Tensor, rest_ND: Tensor) -> Tensor:
        """Bend the gradient of a batch and note how far.

        Shapes: (N, D), (N, D) -> (N, D).
        """
        assert self._books_MKd is not None
        books_MKd = self._books_MKd.to(grad_ND)
        shape = (len(grad_ND), books_MKd.shape[0], books_MKd.shape[2])
        grad_NMd = grad_ND.reshape(shape)
        bent_NMd, aligned_NM = snap_gradient(grad_NMd, rest_ND.reshape(shape), books_MKd, self.config)
        self._note(grad_NMd, bent_NMd, aligned_NM)
        return bent_NMd.reshape_as(grad_ND)

    def take_health(self) -> SnapHealth | None:
        """Give the health since the last call, and start anew; None if nothing was snapped."""
        rows, aligned, cosine, energy = self._sums.tolist()
        self._sums.zero_()
        return SnapHealth(1 - aligned / rows, cosine / rows, energy / rows) if rows else None

    def _leave_over(self, y_ND: Tensor) -> Tensor:
        if self._coarse_CD is None:
            return y_ND
        coarse_CD = self._coarse_CD.to(y_ND)
        return y_ND - coarse_CD[torch.cdist(y_ND, coarse_CD).argmin(dim=1)]

    def _note(self, grad_NMd: Tensor, bent_NMd: Tensor, aligned_NM: Tensor) -> None:
        raw, kept = grad_NMd.flatten(1), bent_NMd.flatten(1)
        lengths = raw.norm(dim=1), kept.norm(dim=1)
        live = lengths[0] > _TINY
        cosine = (raw * kept).sum(1) / (lengths[0] * lengths[1]).clamp_min(_TINY)
        energy = lengths[1].square() / lengths[0].square().clamp_min(_TINY)
        sums = [live.sum(), (aligned_NM.to(raw).mean(1) * live).sum(), (cosine * live).sum(), (energy * live).sum()]
        self._sums += torch.stack([value.double() for value in sums]).cpu()


def _choose_codeword(grad_NMd: Tensor, y_NMd: Tensor, books_MKd: Tensor, near_NMk: Tensor) -> tuple[Tensor, Tensor]:
    """Give the pull to the best aligned of the near codewords and its cosine with the descent direction."""
    parts = torch.arange(books_MKd.shape[0], device=near_NMk.device)[None, :, None]
    pulls_NMkd = books_MKd[parts, near_NMk] - y_NMd[:, :, None]
    lengths_NMk = pulls_NMkd.norm(dim=-1)
    along_NMk = -(pulls_NMkd * grad_NMd[:, :, None]).sum(-1)
    # A row that sits on its codeword has no direction to it: such a codeword is never chosen.
    cosine_NMk = torch.where(lengths_NMk > _TINY, along_NMk / lengths_NMk.clamp_min(_TINY), -torch.inf)
    best_NM, where_NM = cosine_NMk.max(dim=-1)
    chosen_NMd = pulls_NMkd.gather(2, where_NM[..., None, None].expand(-1, -1, 1, y_NMd.shape[2])).squeeze(2)
    return chosen_NMd, best_NM / grad_NMd.norm(dim=-1).clamp_min(_TINY)


def _choose_any(grad_NMd: Tensor, y_NMd: Tensor, books_MKd: Tensor, distances_NMK: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.arange(books_MKd.shape[1], device=grad_NMd.device).expand_as(distances_NMK)
    return _choose_codeword(grad_NMd, y_NMd, books_MKd, order)


def _bend(grad_NMd: Tensor, pull_NMd: Tensor, cosine_NM: Tensor, config: SnapConfig) -> Tensor:
    length_NM = pull_NMd.norm(dim=-1).clamp_min(_TINY)
    unit_NMd = pull_NMd / length_NM[..., None]
    size_NM = grad_NMd.norm(dim=-1)
    if config.variant == "add":
        return grad_NMd - config.beta * size_NM[..., None] * unit_NMd
    if config.variant == "norm":
        return -size_NM[..., None] * unit_NMd
    kept_NM = size_NM * cosine_NM
    if config.variant == "clamp":
        kept_NM = torch.minimum(kept_NM, length_NM / config.step)
    projected_NMd = -kept_NM[..., None] * unit_NMd
    if config.variant == "blend":
        return grad_NMd + config.beta * (projected_NMd - grad_NMd)
    if config.variant == "rescale":
        return projected_NMd * (grad_NMd.norm() / projected_NMd.norm().clamp_min(_TINY))
    return projected_NMd


def _fall_back(grad_NMd: Tensor, y_NMd: Tensor, books_MKd: Tensor, near_NMk: Tensor, fallback: str) -> Tensor:
    if fallback == "pass":
        return grad_NMd
    if fallback != "orthogonal":
        return torch.zeros_like(grad_NMd)
    parts = torch.arange(books_MKd.shape[0], device=near_NMk.device)
    rest_NMd = y_NMd - books_MKd[parts, near_NMk[..., 0]]
    squared_NM = rest_NMd.square().sum(-1, keepdim=True).clamp_min(_TINY)
    return grad_NMd - (grad_NMd * rest_NMd).sum(-1, keepdim=True) / squared_NM * rest_NMd
