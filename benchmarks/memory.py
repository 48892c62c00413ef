"""How much memory making an index takes, from Parquet to shards: all our processes together, sampled as they work.

Vectors are seeded clusters, written group by group. Each stage runs as `gsl` runs it, in a process of its own on a
local Ray: one worker fits the codebook, which takes no more than a sample; two encode and two build. Every 0.2 s the
resident memory of the driver and of all workers is added up, idle ones included, Ray's own daemons apart: as it is (a
page that processes share counts for each), and shared out (it counts once).

python benchmarks/memory.py [--rows 10000000] [--dim 32] [--memory-mb 128]
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from record import write_result

from gsl_dist.index.manifest import open_version
from gsl_dist.storage import Folder

PLACE = Path("build/bench/memory")
STAGES = ("codebook", "encode", "build")
GROUP_ROWS, CLUSTERS, WORKERS, PERIOD_S = 65_536, 1000, 2, 0.2
# What Ray starts for itself on its node, and where a stage asks for a dataset, to keep its books.
_DAEMONS = re.compile(
    r"raylet|gcs_server|Agent|/dashboard/|/log_monitor|/monitor\.py|/runtime_env/"
    r"|_StatsActor|ActorLocationTracker|Autoscaling"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--memory-mb", type=int, default=128)
    parser.add_argument("--vectors", choices=["float16", "int8"], help="keep vectors as well")
    wanted = parser.parse_args()
    corpus, stages = write_corpus(wanted.rows, wanted.dim), {}
    for stage, settings in describe_stages(wanted, corpus).items():
        shutil.rmtree(settings.get("index") or settings["output"], ignore_errors=True)
        (PLACE / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
        stages[stage] = watch_stage(stage)
        print(stage, {name: figure for name, figure in stages[stage].items() if name != "at_peak"}, flush=True)
    rows = open_version(Folder(PLACE / "index")).rows
    assert rows == wanted.rows, rows
    peaks = {name: max(taken[name] for taken in stages.values()) for name in ("peak_rss_mb", "peak_pss_mb")}
    write_result("memory", {"setting": vars(wanted) | {"workers": WORKERS}, **peaks, "stages": stages})


def write_corpus(rows: int, dim: int) -> Path:
    path = PLACE / f"corpus-{rows}-{dim}.parquet"
    if path.exists():
        return path
    PLACE.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, dim)).astype(np.float32) * 2
    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), dim))])
    with Folder(PLACE).whole(path.name) as draft, pq.ParquetWriter(draft, schema) as writer:
        for start in range(0, rows, GROUP_ROWS):
            ids = np.arange(start, min(start + GROUP_ROWS, rows))
            vectors = centres[rng.integers(CLUSTERS, size=len(ids))] + rng.normal(size=(len(ids), dim))
            flat = pa.array(vectors.astype(np.float32).ravel())
            writer.write_table(pa.table([ids, pa.FixedSizeListArray.from_arrays(flat, dim)], schema=schema))
    return path


def describe_stages(wanted: argparse.Namespace, corpus: Path) -> dict[str, dict[str, Any]]:
    columns = {"path": str(corpus), "id_column": "id", "vector_column": "vector"}
    places = {name: str(PLACE / name) for name in ("codebook", "codes", "index")}
    crew = {"resources": {"workers": WORKERS, "cpus": 1}}
    quantizer = {"kind": "pq", "sub_vectors": 8, "bits": 8, "cells": 1024}
    lloyd = {"iterations": 5, "sample_rows": 100_000}
    fitted = {"source": "fitted", "corpus": columns, "quantizer": quantizer, "lloyd": lloyd}
    coded = {"corpus": columns, "codebook": places["codebook"], "shards": wanted.shards}
    built = {"codes": places["codes"], "codebook": places["codebook"], "index": places["index"]}
    return {
        "codebook": fitted | {"output": places["codebook"]},
        "encode": coded | {"output": places["codes"], "keep_vectors": wanted.vectors is not None} | crew,
        "build": built | {"memory_mb": wanted.memory_mb, "vectors": wanted.vectors} | crew,
    }


def watch_stage(stage: str, place: Path = PLACE) -> dict[str, Any]:
    """Run a stage by its config in a folder; give how long it took and its peak, in MB of a million bytes."""
    started, peaks, at_peak = time.perf_counter(), {"rss": 0.0, "pss": 0.0}, {}
    command = [sys.executable, "-m", "gsl_dist.cli", stage, str(place / f"{stage}.yaml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            held = {f"{name} {pid}": measure(pid) for pid, name in find_processes(driver.pid).items()}
            total = {kind: sum(one[kind] for one in held.values()) for kind in peaks}
            if total["rss"] > peaks["rss"]:
                at_peak = held
            peaks = {kind: max(peaks[kind], total[kind]) for kind in peaks}
            time.sleep(PERIOD_S)
    if driver.returncode:
        raise SystemExit(f"gsl {stage} ended with {driver.returncode}")
    figures = {f"peak_{kind}_mb": round(peak, 1) for kind, peak in peaks.items()}
    return {"seconds": round(time.perf_counter() - started, 1), **figures, "at_peak": list_held(at_peak)}


def list_held(held: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    # Without the numbers of the processes, which say nothing to others.
    ordered = sorted(held.items(), key=lambda item: -item[1]["rss"])
    return [{"process": name.rpartition(" ")[0]} | {k: round(v, 1) for k, v in one.items()} for name, one in ordered]


def find_processes(driver: int) -> dict[int, str]:
    """Give the driver and those below it that are workers, by their number, and what they are called."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := re.search(r"PPid:\s+(\d+)", read_file(entry / "status"))):
            parents[int(entry.name)] = int(found[1])
    below, found = {driver: "driver"}, [driver]
    while found:
        found = [pid for pid, parent in parents.items() if parent in found]
        for pid in found:
            called = read_file(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")
            if ("ray::" in called or "default_worker" in called) and not _DAEMONS.search(called.split(" --")[0]):
                below[pid] = called.split(" ")[0] if "ray::" in called else "starting"
    return below


def measure(pid: int) -> dict[str, float]:
    """Give resident memory as it is and shared out, 0 of a process that is gone, in MB."""
    lines = read_file(Path(f"/proc/{pid}/smaps_rollup"))
    found = {name: re.search(rf"^{name}:\s+(\d+) kB", lines, re.MULTILINE) for name in ("Rss", "Pss")}
    return {name.lower(): int(match[1]) * 1024 / 1e6 if match else 0.0 for name, match in found.items()}


def read_file(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


if __name__ == "__main__":
    main()
