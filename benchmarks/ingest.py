"""From raw vectors to a searchable index on all cores: this project's two workers, one faiss process, autofaiss.

All build IVF-PQ of the same cells and bytes over the same file of vectors and end with an index on disk. faiss trains
on 262,144 rows with 15 iterations; we on as many with 8, which go further and leave no larger an error, and once more
on half as many; autofaiss does as it does by default. What came of it is told as recall@10 of the built index, an
eighth of the cells probed. Each round runs all of them in turn, each in processes of its own that see two cores. Ray is
started before the clock is; what its workers then take to start counts. autofaiss wants another numpy than everything
else here: name the interpreter that has it.

python benchmarks/ingest.py photos [--cells 4096] [--bytes 16] [--rounds 3] [--autofaiss .venv-autofaiss/bin/python]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from record import spread, write_result
from vectors import SUMS, Vectors, open_vectors

from gsl_dist.evaluate import recall_at
from gsl_dist.index.search import open_searcher

PLACE = Path("build/bench/ingest").absolute()
WORKERS, TRAINED, SHARE = 2, 262_144, 8
ITERATIONS = {"ours": 8, "faiss": 15}

FAISS = """
import sys, time, faiss, numpy as np
started = time.perf_counter()
base = np.load(sys.argv[1])
cells, size, trained, iterations = map(int, sys.argv[3:7])
index = faiss.index_factory(base.shape[1], f"IVF{cells},PQ{size}np")
index.cp.niter, index.cp.max_points_per_centroid = iterations, 1 << 20
index.pq.cp.niter, index.pq.cp.max_points_per_centroid = iterations, 1 << 20
index.train(base[np.sort(np.random.default_rng(0).permutation(len(base))[:trained])])
fitted = time.perf_counter()
index.add(base)
added = time.perf_counter()
faiss.write_index(index, sys.argv[2])
print("codebook", fitted - started, "encode", added - fitted, "build", time.perf_counter() - added)
"""
AUTOFAISS = """
import sys, time, numpy as np
from autofaiss import build_index
started = time.perf_counter()
base = np.load(sys.argv[1])
build_index(base, index_path=sys.argv[2], index_infos_path=sys.argv[2] + ".json", metric_type="l2", nb_cores=2,
            index_key=f"IVF{sys.argv[3]},PQ{sys.argv[4]}x8np", index_param="nprobe=16", max_index_memory_usage="8G",
            current_memory_available="16G", verbose=30)
print("all", time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(SUMS))
    for name, value in {"cells": 4096, "bytes": 16, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--autofaiss", type=Path)
    parser.add_argument("--trained", type=int, help="one build of ours with so many rows in the sample, as in a round")
    wanted = parser.parse_args()
    if wanted.trained:
        print(json.dumps(time_ours(wanted)), flush=True)
        return
    PLACE.mkdir(parents=True, exist_ok=True)
    vectors = open_vectors(wanted.data)
    np.save(PLACE / "base.npy", vectors.base)
    runs: dict[str, Any] = {
        "gsl_dist": partial(run_ours, wanted, TRAINED),
        "gsl_dist, half the sample": partial(run_ours, wanted, TRAINED // 2),
        "faiss": partial(run_script, FAISS, wanted),
    }
    if wanted.autofaiss:
        runs["autofaiss"] = partial(run_script, AUTOFAISS, wanted, python=str(wanted.autofaiss))
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    recalls: dict[str, float] = {}
    for number in range(wanted.rounds):
        for name, run in runs.items():
            for part, seconds in run().items():
                spent[name].setdefault(part, []).append(seconds)
            recalls[name] = measure_recall(name, vectors, wanted.cells // SHARE)
            rounded = {part: round(values[-1], 1) for part, values in spent[name].items()}
            print(number, name, rounded, "recall@10", round(recalls[name], 4), flush=True)
        asked = {key: getattr(wanted, key) for key in ("data", "cells", "bytes", "rounds")}
        setting = asked | {"rows": len(vectors.base)}
        times = {name: {part: spread(values) for part, values in parts.items()} for name, parts in spent.items()}
        measured = {"setting": setting, "rounds": number + 1, "seconds": times, "recall10": recalls}
        write_result(f"ingest-{wanted.data}", measured)


def measure_recall(name: str, vectors: Vectors, probes: int) -> float:
    """Give recall@10 of the index that was built last."""
    if name.startswith("gsl_dist"):
        found_QK = open_searcher(str(PLACE / "ours" / "index")).search(vectors.queries, 10, probes=probes).ids
    else:
        index = faiss.read_index(str(PLACE / "other.faiss"))
        faiss.extract_index_ivf(index).nprobe = probes
        found_QK = index.search(vectors.queries, 10)[1]
    return recall_at(found_QK, vectors.neighbours[:, :10], 10)


def run_script(script: str, wanted: argparse.Namespace, python: str = sys.executable) -> dict[str, float]:
    """Run one build of another system in a process with both cores; give the seconds of its parts and of all."""
    given = [PLACE / "base.npy", PLACE / "other.faiss", wanted.cells, wanted.bytes, TRAINED, ITERATIONS["faiss"]]
    started = time.perf_counter()
    command = [python, "-c", script, *map(str, given)]
    told = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(WORKERS)}, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(told.stderr)
    words = told.stdout.splitlines()[-1].split()
    parts = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    return {**parts, "process": time.perf_counter() - started}


def run_ours(wanted: argparse.Namespace, trained: int) -> dict[str, float]:
    asked = ["--cells", wanted.cells, "--bytes", wanted.bytes, "--trained", trained]
    started = time.perf_counter()
    told = subprocess.run([sys.executable, __file__, wanted.data, *map(str, asked)], capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(told.stderr)
    return {**json.loads(told.stdout.splitlines()[-1]), "process": time.perf_counter() - started}


def time_ours(wanted: argparse.Namespace) -> dict[str, float]:
    """Run the three stages with two workers; give the seconds of each."""
    from gsl_dist.cluster.build import BuildConfig, run_build
    from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
    from gsl_dist.cluster.encode import EncodeConfig, run_encode
    from gsl_dist.cluster.session import start_session
    from gsl_dist.config import check_config

    place = PLACE / "ours"
    shutil.rmtree(place, ignore_errors=True)
    corpus, resources = {"path": str(PLACE / "base.npy")}, {"workers": WORKERS}
    shape = {"kind": "pq", "sub_vectors": wanted.bytes, "cells": wanted.cells}
    lloyd = {"iterations": ITERATIONS["ours"], "sample_rows": wanted.trained}
    codebook, codes = str(place / "codebook"), str(place / "codes")
    fit = {"source": "fitted", "corpus": corpus, "quantizer": shape, "lloyd": lloyd, "output": codebook}
    encode = {"corpus": corpus, "codebook": codebook, "output": codes, "shards": WORKERS, "batch_rows": 16_384}
    build = {"codes": codes, "codebook": codebook, "index": str(place / "index")}
    start_session(WORKERS)
    spent = {}
    stages = {"codebook": (CodebookConfig, run_codebook, fit), "encode": (EncodeConfig, run_encode, encode)}
    for name, (kind, run, settings) in (stages | {"build": (BuildConfig, run_build, build)}).items():
        started = time.perf_counter()
        run(check_config(kind, settings | {"resources": resources}))
        spent[name] = time.perf_counter() - started
    return spent | {"all": sum(spent.values())}


if __name__ == "__main__":
    main()
