"""Networks for vectors and small images, any torch module by its import path, and for finished features a head or none.

An `Encoder` takes items as the corpus gives them (float32 vectors, or uint8 images with channels last) and gives
representations of `dim` numbers. It normalizes over channels, never over the batch, so that a row's representation
depends on that row alone: one worker and many train the same network. Several modalities are the exception, see
`multimodal.py`; and while it learns, a `FusedEncoder` gives their representations one by one.
"""

# Shapes: N items, D dims of a representation, H W channels of an image

from __future__ import annotations

import importlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gsl_dist.config import Strict
from gsl_dist.encoders.multimodal import AsymFusion, FusionConfig, Views
from gsl_dist.errors import ConfigError

_TINY = 1e-12


class MlpConfig(Strict):
    """A perceptron for vectors (images are flattened)."""

    kind: Literal["mlp"]
    dim: int = Field(default=64, ge=1, description="numbers of a representation")
    hidden: tuple[int, ...] = Field(default=(256,), description="widths of the hidden layers")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of inputs and hidden units left out in a step; drawn by each worker for its rows",
    )
    input_dropout: float | None = Field(default=None, ge=0, lt=1, description="of inputs; None: as `dropout`")
    normalize: bool = Field(default=True, description="bring representations to length 1")


class HeadConfig(Strict):
    """For vectors that are good already: a linear map that begins as the identity, and a small perceptron beside it.

    With fewer numbers than the vectors have, the map begins as their principal axes.
    """

    kind: Literal["head"]
    dim: int | None = Field(default=None, ge=1, description="at most that of the vectors; None: the same")
    hidden: tuple[int, ...] = Field(default=(256,), description="of the perceptron; none: the linear map alone")
    normalize: bool = Field(default=False, description="bring representations to length 1")


class CnnConfig(Strict):
    """A small convolutional network for small images; each stage halves the sides."""

    kind: Literal["cnn"]
    dim: int = Field(default=64, ge=1, description="numbers of a representation")
    channels: tuple[int, ...] = Field(default=(32, 64, 128), min_length=1, description="of each stage")
    depths: tuple[int, ...] | None = Field(default=None, description="convolutions of each stage; None: one each")
    grid: int = Field(
        default=4, ge=1, description="places left in each direction at the end: where a thing is counts in small images"
    )
    normalize: bool = Field(default=True, description="bring representations to length 1")

    @model_serializer(mode="wrap")
    def _leave_out(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is not asked for is not written: what was made before it could be asked for is found again.
        tree: dict[str, Any] = dump(self)
        return {key: value for key, value in tree.items() if (key, value) not in (("depths", None), ("grid", 4))}

    @model_validator(mode="after")
    def _has_a_depth_for_each_stage(self) -> CnnConfig:
        if self.depths is not None and (len(self.depths) != len(self.channels) or min(self.depths) < 1):
            raise ValueError(f"depths {self.depths} must have one of at least 1 for each of channels {self.channels}")
        return self


class ModuleConfig(Strict):
    """Your own network: `target: "package.module:callable"`, called with `arguments`, gives a torch module.

    The module gets float32 vectors (N, D_in), or float32 images (N, C, H, W) from -1 to 1, and gives (N, dim).
    """

    kind: Literal["module"]
    target: str = Field(pattern=r"^[\w.]+:[\w.]+$", description="what makes the module: package.module:callable")
    arguments: dict[str, Any] = Field(default={}, description="what it is called with")
    dim: int = Field(ge=1, description="numbers of a representation")
    normalize: bool = Field(default=True, description="bring representations to length 1")


class TableConfig(Strict):
    """No network: the vectors of the corpus are the representations already."""

    kind: Literal["table"]
    normalize: bool = Field(default=False, description="bring representations to length 1")


EncoderConfig = Annotated[
    MlpConfig | HeadConfig | CnnConfig | FusionConfig | ModuleConfig | TableConfig, Field(discriminator="kind")
]


class Encoder(nn.Module):
    """Items in, representations out.

    Args:
        backbone: takes prepared float32 items.
        dim: D, the length of a representation.
        normalize: scale every representation to length 1.
    """

    def __init__(self, backbone: nn.Module, dim: int, *, normalize: bool) -> None:
        super().__init__()
        self.backbone, self.dim, self.normalize = backbone, dim, normalize

    def forward(self, items: Tensor) -> Tensor:
        """Give representations.

        Shapes: (N, D_in) float32 or (N, H, W, channels) uint8 -> (N, D) float32.
        """
        y_ND: Tensor = self.backbone(_prepare(items))
        return F.normalize(y_ND, dim=1) if self.normalize else y_ND


class FusedEncoder(Encoder):
    """Items of several modalities in, representations of the whole items out; while it learns, all `Views` of them.

    Args:
        backbone: gives the views.
        dim: D, the length of a representation.
        normalize: as the backbone does it.
    """

    backbone: AsymFusion

    def forward(self, items: Tensor) -> Any:
        """Give representations, or in training `Views`.

        Shapes: (N, H, W, C + 1) uint8 -> (N, D) float32.
        """
        views: Views = self.backbone(items)
        return views if self.training else views.y_VND[-1]


class Head(nn.Module):
    """A linear map W, and a perceptron f beside it whose last layer begins at zero: y = W x + s f((x - c) / s).

    With c the mean of the vectors and s^2 that of the squares of what is left, f sees numbers of about 1, and vectors
    of any size train alike. Without a sample to start from, W has random orthonormal rows, c is 0 and s is 1.

    Args:
        width: D_in, the numbers of a vector.
        dim: D, at most as many.
        hidden: the widths of f's hidden layers; none: there is no f.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, width: int, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim, bias=False)
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        self.branch = _make_branch(width, dim, hidden) if hidden else None
        if width == dim:
            nn.init.eye_(self.linear.weight)
        else:
            nn.init.orthogonal_(self.linear.weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Give representations.

        Shapes: (N, D_in) -> (N, D).
        """
        y_ND: Tensor = self.linear(x_ND)
        return y_ND if self.branch is None else y_ND + self.scale * self.branch((x_ND - self.centre) / self.scale)

    @torch.no_grad()
    def start_from(self, x_ND: Tensor) -> None:
        """Set W to the principal axes of a sample, the widest first, unless it is square; set c and s.

        Shapes: (N, D_in).
        """
        x_ND = x_ND.double()
        rest_ND = x_ND - x_ND.mean(0)
        self.centre.copy_(x_ND.mean(0))
        self.scale.copy_(rest_ND.square().mean().sqrt().clamp_min(_TINY))
        dim, width = self.linear.weight.shape
        if dim < width:
            self.linear.weight.copy_(torch.linalg.eigh(rest_ND.T @ rest_ND).eigenvectors.T.flip(0)[:dim])


def make_encoder(
    config: EncoderConfig, item_shape: tuple[int, ...], modalities: Mapping[str, int] | None = None
) -> Encoder:
    """Give an untrained encoder for items of this shape.

    Args:
        config: which, and its numbers.
        item_shape: of one item as the corpus gives it.
        modalities: the names and channels of the images that an item is made of, if it is of several.

    Raises:
        ConfigError: the encoder cannot take such items, or the target cannot be imported.
    """
    if isinstance(config, FusionConfig):
        return _make_fused(config, modalities or {})
    if modalities:
        wanted = f"items of several modalities ({', '.join(modalities)}) are for asymfusion"
        raise ConfigError("encoder.kind", config.kind, wanted)
    if isinstance(config, TableConfig):
        _want_shape(config.kind, item_shape, axes=1)
        return Encoder(nn.Identity(), item_shape[0], normalize=config.normalize)
    if isinstance(config, HeadConfig):
        return _make_headed(config, item_shape)
    if isinstance(config, ModuleConfig):
        encoder = Encoder(_import_module(config), config.dim, normalize=config.normalize)
        _check_width(encoder, config, item_shape)
        return encoder
    if isinstance(config, CnnConfig):
        _want_shape(config.kind, item_shape, axes=3)
        backbone: nn.Module = _make_cnn(item_shape[2], config)
    else:
        backbone = _make_mlp(int(torch.Size(item_shape).numel()), config)
    return Encoder(backbone, config.dim, normalize=config.normalize)


def _make_fused(config: FusionConfig, modalities: Mapping[str, int]) -> Encoder:
    if not modalities:
        raise ConfigError("encoder.kind", config.kind, "it takes items of modalities: name them in corpus.modalities")
    if len(modalities) > 2 and config.fuses:
        wanted = f"fusion is between two modalities; of {len(modalities)} set shuffle and shift to false"
        raise ConfigError("encoder.shuffle", config.shuffle, wanted)
    return FusedEncoder(AsymFusion(modalities, config), config.dim, normalize=config.normalize)


def _prepare(items: Tensor) -> Tensor:
    if items.dtype == torch.uint8:
        return items.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return items


def _make_headed(config: HeadConfig, item_shape: tuple[int, ...]) -> Encoder:
    _want_shape(config.kind, item_shape, axes=1)
    width, dim = item_shape[0], config.dim or item_shape[0]
    if dim > width:
        raise ConfigError("encoder.dim", dim, f"a head gives at most as many numbers as the vectors have, {width}")
    return Encoder(Head(width, dim, config.hidden), dim, normalize=config.normalize)


def _make_branch(width: int, dim: int, hidden: tuple[int, ...]) -> nn.Module:
    # The last layer has no bias: distances do not see it, so all that could train it is rounding.
    last = nn.Linear(hidden[-1], dim, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(_make_mlp(width, MlpConfig(kind="mlp", dim=hidden[-1], hidden=hidden[:-1])), nn.ReLU(), last)


def _make_mlp(width: int, config: MlpConfig) -> nn.Module:
    drop = [nn.Dropout(config.dropout)] if config.dropout else []
    at_inputs = config.dropout if config.input_dropout is None else config.input_dropout
    layers: list[nn.Module] = [nn.Flatten(), *([nn.Dropout(at_inputs)] if at_inputs else [])]
    for before, after in pairwise((width, *config.hidden)):
        layers += [nn.Linear(before, after), nn.ReLU(), *drop]
    return nn.Sequential(*layers, nn.Linear((width, *config.hidden)[-1], config.dim))


def _make_cnn(channels: int, config: CnnConfig) -> nn.Module:
    layers: list[nn.Module] = []
    depths = config.depths or (1,) * len(config.channels)
    for (before, after), depth in zip(pairwise((channels, *config.channels)), depths, strict=True):
        for width in (before, *(after,) * (depth - 1)):
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.GroupNorm(min(8, after), after), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
    last = nn.Linear(config.channels[-1] * config.grid**2, config.dim)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(config.grid), nn.Flatten(), last)


def _import_module(config: ModuleConfig) -> nn.Module:
    path, _, name = config.target.partition(":")
    try:
        factory = getattr(importlib.import_module(path), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "encoder.target", config.target, f"it must be importable as module:callable ({error})"
        ) from error
    try:
        module = factory(**config.arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "encoder.arguments", config.arguments, f"{config.target} must accept them ({error})"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError("encoder.target", config.target, f"it must give a torch module, not {type(module).__name__}")
    return module


def _check_width(encoder: Encoder, config: ModuleConfig, item_shape: tuple[int, ...]) -> None:
    """Send one blank item through a network of the user's: better a clear word now than a crash in every worker."""
    blank = torch.zeros(1, *item_shape, dtype=torch.uint8 if len(item_shape) == 3 else torch.float32)
    try:
        with torch.inference_mode():
            shape = tuple(encoder.eval()(blank).shape)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = f"it must take items of shape {item_shape} ({' '.join(str(error).split())})"
        raise ConfigError("encoder.target", config.target, reason) from error
    if shape != (1, config.dim):
        raise ConfigError("encoder.dim", config.dim, f"{config.target} gives rows of shape {shape[1:]}")
    encoder.train()


def _want_shape(kind: str, item_shape: tuple[int, ...], *, axes: int) -> None:
    if len(item_shape) != axes:
        wanted = {1: "vectors", 3: "images"}[axes]
        raise ConfigError("encoder.kind", kind, f"it takes {wanted}, but the corpus has items of shape {item_shape}")
