"""Faults at random moments, as `benchmarks/chaos.py` has them: a dozen without Ray, and some on three nodes."""

import os
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import chaos
from attempts import Trial
from remains import Ledger

from gsl_dist.storage import Folder

IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return chaos.Ground(tmp_path_factory.mktemp("ground"), None, None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with chaos.stand([Trial("encode", "worker", "ray")]) as ground:
        yield ground


def strike(ground, trial, wanted):
    """Carry out rounds until so many faults have struck, and give how much work was done again."""
    struck, repeated = 0, 0
    for number in range(20):
        line = ground.run(trial, random.Random(number))
        assert chaos.name_breaches(line) == [] and line["redone"] == 0, line
        struck, repeated = struck + line["faults"], repeated + line["repeated"]
        if struck >= wanted:
            return repeated
    raise AssertionError(f"only {struck} faults struck {trial}")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["encode", "build"])
@pytest.mark.parametrize("kind", ["driver", "pause", "slow", "clock"])
def test_a_stage_that_was_struck_ends_with_the_bytes_of_one_that_was_not(ground, stage, kind):
    repeated = strike(ground, Trial(stage, kind, "alone"), 2 if kind in ("driver", "pause") else 1)
    assert repeated == 0 or kind == "driver"


@pytest.mark.skipif(not IS_ROOT, reason="only root mounts disks")
@pytest.mark.parametrize("stage", ["encode", "build"])
def test_a_stage_that_finds_no_room_says_so_and_goes_on_where_there_is_more(ground, stage):
    strike(ground, Trial(stage, "full", "alone"), 2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "stage, kind", [("codebook", "worker"), ("encode", "worker"), ("encode", "node"), ("build", "driver")]
)
def test_on_three_nodes_too(cluster, stage, kind):
    faults, seed = 0, 2
    # On a quick machine a stage may be over before the moment that was drawn.
    while not faults and seed < 7:
        line = cluster.run(Trial(stage, kind, "ray"), random.Random(seed))
        assert chaos.name_breaches(line) == [], line
        faults, seed = faults + line["faults"], seed + 1
    assert faults > 0, "nothing was struck"


def test_a_ledger_tells_what_was_begun_and_what_was_finished(tmp_path):
    folder, ledger = Folder(tmp_path), Ledger(tmp_path)
    with pytest.raises(RuntimeError, match="lost"), folder.whole("shard-00001.parquet") as path:
        path.write_bytes(b"x")
        raise RuntimeError("lost")
    for number in (0, 1):
        folder.write_bytes(f"shard-{number:05d}.parquet", b"x")
    folder.write_bytes("shard-00001.note.json", b"{}")
    folder.write_bytes("codes.json", b"{}")
    ledger.close()
    assert ledger.begun == {"shard-00000": 1, "shard-00001": 2} and ledger.finished == {"shard-00001": 1}
