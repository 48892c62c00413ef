"""How much sooner two workers are done than one, and how much longer they take over twice the work, stage by stage.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py STAGE [--rounds 3] [--open] [--memory FOLDER]

A round does a stage with one worker, with two, and with one worker on half of it, one after another in one Ray whose
processes are warm: `strong` is the time of one over that of two (2 at best), `weak` that of one on half of it over that
of two (1 at best). There are as many cores as workers: everything that belongs to the run, the driver and Ray too, is
bound to one core or to two. With `--open` one worker may use both, as its threads that read ahead will.

What a stage takes before its first row is worked at is told apart (`startup_s`): of a first task in a cold Ray, which
imports what it needs, and for training until Ray Train has its workers. Every round is a line of
benchmarks/results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from encoding import make_model, make_settings, write_corpus
from load import count_busy
from record import RESULTS

# The tests' own worlds of random codes.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
from worlds import make_codebook, make_index, make_rows, write_codes

from gsl_dist.client import Client
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.cluster.serve import ServeConfig, serve, stop_service
from gsl_dist.cluster.session import start_session
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.config import Resources, check_config
from gsl_dist.demo import images, read_commit

PLACE = Path("build/bench/scaling").resolve()
CORES, DIM = 2, 64
IMAGES, VECTORS, SAMPLE, CODES, ITEMS = 40_000, 1_000_000, 200_000, 10_000_000, 1_000_000
TRAINED, EPOCHS, BATCH = 6_000, 4, 256
ASKED, PROBES = 1024, 16


def main() -> None:
    """Measure rounds of one stage and append them."""
    global PLACE
    stages: dict[str, Callable[[], Callable[[int, int], float]]] = {
        "train": prepare_train,
        "codebook": prepare_codebook,
        "encode images": prepare_images,
        "encode vectors": prepare_vectors,
        "build": prepare_build,
        "search": prepare_search,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--open", action="store_true", help="bind nothing to a core")
    parser.add_argument("--memory", type=Path, help="a folder in memory to write to: no disk is what workers share")
    wanted = parser.parse_args()
    PLACE = wanted.memory.resolve() if wanted.memory else PLACE
    PLACE.mkdir(parents=True, exist_ok=True)
    measure = stages[wanted.stage]()
    # As many cores as there are; a service has more processes, which do not compute.
    start_session(3 if wanted.stage == "search" else CORES - 1)
    startup_s = measure_startup(wanted.stage, measure)
    for number in range(wanted.rounds):
        # Whoever comes first finds other processes, caches and neighbours than who comes last.
        turns = [(1, 1), (2, 1), (1, 2)][:: 1 if number % 2 else -1]
        took, others = {}, {}
        for turn in turns:
            bind(range(CORES if wanted.open else turn[0]))
            (all_s, own_s), start = count_busy(), time.perf_counter()
            took[turn] = measure(*turn)
            worked_s = [now - before for now, before in zip(count_busy(), (all_s, own_s), strict=True)]
            others[turn] = (worked_s[0] - worked_s[1]) / (time.perf_counter() - start)
        line = {"stage": wanted.stage, "startup_s": round(startup_s, 2), "open": wanted.open}
        line["in_memory"] = wanted.memory is not None
        line |= {"one_s": took[1, 1], "two_s": took[2, 1], "half_s": took[1, 2]}
        line |= {"strong": took[1, 1] / took[2, 1], "weak": took[1, 2] / took[2, 1], "commit": read_commit()}
        append_line(line | {"cores_kept_by_others": others[2, 1]})
    ray.shutdown()


def bind(cores: Iterable[int]) -> None:
    """Let this process and all that it started, thread by thread, run on these cores alone."""
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):  # it has just ended
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores)


def append_line(line: dict[str, Any]) -> None:
    shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in line.items()}
    with (RESULTS / "scaling.jsonl").open("a") as stream:
        stream.write(json.dumps(shown, sort_keys=True) + "\n")
    print(shown, flush=True)


def measure_startup(stage: str, measure: Callable[[int, int], float]) -> float:
    """Do a hundredth of the work twice with two workers: what the first takes longer is what it takes to start.

    Training is asked how long it took until its workers began; a service, to answer its first batch.
    """
    if stage in ("train", "search"):
        start = time.perf_counter()
        worked = measure(2, 4)
        return time.perf_counter() - start - worked
    cold, warm = (clock(lambda: measure(2, 100)) for _ in range(2))
    return cold - warm


def clock(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def clear(name: str) -> str:
    shutil.rmtree(PLACE / name, ignore_errors=True)
    return str(PLACE / name)


def prepare_train() -> Callable[[int, int], float]:
    corpus = write_corpus(TRAINED)

    def measure(workers: int, part: int) -> float:
        """Give the time of all epochs but the first."""
        tree = images("train").model_dump() | {"path": str(cut(corpus, TRAINED // part))}
        settings: dict[str, Any] = {"corpus": tree, "output": clear("model"), "loss": {"kind": "proxy"}}
        settings["encoder"] = {"kind": "cnn", "dim": 48, "channels": [16, 32, 64]}
        settings["quantizer"] = {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 16, "residual": False}
        settings["fit"] = {"epochs": EPOCHS, "warmup_epochs": 1, "batch_size": BATCH // part}
        settings["resources"] = {"workers": workers, "cpus": 1}
        ends: list[float] = []
        run_train(check_config(TrainConfig, settings), lambda *told: ends.append(time.perf_counter()))
        return ends[-1] - ends[0]

    return measure


def cut(path: Path, rows: int) -> Path:
    """Give a corpus with the first rows of another alone."""
    place = PLACE / f"{path.stem}-{rows}.parquet"
    if not place.exists():
        pq.write_table(pq.read_table(path).slice(0, rows), place)
    return place


def write_floats() -> Path:
    """Give a corpus of random vectors around random centres."""
    place, rng = PLACE / f"vectors-{VECTORS}.parquet", np.random.default_rng(0)
    if not place.exists():
        centres = 3 * rng.normal(size=(500, DIM))
        x_ND = (centres[rng.integers(500, size=VECTORS)] + rng.normal(size=(VECTORS, DIM))).astype(np.float32)
        columns = {"id": np.arange(VECTORS), "vector": pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), DIM)}
        pq.write_table(pa.table(columns), place, row_group_size=1 << 16)
    return place


def codebook_settings(workers: int, sample: int, output: str) -> dict[str, Any]:
    return {
        "source": "fitted",
        "corpus": {"path": str(write_floats()), "id_column": "id", "vector_column": "vector"},
        "quantizer": {"kind": "pq", "sub_vectors": 16, "bits": 8, "cells": 1024},
        "lloyd": {"sample_rows": sample, "iterations": 8},
        "output": output,
        "resources": {"workers": workers, "cpus": 1},
    }


def prepare_codebook() -> Callable[[int, int], float]:
    write_floats()

    def measure(workers: int, part: int) -> float:
        rows = max(SAMPLE // part, 16_384)
        config = check_config(CodebookConfig, codebook_settings(workers, rows, clear("codebook")))
        return clock(partial(run_codebook, config))

    return measure


def prepare_images() -> Callable[[int, int], float]:
    corpus = write_corpus(IMAGES)
    if not Path("build/bench/encoding/codebook/codebook.json").exists():
        make_model()
        ray.shutdown()

    def measure(workers: int, part: int) -> float:
        resources = {"workers": workers, "cpus": 1}
        config = make_settings(cut(corpus, IMAGES // part), "codes-scaling", shards=4 * CORES, resources=resources)
        return clock(partial(run_encode, config))

    return measure


def prepare_vectors() -> Callable[[int, int], float]:
    corpus, codebook = write_floats(), PLACE / "codebook-of-vectors"
    if not (codebook / "codebook.json").exists():
        run_codebook(check_config(CodebookConfig, codebook_settings(2, SAMPLE, str(codebook))))
        ray.shutdown()

    def measure(workers: int, part: int) -> float:
        tree = {"path": str(cut(corpus, VECTORS // part)), "id_column": "id", "vector_column": "vector"}
        settings = {"corpus": tree, "codebook": str(codebook), "output": clear("codes"), "shards": 4 * CORES}
        settings["resources"] = {"workers": workers, "cpus": 1}
        return clock(partial(run_encode, check_config(EncodeConfig, settings)))

    return measure


def prepare_build() -> Callable[[int, int], float]:
    codebook = make_codebook("pq", bits=8, cells=1024, dim=DIM, choices=16)

    def measure(workers: int, part: int) -> float:
        place = PLACE / f"built-{part}"
        if not (place / "codes" / "codes.json").exists():
            write_codes(place, codebook, make_rows(codebook, CODES // part), files=4 * CORES, group=1 << 16)
        settings = {"codes": str(place / "codes"), "codebook": str(place / "codebook")}
        # As many tasks run as there are cores for: one that takes both is alone. Ray has other processes for each, and
        # those of the first turn may be new.
        settings["resources"] = {"cpus": CORES // workers}
        for _ in range(2):
            settings["index"] = clear("index")
            taken = clock(partial(run_build, check_config(BuildConfig, settings)))
        return taken

    return measure


def prepare_search() -> Callable[[int, int], float]:
    codebook = make_codebook("pq", bits=8, cells=1024, dim=DIM, choices=16)
    queries = np.random.default_rng(1).normal(size=(ASKED, DIM)).astype(np.float32) * 3

    def measure(workers: int, part: int) -> float:
        """Give the time of a batch, the median of several, where so many replicas share the shards."""
        place = PLACE / f"served-{part}"
        if not (place / "CURRENT.json").exists():
            make_index(place, rows=ITEMS // part, shards=2, codebook=codebook)
        service = serve(ServeConfig(index=str(place), port=0, replicas=workers, resources=Resources(cpus=1)))
        try:
            with Client(service.url, timeout_s=60) as client:
                ask = partial(client.search, queries, 10, PROBES)
                return statistics.median([clock(ask) for _ in range(9)][2:])
        finally:
            stop_service()

    return measure


if __name__ == "__main__":
    main()
