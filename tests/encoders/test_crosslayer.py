"""Layers that share a part of their weights: counts, reconstruction, one storage, and what holds them to a teacher."""

import copy

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from gsl_dist.encoders import EncoderConfig, make_encoder
from gsl_dist.encoders.crosslayer import (
    CompressConfig,
    Group,
    Plan,
    Preservation,
    PreserveConfig,
    factor_layers,
    measure_skew,
    plan_compression,
)
from gsl_dist.errors import ConfigError

DEEP = {"kind": "cnn", "dim": 6, "channels": [16, 16], "depths": [2, 3], "grid": 1}
MLP = {"kind": "mlp", "dim": 6, "hidden": [16, 16, 16, 16]}


def start_encoder(config=DEEP, shape=(8, 8, 1), modalities=None):
    torch.manual_seed(0)
    return make_encoder(TypeAdapter(EncoderConfig).validate_python(config), shape, modalities)


def settings(**changes):
    return CompressConfig(**{"model": "unused", "ratio": 3} | changes)


def make_images(rows=8):
    return torch.randint(256, (rows, 8, 8, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def count(encoder):
    return sum(parameter.numel() for parameter in encoder.parameters())


def factored(config=DEEP, shape=(8, 8, 1), **changes):
    teacher = start_encoder(config, shape)
    encoder, plan = copy.deepcopy(teacher), plan_compression(teacher, settings(**changes))
    factor_layers(encoder, plan)
    return encoder, teacher, plan


CASES = [
    (ratio, method, share)
    for ratio in (2, 3, 6)
    for method, share in (("crosslayer", 0.25), ("crosslayer", 0), ("layerwise", 0))
]


@pytest.mark.parametrize(("ratio", "method", "share"), CASES)
@pytest.mark.parametrize(("config", "shape"), [(DEEP, (8, 8, 1)), (MLP, (10,))])
def test_a_plan_meets_its_ratio_and_counts_what_the_network_then_has(config, shape, ratio, method, share):
    if config is MLP:
        ratio = min(ratio, 2.4)  # the first and the last layer stay as they are
    encoder, teacher, plan = factored(config, shape, ratio=ratio, method=method, unique_share=share)
    assert plan.before == count(teacher) and plan.after == count(encoder)
    assert plan.after <= plan.before / ratio < plan.after + sum(group.unique_cost for group in plan.groups)
    by_hand = 0
    for group in plan.groups:
        layers = len(group.layers)
        by_hand += group.common * group.rows + layers * group.common * group.columns
        by_hand += layers * group.unique * (group.rows + group.columns)
        assert (group.common == 0) == (method == "layerwise") and (share > 0 or group.unique * group.common == 0)
    if method == "layerwise":  # ranks differ by one at most: nothing is lost to one rank for all
        assert {len(group.layers) for group in plan.groups} == {1}
        assert max(group.unique for group in plan.groups) - min(group.unique for group in plan.groups) <= 1
        assert plan.before / ratio - plan.after < plan.groups[0].unique_cost
    weights = sum(teacher.get_submodule(name).weight.numel() for group in plan.groups for name in group.layers)
    assert plan.after == plan.before - weights + by_hand


@pytest.mark.parametrize(("config", "shape"), [(DEEP, (8, 8, 1)), (MLP, (10,))])
@pytest.mark.parametrize("full", ["common", "unique", "both"])
def test_at_full_rank_the_network_is_what_it_was(config, shape, full):
    teacher = start_encoder(config, shape)
    shared = plan_compression(teacher, settings(ratio=1.5)).groups
    groups = []
    for group in shared:
        common, unique = group.most
        half = max(1, common // 2)
        sizes = {"common": (common, 0), "unique": (0, unique), "both": (half, unique)}[full]
        groups.append(group.model_copy(update={"common": sizes[0], "unique": sizes[1]}))
    encoder = copy.deepcopy(teacher)
    factor_layers(encoder, Plan(groups=tuple(groups), before=0, after=0))
    items = make_images() if len(shape) == 3 else torch.randn(8, *shape)
    torch.testing.assert_close(encoder(items), teacher(items), rtol=1e-4, atol=1e-5)
    for group in groups:
        for name in group.layers:
            weight = teacher.get_submodule(name).weight
            torch.testing.assert_close(encoder.get_submodule(name).weight(), weight, rtol=1e-4, atol=1e-5)


def test_the_first_parts_are_the_best_that_a_common_basis_gives():
    encoder, teacher, plan = factored(ratio=3, unique_share=0)
    [group] = plan.groups
    side_by_side = torch.cat([teacher.get_submodule(name).weight.flatten(1).T for name in group.layers], 1)
    values = torch.linalg.svdvals(side_by_side)
    missed = sum(
        (encoder.get_submodule(name).weight() - teacher.get_submodule(name).weight).square().sum()
        for name in group.layers
    )
    torch.testing.assert_close(missed, values[group.common :].square().sum(), rtol=1e-4, atol=1e-5)
    assert float(measure_skew(encoder)) < 1e-10, "the columns begin orthonormal"


def test_both_ways_of_execution_give_the_same():
    encoder, _, plan = factored(ratio=6)
    layer = encoder.get_submodule(plan.groups[0].layers[0])
    x = torch.randn(3, 16, 8, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight(), padding=1), rtol=1e-4, atol=1e-5)
    left, right = layer.parts
    assert len(right) * (left.shape[0] + right.shape[1]) < left.shape[0] * right.shape[1], "it went in two steps"


def test_what_is_shared_is_held_and_stored_once_and_learned_by_all():
    encoder, _, plan = factored()
    [group] = plan.groups
    commons = [name for name in encoder.state_dict() if "commons" in name]
    assert commons == ["commons.0"] and len(group.layers) == 4
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.commons[0].add_(1)
    for name in group.layers:
        assert other.get_submodule(name).parts[0].data_ptr() != encoder.get_submodule(name).parts[0].data_ptr()
        assert not torch.equal(other.get_submodule(name).weight(), encoder.get_submodule(name).weight())
    encoder(make_images()).square().sum().backward()
    alone = encoder.commons[0].grad.clone()
    assert alone.abs().sum() > 0 and encoder.get_submodule(group.layers[-1]).inside.grad.abs().sum() > 0


def test_a_network_without_weights_takes_those_that_another_stored():
    encoder, _, plan = factored()
    fresh = start_encoder()
    factor_layers(fresh, plan, start=False)
    fresh.load_state_dict(encoder.state_dict())
    assert torch.equal(fresh(make_images()), encoder(make_images()))


@pytest.mark.parametrize(
    ("config", "shape", "changes", "match"),
    [
        (DEEP, (8, 8, 1), {"ratio": 50}, r"compress.ratio: got 50.0, but layers that cannot share hold 406 of 9,6"),
        (DEEP, (8, 8, 1), {"ratio": 50}, r"backbone.0: 144, backbone.19: 96.* at most; lower it, set compress.lone"),
        ({**DEEP, "depths": None}, (8, 8, 1), {}, r"no two layers between the first and the last have one shape"),
    ],
)
def test_a_ratio_that_cannot_be_met_names_the_layers_and_the_way_out(config, shape, changes, match):
    with pytest.raises(ConfigError, match=match):
        plan_compression(start_encoder(config, shape), settings(**changes))


def test_lone_layers_are_left_or_decomposed_alone():
    tapering = {**DEEP, "channels": [16, 24], "depths": [3, 3]}
    encoder = start_encoder(tapering)
    kept = plan_compression(encoder, settings(ratio=1.5))
    assert [len(group.layers) for group in kept.groups] == [2, 2]
    plan = plan_compression(encoder, settings(ratio=6, lone="factor"))
    assert sorted((len(group.layers), group.common > 0) for group in plan.groups) == [(1, False), (2, True), (2, True)]


def test_the_largest_ratio_that_is_told_can_be_had():
    encoder = start_encoder()
    with pytest.raises(ConfigError) as caught:
        plan_compression(encoder, settings(ratio=50))
    most = float(str(caught.value).partition(" at most")[0].rpartition(" ")[2])
    assert plan_compression(encoder, settings(ratio=most - 0.05)).groups[0].common == 1


def hold(config, **changes):
    encoder, teacher, plan = factored(**changes)
    preservation = Preservation(encoder.train(), teacher, plan, PreserveConfig(**config))
    return encoder, teacher, plan, preservation


def say_terms(preservation, encoder, items):
    encoder(items)
    return preservation.terms(items, lambda rows: rows, 1)


def test_feature_terms_are_the_sums_of_their_formula():
    weights = {"weight": 7.0, "near": 0.5, "distant": 0.2, "orthogonality": 0.0}
    encoder, teacher, plan, preservation = hold(weights)
    items = make_images(5)
    seen = {}
    for place, network in enumerate((encoder, teacher)):
        for name in plan.groups[0].layers:
            network.get_submodule(name).register_forward_hook(
                lambda module, given, output, key=(place, name): seen.__setitem__(key, output)
            )
    found = say_terms(preservation, encoder, items)
    related = []
    for place in (0, 1):
        for name in plan.groups[0].layers:
            flat = seen[place, name].flatten(1)
            related.append((flat @ flat.T) / (flat @ flat.T).norm(dim=1, keepdim=True))
    ours, theirs = related[:4], related[4:]
    wanted = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))
    near, distant = [], []
    for i in range(4):
        for j in range(i + 1, 4):
            gap = ((ours[i] - ours[j]).norm() - (theirs[i] - theirs[j]).norm()).square()
            (near if j == i + 1 else distant).append(gap)
    wanted = 7 * (wanted + 0.5 * sum(near) / 3 + 0.2 * sum(distant) / 3) / 25
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)


def test_weight_terms_and_orthogonality_are_divided_among_workers():
    encoder, _, plan, preservation = hold({"level": "weight", "weight": 3.0, "near": 1.0, "orthogonality": 2.0})
    with torch.no_grad():
        encoder.commons[0].mul_(1.1)
    alone = preservation.terms(make_images(), lambda rows: rows, 1)
    torch.testing.assert_close(preservation.terms(make_images(), lambda rows: rows, 4), alone / 4)
    size = plan.groups[0].common
    skew = (0.21**2) / size  # the diagonal is 1.21, all else 0
    torch.testing.assert_close(measure_skew(encoder), torch.tensor(skew), rtol=1e-3, atol=1e-7)
    assert float(alone) > 2 * skew


@pytest.mark.parametrize("level", ["feature", "weight", "both"])
def test_a_network_that_lost_nothing_is_held_by_nothing(level):
    teacher = start_encoder()
    [group] = plan_compression(teacher, settings(ratio=1.5)).groups
    plan = Plan(groups=(group.model_copy(update={"common": group.most[0], "unique": 0}),), before=0, after=0)
    encoder = copy.deepcopy(teacher)
    factor_layers(encoder, plan)
    preservation = Preservation(encoder.train(), teacher, plan, PreserveConfig(level=level))
    assert float(say_terms(preservation, encoder, make_images())) < 1e-4


def test_following_the_terms_alone_brings_similarities_back_for_items_that_were_not_seen():
    encoder, _, _, preservation = hold({"orthogonality": 0.0}, ratio=6)
    items, others = make_images(32).split(16)
    optimizer = torch.optim.Adam(encoder.parameters(), 3e-3)
    before = float(say_terms(preservation, encoder, others))
    for _ in range(30):
        loss = say_terms(preservation, encoder, items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(say_terms(preservation, encoder, others)) < 0.7 * before


def test_a_network_of_modalities_shares_across_its_blocks():
    config = {"kind": "asymfusion", "dim": 6, "channels": [20], "blocks": 4}
    teacher = start_encoder(config, (8, 8, 3), {"image": 1, "edges": 1}).eval()
    plan = plan_compression(teacher, settings(ratio=1.6))
    encoder = copy.deepcopy(teacher)
    factor_layers(encoder, plan)
    items = torch.cat([make_images(), make_images().flip(0), torch.full((8, 8, 8, 1), 3, dtype=torch.uint8)], 3)
    assert encoder(items).shape == (8, 6) and count(encoder) == plan.after
    preservation = Preservation(encoder.train(), teacher, plan, PreserveConfig())
    encoder(items)
    assert torch.isfinite(preservation.terms(items, lambda rows: rows, 1))


def test_a_group_knows_what_its_columns_cost():
    group = Group(layers=("a", "b", "c"), rows=10, columns=4, common=2, unique=1)
    assert group.parameters == 2 * 10 + 3 * 2 * 4 + 3 * (10 + 4)
    assert group.most == (10, 4)
    assert isinstance(nn.ParameterList(), nn.Module)
