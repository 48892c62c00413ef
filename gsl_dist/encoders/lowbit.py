"""Low-bit weights by parts: from stage to stage more of each layer is quantized, until all of it is.

One engine, four choices. The levels (`packed`): binary, ternary, powers of two. What is quantized next (`select`). By
whole filters or single weights (`unit`). Whether what was quantized stays as it is (`frozen`) or is chosen anew in
every step. Each stage runs the whole schedule of learning rates with an optimizer of its own. Two corners have names:

    stochastic quantization   binary or ternary, filters by their error at random, not frozen
    incremental quantization  powers of two, single weights by their size, frozen, from a trained float network on

With the ratio r of a layer of u units, n = ceil(r u) are quantized. With e_i = |W_i - Q_i|_1 / |W_i|_1 (0 where the
norm is), the `select` rules are

    paper      n units are drawn to be quantized, one by one without replacement, with chances as 1 / (e_i + 1e-7)
    released   u - n units are drawn to be kept, with chances as e_i
    random     all chances are equal
    magnitude  the n of largest mean |W|

Not frozen, the forward pass sees the hybrid H (Q where chosen, W elsewhere) and the gradient at H moves the whole of W
as it is: neither clipped nor scaled. The choice is drawn again in every step from a generator of the seed, the layer,
the epoch and the step, so that every worker of a data-parallel training draws the same. Frozen, what is chosen takes
its level when a stage begins and has it back after every step of the optimizer, whatever momentum or decay did; the
levels of a layer are those of its first stage. `control` takes the same steps and restarts and quantizes nothing.

While part of a network is float, what it gives depends on a draw: it refuses to be evaluated or exported. The training
loop alone looks at it so, to fit the codebook to the network as the next step has it.

Source: Dong et al., arXiv 1708.01001, read through the released code and two accounts of it, and Zhou et al., arXiv
1702.03044, read through the released code and a port; docs/encoders.md says what is whose. That every worker draws the
same, what the codebook is fitted to, the levels of a layer held fixed, and the other corners are this project's.
"""

# Shapes: m filters, d weights of each, u units: filters or single weights

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gsl_dist.config import Strict
from gsl_dist.encoders.packed import Grid, fit_grid, pack_layer, write_header
from gsl_dist.errors import ConfigError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_GUARD = 1e-7
_ROUNDING = 1e-9
_SELECT = "what is quantized first: the least error by the rule of the paper or of its code, any, or the largest"
_UNIT = "what is chosen: whole filters, or single weights"
_FROZEN = "what was quantized stays as it is"
_FLOAT_FIRST = "a stage of the float network comes before"


class Stage(NamedTuple):
    """One run through the schedule of learning rates with a share of each layer quantized; 0: the float network."""

    ratio: float
    epochs: int


class _StagedConfig(Strict):
    """What both methods share."""

    select: Literal["paper", "released", "random", "magnitude"]
    unit: Literal["filter", "element"]
    frozen: bool
    float_first: bool
    ratios: tuple[float, ...] = Field(default=(0.5, 0.75, 0.875, 1.0), min_length=1, description="a stage each")
    epochs: int | None = Field(
        default=None, ge=1, description="of each stage after the float one; None: fit.epochs, as in every stage"
    )
    leave: tuple[str, ...] = Field(default=(), description="layers that stay float, such as backbone.0")
    control: bool = Field(default=False, description="the same stages in float: quantize nothing")

    @model_validator(mode="after")
    def _ratios_rise_to_one(self) -> _StagedConfig:
        rises = all(0 < a <= b for a, b in zip(self.ratios, (*self.ratios[1:], 1.0), strict=True))
        if not rises or self.ratios[-1] != 1:
            raise ValueError(f"ratios {list(self.ratios)} must be above 0, never fall, and end at 1")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> _StagedConfig:
        if self.epochs and not self.float_first:
            raise ValueError("epochs goes with float_first: true; without it every stage has fit.epochs")
        if self.frozen and not self.float_first and self.ratios[0] == 1:
            raise ValueError("ratios that begin at 1 freeze an untrained network: let float_first be true")
        return self

    def plan_stages(self, epochs: int) -> list[Stage]:
        """Give the stages of a training whose schedule is so many epochs long.

        When all weights are frozen, nothing that counts is left to train: that stage has no epochs.
        """
        first = [Stage(0.0, epochs)] if self.float_first else []
        own = self.epochs or epochs
        return first + [Stage(ratio, 0 if self.frozen and ratio == 1 else own) for ratio in self.ratios]


class StochasticConfig(_StagedConfig):
    """Weights of two or three levels: stochastic quantization, unless told otherwise."""

    kind: Literal["binary", "ternary"]
    select: Literal["paper", "released", "random", "magnitude"] = Field(default="paper", description=_SELECT)
    unit: Literal["filter", "element"] = Field(default="filter", description=_UNIT)
    frozen: bool = Field(default=False, description=_FROZEN)
    float_first: bool = Field(default=False, description=_FLOAT_FIRST)

    @property
    def bits(self) -> int:
        """Give the bits of one weight."""
        return 1 if self.kind == "binary" else 2


class IncrementalConfig(_StagedConfig):
    """Weights that are powers of two: incremental quantization, unless told otherwise."""

    kind: Literal["power"]
    bits: int = Field(default=5, ge=2, le=8, description="of one weight; 2^(bits - 2) powers of either sign, and 0")
    select: Literal["paper", "released", "random", "magnitude"] = Field(default="magnitude", description=_SELECT)
    unit: Literal["filter", "element"] = Field(default="element", description=_UNIT)
    frozen: bool = Field(default=True, description=_FROZEN)
    float_first: bool = Field(default=True, description=_FLOAT_FIRST)


LowbitConfig = Annotated[StochasticConfig | IncrementalConfig, Field(discriminator="kind")]


class Partition(nn.Module):
    """The parametrization of one weight: gives it as it is, in part quantized, or as a whole.

    Args:
        name: of the layer, for messages.
        weight: what it parametrizes.
        config: the four choices.
        seed: of this layer's draws.
    """

    frozen: Tensor
    scales: Tensor
    edge: Tensor

    def __init__(
        self, name: str, weight: Tensor, config: StochasticConfig | IncrementalConfig, seed: tuple[int, int]
    ) -> None:
        super().__init__()
        self.name, self.config, self.seed = name, config, seed
        self.ratio, self.moment, self.open = 0.0, (0, 0), False
        self._held: Tensor | None = None
        if config.frozen and not config.control:
            # Bytes, not bools: some backends of torch.distributed do not send those.
            self.register_buffer("frozen", torch.zeros_like(weight, dtype=torch.uint8, requires_grad=False))
            self.register_buffer("scales", weight.new_zeros(1 if config.kind == "power" else len(weight), 1))
            self.register_buffer("edge", weight.new_zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        """Give the weight that the network computes with.

        Raises:
            ConfigError: outside of a training step, while part of it is float.
        """
        if self.config.control or self.ratio == 0:
            return weight
        is_step = self.training and torch.is_grad_enabled()
        if not is_step and not self.open:
            self.check()
        if self.config.frozen:
            return weight
        hybrid: Tensor = _Hybrid.apply(weight, self.mix(weight.detach()))
        return hybrid

    @torch.no_grad()
    def mix(self, weight: Tensor) -> Tensor:
        """Give the hybrid: levels where the draw of this step says so, the weight itself elsewhere.

        Shapes: (m, ...) -> the same.
        """
        grid = self.grid(weight)
        quantized_md = grid.decode(grid.code(weight))
        if self.ratio < 1:
            weight_md = weight.flatten(1)
            quantized_md = torch.where(self._choose(weight_md, quantized_md), quantized_md, weight_md)
        return quantized_md.reshape_as(weight)

    def grid(self, weight: Tensor) -> Grid:
        """Give the levels of the layer: those that its first frozen weights took, or those that suit it now."""
        if self.config.frozen and self.frozen.any():
            return Grid(self.config.kind, self.config.bits, self.scales, self.edge)
        return fit_grid(weight, self.config.kind, self.config.bits)

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Quantize as much of the weight as the ratio says, in place and for good."""
        grid = self.grid(weight)
        quantized_md, weight_md = grid.decode(grid.code(weight)), weight.flatten(1)
        chosen = self._choose(weight_md, quantized_md).reshape_as(weight)
        weight.copy_(torch.where(chosen, quantized_md.reshape_as(weight), weight))
        self.scales.copy_(grid.scales)
        self.edge.copy_(grid.edge)
        self.frozen.copy_(chosen)
        self.hold(weight)

    def hold(self, weight: Tensor) -> None:
        """Remember the values that frozen weights have now."""
        self._held = weight.detach().clone()

    @torch.no_grad()
    def restore(self, weight: Tensor) -> None:
        """Give frozen weights the values back that they were frozen at."""
        if self._held is not None:
            weight.copy_(torch.where(self.frozen.bool(), self._held, weight))

    def check(self) -> None:
        """Let pass what is as a whole float or quantized.

        Raises:
            ConfigError: it is neither.
        """
        if not self.config.control and self.ratio < 1:
            raise ConfigError(
                f"layer {self.name}",
                f"quantized to {self.ratio:g}",
                "a network is evaluated and exported when all of it is: train on to the last ratio of lowbit, 1",
            )

    def _choose(self, weight_md: Tensor, quantized_md: Tensor) -> Tensor:
        """Tell which weights are quantized at this ratio and moment, those that are frozen already among them."""
        taken_md = self.frozen.flatten(1).bool() if self.config.frozen else torch.zeros_like(weight_md).bool()
        parts = [weight_md, quantized_md, taken_md]
        if self.config.unit == "element":
            parts = [part.reshape(-1, 1) for part in parts]
        rank_u = _rank_units(parts[0], parts[1], self.config.select, (*self.seed, *self.moment))
        rank_u[parts[2].all(1).cpu()] = -torch.inf
        chosen_u = torch.zeros(len(rank_u), dtype=torch.bool)
        chosen_u[rank_u.topk(count_units(self.ratio, len(rank_u)), largest=False).indices] = True
        return chosen_u.to(weight_md.device)[:, None].expand_as(parts[0]).reshape(weight_md.shape)


class Progression:
    """Leads an encoder from float to low-bit weights: knows its partitions and which stage they are in.

    Args:
        encoder: its layers get a partition each, all but those that are to stay float.
        config: the method.
        seed: of all draws.

    Raises:
        ConfigError: a layer that is to stay float is not there, or none is left to quantize.
    """

    def __init__(self, encoder: nn.Module, config: StochasticConfig | IncrementalConfig, *, seed: int) -> None:
        self.config = config
        self._layers = _find_layers(encoder, config.leave)
        self._partitions: list[Partition] = []
        for number, (name, layer) in enumerate(self._layers.items()):
            partition = Partition(name, layer.weight.detach(), config, (seed, number))
            parametrize.register_parametrization(layer, "weight", partition)
            self._partitions.append(partition)

    def plan_stages(self, epochs: int) -> list[Stage]:
        """Give the stages of a training whose schedule is so many epochs long."""
        return self.config.plan_stages(epochs)

    def enter(self, ratio: float) -> None:
        """Begin a stage: frozen ones quantize what they are to hold from now on."""
        self.go_on(ratio)
        for partition, weight in self._pairs() if self._freezes else []:
            if ratio:
                partition.freeze(weight)

    def go_on(self, ratio: float) -> None:
        """Be in a stage that was begun before."""
        for partition, weight in self._pairs():
            partition.ratio = ratio
            if self._freezes:
                partition.hold(weight)

    def draw(self, epoch: int, step: int) -> None:
        """Let the choice be that of a step."""
        for partition in self._partitions:
            partition.moment = (epoch, step)

    def restore(self) -> None:
        """Give frozen weights back the values that the optimizer moved."""
        for partition, weight in self._pairs() if self._freezes else []:
            partition.restore(weight)

    @contextlib.contextmanager
    def look(self) -> Iterator[None]:
        """Let the network be looked at as the step that was drawn last has it, in part float as it may be."""
        for partition in self._partitions:
            partition.open = True
        try:
            yield
        finally:
            for partition in self._partitions:
                partition.open = False

    @property
    def _freezes(self) -> bool:
        return self.config.frozen and not self.config.control

    def _pairs(self) -> Iterator[tuple[Partition, Tensor]]:
        for partition, layer in zip(self._partitions, self._layers.values(), strict=True):
            yield partition, layer.parametrizations["weight"].original


class _Hybrid(torch.autograd.Function):
    """Gives the hybrid, and hands its gradient on to the weight. W + (H - W) would be H but for rounding."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, hybrid: Tensor) -> Tensor:
        return hybrid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def export_weights(encoder: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give an encoder as tensors and the header of a safetensors file, its quantized layers as codes.

    Raises:
        ConfigError: a layer is quantized in part.
    """
    tensors, layers = dict(encoder.state_dict()), {}
    for name, layer in encoder.named_modules():
        if (partition := _find_partition(layer)) is None:
            continue
        partition.check()
        own = f"{name}.parametrizations.weight."
        weight = tensors[own + "original"]
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(own)}
        if partition.config.control:
            tensors[f"{name}.weight"] = weight
        else:
            packed, layers[f"{name}.weight"] = pack_layer(f"{name}.weight", weight, partition.grid(weight))
            tensors |= packed
    return {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, write_header(layers) if layers else {}


def count_units(ratio: float, units: int) -> int:
    """Give how many of so many units are quantized at a ratio."""
    return math.ceil(ratio * units - _ROUNDING)


def _find_layers(encoder: nn.Module, leave: tuple[str, ...]) -> dict[str, Any]:
    known = {name: layer for name, layer in encoder.named_modules() if isinstance(layer, _LAYERS)}
    if missing := [name for name in leave if name not in known]:
        raise ConfigError("lowbit.leave", missing[0], f"the layers with weights are {', '.join(known) or 'none'}")
    layers = {name: layer for name, layer in known.items() if name not in leave}
    if taken := [name for name, layer in layers.items() if parametrize.is_parametrized(layer, "weight")]:
        allowed = "its weight is computed from others already: name it in lowbit.leave"
        raise ConfigError("lowbit", f"layer {taken[0]}", allowed)
    if shared := _find_shared(layers):
        raise ConfigError("lowbit", f"layer {shared}", "it shares its weight with another: name both in lowbit.leave")
    if not layers:
        allowed = "no layer is left to quantize: a convolution or a linear map outside of lowbit.leave is needed"
        raise ConfigError("lowbit.leave", list(leave), allowed)
    return layers


def _find_shared(layers: dict[str, Any]) -> str | None:
    owners: dict[int, str] = {}
    return next((name for name, layer in layers.items() if owners.setdefault(id(layer.weight), name) != name), None)


def _find_partition(layer: nn.Module) -> Partition | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations["weight"][0]  # type: ignore[union-attr, index]
    return first if isinstance(first, Partition) else None


def _rank_units(weight_ud: Tensor, quantized_ud: Tensor, select: str, seed: tuple[int, ...]) -> Tensor:
    """Give a number for each unit; those with the least are quantized. It lies where every worker computes alike."""
    size_u = weight_ud.abs().sum(1).cpu().double()
    if select == "magnitude":
        return -size_u
    # Of clocks that ring at rates p, the first n to ring are n draws by p without replacement.
    waits_u = torch.from_numpy(np.random.default_rng(seed).exponential(size=len(size_u)))
    if select == "random":
        return waits_u
    error_u = (weight_ud - quantized_ud).abs().sum(1).cpu().double() / size_u.clamp_min(_GUARD**2)
    return waits_u * (error_u + _GUARD) if select == "paper" else -waits_u / (error_u + _GUARD)
