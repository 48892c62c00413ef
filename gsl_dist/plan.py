"""What an index of so many vectors will take: cells, shards, memory, disk, time to build and to ask.

A plan is arithmetic on `Costs`, what one core of one machine was measured to take for each part of the work
(`benchmarks/costs.py` measures and fits them; those shipped are of a small machine with two cores). Nothing is looked
up in advance but these: a plan for a larger machine wants costs measured there.

Of a row, encoding reads D floats, compares them with C centroids and each part with K codewords, and writes a code.
Of a query, each machine compares it with C centroids, makes tables from K codewords of D numbers, and looks at the
codes in its probed lists; where vectors are kept, it measures candidates exactly. How many lists must be probed for a
recall is what real vectors showed (`Reach`). It is the share of true neighbours in the lists looked into: codes lose
some of them again, the more the shorter they are, and kept vectors win most of those back.
"""

# Shapes: N rows, D dims, C cells, K codewords

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import Field

from gsl_dist.config import Strict, check_config
from gsl_dist.errors import ConfigError

K = 256
ID_BYTES, FLOAT_BYTES = 8, 4
SAMPLE_PER_CELL, TRAINING_ROUNDS = 64, 10
MOST_CELLS, LEAST_LIST_ROWS = 1 << 18, 32
SHARD_ROWS = 10_000_000
REFINE = 4
SHIPPED = Path(__file__).parent / "costs.json"


class Reach(Strict):
    """How the share of true neighbours in the probed lists grows: its log odds are a plane over two logarithms.

        log(recall / (1 - recall)) = constant + by_probes log(probes) + by_cells log(cells)

    `crowding`: rows in the lists that queries probe, over as many average lists.
    """

    constant: float
    by_probes: float = Field(gt=0)
    by_cells: float
    crowding: float = Field(ge=1)

    def find_probes(self, recall: float, cells: int) -> int:
        """Give how many lists of so many hold a share of the true neighbours."""
        odds = math.log(recall / (1 - recall))
        wanted = math.exp((odds - self.constant - self.by_cells * math.log(cells)) / self.by_probes)
        return max(1, min(cells, math.ceil(wanted)))


class Costs(Strict):
    """What one core takes; all above zero or zero where too little to be measured.

    Units are in the names; `compare_ns`, `coarse_ns`, `table_ns`: for one dimension of one centroid or codeword, in
    batches and for a single query; `probe_ns`: for one entry of the tables of a probed list, of which each byte of a
    code has K; `scan_ns`: for one byte of one code; `build_shard_s`: for a shard, however small.
    """

    made_on: str
    encode_row_us: float = Field(ge=0)
    encode_float_ns: float = Field(ge=0)
    compare_ns: float = Field(ge=0)
    build_shard_s: float = Field(ge=0)
    build_row_us: float = Field(ge=0)
    build_byte_ns: float = Field(ge=0)
    query_us: float = Field(ge=0)
    coarse_ns: float = Field(ge=0)
    table_ns: float = Field(ge=0)
    probe_ns: float = Field(ge=0)
    scan_ns: float = Field(ge=0)
    refine_us: float = Field(ge=0)
    reach: Reach

    def encode_s(self, rows: float, dim: int, cells: int) -> float:
        """Give the seconds that one core takes to encode rows."""
        return rows * (self.encode_row_us + 1e-3 * dim * (self.encode_float_ns + self.compare_ns * (cells + K))) * 1e-6

    def build_s(self, rows: float, code_bytes: int, shards: int = 1) -> float:
        """Give the seconds that one core takes to build the lists of rows."""
        of_rows = rows * (self.build_row_us + 1e-3 * self.build_byte_ns * code_bytes) * 1e-6
        return self.build_shard_s * shards + of_rows

    def prepare_us(self, dim: int, cells: int) -> float:
        """Give the time of a query before it has looked at any code."""
        return self.query_us + 1e-3 * dim * (self.coarse_ns * cells + self.table_ns * K)

    def scan_us(self, probes: int, scanned: float, code_bytes: int) -> float:
        """Give the time of a query for the lists that it looks into."""
        return 1e-3 * code_bytes * (self.probe_ns * probes * K + self.scan_ns * scanned)


class Task(Strict):
    """What is to be planned."""

    rows: int = Field(ge=1_000, le=10**12, description="of the corpus")
    dim: int = Field(ge=1, le=65_536, description="dimensions of a vector")
    code_bytes: int = Field(ge=1, le=4_096, description="of an item")
    recall: float = Field(default=0.9, gt=0, lt=1, description="share of true neighbours in the lists looked into")
    k: int = Field(default=10, ge=1, description="hits of a query")
    machines: int = Field(default=1, ge=1, description="that the index is spread over")
    cores: int = Field(default=2, ge=1, description="of each machine")
    memory_gb: float = Field(default=16.0, gt=0, description="of each machine")
    vectors: int = Field(default=0, ge=0, le=4, description="bytes kept of each dimension: 0, 1 (int8) or 2 (float16)")
    cells: int | None = Field(default=None, ge=1, description="None: those that answer fastest")


class Plan(Strict):
    """What it will take. Times are with all cores of all machines; `query_ms` is of one query alone, on one core each.

    `queries_per_s` is with all cores busy, without a service around them.
    """

    cells: int
    probes: int
    shards: int
    sample_rows: int
    memory_gb: float = Field(description="of each machine: lists, ids and codebook")
    mapped_gb: float = Field(description="of each machine: kept vectors, mapped and read where they are looked at")
    disk_gb: float = Field(description="of one version")
    fits: bool = Field(description="whether the memory of each machine holds its lists")
    codebook_hours: float
    encode_hours: float
    build_hours: float
    scanned: float = Field(description="codes that a query looks at")
    query_ms: float
    queries_per_s: float


def load_costs(path: str | None = None) -> Costs:
    """Read costs: those shipped, or of another file.

    Raises:
        ConfigError: the file is none of costs.
    """
    place = Path(path) if path else SHIPPED
    try:
        return Costs.model_validate_json(place.read_text())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "costs", str(place), f"it must be a file that benchmarks/costs.py wrote ({reason})"
        ) from error


def read_task(settings: list[str]) -> Task:
    """Read a task from `key=value` words; whole numbers may be written like 1e9.

    Raises:
        ConfigError: an unknown key, or a value out of range.
    """
    tree: dict[str, Any] = {}
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError("plan", word, f"settings are written key=value, of {', '.join(Task.model_fields)}")
        try:
            number = float(value)
        except ValueError:
            raise ConfigError(key, value, "it must be a number") from None
        tree[key] = int(number) if number.is_integer() else number
    return check_config(Task, tree)


def make_plan(task: Task, costs: Costs) -> Plan:
    """Plan an index, with the number of cells that answers a query soonest.

    Raises:
        ConfigError: there are more cells than rows to train them on.
    """
    if task.cells and task.cells * SAMPLE_PER_CELL > task.rows and task.cells > 1:
        most = task.rows // SAMPLE_PER_CELL
        raise ConfigError(
            "cells", task.cells, f"{task.rows} rows train at most {most} cells, {SAMPLE_PER_CELL} rows each"
        )
    if task.cells:
        return _lay_out(task, costs, task.cells)
    room = max(1, min(MOST_CELLS, task.rows // max(LEAST_LIST_ROWS, SAMPLE_PER_CELL)))
    choices = [1 << power for power in range(int(math.log2(room)) + 1)]
    return min((_lay_out(task, costs, cells) for cells in choices), key=lambda plan: plan.query_ms)


def _lay_out(task: Task, costs: Costs, cells: int) -> Plan:
    probes = costs.reach.find_probes(task.recall, cells)
    scanned = min(task.rows, costs.reach.crowding * task.rows * probes / cells)
    prepare = costs.prepare_us(task.dim, cells)
    candidates = REFINE * task.k if task.vectors else 0
    # Every machine prepares each query and ranks candidates of its own; the lists are shared out.
    alone = prepare + costs.scan_us(probes, scanned / task.machines, task.code_bytes) + costs.refine_us * candidates
    codebook = FLOAT_BYTES * task.dim * (cells + K)
    of_lists = task.rows * (task.code_bytes + ID_BYTES) / task.machines
    kept = task.rows * task.dim * task.vectors
    cores, sample = task.machines * task.cores, min(task.rows, max(SAMPLE_PER_CELL * cells, 256 * K))
    training = TRAINING_ROUNDS * sample * task.dim * (cells + K) * costs.compare_ns * 1e-9
    memory = (of_lists + codebook) / 2**30
    shards = max(1, task.machines, math.ceil(task.rows / SHARD_ROWS))
    return Plan(
        cells=cells,
        probes=probes,
        shards=shards,
        sample_rows=sample,
        memory_gb=memory,
        mapped_gb=kept / task.machines / 2**30,
        disk_gb=(task.rows * (task.code_bytes + ID_BYTES) + kept + codebook) / 2**30,
        fits=memory < task.memory_gb,
        codebook_hours=training / cores / 3600,
        encode_hours=costs.encode_s(task.rows, task.dim, cells) / cores / 3600,
        build_hours=costs.build_s(task.rows, task.code_bytes, shards) / min(cores, shards) / 3600,
        scanned=scanned,
        query_ms=alone / 1e3,
        queries_per_s=cores / (task.machines * alone * 1e-6),
    )
