"""What tests of the snapping layer stand on: codebooks, batches, and the layer by loops."""

import itertools

import numpy as np
import pytest
import torch
from reference import place_in_loops, snap_in_loops

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers import AdditiveConfig, decode, make_quantizer, open_quantizer, rotate
from gsl_dist.quantizers.product import find_codewords
from gsl_dist.snap import SnapConfig, SnappingLayer
from gsl_dist.snap import snap_gradient as snap_near

ON_THE_LINE = ("project", "norm", "clamp", "rescale")
VARIANTS = (*ON_THE_LINE, "blend", "add")
COUPLED = ("penalty", "surgery")
FORCES = (*COUPLED, "spring")
FALLBACKS = ("pass", "zero", "widen", "orthogonal")
SHAPES = [
    (kind, rotated, residual) for kind in ("pq", "rq", "lsq") for rotated in (False, True) for residual in (False, True)
]
SHAPES += [("vlq", rotated, True) for rotated in (False, True)]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_force = pytest.mark.parametrize("variant", FORCES)
every_fallback = pytest.mark.parametrize("fallback", FALLBACKS)
every_shape = pytest.mark.parametrize(
    ("kind", "rotated", "residual"),
    SHAPES,
    ids=[f"{kind}{' rotated' * rotated}{' residual' * residual}" for kind, rotated, residual in SHAPES],
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def make_config(variant, fallback="pass", **settings):
    return SnapConfig(variant=variant, fallback=fallback, **{"beta": 0.6, "step": 2.0, "neighbours": 3} | settings)


def make_blocks(*, rows=24, parts=3, words=8, dims=4, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(rows, parts, dims), (rows, parts, dims), (parts, words, dims)]
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def make_codebook(kind="pq", rotated=False, *, dim=6, parts=2, words=8, cells=1, residual=False, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(cells, dim)) * 3 if cells > 1 else np.zeros((1, dim))
    books = rng.normal(size=(parts, words, dim // parts if kind in ("pq", "vlq") else dim))
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0] if rotated else None
    lines = {}
    if kind == "vlq":
        ends = np.stack([np.delete(np.arange(cells), cell) for cell in range(cells)])
        lines = {"edges": ends, "levels": np.linspace(0, 0.6, 256), "feet": np.full(ends.shape, 0.3)}
    return Codebook(coarse, books, residual, kind, rotation=rotation, **lines)


def make_shape(kind, rotated, residual):
    """Give a codebook of few enough sums that the beam of a snapping layer holds them all."""
    return make_codebook(kind, rotated, words=4, cells=3 if residual else 1, residual=residual)


def make_batch(rows=40, dim=6, *, dtype=torch.float64, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, dim, generator=draw, dtype=dtype) for _ in range(2)]


def send_back(layer, y, grad):
    """Give the gradient that reaches y when `grad` comes back."""
    y = y.clone().requires_grad_()
    layer(y).backward(grad)
    return y.grad


def quantize(y, codebook):
    """Give what the nearest code of each row stands for, with a search that drops nothing."""
    config = AdditiveConfig(kind="rq", books=codebook.sub_vectors, bits=codebook.bits)
    quantizer = make_quantizer(config, codebook.dim) if codebook.additive else open_quantizer(codebook)
    cells_N, codes = quantizer.encode(y, codebook)
    return decode(cells_N, codes, codebook).to(y.dtype)


def list_candidates(codebook):
    """Give the codewords of each block: those of each book, or all the sums."""
    if not codebook.additive:
        return codebook.books.tolist()
    return [[np.sum(words, axis=0).tolist() for words in itertools.product(*codebook.books.astype(np.float64))]]


def snap_slowly(grad, y, codebook, config):
    """Bend the gradients of a batch in loops: turned, without what the cell explains, block by block, turned back."""
    turned, rest = rotate(grad, codebook), rotate(y, codebook)
    if codebook.residual:
        rest = torch.stack([torch.tensor(leave_slowly(row, codebook), dtype=y.dtype) for row in rest])
    blocks = (1 if codebook.additive else codebook.sub_vectors, -1)
    bent, aligned, pulls = snap_in_loops(
        turned.unflatten(1, blocks).tolist(), rest.unflatten(1, blocks).tolist(), list_candidates(codebook), config
    )
    bent = torch.tensor(bent, dtype=y.dtype).flatten(1)
    back = bent if codebook.rotation is None else bent @ torch.tensor(codebook.rotation, dtype=y.dtype)
    return back, turned.unflatten(1, blocks), torch.tensor(aligned), pulls


def leave_slowly(row, codebook):
    """Give what the nearest cell, or its nearest line, leaves of a row."""
    row, coarse = row.tolist(), codebook.coarse.astype(np.float64)
    cell = int(np.square(coarse - row).sum(1).argmin())
    if codebook.edges is None:
        return row - coarse[cell]
    return place_in_loops(row, cell, coarse.tolist(), codebook.edges.tolist(), codebook.levels.tolist())[2]


def snap_gradient(grad, y, books, config):
    """Snap among the codewords of product books."""
    return snap_near(grad, y, lambda k: find_codewords(y, books, k), config)


def make_layer(config, codebook, *, workers=1):
    layer = SnappingLayer(config, workers=workers)
    layer.set_codebook(codebook)
    return layer


def find_pulls(grad, y, books, config):
    """Give the pulls to the chosen codewords, zero where none was aligned, and who was aligned."""
    _, aligned, pulls = snap_in_loops(grad.tolist(), y.tolist(), books.tolist(), config)
    zeros = [0.0] * y.shape[2]
    return torch.tensor([[d or zeros for d in row] for row in pulls], dtype=y.dtype), torch.tensor(aligned)
