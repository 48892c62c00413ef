"""Weights that take few levels: what a code of 1, 2 or b bits is worth, and how codes lie in a file.

A filter is a row of the flattened weight, W_i. Its levels:

    binary   a_i sign(W_i),  a_i = mean |W_i|,  sign(0) = 1
    ternary  a_i where W > t, -a_i where W < -t, else 0;  t = 0.7 mean |W - mean W| over the whole layer, the layer's
             mean taken off for t alone;  a_i = mean |W| over what of the filter lies beyond t, 0 where nothing does
    power    0 and +-2^n, top - 2^(b-2) < n <= top, the nearest of them, larger where two are as near;
             top = floor(log2(4 max|W| / 3)) over the whole layer

A `Grid` holds what must be known of a layer to read its codes: a_i, t, top. Training quantizes by coding and decoding
again, so that a weight read from a file is, bit for bit, the one that was trained.

In a file the codes of a layer are one run of bits, lowest first, beside the scales of its filters; everything else
(biases, normalizations, layers that stay float) is as it was. What is coded says the header, as JSON. To read it takes
this module and nothing of what trains.

Source: binary and ternary as in the released code of Dong et al., Learning Accurate Low-Bit Deep Neural Networks with
Stochastic Quantization, arXiv 1708.01001 (their text takes t per filter); power as in Zhou et al., Incremental Network
Quantization, arXiv 1702.03044. The files are this project's.
"""

# Shapes: m filters, d weights of each, P positions in a table of levels

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

LevelKind = Literal["binary", "ternary", "power"]
"""Which levels weights may take."""

HEADER = "gsl_packed"
"""The entry of a safetensors header that says what is coded."""
CODES, SCALES = ".codes", ".scales"
_THRESHOLD = 0.7


@dataclass(frozen=True)
class Grid:
    """The levels of one layer.

    Args:
        kind: which levels these are.
        bits: of one code.
        scales: what levels are multiplied with: a_i, or 2^top for all filters.
        edge: t of ternary levels; top of powers.

    Shapes: scales (m, 1) or (1, 1) float32; edge () float32.
    """

    kind: LevelKind
    bits: int
    scales: Tensor
    edge: Tensor

    def code(self, weight: Tensor) -> Tensor:
        """Give the code of each weight.

        Shapes: (m, ...) float32 -> (m, d) uint8.
        """
        weight_md = weight.flatten(1)
        if self.kind == "binary":
            return (weight_md >= 0).to(torch.uint8)
        if self.kind == "ternary":
            return ((weight_md > self.edge) + 2 * (weight_md < -self.edge)).to(torch.uint8)
        return self._code_powers(weight_md)

    def decode(self, codes_md: Tensor) -> Tensor:
        """Give what codes stand for.

        Shapes: (m, d) uint8 -> (m, d) float32.
        """
        levels_P = torch.tensor(list_levels(self.kind, self.bits), device=codes_md.device)
        return levels_P[codes_md.long()] * self.scales

    def _code_powers(self, weight_md: Tensor) -> Tensor:
        size_md, count = weight_md.abs(), 1 << (self.bits - 2)
        below_md = (self.edge - _nearest_power(size_md)).clamp(0, count - 1)
        codes_md = 1 + 2 * below_md + (weight_md < 0)
        smallest = torch.ldexp(torch.ones_like(self.edge), self.edge.int() - count)
        return torch.where(size_md >= smallest, codes_md, 0).to(torch.uint8)


def fit_grid(weight: Tensor, kind: LevelKind, bits: int) -> Grid:
    """Give the levels that suit a layer.

    Shapes: weight (m, ...) float32.
    """
    weight_md = weight.flatten(1)
    size_md, edge = weight_md.abs(), weight.new_zeros(())
    if kind == "binary":
        scales = size_md.mean(1, keepdim=True)
    elif kind == "ternary":
        edge = _THRESHOLD * (weight - weight.mean()).abs().mean()
        beyond_md = size_md > edge
        scales = (size_md * beyond_md).sum(1, keepdim=True) / beyond_md.sum(1, keepdim=True).clamp_min(1)
    else:
        edge = _nearest_power(size_md.max())
        scales = torch.ldexp(torch.ones_like(edge), edge.int()).reshape(1, 1)
    return Grid(kind, bits, scales, edge)


def list_levels(kind: LevelKind, bits: int) -> list[float]:
    """Give what each code is worth, before it is multiplied with its scale."""
    if kind == "binary":
        return [-1.0, 1.0]
    if kind == "ternary":
        return [0.0, 1.0, -1.0]
    return [0.0] + [sign * 2.0**-n for n in range(1 << (bits - 2)) for sign in (1, -1)]


def pack_layer(name: str, weight: Tensor, grid: Grid) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the tensors of one coded layer, and what the header says of it.

    Shapes: weight (m, ...) float32 -> codes (bytes,) uint8, scales (m,) float32; powers have none.
    """
    tensors = {name + CODES: pack_bits(grid.code(weight), grid.bits)}
    entry: dict[str, Any] = {"shape": list(weight.shape), "kind": grid.kind, "bits": grid.bits}
    if grid.kind == "power":
        return tensors, entry | {"top": int(grid.edge)}
    return tensors | {name + SCALES: grid.scales.flatten().cpu()}, entry


def write_header(layers: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Give the safetensors header of coded layers."""
    return {HEADER: json.dumps({"layers": layers}, sort_keys=True)}


def read_packed(header: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Give what a safetensors header says of coded layers, by the names of their weights."""
    layers: dict[str, dict[str, Any]] = json.loads(header[HEADER])["layers"] if HEADER in header else {}
    return layers


def count_bytes(tensors: dict[str, Tensor], header: dict[str, str]) -> dict[str, int]:
    """Give the bytes that the weights would take as float32, and as codes alone.

    The latter is the ideal: neither scales of filters nor headers, and what was left float as it is.
    """
    layers = read_packed(header)
    coded = {name: int(np.prod(entry["shape"])) for name, entry in layers.items()}
    own = {name + end for name in coded for end in (CODES, SCALES)}
    rest = sum(tensor.nbytes for name, tensor in tensors.items() if name not in own)
    ideal = sum(-(-count * layers[name]["bits"] // 8) for name, count in coded.items())
    return {"encoder_bytes_float": 4 * sum(coded.values()) + rest, "encoder_bytes_ideal": ideal + rest}


def unpack_weights(tensors: dict[str, Tensor], header: dict[str, str]) -> dict[str, Tensor]:
    """Give all weights as float32, those that were coded and those that were not.

    Raises:
        KeyError, ValueError, TypeError, RuntimeError: tensors and header do not fit each other.
    """
    weights = dict(tensors)
    for name, entry in read_packed(header).items():
        kind, bits, shape = entry["kind"], int(entry["bits"]), tuple(entry["shape"])
        codes = unpack_bits(weights.pop(name + CODES), bits, int(np.prod(shape))).reshape(shape[0], -1)
        if kind == "power":
            scales = torch.ldexp(torch.ones(1, 1), torch.tensor(entry["top"]))
        else:
            scales = weights.pop(name + SCALES)[:, None]
        weights[name] = Grid(kind, bits, scales, torch.zeros(())).decode(codes).reshape(shape)
    return weights


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Write the lowest bits of codes one after another, lowest first.

    Shapes: any, uint8 -> (bytes,) uint8.
    """
    flat = codes.flatten().cpu().numpy()
    single = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(single.ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack_bits`.

    Shapes: (bytes,) uint8 -> (count,) uint8.
    Raises:
        ValueError: these are not the bytes of so many codes.
    """
    if len(packed) != -(-count * bits // 8):
        raise ValueError(f"{len(packed)} bytes for {count} codes of {bits} bits")
    single = np.unpackbits(packed.numpy(), bitorder="little", count=count * bits).reshape(count, bits)
    return torch.from_numpy((single << np.arange(bits, dtype=np.uint8)).sum(axis=1, dtype=np.uint8))


def _nearest_power(size: Tensor) -> Tensor:
    """Give the exponent of the nearest power of two, the larger one half way between two; 0 for 0."""
    mantissa, exponent = torch.frexp(size)
    return (exponent - ((mantissa < 0.75) & (size > 0)).int()).to(size)  # 2^(n-1) <= size < 2^n
