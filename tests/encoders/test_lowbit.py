"""Partitions: what is quantized, with which chances, how gradients pass, and what may not be looked at or moved."""

import itertools
import math

import pytest
import torch
from reference import draw_in_turn
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrizations

from gsl_dist.config import check_config
from gsl_dist.encoders import CnnConfig, Encoder, FusionConfig, HeadConfig, MlpConfig, Progression, make_encoder
from gsl_dist.encoders.lowbit import IncrementalConfig, Stage, StochasticConfig, export_weights
from gsl_dist.encoders.packed import unpack_weights
from gsl_dist.errors import ConfigError
from gsl_dist.fit import embed

KINDS = ("binary", "ternary", "power")
RULES = ("paper", "released", "random", "magnitude")
ERRORS = (0.1, 0.2, 0.4, 0.8)


def make_config(kind="binary", **settings):
    return check_config(IncrementalConfig if kind == "power" else StochasticConfig, {"kind": kind} | settings)


def start(config, *, seed=0, encoder=None):
    torch.manual_seed(seed)
    encoder = encoder or make_encoder(CnnConfig(kind="cnn", dim=8, channels=(4, 8)), (8, 8, 1))
    return encoder, Progression(encoder, config, seed=seed)


def make_items(rows=16):
    return torch.randint(256, (rows, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def layers_of(encoder):
    return [layer for layer in encoder.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def originals_of(encoder):
    return [layer.parametrizations["weight"].original for layer in layers_of(encoder)]


def make_known(select, **settings):
    """Give a layer of four filters whose relative errors as binary weights are ERRORS, and its progression."""
    layer = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(
            torch.tensor([[1 + error, 1 - error] for error in ERRORS]) * torch.tensor([[1, 2, 3, 0.5]]).T
        )
    encoder = Encoder(nn.Sequential(layer), 4, normalize=False)
    return layer, Progression(encoder, make_config(select=select, **settings), seed=3)


def count_choices(layer, progression, draws=4000):
    """Give how often each filter is quantized."""
    chosen = torch.zeros(4)
    for step in range(draws):
        progression.draw(0, step)
        chosen += (layer.weight != layer.parametrizations["weight"].original).any(1)
    return (chosen / draws).tolist()


@pytest.mark.parametrize(("kind", "most"), [("binary", 2), ("ternary", 3)])
def test_at_ratio_one_a_filter_has_as_few_values_as_its_bits_say(kind, most):
    encoder, progression = start(make_config(kind))
    progression.enter(1.0)
    for training in (True, False):
        encoder.train(training)
        for layer in layers_of(encoder):
            assert max(len(filter_.unique()) for filter_ in layer.weight.flatten(1)) <= most


@pytest.mark.parametrize(
    ("select", "chances", "draws", "is_kept"),
    [
        ("paper", [1 / error for error in ERRORS], 2, False),
        ("released", ERRORS, 2, True),
        ("random", [1, 1, 1, 1], 2, False),
    ],
)
def test_filters_are_chosen_as_often_as_the_law_says(select, chances, draws, is_kept):
    layer, progression = make_known(select)
    progression.enter(0.5)
    law = draw_in_turn(chances, draws)
    wanted = [1 - chance for chance in law] if is_kept else law
    assert count_choices(layer, progression) == pytest.approx(wanted, abs=0.03)


def test_the_two_rules_of_errors_are_alike_and_not_the_same():
    paper = draw_in_turn([1 / error for error in ERRORS], 2)
    released = [1 - chance for chance in draw_in_turn(ERRORS, 2)]
    # As others found by enumeration, for these errors and half of four filters.
    assert paper == pytest.approx([0.85, 0.63, 0.34, 0.18], abs=0.01)
    assert released == pytest.approx([0.82, 0.65, 0.37, 0.15], abs=0.01)


def test_by_magnitude_the_largest_are_chosen_in_every_step():
    layer, progression = make_known("magnitude")
    progression.enter(0.5)
    assert count_choices(layer, progression, draws=5) == [0, 1, 1, 0]


@pytest.mark.parametrize(("ratio", "filters"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.875, 4)])
@pytest.mark.parametrize("select", RULES)
def test_a_ratio_is_met_from_above(select, ratio, filters):
    layer, progression = make_known(select)
    progression.enter(ratio)
    for step in range(10):
        progression.draw(0, step)
        assert (layer.weight != layer.parametrizations["weight"].original).any(1).sum() == filters


@pytest.mark.parametrize("select", ["paper", "released"])
def test_filters_without_error_are_drawn_like_any_other(select):
    encoder, progression = start(make_config(select=select), encoder=Encoder(nn.Linear(3, 6), 6, normalize=False))
    originals_of(encoder)[0].data.fill_(0.5)
    progression.enter(0.5)
    assert encoder.backbone.weight.unique().tolist() == [0.5]


@pytest.mark.parametrize("unit", ["filter", "element"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_at_the_weight_is_that_at_the_hybrid(kind, unit):
    config = make_config(kind, unit=unit, frozen=False, float_first=False, select="paper")
    encoder, progression = start(config)
    progression.enter(0.5)
    progression.draw(1, 2)
    twin = make_encoder(CnnConfig(kind="cnn", dim=8, channels=(4, 8)), (8, 8, 1))
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if "parametrizations" not in name}
    weights |= {
        f"{name}.weight": layer.weight.detach()
        for name, layer in encoder.named_modules()
        if layer in layers_of(encoder)
    }
    twin.load_state_dict(weights)
    for network in (encoder, twin):
        network(make_items())[:, 0].sum().backward()
    for weight, layer in zip(originals_of(encoder), layers_of(twin), strict=True):
        assert torch.equal(weight.grad, layer.weight.grad) and weight.grad.any()
        hybrid, own = layer.weight.detach(), weight.detach()
        assert (hybrid != own).any() and (hybrid == own).any()


def test_a_step_has_one_choice_and_the_next_another_and_a_whole_network_none():
    encoder, progression = start(make_config())
    layer = encoder.backbone[4]
    progression.enter(0.5)
    seen = []
    for moment in [(0, 0), (0, 1), (0, 0), (1, 0)]:
        progression.draw(*moment)
        seen.append(layer.weight.detach().clone())
        assert torch.equal(layer.weight, seen[-1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[3])
    progression.enter(1.0)
    whole = layer.weight.detach().clone()
    progression.draw(0, 5)
    assert torch.equal(layer.weight, whole)


def test_layers_draw_by_themselves_and_seeds_decide():
    def draw(seed):
        both = nn.Sequential(nn.Linear(5, 64, bias=False), nn.Linear(5, 64, bias=False))
        progression = Progression(both, make_config(select="random"), seed=seed)
        for weight in originals_of(both):
            weight.data.copy_(torch.arange(1.0, 6.0).expand(64, 5))
        progression.enter(0.5)
        return [layer.weight.detach() for layer in both]

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_in_part_float_is_neither_evaluated_nor_exported(kind):
    encoder, progression = start(make_config(kind))
    progression.enter(0.5)
    encoder.train()(make_items())
    refused = r"layer backbone\.0: got 'quantized to 0\.5'.*train on to the last ratio"
    with pytest.raises(ConfigError, match=refused):
        embed(encoder, make_items())
    with pytest.raises(ConfigError, match=refused):
        embed(encoder, make_items(), views=2)
    with pytest.raises(ConfigError, match=refused):
        export_weights(encoder)
    with progression.look():
        looked = embed(encoder, make_items())
        assert torch.equal(embed(encoder, make_items()), looked)
    with pytest.raises(ConfigError, match=refused):
        embed(encoder, make_items())
    progression.enter(1.0)
    assert torch.isfinite(embed(encoder, make_items())).all()


def test_what_was_never_begun_is_not_exported_either():
    encoder, _ = start(make_config())
    with pytest.raises(ConfigError, match="quantized to 0"):
        export_weights(encoder)


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_never_move_and_the_others_do(optimizer):
    encoder, progression = start(make_config("power", bits=4))
    stepper = OPTIMIZERS[optimizer](encoder.parameters())
    kept = None
    for ratio in (0.5, 0.75, 0.875):
        progression.enter(ratio)
        frozen = [layer.parametrizations["weight"][0].frozen.bool().clone() for layer in layers_of(encoder)]
        values = [weight.detach().clone() for weight in originals_of(encoder)]
        for old, mask, value in zip(kept or [], frozen, values, strict=False):
            assert mask[old[0]].all() and torch.equal(value[old[0]], old[1])
        for step in range(3):
            progression.draw(0, step)
            stepper.zero_grad()
            encoder(make_items())[:, 0].sum().backward()
            stepper.step()
            progression.restore()
        for weight, mask, value in zip(originals_of(encoder), frozen, values, strict=True):
            assert mask.sum() == math.ceil(ratio * mask.numel())
            assert torch.equal(weight[mask], value[mask]) and (weight[~mask] != value[~mask]).any()
        kept = [(mask, value[mask]) for mask, value in zip(frozen, values, strict=True)]


def test_the_largest_are_frozen_first_at_the_levels_of_the_first_stage():
    encoder, progression = start(make_config("power"), encoder=Encoder(nn.Linear(4, 2), 2, normalize=False))
    [weight] = originals_of(encoder)
    weight.data.copy_(torch.tensor([[0.9, -0.4, 0.2, 0.03], [0.6, 0.3, -0.1, 0.01]]))
    progression.enter(0.5)
    expected = torch.tensor([[1.0, -0.5, 0.2, 0.03], [0.5, 0.25, -0.1, 0.01]])
    torch.testing.assert_close(weight.data, expected, rtol=0, atol=0)
    # What grows past the largest level takes it: the levels of a layer are fixed once.
    weight.data[1, 3] = 40.0
    progression.enter(1.0)
    assert weight.data[1, 3] == 1.0
    assert weight.data[0, 2] == 0.25 and weight.data[1, 2] == -0.125 and weight.data[0, 3] == 2.0**-5


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("unit", "select"), list(itertools.product(("filter", "element"), RULES)))
@pytest.mark.parametrize("kind", KINDS)
def test_every_corner_ends_with_a_file_that_gives_the_same_embeddings(kind, unit, select, frozen):
    encoder, progression = start(make_config(kind, unit=unit, select=select, frozen=frozen, float_first=frozen))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.01)
    for step, ratio in enumerate((0.3, 0.6, 1.0)):
        progression.enter(ratio)
        progression.draw(0, step)
        optimizer.zero_grad()
        encoder(make_items())[:, 0].sum().backward()
        optimizer.step()
        progression.restore()
    wanted = embed(encoder, make_items())
    tensors, header = export_weights(encoder)
    plain = make_encoder(CnnConfig(kind="cnn", dim=8, channels=(4, 8)), (8, 8, 1))
    plain.load_state_dict(unpack_weights(load(save(tensors, metadata=header)), header))
    assert torch.equal(embed(plain, make_items()), wanted)
    assert all(name.endswith(".codes") == (tensor.dtype == torch.uint8) for name, tensor in tensors.items())


def test_weights_that_modalities_share_have_one_choice_in_a_step():
    def make():
        torch.manual_seed(0)
        config = FusionConfig(kind="asymfusion", dim=12, channels=(20, 40))
        return make_encoder(config, (10, 9, 3), {"image": 1, "edges": 1})

    items = torch.randint(256, (6, 10, 9, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    items[..., -1] = 3  # both are there
    encoder, progression = start(make_config("ternary"), encoder=make())
    progression.enter(0.5)
    seen = []
    layer = next(layer for layer in layers_of(encoder) if isinstance(layer, nn.Conv2d))
    layer.register_forward_hook(lambda module, given, made: seen.append(module.weight.detach().clone()))
    encoder.train()(items)
    assert len(seen) > 1 and all(torch.equal(weight, seen[0]) for weight in seen)
    progression.enter(1.0)
    wanted = embed(encoder, items)
    tensors, header = export_weights(encoder)
    plain = make()
    plain.load_state_dict(unpack_weights(load(save(tensors, metadata=header)), header))
    assert torch.equal(embed(plain, items), wanted)


def test_a_control_computes_and_exports_what_it_was_given():
    encoder, progression = start(make_config("power", control=True))
    progression.enter(0.5)
    originals = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    tensors, header = export_weights(encoder)
    assert not header and set(tensors) == set(
        make_encoder(CnnConfig(kind="cnn", channels=(4, 8)), (8, 8, 1)).state_dict()
    )
    assert torch.equal(tensors["backbone.0.weight"], originals["backbone.0.parametrizations.weight.original"])
    assert torch.isfinite(embed(encoder, make_items())).all()


def test_layers_that_are_to_stay_float_do():
    encoder, progression = start(make_config(leave=["backbone.0"]))
    before = encoder.backbone[0].weight.detach().clone()
    progression.enter(1.0)
    assert torch.equal(encoder.backbone[0].weight, before) and len(encoder.backbone[4].weight[0].unique()) == 2
    tensors, _ = export_weights(encoder)
    assert "backbone.0.weight" in tensors and "backbone.4.weight.codes" in tensors


def test_a_head_begins_at_a_sample_before_it_is_quantized():
    torch.manual_seed(0)
    items = torch.randn(100, 6) * torch.arange(1.0, 7.0)
    encoder = make_encoder(HeadConfig(kind="head", dim=3, hidden=(4,)), (6,))
    twin = make_encoder(HeadConfig(kind="head", dim=3, hidden=(4,)), (6,))
    Progression(encoder, make_config(), seed=0)
    for network in (encoder, twin):
        network.backbone.start_from(items)
    assert torch.equal(encoder.backbone.linear.weight, twin.backbone.linear.weight)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ratios": []}, "ratios"),
        ({"ratios": [0.5, 0.75]}, "end at 1"),
        ({"ratios": [0.0, 1.0]}, "above 0"),
        ({"ratios": [-0.5, 1.0]}, "above 0"),
        ({"ratios": [0.75, 0.5, 1.0]}, "never fall"),
        ({"ratios": [0.5, 1.5]}, "end at 1"),
        ({"ratios": [1.2]}, "end at 1"),
        ({"select": "largest"}, "select"),
        ({"unit": "layer"}, "unit"),
        ({"bits": 3}, "bits"),
        ({"epochs": 3}, "epochs goes with float_first: true"),
        ({"frozen": True, "ratios": [1.0]}, "freeze an untrained network"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        make_config(**settings)


@pytest.mark.parametrize("bits", [1, 9, 4.5])
def test_powers_have_two_to_eight_bits(bits):
    with pytest.raises(ConfigError, match="bits"):
        make_config("power", bits=bits)


def test_layers_that_are_not_there_or_all_left_float_are_refused():
    with pytest.raises(
        ConfigError, match=r"lowbit\.leave: got 'backbone\.1', but the layers with weights are backbone\.0, "
    ):
        start(make_config(leave=["backbone.1"]))
    alone = Encoder(nn.Linear(3, 2), 2, normalize=False)
    with pytest.raises(ConfigError, match=r"lowbit\.leave: .*no layer is left to quantize"):
        start(make_config(leave=["backbone"]), encoder=alone)
    with pytest.raises(ConfigError, match="no layer is left to quantize"):
        start(make_config(), encoder=Encoder(nn.Flatten(), 2, normalize=False))


def test_a_weight_that_is_computed_already_is_refused_by_its_layer_or_left():
    def make():
        layers = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
        return Encoder(layers, 2, normalize=False)

    with pytest.raises(ConfigError, match=r"layer backbone\.0.*lowbit\.leave"):
        start(make_config(), encoder=make())
    encoder, progression = start(make_config(leave=["backbone.0"]), encoder=make())
    progression.enter(1.0)
    tensors, _ = export_weights(encoder)
    assert "backbone.0.parametrizations.weight.original0" in tensors and "backbone.1.weight.codes" in tensors


def test_layers_that_share_a_weight_are_refused_by_name():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    layers[1].weight = layers[0].weight
    with pytest.raises(ConfigError, match=r"layer backbone\.1.*shares its weight.*lowbit\.leave"):
        start(make_config(), encoder=Encoder(layers, 2, normalize=False))
    start(make_config(leave=["backbone.0", "backbone.1"]), encoder=Encoder(layers, 2, normalize=False))


def test_stages_run_the_whole_schedule_each_and_the_last_frozen_one_has_none():
    assert make_config().plan_stages(6) == [Stage(ratio, 6) for ratio in (0.5, 0.75, 0.875, 1.0)]
    power = make_config("power", ratios=[0.3, 0.6, 1.0], epochs=2)
    assert power.plan_stages(6) == [Stage(0.0, 6), Stage(0.3, 2), Stage(0.6, 2), Stage(1.0, 0)]
    assert make_config("power", ratios=[0.3, 1.0], control=True).plan_stages(6)[1:] == [Stage(0.3, 6), Stage(1.0, 0)]


def test_an_mlp_is_quantized_layer_by_layer():
    encoder = make_encoder(MlpConfig(kind="mlp", dim=4, hidden=(6,)), (5,))
    progression = Progression(encoder, make_config("ternary"), seed=0)
    progression.enter(1.0)
    tensors, _ = export_weights(encoder)
    assert {name for name in tensors if name.endswith("codes")} == {
        "backbone.1.weight.codes",
        "backbone.3.weight.codes",
    }
