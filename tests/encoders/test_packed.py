"""Levels of weights by their formulas, and codes in a file that are read back bit for bit."""

import pytest
import torch
from reference import quantize_in_loops, read_packed_in_loops
from safetensors.torch import load, save

from gsl_dist.encoders.packed import (
    count_bytes,
    fit_grid,
    list_levels,
    pack_bits,
    pack_layer,
    unpack_bits,
    unpack_weights,
    write_header,
)

KINDS = [("binary", 1), ("ternary", 2), ("power", 2), ("power", 4), ("power", 5), ("power", 7), ("power", 8)]
every_kind = pytest.mark.parametrize(("kind", "bits"), KINDS)


def make_weight(shape=(6, 3, 3, 3), *, seed=0, scale=0.1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + 0.01


def quantize(weight, kind, bits):
    grid = fit_grid(weight, kind, bits)
    return grid.decode(grid.code(weight)).reshape_as(weight)


def pack(weights, kind, bits):
    """Give a file of such layers, as bytes."""
    tensors, layers = {}, {}
    for name, weight in weights.items():
        packed, layers[name] = pack_layer(name, weight, fit_grid(weight, kind, bits))
        tensors |= packed
    return save(tensors, metadata=write_header(layers)), tensors, write_header(layers)


@every_kind
def test_levels_are_those_of_the_formulas(kind, bits):
    weight = make_weight((5, 2, 3, 3))
    wanted = quantize_in_loops(weight.flatten(1).double().tolist(), kind, bits)
    torch.testing.assert_close(quantize(weight, kind, bits).flatten(1), torch.tensor(wanted), rtol=1e-6, atol=0)


@every_kind
def test_a_filter_takes_as_many_values_as_its_codes_tell_apart(kind, bits):
    quantized = quantize(make_weight((8, 200)), kind, bits)
    most = {"binary": 2, "ternary": 3}.get(kind, 2 ** (bits - 1) + 1)
    assert len(list_levels(kind, bits)) == most <= 2**bits
    assert max(len(row.unique()) for row in quantized) <= most
    if kind == "binary":
        assert all(len(row.unique()) == 2 for row in quantized)


@every_kind
def test_what_is_quantized_stays_as_it_is_under_the_same_levels(kind, bits):
    weight = make_weight()
    grid = fit_grid(weight, kind, bits)
    once = grid.decode(grid.code(weight))
    assert torch.equal(grid.decode(grid.code(once)), once)


@pytest.mark.parametrize("size", [0.75, 0.7500001, 1.0, 1.4999999, 1.5])
def test_the_largest_weight_lies_between_three_quarters_and_one_and_a_half_of_the_largest_power(size):
    grid = fit_grid(torch.tensor([[size, 0.1]]), "power", 5)
    assert 0.75 * 2.0 ** int(grid.edge) <= size < 1.5 * 2.0 ** int(grid.edge)


def test_half_way_between_two_powers_the_larger_is_taken():
    # 4 bits: 4 powers, of which 1 is the largest and 1/8 the least; below the half of that is zero.
    weight = torch.tensor([[1.4, 0.75, 0.7499999, -0.375, 0.09375, 0.0625, 0.0624999, -0.0, 0.0]])
    assert quantize(weight, "power", 4).tolist() == [[1, 1, 0.5, -0.5, 0.125, 0.125, 0, 0, 0]]


@every_kind
def test_a_layer_of_zeros_stays_one(kind, bits):
    assert not quantize(torch.zeros(3, 4), kind, bits).any()


def test_the_threshold_is_that_of_the_layer_and_the_scale_that_of_the_filter():
    weight = torch.tensor([[1.0, -1.0, 0.1, 0.0], [0.2, -0.1, 0.3, 0.0]])
    assert quantize(weight, "ternary", 2).tolist() == [[1, -1, 0, 0], pytest.approx([0, 0, 0.3, 0])]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 61])
def test_codes_lie_one_after_another_lowest_bit_first(bits, count):
    codes = torch.randint(1 << bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    number = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(-(-count * bits // 8), "little")
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@every_kind
def test_a_file_gives_back_the_weights_that_were_quantized_bit_for_bit(kind, bits):
    weights = {"first.weight": make_weight((6, 1, 3, 3)), "last.weight": make_weight((5, 11), seed=1, scale=3.0)}
    content, _, header = pack(weights, kind, bits)
    given = unpack_weights(load(content), header)
    for name, weight in weights.items():
        assert torch.equal(given[name], quantize(weight, kind, bits))
        assert given[name].flatten().tolist() == read_packed_in_loops(content)[name]


def test_what_was_not_coded_is_handed_on():
    weight = make_weight()
    assert unpack_weights({"weight": weight}, {}) == {"weight": weight}
    tensors, entry = pack_layer("weight", weight, fit_grid(weight, "binary", 1))
    bias = torch.ones(3)
    given = unpack_weights(tensors | {"bias": bias}, write_header({"weight": entry}))
    assert given["bias"] is bias and set(given) == {"weight", "bias"}


@pytest.mark.parametrize(("kind", "bits", "scales"), [("binary", 1, 24), ("ternary", 2, 24), ("power", 5, 0)])
def test_a_file_is_its_ideal_size_but_for_scales_and_header(kind, bits, scales):
    content, tensors, header = pack({"weight": make_weight((6, 3, 3, 3))}, kind, bits)
    sizes = count_bytes(tensors | {"bias": torch.zeros(6)}, header)
    codes = -(-6 * 27 * bits // 8)
    assert sizes == {"encoder_bytes_float": 4 * (6 * 27 + 6), "encoder_bytes_ideal": codes + 4 * 6}
    told = int.from_bytes(content[:8], "little") + 8
    assert len(content) == codes + scales + told


def test_a_file_that_does_not_fit_its_header_is_not_read():
    _, tensors, header = pack({"weight": make_weight()}, "binary", 1)
    with pytest.raises(KeyError):
        unpack_weights({}, header)
    with pytest.raises(ValueError, match="3 bytes for 162 codes of 1 bits"):
        unpack_weights(tensors | {"weight.codes": tensors["weight.codes"][:3]}, header)
