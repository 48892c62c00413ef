"""AsymFusion: one network for items of several modalities, such as an image and its depth or its edges.

Every weight is shared by all modalities; only batch normalization is private to each. In the last block of every stage
two modalities exchange what they see, in both directions and without a parameter. With C channels in the middle of the
block, g = C // 5 and k = 4 g, after the first convolution:

    shuffle   the channels from k on change places:  y1 = [x1[:k], x2[k:]],  y2 = [x2[:k], x1[k:]]
    shift     s_m: each of four groups of g kept channels of x_m reads the neighbour above, to the left, to the right,
              below (zeros outside); the channels from k on are zero
    add       after the second convolution:  y1 += s2,  y2 += s1;  then the shuffle once more

What 1 receives from 2 is not what 2 receives from 1: the fusion is asymmetric. Each modality m ends in a representation
e_m of its own, and the item in e = sum_m alpha_m e_m, with alpha the softmax of one learned number a modality. All e_m
and e are learned from, but through e only alpha learns: e_m is held constant there (`Views`).

An item that lacks a modality passes unfused, and so does, with `modality_dropout`, that share of the items in a step:
only then was the network taught to do with one. Its e is that of the modalities that are there.

Source: Wang, Sun, Lu, Yao, Learning Deep Multimodal Feature Representation with Asymmetric Multi-layer Fusion, arXiv
2108.05009. The block, the offsets, the shares and the gradient of alpha are those of the released code. This project's
own: representations in place of a segmentation, small stages for small images, statistics that are updated instead of
frozen, modality dropout, private stems where channels differ in number.
"""

# Shapes: N items, H W of an image, C channels, V views, D dims of a representation; M modalities

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gsl_dist.config import Strict
from gsl_dist.errors import DataError

Rows = tuple[Tensor, Tensor] | None
"""The rows of two modalities that belong to the same items; None: all of them, in the same order."""

_OFFSETS = ((-1, 0), (0, -1), (0, 1), (1, 0))
"""Where the four groups of the shift read: rows down, columns to the right."""

_MOMENTUM = 0.1
"""Share of a batch in the running statistics."""

_PAIR = 2
_GROUPS = 5
_GRID = 2
"""Places left in each direction at the end of the network."""


class FusionConfig(Strict):
    """One residual network for all modalities of an item, fused without parameters in the last block of each stage."""

    kind: Literal["asymfusion"]
    dim: int = Field(default=64, ge=1, description="numbers of a representation")
    channels: tuple[int, ...] = Field(default=(40, 80, 160), min_length=1, description="of each stage, at least 10")
    blocks: int = Field(default=2, ge=2, description="of each stage; the first halves the sides, the last one fuses")
    sharing: Literal["weights", "all", "none"] = Field(
        default="weights", description="by modalities: weights but not normalization, both, or neither"
    )
    shuffle: bool = Field(default=True, description="exchange channels where modalities are fused")
    shift: bool = Field(default=True, description="add each other's moved pixels where modalities are fused")
    modality_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of items whose modalities pass alone in a step; above 0, one modality is enough later",
    )
    normalize: bool = Field(default=True, description="bring representations to length 1")

    @model_validator(mode="after")
    def _has_channels_to_exchange(self) -> FusionConfig:
        if min(self.channels) < 2 * _GROUPS:
            raise ValueError(f"channels {self.channels} must be at least {2 * _GROUPS}: a fifth of half is exchanged")
        return self

    @property
    def fuses(self) -> bool:
        """Tell whether modalities exchange anything before the end."""
        return self.shuffle or self.shift


class Views(NamedTuple):
    """What the network makes of items: a representation by each modality, and last the fused one.

    Shapes: y_VND (V, N, D); there_VN (V, N) bool, false where there is nothing to learn from.
    """

    y_VND: Tensor
    there_VN: Tensor


class AsymFusion(nn.Module):
    """Gives the views of items of several modalities.

    Args:
        modalities: their names, in the order in which items hold them, and their channels.
        config: the shape of the network.
        normalize: scale every representation to length 1.
    """

    def __init__(self, modalities: Mapping[str, int], config: FusionConfig) -> None:
        super().__init__()
        self.names, self.widths, self.config = tuple(modalities), tuple(modalities.values()), config
        count = len(self.names)
        copies = count if config.sharing == "none" else 1
        norms = 1 if config.sharing == "all" else count
        alike = len(set(self.widths)) == 1
        first = config.channels[0]
        stems = self.widths[:copies] if alike else self.widths
        self.stem = Each([_make_conv(width, first, 3) for width in stems])
        self.stem_norm = Norms(first, norms)
        self.blocks = nn.ModuleList()
        for before, after in zip((first, *config.channels), config.channels, strict=False):
            self.blocks.append(Block(before, after, 2, copies, norms))
            self.blocks.extend(Block(after, after, 1, copies, norms) for _ in range(config.blocks - 1))
        width = config.channels[-1] * _GRID**2
        self.last = Each([nn.Linear(width, config.dim) for _ in range(copies)])
        self.alpha = nn.Parameter(torch.zeros(count))

    @property
    def does_with_one(self) -> bool:
        """Tell whether an item may lack a modality."""
        return len(self.names) == 1 or not self.config.fuses or self.config.modality_dropout > 0

    def forward(self, items: Tensor) -> Views:
        """Give the views.

        Shapes: (N, H, W, C + 1) uint8, the channels of all modalities and a plane whose bits say which are there.
        Raises:
            DataError: a row lacks a modality that this network was not taught to do without.
        """
        images, there_MN = split_items(items, self.widths)
        whole_N = there_MN.all(0)
        self._check_there(there_MN, whole_N)
        fused_N = whole_N
        if self.training and self.config.modality_dropout:
            fused_N = whole_N & (torch.rand(len(items), device=items.device) >= self.config.modality_dropout)
        if not whole_N.all():
            images = [image[there_N] for image, there_N in zip(images, there_MN, strict=True)]
        e_MND = [F.normalize(e, dim=1) if self.config.normalize else e for e in self._run(images, there_MN, fused_N)]
        e_MND = [_put_back(e, there_N) for e, there_N in zip(e_MND, there_MN, strict=True)]
        joined_ND = self._join(torch.stack(e_MND).detach(), there_MN)
        # In training, e is of whole items alone: of one modality it says nothing that could teach alpha.
        last_N = fused_N if self.training else there_MN.any(0)
        return Views(torch.stack([*e_MND, joined_ND]), torch.cat([there_MN, last_N[None]]))

    def _run(self, images: list[Tensor], there_MN: Tensor, fused_N: Tensor) -> list[Tensor]:
        fuses = self.config.fuses and len(images) == _PAIR
        rows = None
        if fuses and not fused_N.all():
            rows = fused_N[there_MN[0]].nonzero()[:, 0], fused_N[there_MN[1]].nonzero()[:, 0]
        xs = [F.relu(x) for x in self.stem_norm(self.stem(images))]
        for place, block in enumerate(self.blocks, 1):
            is_last = place % self.config.blocks == 0
            xs = block(xs, self.config, rows) if fuses and is_last else block(xs)
        return self.last([F.adaptive_avg_pool2d(x, _GRID).flatten(1) for x in xs])

    def _join(self, e_MND: Tensor, there_MN: Tensor) -> Tensor:
        weights_MN = torch.softmax(self.alpha, 0)[:, None] * there_MN
        joined_ND = torch.einsum("mn,mnd->nd", weights_MN / weights_MN.sum(0).clamp_min(1e-12), e_MND)
        return F.normalize(joined_ND, dim=1) if self.config.normalize else joined_ND

    def _check_there(self, there_MN: Tensor, whole_N: Tensor) -> None:
        if self.does_with_one or whole_N.all():
            return
        row = int((~whole_N).nonzero()[0])
        here = zip(self.names, there_MN[:, row].tolist(), strict=True)
        lacking = ", ".join(name for name, is_here in here if not is_here)
        raise DataError(
            "items",
            f"a row without {lacking}",
            f"this encoder fuses {' and '.join(self.names)} and needs both: give {lacking} too, or train it with "
            f"encoder.modality_dropout above 0",
        )


class Block(nn.Module):
    """A residual bottleneck over a list of tensors, one a modality; where it is told to, it fuses two of them."""

    def __init__(self, before: int, after: int, stride: int, copies: int, norms: int) -> None:
        super().__init__()
        middle = after // 2
        shapes = [(before, middle, 1, 1), (middle, middle, 3, stride), (middle, after, 1, 1)]
        self.convs = nn.ModuleList(Each([_make_conv(*shape) for _ in range(copies)]) for shape in shapes)
        self.norms = nn.ModuleList(Norms(shape[1], norms) for shape in shapes)
        self.skip, self.skip_norm = None, None
        if stride > 1 or before != after:
            self.skip = Each([_make_conv(before, after, 1, stride) for _ in range(copies)])
            self.skip_norm = Norms(after, norms)

    def forward(self, xs: list[Tensor], fusion: FusionConfig | None = None, rows: Rows = None) -> list[Tensor]:
        """Give the next maps of each modality; `fusion` says what is exchanged, `rows` between which of them."""
        shuffle, shift = (fusion.shuffle, fusion.shift) if fusion else (False, False)
        ys = [F.relu(y) for y in self.norms[0](self.convs[0](xs))]
        moved = _take_rows([shift_pixels(y) for y in ys], rows) if shift else []
        ys = _exchange(swap_channels, ys, rows) if shuffle else ys
        ys = [F.relu(y) for y in self.norms[1](self.convs[1](ys))]
        if shift:
            ys = _exchange(lambda y1, y2: (y1 + moved[1], y2 + moved[0]), ys, rows)
        ys = _exchange(swap_channels, ys, rows) if shuffle else ys
        ys = self.norms[2](self.convs[2](ys))
        kept = self.skip_norm(self.skip(xs)) if self.skip and self.skip_norm else xs
        return [F.relu(y + x) for y, x in zip(ys, kept, strict=True)]


class Each(nn.Module):
    """Applies to every modality its own module, or the one that all share."""

    def __init__(self, copies: list[nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copies)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Give what becomes of the tensor of each modality."""
        return [self.copies[place % len(self.copies)](x) for place, x in enumerate(xs)]


class Norms(nn.Module):
    """Batch normalization of every modality by itself, or of all together by one set of statistics."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(JointNorm(channels) for _ in range(count))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Give the normalized tensor of each modality."""
        if len(self.copies) == 1:
            return list(self.copies[0](torch.cat(xs)).split([len(x) for x in xs]))
        return [norm(x) for norm, x in zip(self.copies, xs, strict=True)]


class JointNorm(nn.BatchNorm2d):
    """Batch normalization over the rows of all workers: any number of them trains the same network."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=_MOMENTUM)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Give the normalized maps; a batch without rows is left as it is.

        Shapes: (N, C, H, W) -> the same.
        """
        if not self.training:
            return super().forward(x_NCHW)
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x_NCHW) if len(x_NCHW) else x_NCHW
        mean_C, variance_C, count = self._measure(x_NCHW)
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, _MOMENTUM)
            self.running_var.lerp_(variance_C * (count / (count - 1).clamp_min(1)), _MOMENTUM)
            self.num_batches_tracked.add_(1)
        scale_C = self.weight * (variance_C + self.eps).rsqrt()
        offset_C = self.bias - mean_C * scale_C
        return x_NCHW * scale_C[:, None, None] + offset_C[:, None, None]

    def _measure(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Sums about the running mean, which is near the true one: squares of large numbers would cancel.
        about_C = self.running_mean.clone()
        rest_NCHW = x_NCHW - about_C[:, None, None]
        count = torch.full_like(about_C[:1], x_NCHW.numel() / x_NCHW.shape[1])
        sums = _SumOverWorkers.apply(torch.cat([rest_NCHW.sum((0, 2, 3)), rest_NCHW.square().sum((0, 2, 3)), count]))
        count = sums[-1:].detach().clamp_min(1)
        off_C, square_C = (sums[:-1] / count).chunk(2)
        return about_C + off_C, square_C - off_C.square(), count


class _SumOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # Every worker holds the part of the gradient that comes through its own rows.
        total = grad.clone()
        dist.all_reduce(total)
        return total


def swap_channels(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Let the last fifth of the channels, or a little more, change places; doing it twice undoes it.

    Shapes: (N, C, H, W) each -> the same.
    """
    kept = _count_kept(x1)
    return torch.cat([x1[:, :kept], x2[:, kept:]], 1), torch.cat([x2[:, :kept], x1[:, kept:]], 1)


def shift_pixels(x_NCHW: Tensor) -> Tensor:
    """Move the kept channels by a pixel, each of four groups another way; zeros come in, and for all other channels.

    Shapes: (N, C, H, W) -> the same.
    """
    kept, (height, width) = _count_kept(x_NCHW), x_NCHW.shape[2:]
    wide = F.pad(x_NCHW[:, :kept], (1, 1, 1, 1))
    moved = [
        part[:, :, 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        for part, (down, right) in zip(wide.split(kept // len(_OFFSETS), dim=1), _OFFSETS, strict=True)
    ]
    return torch.cat([*moved, torch.zeros_like(x_NCHW[:, kept:])], 1)


def split_items(items: Tensor, widths: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Take items apart: the images of each modality from -1 to 1, and which are there.

    Shapes: (N, H, W, sum of widths + 1) uint8 -> M x (N, width, H, W) float32, (M, N) bool.
    """
    planes = items.permute(0, 3, 1, 2)
    places = torch.arange(len(widths), device=items.device)
    there_MN = (planes[:, -1, 0, 0].int() >> places[:, None] & 1).bool()
    images = planes[:, :-1].float().div_(127.5).sub_(1)
    return [part.contiguous() for part in images.split(widths, dim=1)], there_MN


def _count_kept(x_NCHW: Tensor) -> int:
    return len(_OFFSETS) * (x_NCHW.shape[1] // _GROUPS)


def _exchange(
    exchange: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], xs: list[Tensor], rows: Rows
) -> list[Tensor]:
    """Let two modalities exchange something where both belong to the item."""
    parts = exchange(*_take_rows(xs, rows))
    if rows is None:
        return list(parts)
    return [x.index_copy(0, own, part) for x, own, part in zip(xs, rows, parts, strict=True)]


def _take_rows(xs: list[Tensor], rows: Rows) -> list[Tensor]:
    return xs if rows is None else [x[own] for x, own in zip(xs, rows, strict=True)]


def _put_back(e_ND: Tensor, there_N: Tensor) -> Tensor:
    if len(e_ND) == len(there_N):
        return e_ND
    whole_ND = e_ND.new_zeros(len(there_N), e_ND.shape[1])
    return whole_ND.index_copy(0, there_N.nonzero()[:, 0], e_ND)


def _make_conv(before: int, after: int, size: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
