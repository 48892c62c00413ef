"""Cross-layer compression, MICIK-style: layers of one shape share a part of their weights and keep a small part each.

With W_l the weights of layer l of a group as a matrix, a column an output (P x Q; P is k k C_in in a convolution):

    W_l  ~  C A_l + U_l V_l        C: P x K, common to the group;  A_l: K x Q;  U_l V_l: of rank u, unique to the layer

which takes K P + L (K Q + u (P + Q)) numbers for L layers instead of L P Q. Of a trained network C and all A_l come
from the singular vectors of [W_1 ... W_L] side by side, and U_l, V_l from those of what is left over of W_l. Then the
network is trained on, with terms that keep what it knew (`Preservation`):

    feature     sum over l of |G_l - G'_l|^2 / b^2, with G_l the similarities of the b items of a batch by the output of
                layer l (rows scaled to length 1) and G' those of the network before; and, of pairs of layers near each
                other and far apart, the mean of (|G_l - G_m| - |G'_l - G'_m|)^2 / b^2
    weight      of such pairs in a group, the mean of (cos(W_l, W_m) - cos(W'_l, W'_m))^2
    orthogonal  the mean square of C^T C - I

`layerwise` is the plain alternative at as many numbers: no common part, a singular value decomposition of every layer.
The first layer and the last are left as they are.

Source: of MICIK (Zhang, Wang, Li, Ghosh, Kolagunda, Wang, arXiv 1902.00918) only the abstract could be read: common and
unique components across layers, similarity kept among near and distant layers. What is above is this project's own
definition of that; the similarity of features is Tung and Mori's, arXiv 1907.09682. This module does not know where
networks are kept.
"""

# Shapes: L layers of a group, P rows and Q columns of their matrices, K common columns, u unique ones; b items

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from gsl_dist.config import Location, Strict
from gsl_dist.encoders.backbones import Encoder
from gsl_dist.errors import ConfigError

Layer = nn.Conv2d | nn.Linear
Gather = Callable[[Tensor], Tensor]

_TINY = 1e-12
_SHOWN = 6


class PreserveConfig(Strict):
    """What a compressed network is held to while it is trained on, beside its loss."""

    level: Literal["feature", "weight", "both", "none"] = Field(
        default="feature", description="similarities of items by each layer, of layers by their weights, or both"
    )
    weight: float = Field(default=300.0, ge=0, description="of all terms of similarity")
    near: float = Field(default=0.1, ge=0, description="of pairs of neighbouring layers, against the layers themselves")
    distant: float = Field(default=0.1, ge=0, description="of all other pairs")
    orthogonality: float = Field(default=1.0, ge=0, description="of the common parts")


class CompressConfig(Strict):
    """Which trained network is compressed, how far, and what is kept of it."""

    model: Location = Field(description="the model folder of the network, trained by the same encoder settings")
    ratio: float = Field(gt=1, description="times fewer parameters, of the whole encoder")
    method: Literal["crosslayer", "layerwise"] = Field(
        default="crosslayer", description="common and unique parts, or a decomposition of each layer alone"
    )
    unique_share: float = Field(default=0.25, ge=0, lt=1, description="of a group's parameters, for the unique parts")
    lone: Literal["keep", "factor"] = Field(
        default="keep", description="layers whose shape no other has: as they are, or decomposed alone"
    )
    preserve: PreserveConfig = PreserveConfig()


class Group(Strict):
    """Layers of one shape: K common columns, u unique ones each."""

    layers: tuple[str, ...]
    rows: int
    columns: int
    common: int
    unique: int

    @property
    def parameters(self) -> int:
        """Give how many numbers they take."""
        return self.common * self.common_cost + self.unique * self.unique_cost

    @property
    def common_cost(self) -> int:
        """Give what one more common column takes."""
        return self.rows + len(self.layers) * self.columns

    @property
    def unique_cost(self) -> int:
        """Give what one more unique column takes in every layer."""
        return len(self.layers) * (self.rows + self.columns)

    @property
    def most(self) -> tuple[int, int]:
        """Give the most common and unique columns that make a difference."""
        return min(self.rows, len(self.layers) * self.columns), min(self.rows, self.columns)


class Plan(Strict):
    """What becomes of each layer, and the parameters of the encoder before and after."""

    groups: tuple[Group, ...]
    before: int
    after: int


class Factored(nn.Module):
    """A layer whose weights are C A + U V; C belongs to the encoder, which holds it once for all that share it."""

    def __init__(self, layer: Layer, common: nn.Parameter | None, group: Group) -> None:
        super().__init__()
        self.shape, self.bias = tuple(layer.weight.shape), layer.bias
        conv = isinstance(layer, nn.Conv2d)
        self.how: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding} if conv else {}
        self._common = [common]  # in a list: registered here too, it would be counted and stored for every layer
        if group.common:
            self.inside = nn.Parameter(torch.zeros(group.common, group.columns))
        if group.unique:
            self.left = nn.Parameter(torch.zeros(group.rows, group.unique))
            self.right = nn.Parameter(torch.zeros(group.unique, group.columns))

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Give the two factors of the whole: [C U] and [A; V].

        Shapes: (P, K + u), (K + u, Q).
        """
        lefts = [part for part in (self._common[0], getattr(self, "left", None)) if part is not None]
        rights = [part for part in (getattr(self, "inside", None), getattr(self, "right", None)) if part is not None]
        return torch.cat(lefts, 1), torch.cat(rights)

    def weight(self) -> Tensor:
        """Give the weights that the factors stand for, in the shape of the layer."""
        left_PR, right_RQ = self.parts
        return (left_PR @ right_RQ).T.reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Give what the layer gives: in two steps where these are fewer multiplications, at once where they are not."""
        left_PR, right_RQ = self.parts
        rank, (rows, columns) = len(right_RQ), (left_PR.shape[0], right_RQ.shape[1])
        in_two = rank * (rows + columns) < rows * columns
        if not self.how:
            return F.linear(F.linear(x, left_PR.T), right_RQ.T, self.bias) if in_two else self._apply_whole(x)
        if not in_two:
            return self._apply_whole(x)
        x = F.conv2d(x, left_PR.T.reshape(rank, *self.shape[1:]), **self.how)
        return F.conv2d(x, right_RQ.T[:, :, None, None], self.bias)

    def _apply_whole(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, **self.how) if self.how else F.linear(x, self.weight(), self.bias)


def plan_compression(encoder: Encoder, config: CompressConfig) -> Plan:
    """Decide how many common and unique columns each group gets, so that the encoder is as small as wanted.

    Raises:
        ConfigError: no layers have the same shape, or what cannot be shared is too large for the ratio.
    """
    before = sum(parameter.numel() for parameter in encoder.parameters())
    shapes, whole = _group_layers(encoder, config)
    if not shapes:
        wanted = f"no two layers between the first and the last have one shape ({_show(whole)}): give stages the same "
        raise ConfigError("compress.ratio", config.ratio, wanted + "widths, or set compress.lone to factor")
    groups = [_start_group(layers, *matrix) for matrix, shape in shapes for layers in _part_layers(config, shape)]
    shared = sum(len(group.layers) * group.rows * group.columns for group in groups)
    room = int(before / config.ratio) - (before - shared)
    least = sum(group.parameters for group in groups)
    if room < least:
        most = before / (before - shared + least)
        allowed = (
            f"layers that cannot share hold {before - shared:,} of {before:,} parameters, normalization and biases "
            f"included ({_show(whole)}): {most:.1f} at most; lower it, set compress.lone to factor, or give stages the "
            f"same widths"
        )
        raise ConfigError("compress.ratio", config.ratio, allowed)
    share = {id(group): len(group.layers) * group.rows * group.columns / shared for group in groups}
    grown = [_fill_group(config, group, int(room * share[id(group)])) for group in groups]
    grown = _settle_rest(grown, room - sum(group.parameters for group in grown))
    return Plan(groups=tuple(grown), before=before, after=before - shared + sum(group.parameters for group in grown))


def factor_layers(encoder: Encoder, plan: Plan, *, start: bool = True) -> None:
    """Put factors in place of the layers of a plan.

    Args:
        encoder: the network, changed in place.
        plan: which layers, and how many columns.
        start: take the factors from the layers' weights; False: leave them zero, to be loaded.
    """
    encoder.commons = nn.ParameterList()
    for group in plan.groups:
        layers = [_find_layer(encoder, name) for name in group.layers]
        common = None
        if group.common:
            common = nn.Parameter(torch.zeros(group.rows, group.common))
            encoder.commons.append(common)
        factored = [Factored(layer, common, group) for layer in layers]
        if start:
            _start_factors(factored, common, [_flatten(layer.weight) for layer in layers])
        for name, module in zip(group.layers, factored, strict=True):
            parent, _, leaf = name.rpartition(".")
            setattr(encoder.get_submodule(parent), leaf, module)


class Preservation:
    """The terms that hold a compressed network to the one that it was made of.

    Args:
        encoder: the network that learns, factored.
        teacher: the one it was made of, which does not change.
        plan: the layers that are compared.
        config: the terms and their weights.
    """

    def __init__(self, encoder: Encoder, teacher: Encoder, plan: Plan, config: PreserveConfig) -> None:
        self.teacher, self.config = teacher.eval().requires_grad_(False), config
        self._encoder, self._groups = encoder, plan.groups
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._known: dict[str, list[Tensor]] = defaultdict(list)
        wanted = {name for group in plan.groups for name in group.layers}
        self._names = [name for name, _ in encoder.named_modules() if name in wanted]
        if config.level in ("feature", "both"):
            for name in self._names:
                encoder.get_submodule(name).register_forward_hook(_keep_output(self._seen[name], only_training=True))
                teacher.get_submodule(name).register_forward_hook(_keep_output(self._known[name]))

    def terms(self, items: Tensor, gather: Gather, workers: int) -> Tensor:
        """Give the sum of all terms for the batch that the network has just seen.

        Args:
            items: this worker's rows of it.
            gather: gives the rows of all workers.
            workers: how many there are; what no row decides is counted by each, and so divided among them.
        """
        total = items.new_zeros((), dtype=torch.float32)
        if self.config.level in ("feature", "both"):
            total = total + self.config.weight * self._compare_features(items, gather)
        if self.config.level in ("weight", "both"):
            total = total + self.config.weight / workers * self._compare_weights()
        return total + self.config.orthogonality / workers * measure_skew(self._encoder)

    def _compare_features(self, items: Tensor, gather: Gather) -> Tensor:
        for known in self._known.values():
            known.clear()
        with torch.no_grad():
            self.teacher(items)
        ours, theirs = (
            [relate_items(gather(part.flatten(1))) for name in self._names for part in seen[name]]
            for seen in (self._seen, self._known)
        )
        for seen in self._seen.values():
            seen.clear()
        size = len(ours[0]) ** 2
        each = sum(
            ((our - their).square().sum() for our, their in zip(ours, theirs, strict=True)), ours[0].new_zeros(())
        )
        far = [(_part(ours[i], ours[j]) - _part(theirs[i], theirs[j])).square() for i, j in _pairs(len(ours))]
        return (each + self._weigh(far, [j - i for i, j in _pairs(len(ours))])) / size

    def _compare_weights(self) -> Tensor:
        found, gaps = [], []
        for group in self._groups:
            ours = [_find_factored(self._encoder, name).weight().flatten() for name in group.layers]
            theirs = [_find_layer(self.teacher, name).weight.flatten() for name in group.layers]
            for i, j in _pairs(len(ours)):
                kept = F.cosine_similarity(theirs[i], theirs[j], dim=0)
                found.append((F.cosine_similarity(ours[i], ours[j], dim=0) - kept).square())
                gaps.append(j - i)
        return self._weigh(found, gaps)

    def _weigh(self, terms: list[Tensor], gaps: list[int]) -> Tensor:
        total = torch.zeros(())
        for weight, is_near in ((self.config.near, True), (self.config.distant, False)):
            some = [term for term, gap in zip(terms, gaps, strict=True) if (gap == 1) == is_near]
            if some and weight:
                total = total.to(some[0]) + weight * torch.stack(some).mean()
        return total


def relate_items(x_ND: Tensor) -> Tensor:
    """Give how alike the items of a batch are by one layer, rows scaled to length 1.

    Shapes: (b, D) -> (b, b).
    """
    return F.normalize(x_ND @ x_ND.T, dim=1)


def measure_skew(encoder: Encoder) -> Tensor:
    """Give how far the common columns are from orthonormal: the mean square of C^T C - I, over all groups."""
    commons = encoder.commons
    assert isinstance(commons, nn.ParameterList), "the encoder is factored"
    gaps = [common.T @ common - torch.eye(common.shape[1], device=common.device) for common in commons]
    return torch.stack([gap.square().mean() for gap in gaps]).mean() if gaps else torch.zeros(())


def _group_layers(
    encoder: Encoder, config: CompressConfig
) -> tuple[list[tuple[tuple[int, int], list[str]]], dict[str, int]]:
    """Give the layers that are to be factored by the shape of their matrices, and those that are not, with sizes."""
    named = [(name, module) for name, module in encoder.named_modules() if isinstance(module, Layer)]
    by_shape: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, layer in named[1:-1]:
        if getattr(layer, "groups", 1) == 1 and getattr(layer, "dilation", (1, 1)) == (1, 1):
            shape = (type(layer).__name__, *layer.weight.shape)
            by_shape[shape].append(name)
    taken = {shape: names for shape, names in by_shape.items() if len(names) > 1 or config.lone == "factor"}
    sizes = {name: layer.weight.numel() for name, layer in named}
    inside = {name for names in taken.values() for name in names}
    shapes = [((sizes[names[0]] // shape[1], shape[1]), names) for shape, names in taken.items()]
    return shapes, {name: size for name, size in sizes.items() if name not in inside}


def _part_layers(config: CompressConfig, layers: list[str]) -> list[list[str]]:
    # Alone, each layer has a rank of its own, so that no parameter is lost to one rank for all.
    return [layers] if config.method == "crosslayer" else [[name] for name in layers]


def _start_group(layers: list[str], rows: int, columns: int) -> Group:
    alone = len(layers) == 1
    return Group(layers=tuple(layers), rows=rows, columns=columns, common=int(not alone), unique=int(alone))


def _fill_group(config: CompressConfig, group: Group, room: int) -> Group:
    most_common, most_unique = group.most
    if not group.common:
        return group.model_copy(update={"unique": max(1, min(most_unique, room // group.unique_cost))})
    unique = min(most_unique, int(config.unique_share * room / group.unique_cost))
    if room - unique * group.unique_cost < group.common_cost:
        unique = 0
    common = max(1, min(most_common, (room - unique * group.unique_cost) // group.common_cost))
    return group.model_copy(update={"common": common, "unique": unique})


def _settle_rest(groups: list[Group], rest: int) -> list[Group]:
    """Spend what divisions left over, a column at a time in turn; take back what the least of columns took too much."""
    grown = list(groups)
    while rest < 0:
        place = max(range(len(grown)), key=lambda place: _columns(grown[place]))
        rest += _cost(grown[place])
        grown[place] = _grow(grown[place], -1)
    while True:
        before = rest
        for place, group in enumerate(grown):
            if _cost(group) <= rest and _columns(group) < group.most[0 if group.common else 1]:
                grown[place] = _grow(group, 1)
                rest -= _cost(group)
        if rest == before:
            return grown


def _columns(group: Group) -> int:
    return group.common or group.unique


def _cost(group: Group) -> int:
    return group.common_cost if group.common else group.unique_cost


def _grow(group: Group, by: int) -> Group:
    return group.model_copy(update={"common" if group.common else "unique": _columns(group) + by})


def _start_factors(factored: list[Factored], common: nn.Parameter | None, weights_PQ: list[Tensor]) -> None:
    with torch.no_grad():
        for module, weight_PQ in zip(factored, weights_PQ, strict=True):
            if common is not None and module is factored[0]:
                columns_PP, _, _ = torch.linalg.svd(torch.cat(weights_PQ, 1).double(), full_matrices=False)
                common.copy_(columns_PP[:, : common.shape[1]])
            rest_PQ = weight_PQ
            if common is not None:
                module.inside.copy_(common.T @ weight_PQ)
                rest_PQ = weight_PQ - common @ module.inside
            if hasattr(module, "left"):
                left, values, right = torch.linalg.svd(rest_PQ.double(), full_matrices=False)
                unique, root = module.left.shape[1], values.sqrt()
                module.left.copy_(left[:, :unique] * root[:unique])
                module.right.copy_(root[:unique, None] * right[:unique])


def _flatten(weight: Tensor) -> Tensor:
    """Give the weights of a layer as a matrix: (P, Q), a column an output."""
    return weight.detach().flatten(1).T


def _find_layer(encoder: Encoder, name: str) -> Layer:
    layer = encoder.get_submodule(name)
    assert isinstance(layer, nn.Conv2d | nn.Linear), "a plan names layers"
    return layer


def _find_factored(encoder: Encoder, name: str) -> Factored:
    layer = encoder.get_submodule(name)
    assert isinstance(layer, Factored), "the encoder is factored"
    return layer


def _keep_output(kept: list[Tensor], *, only_training: bool = False) -> Callable[..., None]:
    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        if not only_training or (module.training and torch.is_grad_enabled()):
            kept.append(output)

    return keep


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def _part(one_BB: Tensor, other_BB: Tensor) -> Tensor:
    return (one_BB - other_BB).square().sum().clamp_min(_TINY).sqrt()


def _show(layers: dict[str, int]) -> str:
    largest = sorted(layers, key=lambda name: -layers[name])[:_SHOWN]
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return ", ".join(f"{name}: {layers[name]:,}" for name in largest) + more
