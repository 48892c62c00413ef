"""The yardstick: how far decoded vectors lie from the vectors, ours and faiss's, at equal bytes on the same rows.

Codebooks are trained on one part of the rows and code both that part and rows held out; the error is relative to the
variance of each. Both sides have their default settings and as many threads; faiss's residual quantizer encodes with
the beam that ours has. Its product-additive quantizers, which have no counterpart here, stand beside the others.
Besides principal axes of the shipped pictures, any rows of an npy or npz file take part (`--data name=path[:key]`).
What was measured once is kept in build/bench/quantizers, to be removed when the code changes, and not measured again.

OMP_NUM_THREADS=1 python benchmarks/quantizers.py [--rows 10000] [--held-out 2000] [--bytes 8 16] [--seeds 3]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from record import spread, write_result

from gsl_dist.config import check_config
from gsl_dist.data import open_corpus
from gsl_dist.demo import images
from gsl_dist.quantizers import (
    AdditiveConfig,
    AdditiveQuantizer,
    LloydConfig,
    OptimizedConfig,
    ProductConfig,
    decode,
    make_quantizer,
    train_codebook,
)
from gsl_dist.storage import Folder

CACHE = Path("build/bench/quantizers")
THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
PICTURE_AXES = 64
BITS = 8
FIGURES = ("train_error", "held_out_error", "train_s", "encode_s")
Rows = NDArray[np.float32]
Code = Callable[[Rows], Rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--held-out", type=int, default=2_000)
    parser.add_argument("--bytes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", action="append", default=[], metavar="NAME=PATH[:KEY]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    wanted = parser.parse_args()
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    tables = {}
    for name, rows in read_sets(wanted.data).items():
        train, held_out = split_rows(rows, wanted.rows, wanted.held_out, turn=name == "fashion")
        # Parts of equal length, and four choices in each of faiss's product-additive ones.
        sizes = [size for size in wanted.bytes if train.shape[1] % size == 0 and size % 4 == 0]
        measured = {
            f"{method} {size}": [run_once(name, method, size, seed, (train, held_out)) for seed in range(wanted.seeds)]
            for size, method in itertools.product(sizes, wanted.methods)
        }
        setting = {"rows": len(train), "held_out": len(held_out), "dim": train.shape[1]}
        tables[name] = setting | {"methods": {key: summarise(runs) for key, runs in measured.items()}}
    write_result("quantizers", {"data": tables, "threads": THREADS, "seeds": wanted.seeds})


def read_sets(given: list[str]) -> dict[str, Rows]:
    """Give the rows of every set by its name; files that are not there are passed over."""
    sets = {"fashion": np.concatenate([read_pictures(part) for part in ("train", "database")])}
    for name, _, place in (item.partition("=") for item in given):
        path, _, key = place.partition(":")
        if not Path(path).exists():
            print(f"{name}: there is no file {path}, passed over", flush=True)
            continue
        found = np.load(path)
        sets[name] = np.asarray(found if isinstance(found, np.ndarray) else found[key or found.files[0]])
    return sets


def read_pictures(part: str) -> Rows:
    items = open_corpus(images(part)).read_all().items
    return items.reshape(len(items), -1).astype(np.float32)


def split_rows(rows: Rows, count: int, held_out: int, *, turn: bool) -> tuple[Rows, Rows]:
    """Draw rows to train on and others to hold out; `turn` gives the principal axes of the first."""
    drawn = np.random.default_rng(0).permutation(len(rows))
    count = min(count, len(rows) - held_out)
    parts = [rows[drawn[:count]].astype(np.float32), rows[drawn[count : count + held_out]].astype(np.float32)]
    if turn:
        centre = parts[0].mean(0)
        axes = np.linalg.eigh(np.cov(parts[0].T))[1][:, ::-1][:, :PICTURE_AXES].astype(np.float32)
        parts = [(part - centre) @ axes for part in parts]
    return np.ascontiguousarray(parts[0]), np.ascontiguousarray(parts[1])


def run_once(name: str, method: str, size: int, seed: int, parts: tuple[Rows, Rows]) -> dict[str, float]:
    """Measure one codebook, or read what was measured before."""
    digest = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]
    key = {"rows": digest, "method": method, "bytes": size, "seed": seed, "threads": THREADS}
    cache, file = Folder(CACHE), f"{name}-{method.replace(' ', '-')}-{size}-{seed}-{digest}.json"
    if cache.exists(file) and (kept := cache.read_json(file))["key"] == key:
        return kept["figures"]
    begun = time.perf_counter()
    code = METHODS[method](parts[0], size, seed)
    trained = time.perf_counter()
    decoded = code(np.concatenate(parts))
    taken = time.perf_counter() - trained
    errors = [measure_error(part, own) for part, own in zip(parts, np.split(decoded, [len(parts[0])]), strict=True)]
    figures = dict(zip(FIGURES, [*errors, trained - begun, taken], strict=True))
    cache.write_json(file, {"key": key, "figures": figures})
    print(name, size, method, {figure: round(value, 4) for figure, value in figures.items()}, flush=True)
    return figures


def measure_error(x_ND: Rows, decoded_ND: Rows) -> float:
    return float(np.square(x_ND - decoded_ND).sum(1, dtype=np.float64).mean() / x_ND.var(0, dtype=np.float64).sum())


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    return {figure: spread([run[figure] for run in runs]) for figure in FIGURES}


def train_ours(settings: dict[str, Any], train: Rows, size: int, seed: int) -> Code:
    kinds = {"pq": ProductConfig, "opq": OptimizedConfig, "rq": AdditiveConfig, "lsq": AdditiveConfig}
    kind = kinds[settings["kind"]]
    choices = "books" if kind is AdditiveConfig else "sub_vectors"
    quantizer = make_quantizer(check_config(kind, settings | {choices: size, "bits": BITS}), train.shape[1])
    codebook = train_codebook(torch.from_numpy(train), quantizer, LloydConfig(), seed=seed).codebook
    return lambda x_ND: decode(*quantizer.encode(torch.from_numpy(x_ND), codebook), codebook).numpy()


def train_theirs(kind: str, train: Rows, size: int, seed: int) -> Code:
    dim = train.shape[1]
    kinds = {
        "pq": lambda: faiss.ProductQuantizer(dim, size, BITS),
        "rq": lambda: faiss.ResidualQuantizer(dim, size, BITS),
        "lsq": lambda: faiss.LocalSearchQuantizer(dim, size, BITS),
        # Product-additive codes: four choices that add up in each of size / 4 parts.
        "prq": lambda: faiss.ProductResidualQuantizer(dim, size // 4, 4, BITS),
        "plsq": lambda: faiss.ProductLocalSearchQuantizer(dim, size // 4, 4, BITS),
    }
    codes = kinds[kind]()
    split = kind in ("prq", "plsq")
    for part in (
        [faiss.downcast_AdditiveQuantizer(codes.subquantizer(m)) for m in range(size // 4)] if split else [codes]
    ):
        if isinstance(part, faiss.LocalSearchQuantizer):
            part.random_seed += seed
        else:
            part.cp.seed += seed
    codes.train(train)
    if kind == "rq":
        codes.max_beam_size = AdditiveQuantizer(AdditiveConfig(kind="rq"), dim).beam
    return lambda x_ND: codes.decode(codes.compute_codes(x_ND))


def train_turned(train: Rows, size: int, seed: int) -> Code:
    dim = train.shape[1]
    turn, inner = faiss.OPQMatrix(dim, size), faiss.ProductQuantizer(dim, size, BITS)
    inner.cp.seed += seed
    turn.pq = inner
    turn.train(train)
    code = train_theirs("pq", turn.apply(train), size, seed)
    return lambda x_ND: turn.reverse_transform(code(turn.apply(x_ND)))


def ours(kind: str, **settings: Any) -> Callable[[Rows, int, int], Code]:
    return lambda train, size, seed: train_ours({"kind": kind} | settings, train, size, seed)


def theirs(kind: str) -> Callable[[Rows, int, int], Code]:
    return lambda train, size, seed: train_theirs(kind, train, size, seed)


METHODS: dict[str, Callable[[Rows, int, int], Code]] = {
    "pq": ours("pq"),
    "faiss pq": theirs("pq"),
    "opq": ours("opq"),
    "faiss opq": train_turned,
    "rq": ours("rq"),
    "faiss rq": theirs("rq"),
    "lsq": ours("lsq"),
    "faiss lsq": theirs("lsq"),
    "faiss prq": theirs("prq"),
    "faiss plsq": theirs("plsq"),
}


if __name__ == "__main__":
    main()
