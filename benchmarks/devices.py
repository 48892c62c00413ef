"""Codes of lines searched by the compiled loop on one core, and by torch on each device there is.

Codes are random, as in `scanning.py`, which changes no work. Queries come one at a time, as a service gets them, and in
batches; times are those of the clock on the wall, answers included. Codes a second are counted between two numbers of
probes, so that what a query costs beside its scan is left out; milliseconds a query are with it, at the smaller number.

python benchmarks/devices.py [--rows 400000] [--dim 128] [--books 8] [--cells 256] [--edges 16] [--probes 256] ...
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from record import spread, write_result
from scanning import FURTHER, make_index

from gsl_dist.cluster.device import hold_lists
from gsl_dist.index.lists import Lists
from gsl_dist.index.vlq import LineLists


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"rows": 400_000, "dim": 128, "books": 8, "cells": 256, "edges": 16, "probes": 256, "rounds": 5}
    for name, value in (defaults | {"queries": 64, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    wanted = parser.parse_args()
    faiss.omp_set_num_threads(wanted.threads)
    torch.set_num_threads(wanted.threads)
    lists = make_index("vlq", wanted)
    assert isinstance(lists, LineLists), type(lists)
    searched: dict[str, Lists] = {"compiled": lists}
    searched |= {f"torch, {name}": hold_lists(lists, device) for name, device in list_devices().items()}
    write_result("devices", {"setting": vars(wanted)} | measure_all(searched, wanted))


def list_devices() -> dict[str, str]:
    """Give what torch calls the devices there are, by their names."""
    gpus = range(torch.cuda.device_count())
    return {"cpu": "cpu"} | {f"{torch.cuda.get_device_name(gpu)} {gpu}": f"cuda:{gpu}" for gpu in gpus}


def measure_all(searched: dict[str, Lists], wanted: argparse.Namespace) -> dict[str, Any]:
    """Give codes a second and milliseconds a query of each, whose rounds take turns."""
    queries = np.random.default_rng(1).normal(size=(wanted.queries, wanted.dim)).astype(np.float32)
    parts = {"one at a time": np.split(queries, wanted.queries), "in a batch": [queries]}
    taken: dict[tuple[str, str, int], list[float]] = {}
    counts = (wanted.probes, FURTHER * wanted.probes)
    for lists in searched.values():
        measure(lists, [queries[:2]], wanted.probes)  # compiles what is compiled, and wakes what sleeps
    for _ in range(wanted.rounds):
        for name, lists in searched.items():
            for way, batches in parts.items():
                for probes in counts:
                    taken.setdefault((name, way, probes), []).append(measure(lists, batches, probes))
    codes = (FURTHER - 1) * wanted.probes * wanted.queries * wanted.rows / (wanted.cells * wanted.edges)
    figures: dict[str, Any] = {"million_codes_a_second": {}, "ms_a_query": {}}
    for name in searched:
        few, many = ({way: np.asarray(taken[name, way, probes]) for way in parts} for probes in counts)
        rates = {way: spread(list(codes / 1e6 / (many[way] - few[way]))) for way in parts}
        figures["million_codes_a_second"][name] = rates
        figures["ms_a_query"][name] = {way: spread(list(few[way] / wanted.queries * 1e3)) for way in parts}
    return figures


def measure(lists: Lists, batches: list[NDArray[np.float32]], probes: int) -> float:
    started = time.perf_counter()
    for some in batches:
        lists.search(some, 10, probes)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
