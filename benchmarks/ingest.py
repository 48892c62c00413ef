"""From raw vectors to a searchable index on all cores: this project's two workers, one faiss process, autofaiss.

All build IVF-PQ of the same cells and bytes over the same file of vectors, train on as many rows with as many
iterations, and end with an index on disk. Each round runs all of them in turn, each in processes of its own that see
two cores. Ray is started before the clock is; what its workers then take to start counts. autofaiss wants another numpy
than everything else here: name the interpreter that has it.

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

import numpy as np
from record import spread, write_result
from vectors import SUMS, open_vectors

PLACE = Path("build/bench/ingest").absolute()
WORKERS, ITERATIONS, TRAINED = 2, 15, 262_144

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
    parser.add_argument("--ours", action="store_true", help="one build of ours, as the rounds run it")
    wanted = parser.parse_args()
    if wanted.ours:
        print(json.dumps(time_ours(wanted)), flush=True)
        return
    PLACE.mkdir(parents=True, exist_ok=True)
    np.save(PLACE / "base.npy", vectors := open_vectors(wanted.data).base)
    runs: dict[str, Any] = {"gsl_dist": partial(run_ours, wanted), "faiss": partial(run_script, FAISS, wanted)}
    if wanted.autofaiss:
        runs["autofaiss"] = partial(run_script, AUTOFAISS, wanted, python=str(wanted.autofaiss))
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for number in range(wanted.rounds):
        for name, run in runs.items():
            for part, seconds in run().items():
                spent[name].setdefault(part, []).append(seconds)
            print(number, name, {part: round(values[-1], 1) for part, values in spent[name].items()}, flush=True)
        asked = {key: getattr(wanted, key) for key in ("data", "cells", "bytes", "rounds")}
        setting = asked | {"rows": len(vectors)}
        times = {name: {part: spread(values) for part, values in parts.items()} for name, parts in spent.items()}
        write_result(f"ingest-{wanted.data}", {"setting": setting, "rounds": number + 1, "seconds": times})


def run_script(script: str, wanted: argparse.Namespace, python: str = sys.executable) -> dict[str, float]:
    """Run one build of another system in a process with both cores; give the seconds of its parts and of all."""
    given = [PLACE / "base.npy", PLACE / "other.faiss", wanted.cells, wanted.bytes, TRAINED, ITERATIONS]
    started = time.perf_counter()
    command = [python, "-c", script, *map(str, given)]
    told = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(WORKERS)}, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(told.stderr)
    words = told.stdout.splitlines()[-1].split()
    parts = {name: float(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    return {**parts, "process": time.perf_counter() - started}


def run_ours(wanted: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, wanted.data, "--ours", "--cells", str(wanted.cells), "--bytes"]
    started = time.perf_counter()
    told = subprocess.run([*command, str(wanted.bytes)], capture_output=True, text=True)
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
    lloyd = {"iterations": ITERATIONS, "sample_rows": TRAINED}
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
