"""Encoders: shapes, lengths, and rows that do not depend on their batch."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from gsl_dist.encoders import EncoderConfig, ModuleConfig, make_encoder
from gsl_dist.errors import ConfigError

MLP, CNN, TABLE = {"kind": "mlp", "dim": 12}, {"kind": "cnn", "dim": 12, "channels": [4, 8]}, {"kind": "table"}
HEAD = {"kind": "head", "dim": 12, "hidden": [16], "normalize": True}
MODULE = {
    "kind": "module",
    "target": "torch.nn:Linear",
    "arguments": {"in_features": 10, "out_features": 12},
    "dim": 12,
}
CASES = [(MLP, (10,)), (MLP, (8, 8, 1)), (CNN, (28, 28, 1)), (CNN, (32, 32, 3)), (CNN, (9, 5, 1)), (MODULE, (10,))]
CASES += [(HEAD, (14,)), (HEAD, (12,))]
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
    with torch.no_grad():
        # The perceptron of a head begins with a last layer of zeros, which lets nothing through in the first step.
        [parameter.add_(0.01) for parameter in encoder.parameters()]
    encoder(make_items(shape))[:, 0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


@pytest.mark.parametrize("hidden", [(), (5,), (6, 7)])
def test_an_mlp_has_the_hidden_layers_it_was_given(hidden):
    encoder = start_encoder(MLP, (10,), hidden=hidden)
    widths = [layer.in_features for layer in encoder.backbone if isinstance(layer, nn.Linear)]
    assert widths == [10, *hidden]


def make_stretched(rows=300, width=10):
    """Give rows that spread by another measure in each direction, the directions turned, far from zero."""
    turn = torch.linalg.qr(make_items((width,), width))[0]
    return make_items((width,), rows) * torch.arange(1.0, width + 1) @ turn + 50


@pytest.mark.parametrize("dim", [None, 10])
@pytest.mark.parametrize("hidden", [(), (8,), (8, 8)])
def test_a_head_begins_as_the_identity(dim, hidden):
    items, encoder = make_stretched(), start_encoder(HEAD, (10,), dim=dim, hidden=hidden, normalize=False)
    assert torch.equal(encoder(items), items) and encoder.dim == 10
    encoder.backbone.start_from(items)
    assert torch.equal(encoder(items), items)


def test_a_head_with_fewer_numbers_begins_with_orthonormal_rows_that_the_seed_decides():
    weights = [start_encoder(HEAD, (10,), dim=4).backbone.linear.weight for _ in range(2)]
    torch.testing.assert_close(weights[0] @ weights[0].T, torch.eye(4), atol=1e-6, rtol=0)
    assert torch.equal(*weights)


@pytest.mark.parametrize("dim", [1, 4, 9])
def test_a_head_that_saw_a_sample_begins_as_its_principal_axes(dim):
    items, encoder = make_stretched(), start_encoder(HEAD, (10,), dim=dim, normalize=False)
    encoder.backbone.start_from(items)
    rest = items - items.mean(0)
    left, sizes, right = torch.linalg.svd(rest, full_matrices=False)
    projected = rest @ encoder.backbone.linear.weight.T
    torch.testing.assert_close(
        projected @ encoder.backbone.linear.weight, left[:, :dim] * sizes[:dim] @ right[:dim], atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(projected.square().sum(0), sizes[:dim].square(), rtol=1e-4, atol=0)
    torch.testing.assert_close(encoder(items) - encoder(items.mean(0, keepdim=True)), projected, atol=1e-4, rtol=1e-4)


def test_vectors_of_any_size_train_a_head_alike():
    trained = []
    for size in (1.0, 1000.0):
        items, encoder = make_stretched().double() * size, start_encoder(HEAD, (10,), dim=4, normalize=False).double()
        encoder.backbone.start_from(items)
        start, optimizer = encoder(items), torch.optim.Adam(encoder.parameters(), lr=1e-2)
        for _ in range(5):
            y = encoder(items) - encoder(items).mean(0)
            optimizer.zero_grad()
            (y[:, 0].square().mean() / y.square().mean()).backward()
            optimizer.step()
        assert (encoder(items) - start).abs().max() > size
        trained.append(encoder(items).detach() / size)
    torch.testing.assert_close(*trained, atol=1e-2, rtol=1e-3)


def test_a_head_wider_than_the_vectors_is_refused():
    with pytest.raises(ConfigError, match=r"encoder\.dim: got 11, but a head gives at most .* the vectors have, 10"):
        start_encoder(HEAD, (10,), dim=11)


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


@pytest.mark.parametrize(
    ("config", "shape", "wanted"), [(CNN, (10,), "images"), (TABLE, (8, 8, 1), "vectors"), (HEAD, (8, 8, 1), "vectors")]
)
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


@pytest.mark.parametrize(("dropout", "at_inputs", "wanted"), [(0.5, None, [0.5, 0.5]), (0.5, 0.2, [0.2, 0.5])])
def test_inputs_have_a_dropout_of_their_own(dropout, at_inputs, wanted):
    encoder = start_encoder(MLP, (10,), dropout=dropout, input_dropout=at_inputs)
    assert [layer.p for layer in encoder.backbone if isinstance(layer, nn.Dropout)] == wanted


def test_dropout_leaves_units_out_in_training_alone():
    encoder, items = start_encoder(MLP | {"dropout": 0.5}, (10,)), make_items((10,))
    one, two = encoder(items), encoder(items)
    assert not torch.equal(one, two)
    encoder.eval()
    assert torch.equal(encoder(items), encoder(items))
    plain = start_encoder(MLP, (10,)).eval()
    assert torch.equal(plain(items), encoder(items))
