"""Codes for embeddings that somebody's model gave: recall of the true neighbours in the original space.

Methods at equal bytes over the same rows: faiss's PQ, OPQ, residual and local search quantizers, this project's own,
and these once more after their codewords learned to rank (`gsl_dist.ranked`, default settings, as many bytes and the
same search). `composite` starts from the codebook that is named and learns scores by look-ups alone: as long as the
codes of OPQ and searched as fast. faiss's OPQ keeps 8 dimensions a byte, or all; its additive quantizers encode with
the beam that ours have. Product codes whose bytes do not divide the dimensions are passed over. Search is exhaustive:
`l2` ranks by the exact distance to the decoded item, or by the score of composite codes; `cosine` by the angle to the
decoded item, which is worth having where all vectors have about one length. The database is what codebooks are trained
on; no query takes part. A finished run is a line or two of results/labelfree.jsonl.

python benchmarks/labelfree.py cifar-embeddings [--bytes 8 16] [--seeds 3] [--method NAME ...] [--rows 50000]
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from prepare import Split, cut, open_split
from record import RESULTS
from torch import Tensor

from gsl_dist.codebook import Codebook
from gsl_dist.demo import read_commit
from gsl_dist.evaluate import recall_at
from gsl_dist.quantizers import (
    AdditiveConfig,
    AdditiveQuantizer,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    Quantizer,
    QuantizerConfig,
    decode,
    make_quantizer,
    train_codebook,
)
from gsl_dist.ranked import RankedConfig, find_coded, learn_ranked, mine_neighbours

LLOYD = LloydConfig(iterations=15)
FAISS_SEED = 1234
MANY = 1 << 20
DIVIDING = ("faiss pq", "pq", "opq", "pq ranked", "opq ranked", "composite of pq", "composite of opq")
FITTED: dict[tuple[str, int, int], Codebook] = {}
LOG = RESULTS / "labelfree.jsonl"
Rank = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--bytes", nargs="*", type=int, default=[8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", nargs="*", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    faiss.omp_set_num_threads(wanted.threads)
    split = cut(open_split(wanted.data), wanted.rows)
    done = {tuple(json.loads(line)["key"]) for line in LOG.read_text().splitlines()} if LOG.exists() else set()
    for seed, count, name in itertools.product(range(wanted.seeds), wanted.bytes, wanted.method):
        key = (wanted.data, len(split.database), name, count, seed)
        if key not in done and not (name in DIVIDING and split.database.shape[1] % count):
            run(key, split)


def run(key: tuple[str, int, str, int, int], split: Split) -> None:
    _, _, name, count, seed = key
    started = time.perf_counter()
    lines = []
    for how, rank in METHODS[name](split, count, seed).items():
        found = rank(torch.from_numpy(split.queries)).numpy()
        figures = {f"recall{k}": recall_at(found, split.neighbours[:, :k], k) for k in (1, 10, 100)}
        figures["first_in_10"] = float((found[:, :10] == split.neighbours[:, :1]).any(1).mean())
        line = {"key": key, "how": how, "commit": read_commit(), "seconds": time.perf_counter() - started} | figures
        lines.append(json.dumps(line) + "\n")
        print(line, flush=True)
    with LOG.open("a") as stream:
        stream.write("".join(lines))


def run_faiss(factory: Callable[[int, int, int], Any]) -> Callable[[Split, int, int], dict[str, Rank]]:
    def method(split: Split, count: int, seed: int) -> dict[str, Rank]:
        base = split.database
        quantizer = factory(base.shape[1], count, FAISS_SEED + seed)
        quantizer.train(base)
        if isinstance(quantizer, faiss.AdditiveQuantizer):
            quantizer.max_beam_size = AdditiveQuantizer(AdditiveConfig(kind="rq"), base.shape[1]).beam
        return rank_decoded(torch.from_numpy(quantizer.decode(quantizer.compute_codes(base))))

    return method


def make_product(dim: int, count: int, seed: int) -> Any:
    quantizer = faiss.ProductQuantizer(dim, count, 8)
    quantizer.cp.seed, quantizer.cp.max_points_per_centroid = seed, MANY
    return quantizer


def make_residual(dim: int, count: int, seed: int) -> Any:
    quantizer = faiss.ResidualQuantizer(dim, count, 8)
    quantizer.cp.seed = seed
    return quantizer


def make_local_search(dim: int, count: int, seed: int) -> Any:
    quantizer = faiss.LocalSearchQuantizer(dim, count, 8)
    quantizer.random_seed = seed
    return quantizer


class FaissOpq:
    """faiss's OPQ as one thing that trains, codes and decodes; the rotation may leave dimensions out."""

    def __init__(self, dim: int, count: int, seed: int, most: int = 8) -> None:
        kept = min(dim // count, most) * count
        self.inner, self.product = (make_product(kept, count, seed) for _ in range(2))
        self.turn = faiss.OPQMatrix(dim, count, kept)
        self.turn.pq, self.turn.max_train_points = self.inner, MANY

    def train(self, base: NDArray[np.float32]) -> None:
        """Learn the rotation, then the codewords."""
        self.turn.train(base)
        self.product.train(self.turn.apply(base))

    def compute_codes(self, base: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Give the codes of rows."""
        return self.product.compute_codes(self.turn.apply(base))

    def decode(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Give what codes stand for, turned back."""
        return self.turn.reverse_transform(self.product.decode(codes))


def run_ours(make: Callable[[int], QuantizerConfig]) -> Callable[[Split, int, int], dict[str, Rank]]:
    def method(split: Split, count: int, seed: int) -> dict[str, Rank]:
        base = torch.from_numpy(split.database)
        quantizer, codebook = fit_once(make(count), split, seed)
        return rank_decoded(decode(*quantizer.encode(base, codebook), codebook))

    return method


def fit_once(config: QuantizerConfig, split: Split, seed: int) -> tuple[Quantizer, Codebook]:
    """Fit a codebook, and keep it for the other methods that start from it."""
    key = (config.model_dump_json(), id(split), seed)
    quantizer = make_quantizer(config, split.database.shape[1])
    if key not in FITTED:
        FITTED[key] = train_codebook(torch.from_numpy(split.database), quantizer, LLOYD, seed=seed).codebook
    return quantizer, FITTED[key]


def run_ranked(
    make: Callable[[int], QuantizerConfig], scores: Literal["exact", "tables"] = "exact"
) -> Callable[[Split, int, int], dict[str, Rank]]:
    config = RankedConfig(scores=scores)

    def method(split: Split, count: int, seed: int) -> dict[str, Rank]:
        base = torch.from_numpy(split.database)
        quantizer, start = fit_once(make(count), split, seed)
        codebook = learn_ranked(mine_neighbours(base, config), start, config, seed=seed)
        if scores == "tables":
            return {"l2": lambda queries: find_coded(base, queries, codebook, 100)}
        return rank_decoded(decode(*quantizer.encode(base, codebook), codebook))

    return method


def rank_decoded(decoded_ND: Tensor) -> dict[str, Rank]:
    unit_ND = torch.nn.functional.normalize(decoded_ND)
    half_N = decoded_ND.square().sum(1) / 2
    return {
        "l2": lambda queries: (queries @ decoded_ND.T - half_N).topk(100, dim=1).indices,
        "cosine": lambda queries: (queries @ unit_ND.T).topk(100, dim=1).indices,
    }


def product(count: int) -> ProductConfig:
    return ProductConfig(kind="pq", sub_vectors=count)


def optimized(count: int) -> OptimizedConfig:
    return OptimizedConfig(kind="opq", sub_vectors=count, rotation_iterations=20)


def residual(count: int) -> AdditiveConfig:
    return AdditiveConfig(kind="rq", books=count, joint_iterations=6)


def local_search(count: int) -> AdditiveConfig:
    return AdditiveConfig(kind="lsq", books=count)


METHODS: dict[str, Callable[[Split, int, int], dict[str, Rank]]] = {
    "faiss pq": run_faiss(make_product),
    "faiss opq": run_faiss(FaissOpq),
    "faiss opq, all dimensions": run_faiss(partial(FaissOpq, most=MANY)),
    "faiss rq": run_faiss(make_residual),
    "faiss lsq": run_faiss(make_local_search),
    "pq": run_ours(product),
    "opq": run_ours(optimized),
    "rq": run_ours(residual),
    "lsq": run_ours(local_search),
    "pq ranked": run_ranked(product),
    "opq ranked": run_ranked(optimized),
    "rq ranked": run_ranked(residual),
    "lsq ranked": run_ranked(local_search),
    "composite of pq": run_ranked(product, "tables"),
    "composite of opq": run_ranked(optimized, "tables"),
    "composite of rq": run_ranked(residual, "tables"),
}


if __name__ == "__main__":
    main()
