"""Encoders: shapes, lengths, and rows that do not depend on their batch."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gsl_dist.encoders import EncoderConfig, ModuleConfig, make_encoder
from gsl_dist.errors import ConfigError

MLP, CNN, TABLE = {"kind": "mlp", "dim": 12}, {"kind": "cnn", "dim": 12, "channels": [4, 8]}, {"kind": "table"}
MODULE = {
    "kind": "module",
    "target": "torch.nn:Linear",
    "arguments": {"in_features": 10, "out_features": 12},
    "dim": 12,
}
CASES = [(MLP, (10,)), (MLP, (8, 8, 1)), (CNN, (28, 28, 1)), (CNN, (32, 32, 3)), (CNN, (9, 5, 1)), (MODULE, (10,))]
every_case = pytest.mark.parametrize(("config", "shape"), CASES)


def start_encoder(config, shape, **settings):
    torch.manual_seed(0)
    return make_encoder(TypeAdapter(EncoderConfig).validate_python(config | settings), shape)


def make_items(shape, rows=7):
    draw = torch.Generator().manual_seed(1)
    if len(shape) == 3:
        return torch.randint(256, (rows, *shape), generator=draw, dtype=torch.uint8)
    return torch.randn(rows, *shape, generator=draw)


def make_number():
    """A factory that gives no module."""
    return 3


class Recorder(nn.Module):
    """Keeps what it was given."""

    def forward(self, items):
        self.seen = items
        return items.flatten(1)[:, :4]


@every_case
def test_items_become_float_representations_of_dim_numbers(config, shape):
    encoder = start_encoder(config, shape)
    y = encoder(make_items(shape))
    assert y.shape == (7, 12) and y.dtype == torch.float32 and encoder.dim == 12


@every_case
def test_normalized_representations_have_length_one_and_others_do_not(config, shape):
    items = make_items(shape)
    y = start_encoder(config, shape)(items)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(7))
    raw = start_encoder(config, shape, normalize=False)(items)
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-4
    torch.testing.assert_close(nn.functional.normalize(raw, dim=1), y)


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_a_row_does_not_depend_on_its_batch(config, shape, training):
    encoder, items = start_encoder(config, shape).train(training), make_items(shape)
    alone = torch.cat([encoder(item[None]) for item in items])
    torch.testing.assert_close(alone, encoder(items), rtol=1e-4, atol=1e-6)


@every_case
def test_gradients_reach_every_parameter(config, shape):
    encoder = start_encoder(config, shape)
    encoder(make_items(shape))[:, 0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("hidden", [(), (5,), (6, 7)])
def test_an_mlp_has_the_hidden_layers_it_was_given(hidden):
    encoder = start_encoder(MLP, (10,), hidden=hidden)
    widths = [layer.in_features for layer in encoder.backbone if isinstance(layer, nn.Linear)]
    assert widths == [10, *hidden]


def test_a_table_gives_its_vectors_back():
    items = make_items((10,))
    encoder = start_encoder(TABLE, (10,))
    assert torch.equal(encoder(items), items) and encoder.dim == 10 and not list(encoder.parameters())
    torch.testing.assert_close(start_encoder(TABLE, (10,), normalize=True)(items).norm(dim=1), torch.ones(7))


def test_images_reach_a_module_with_channels_first_from_minus_one_to_one(monkeypatch):
    monkeypatch.setattr(nn, "Recorder", Recorder, raising=False)
    encoder = start_encoder({"kind": "module", "target": "torch.nn:Recorder", "dim": 4}, (5, 6, 3))
    items = make_items((5, 6, 3))
    items[0, 1, 2, 0], items[0, 1, 2, 1] = 0, 255
    encoder(items)
    seen = encoder.backbone.seen
    assert seen.shape == (7, 3, 5, 6) and seen.dtype == torch.float32
    assert seen[0, :2, 1, 2].tolist() == [-1, 1] and items.dtype == torch.uint8


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_package:Net", "No module named 'no_such_package'"),
        ("torch.no_such:Net", "No module named"),
        ("torch.nn:NoSuchNet", "no attribute 'NoSuchNet'"),
        ("test_backbones:make_number", "must give a torch module, not int"),
    ],
)
def test_a_target_that_gives_no_module_is_refused_by_its_field(target, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        start_encoder({"kind": "module", "target": target, "dim": 4}, (10,))
    assert error.value.field == "encoder.target" and target in str(error.value)


@pytest.mark.parametrize("target", ["torch.nn", "torch.nn:", ":Linear", "torch nn:Linear"])
def test_a_target_without_module_and_callable_is_not_a_config(target):
    with pytest.raises(ValidationError, match="target"):
        start_encoder(MODULE, (10,), target=target)


@pytest.mark.parametrize(("config", "shape", "wanted"), [(CNN, (10,), "images"), (TABLE, (8, 8, 1), "vectors")])
def test_items_of_another_shape_are_refused(config, shape, wanted):
    with pytest.raises(ConfigError, match=f"it takes {wanted}, but the corpus has items of shape") as error:
        start_encoder(config, shape)
    assert error.value.field == "encoder.kind"


def test_module_of_another_width_or_with_wrong_arguments_is_refused():
    def config(**changes):
        tree = {"kind": "module", "target": "torch.nn:Linear", "dim": 4}
        return ModuleConfig(**(tree | {"arguments": {"in_features": 6, "out_features": 4}} | changes))

    assert make_encoder(config(), (6,)).training
    with pytest.raises(ConfigError, match=r"encoder\.dim: got 5"):
        make_encoder(config(dim=5), (6,))
    with pytest.raises(ConfigError, match=r"encoder\.arguments"):
        make_encoder(config(arguments={"inputs": 6}), (6,))
    with pytest.raises(ConfigError, match="items of shape"):
        make_encoder(config(), (7,))


def test_dropout_leaves_units_out_in_training_alone():
    encoder, items = start_encoder(MLP | {"dropout": 0.5}, (10,)), make_items((10,))
    one, two = encoder(items), encoder(items)
    assert not torch.equal(one, two)
    encoder.eval()
    assert torch.equal(encoder(items), encoder(items))
    plain = start_encoder(MLP, (10,)).eval()
    assert torch.equal(plain(items), encoder(items))
