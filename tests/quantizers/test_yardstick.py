"""Codes err no more than those of faiss, at equal bytes on the same rows, encoded afresh."""

import faiss
import numpy as np
import pytest
import torch
from corpora import read_pictures

from gsl_dist.quantizers import (
    AdditiveConfig,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    decode,
    make_quantizer,
    train_codebook,
)

ROWS, DIM, CHOICES, BITS = 2000, 32, 4, 5


@pytest.fixture(scope="module")
def rows():
    """Sets of 2,000 rows: principal axes of pictures; clusters, turned, whose axes vary unlike."""
    rng = np.random.default_rng(0)
    centres, turn = 2 * rng.normal(size=(60, DIM)), np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    clusters = (centres[rng.integers(60, size=ROWS)] + rng.normal(size=(ROWS, DIM))) * 1.1 ** -np.arange(DIM) @ turn
    return {"pictures": read_pictures(ROWS, DIM).astype(np.float32), "clusters": clusters.astype(np.float32)}


def measure_error(x, decoded):
    return float(np.square(x - decoded).sum(1).mean() / x.var(0).sum())


def measure_theirs(x, kind):
    if kind == "opq":
        turn = faiss.OPQMatrix(DIM, CHOICES)
        codes = turn.pq = faiss.ProductQuantizer(DIM, CHOICES, BITS)
        turn.train(x)
        x = turn.apply(x)
    else:
        codes = {
            "pq": faiss.ProductQuantizer,
            "rq": faiss.ResidualQuantizer,
            "lsq": faiss.LocalSearchQuantizer,
        }[kind](DIM, CHOICES, BITS)
    codes.train(x)
    return measure_error(x, codes.decode(codes.compute_codes(x)))


def measure_ours(x, config):
    quantizer, x_ND = make_quantizer(config, DIM), torch.tensor(x)
    codebook = train_codebook(x_ND, quantizer, LloydConfig(iterations=20)).codebook
    return measure_error(x, decode(*quantizer.encode(x_ND, codebook), codebook).numpy())


@pytest.mark.parametrize("name", ["pictures", "clusters"])
@pytest.mark.parametrize(
    ("config", "slack"),
    [
        (ProductConfig(sub_vectors=CHOICES, bits=BITS), 1.05),
        (OptimizedConfig(kind="opq", sub_vectors=CHOICES, bits=BITS), 1.05),
        (AdditiveConfig(kind="rq", books=CHOICES, bits=BITS), 1.02),
        (AdditiveConfig(kind="lsq", books=CHOICES, bits=BITS), 1.02),
    ],
    ids=["pq", "opq", "rq", "lsq"],
)
def test_trained_codes_err_no_more_than_those_of_faiss_on(name, config, slack, rows):
    theirs, ours = measure_theirs(rows[name], config.kind), measure_ours(rows[name], config)
    assert ours <= slack * theirs


@pytest.mark.parametrize("name", ["pictures", "clusters"])
def test_a_rotation_helps_product_codes_and_sums_help_more_on(name, rows):
    product = measure_ours(rows[name], ProductConfig(sub_vectors=CHOICES, bits=BITS))
    turned = measure_ours(rows[name], OptimizedConfig(kind="opq", sub_vectors=CHOICES, bits=BITS))
    sums = measure_ours(rows[name], AdditiveConfig(kind="rq", books=CHOICES, bits=BITS))
    assert sums < 0.95 * turned < 0.95 * 0.95 * product
