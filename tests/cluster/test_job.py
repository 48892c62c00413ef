"""A stage as a job: its log is read back as progress, and it ends with who started it."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("ray")
from gsl_dist.cluster.job import STAGES, Step, carry_out, log_progress, open_stage, read_progress
from gsl_dist.config import ROOT, Location, Strict
from gsl_dist.errors import ArtefactError, BadInput, Unwritable

FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s")


class Chore(Strict):
    output: Location
    count: int = 1


@pytest.fixture
def chore(tmp_path):
    path = tmp_path / "chore.yaml"
    path.write_text("output: made")
    return str(path)


@pytest.fixture
def lines(caplog):
    """What was written to the log, as a job's log holds it."""
    caplog.set_level(logging.INFO, "gsl_dist")
    return lambda: "\n".join(FORMAT.format(record) for record in caplog.records)


def run_chore(config, progress):
    progress("chores", config.count, config.count, "")
    return {"output": config.output, "list": [1]}


def run_nothing(config, progress):
    return {}


def run_damaged(config, progress):
    raise ArtefactError("codes", "cut short")


def run_out_of_room(config, progress):
    raise Unwritable("codes/shard-00003.parquet", "No space left on device")


def test_progress_is_read_back_stage_by_stage_as_it_was_written(lines):
    told = [
        ("pipeline", 0, 2, "train"),
        ("warm-up", 1, 2, "loss 0.5, quantization error 0.1"),
        ("warm-up", 2, 2, "loss 0.25"),
        ("pipeline", 1, 2, "encode"),
        ("encode", 3, 8, ""),
    ]
    for step in told:
        log_progress(*step)
    log = f"a line of somebody else 3/4 x\n{lines()}\n2026-01-01 10:00:00,000 WARNING encode 9/9 no progress"
    assert read_progress(log) == [
        Step("", "pipeline", 1, 2, "encode"),
        Step("train", "warm-up", 2, 2, "loss 0.25"),
        Step("encode", "encode", 3, 8, ""),
    ]


def test_a_stage_that_had_nothing_to_do_says_so(chore, lines, capsys):
    assert carry_out(Chore, run_nothing, chore, []) == 0
    assert read_progress(lines()) == [Step("", "nothing", 1, 1, "whole already")]


def test_facts_are_printed_and_a_mistake_is_exit_code_2(chore, lines, capsys):
    assert carry_out(Chore, run_chore, chore, ["count=3"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": os.path.abspath("made")}
    assert read_progress(lines()) == [Step("", "chores", 3, 3, "")]
    assert carry_out(Chore, run_chore, chore, ["cuont=3"]) == 2 and "did you mean count?" in lines()
    assert carry_out(Chore, run_damaged, chore, []) == 2 and "codes: cut short" in lines()


def test_a_full_disk_may_be_tried_again_later_and_is_exit_code_1(chore, lines):
    assert carry_out(Chore, run_out_of_room, chore, []) == 1 and "shard-00003.parquet: it cannot be written" in lines()


def test_a_path_in_the_copy_that_a_job_runs_in_is_refused(chore, lines, capsys, tmp_path, monkeypatch):
    copy = tmp_path / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert carry_out(Chore, run_chore, chore, []) == 2 and "GSL_ROOT" in lines()
    assert carry_out(Chore, run_chore, chore, [f"output={tmp_path}/made"]) == 0
    monkeypatch.setenv(ROOT, str(tmp_path))
    assert carry_out(Chore, run_chore, chore, []) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"output": f"{tmp_path}/made"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_opened_by_its_name(stage):
    kind, run = open_stage(stage)
    assert issubclass(kind, Strict) and run.__name__ == f"run_{stage}"


def test_a_stage_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(BadInput, match="'session', but the stages are train, codebook"):
        open_stage("session")


def test_a_stage_ends_with_the_process_that_started_it(tmp_path):
    child = (
        "import os, time, gsl_dist.cluster.job as job; job.end_with(os.getppid()); print(1, flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)"
    parent += "; c.stdout.readline(); print(c.pid)"
    ran = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    for _ in range(100):
        if not os.path.exists(f"/proc/{int(ran.stdout)}/cmdline") or not _read_words(int(ran.stdout)):
            return
        time.sleep(0.1)
    raise AssertionError("it goes on alone")


def _read_words(pid):
    # Of a process that has ended and that nobody waited for, nothing is left to read.
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            return stream.read()
    except (FileNotFoundError, ProcessLookupError):
        return b""
