import json
import math

import pytest

from gsl_dist.errors import ConfigError
from gsl_dist.plan import ID_BYTES, Costs, K, Reach, Task, load_costs, make_plan, read_task

REACH = Reach(constant=1.0, by_probes=1.2, by_cells=-0.4, crowding=1.5)
COSTS = Costs(
    made_on="a sheet of paper",
    encode_row_us=2.0,
    encode_float_ns=3.0,
    compare_ns=0.1,
    build_shard_s=0.7,
    build_row_us=0.5,
    build_byte_ns=10.0,
    query_us=20.0,
    coarse_ns=0.2,
    table_ns=0.3,
    probe_ns=0.05,
    scan_ns=0.8,
    refine_us=1.0,
    reach=REACH,
)


def make_task(**changes):
    return Task(**({"rows": 10**6, "dim": 100, "code_bytes": 10} | changes))


def test_a_plan_adds_up_what_its_parts_take():
    plan = make_plan(make_task(cells=1000, recall=0.8, cores=4), COSTS)
    probes = math.ceil(math.exp((math.log(4) - 1 + 0.4 * math.log(1000)) / 1.2))
    scanned = 1.5 * 10**6 * probes / 1000
    assert plan.probes == probes and plan.scanned == pytest.approx(scanned)
    query_us = 20 + 100 * 1000 * 0.2e-3 + 100 * K * 0.3e-3 + 10 * (probes * K * 0.05e-3 + scanned * 0.8e-3)
    assert plan.query_ms == pytest.approx(query_us / 1e3)
    assert plan.queries_per_s == pytest.approx(4e6 / query_us)
    encode_us = 2 + 100 * 3e-3 + 100 * (1000 + K) * 0.1e-3
    assert plan.encode_hours == pytest.approx(encode_us / 4 / 3600)
    assert plan.build_hours == pytest.approx((0.7 + 0.5 + 0.1) / 3600), "one shard keeps one core busy"
    assert plan.memory_gb * 2**30 == pytest.approx(10**6 * 18 + 4 * 100 * (1000 + K))
    assert (plan.mapped_gb, plan.shards, plan.fits) == (0, 1, True)


def test_kept_vectors_are_mapped_not_held_and_cost_their_candidates():
    bare, kept = (make_plan(make_task(cells=512, vectors=count), COSTS) for count in (0, 2))
    assert kept.mapped_gb * 2**30 == 2 * 10**8 and kept.memory_gb == bare.memory_gb
    assert kept.disk_gb - bare.disk_gb == pytest.approx(kept.mapped_gb)
    assert kept.query_ms - bare.query_ms == pytest.approx(0.04)


def test_machines_share_rows_and_each_prepares_every_query():
    one, ten = (make_plan(make_task(rows=10**9, cells=65_536, machines=count), COSTS) for count in (1, 10))
    assert ten.encode_hours == pytest.approx(one.encode_hours / 10)
    assert one.shards == ten.shards == 100
    assert one.query_ms / 10 < ten.query_ms < one.query_ms
    assert one.queries_per_s < ten.queries_per_s < 10 * one.queries_per_s
    assert not one.fits and ten.fits, "18 GB on 16 GB machines"


def test_the_number_of_cells_is_the_one_that_answers_soonest():
    task = make_task(rows=10**8)
    best = make_plan(task, COSTS)
    others = [make_plan(task.model_copy(update={"cells": 1 << power}), COSTS) for power in range(1, 19)]
    assert best.query_ms == min(plan.query_ms for plan in others) and best.cells in [plan.cells for plan in others]


def test_more_recall_takes_more_lists_and_never_more_than_all():
    probes = [REACH.find_probes(recall, 256) for recall in (0.5, 0.8, 0.9, 0.99, 0.9999999)]
    assert probes == sorted(probes) and len(set(probes)) > 3 and probes[-1] <= 256
    assert REACH.find_probes(0.01, 256) == 1


def test_a_list_costs_the_bytes_of_code_and_id():
    small, large = (make_plan(make_task(cells=64, code_bytes=count), COSTS) for count in (8, 9))
    assert (large.disk_gb - small.disk_gb) * 2**30 == pytest.approx(10**6)
    assert ID_BYTES == 8


@pytest.mark.parametrize(
    "words, match",
    [
        (["rows"], "settings are written key=value"),
        (["rows=many"], "rows: got 'many', but it must be a number"),
        (["rows=1e6", "dim=96", "code_bytes=0"], "code_bytes"),
        (["rows=1e6", "dim=96", "code_bytes=8", "cell=9"], "cells"),
        (["rows=1e6", "dim=96", "code_bytes=8", "recall=1"], "recall"),
        (["rows=10.5", "dim=96", "code_bytes=8"], "rows"),
        (["dim=96", "code_bytes=8"], "rows"),
    ],
)
def test_settings_that_make_no_task_are_named(words, match):
    with pytest.raises(ConfigError, match=match):
        read_task(words)


def test_settings_may_be_written_short():
    task = read_task(["rows=1e9", "dim=128", "code_bytes=16", "recall=.95"])
    assert (task.rows, task.recall) == (10**9, 0.95)


def test_more_cells_than_rows_can_train_are_refused():
    with pytest.raises(ConfigError, match="cells: got 100000, but 1000000 rows train at most 15625 cells"):
        make_plan(make_task(cells=100_000), COSTS)


def test_costs_are_read_from_the_package_or_a_file(tmp_path):
    shipped = load_costs()
    assert shipped.scan_ns > 0 and shipped.compare_ns > 0 and shipped.reach.by_cells < 0
    path = tmp_path / "costs.json"
    path.write_text(COSTS.model_dump_json())
    assert load_costs(str(path)) == COSTS
    for content in ("{", json.dumps({"made_on": "x"})):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"costs: .*benchmarks/costs\.py wrote"):
            load_costs(str(path))
