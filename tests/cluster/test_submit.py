"""Jobs on a cluster that `ray start` started: submitted, followed, ended, killed, and submitted again."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")
from clusters import find_ports, start_cluster
from corpora import write_vectors

from gsl_dist.cluster.submit import JobDesk, SubmitConfig, find_settings
from gsl_dist.errors import BadInput, ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
JOBS = Path(__file__).resolve().parents[2] / "jobs"

CORPUS = "corpus: {path: corpus.parquet, id_column: id, vector_column: vector, payload_columns: [label]}\n"
STAGES = {
    "codebook": "source: fitted\nquantizer: {kind: pq, sub_vectors: 4, bits: 4, cells: 4}\nlloyd: {iterations: 3}\n"
    "corpus: {path: corpus.parquet, id_column: id, vector_column: vector}\noutput: out/codebook\n",
    "encode": CORPUS + "codebook: out/codebook\noutput: out/codes\nshards: 6\nkeep_vectors: true\n",
    "build": "codes: out/codes\ncodebook: out/codebook\nindex: out/index\n",
    "evaluate": "index: out/index\ncodes: out/codes\noutput: out/evaluation.json\n"
    "queries: {path: queries.parquet, id_column: id, vector_column: vector}\n",
}


@pytest.fixture(scope="module")
def cluster():
    with start_cluster(RAY_AUTH_MODE="disabled") as cluster:
        yield cluster


@pytest.fixture
def desk(cluster, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    return JobDesk(cluster.address)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of configs and corpora, from which one submits."""
    monkeypatch.chdir(tmp_path)
    write_vectors(tmp_path / "corpus.parquet", rows=1200)
    write_vectors(tmp_path / "queries.parquet", rows=40, seed=5, first=10_000)
    (tmp_path / "configs").mkdir()
    for stage, text in STAGES.items():
        (tmp_path / "configs" / f"{stage}.yaml").write_text(text)
    (tmp_path / "configs" / "pipeline.yaml").write_text("pause_s: 0.1\n")
    (tmp_path / ".rayignore").write_text("*.parquet\nout/\n")
    return tmp_path


def submit(desk, stage="pipeline", *overrides, path="configs", **settings):
    return desk.submit(stage, Path(path), overrides, SubmitConfig(python=sys.executable, **settings))


def finish(desk, job):
    """Wait until a job has ended, and give how."""
    return desk.follow_log(job, io.StringIO().write)


def await_file(path, desk, job):
    while not path.exists():
        state = desk.describe(job)
        assert not state.is_over, desk.read_log(job)
        time.sleep(0.01)


def kill_processes(*words, sig=signal.SIGKILL):
    """Kill every process of whose command line all words are part, and tell how many there were."""
    killed = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if line[:1] == [sys.executable] and all(word in line for word in words):
                os.kill(process.pid, sig)
                killed += 1
    return killed


def digest_files(folder):
    """Give what is in every file, of manifests and evaluations without the times that they tell."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in found:
        if name.endswith(("manifest.json", "evaluation.json")):
            told = json.loads(found[name])
            told = {key: told[key] for key in told if key not in ("created", "digest")}
            for point in told.get("recall_by_probes", []):
                del point["latency_ms"]
            found[name] = json.dumps(told).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def test_a_pipeline_is_followed_stage_by_stage_and_run_again_does_nothing(desk, cluster, place):
    state = finish(desk, submit(desk))
    assert state.status == "SUCCEEDED" and state.is_over
    stages = [step.stage for step in state.steps]
    assert state.steps[0]._asdict() == {"stage": "", "what": "pipeline", "done": 4, "total": 4, "remark": "done"}
    assert [stage for stage in dict.fromkeys(stages) if stage] == list(STAGES)
    assert all(step.done == step.total for step in state.steps)
    made = digest_files(place / "out")
    # The job got the configs, and nothing that .rayignore names.
    [copy] = [path for path in cluster.folder.rglob("working_dir_files/*/configs") if path.is_dir()]
    assert not (copy.parent / "corpus.parquet").exists() and {f.stem for f in copy.iterdir()} == {*STAGES, "pipeline"}
    again = finish(desk, submit(desk))
    assert [step.remark for step in again.steps] == ["done", *["whole already"] * 4]
    assert digest_files(place / "out") == made
    assert {again.job, state.job} <= {listed.job for listed in desk.list_jobs()}


def test_what_cannot_run_is_refused_before_anything_is_sent(desk, place):
    before = len(desk.list_jobs())
    for overrides, words in [(["encode.shards=0"], "shards"), (["fly=1"], "fly"), (["encode.shrads=1"], "mean shards")]:
        with pytest.raises(ConfigError, match=words):
            submit(desk, "pipeline", *overrides)
    with pytest.raises(ConfigError, match="shards: got 'x'"):
        submit(desk, "encode", "shards=x", path="configs/encode.yaml")
    with pytest.raises(BadInput, match="'session', but the stages are train"):
        submit(desk, "session", path="configs/encode.yaml")
    (place / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="it must lie in working_dir"):
        submit(desk, working_dir="elsewhere")
    with pytest.raises(ConfigError, match="there is no"):
        submit(desk, "encode", path="configs/none.yaml")
    assert len(desk.list_jobs()) == before


def test_a_job_that_there_is_not_is_refused(desk, cluster):
    for look in (desk.describe, desk.read_log, desk.stop, lambda job: desk.follow_log(job, print)):
        with pytest.raises(BadInput, match=f"'none', but the cluster at {cluster.address} has no such job"):
            look("none")


def test_where_no_cluster_is_the_error_says_how_to_start_one():
    with pytest.raises(ConfigError, match=r"address: got 'http://127.0.0.1:\d+', but no Ray cluster answers there"):
        JobDesk(f"http://127.0.0.1:{find_ports(1)[0]}")


def test_settings_lie_beside_the_config_unless_a_file_is_named(place):
    assert find_settings(None, Path("configs/encode.yaml")) == SubmitConfig()
    (place / "configs" / "submit.yaml").write_text("env: {A: b}\nentry: {cpus: 1}")
    for config in (Path("configs/encode.yaml"), Path("configs")):
        assert find_settings(None, config).env == {"A": "b"}
    (place / "far.yaml").write_text("adress: http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="did you mean address"):
        find_settings(Path("far.yaml"), Path("configs"))


@pytest.mark.slow
def test_a_stage_that_was_killed_is_tried_again_by_its_own_job(desk, place):
    finish(desk, submit(desk, "codebook", path="configs/codebook.yaml"))
    job = submit(desk, "encode", "batch_rows=1", path="configs/encode.yaml")
    await_file(place / "out" / "codes" / "shard-00000.note.json", desk, job)
    assert kill_processes("gsl_dist.cluster.job", "encode") == 1
    state = finish(desk, job)
    assert state.status == "SUCCEEDED" and "encode was ended by signal 9 in try 1 of 3" in desk.read_log(job)
    assert (place / "out" / "codes" / "codes.json").exists()


@pytest.mark.slow
def test_a_job_that_was_killed_half_way_and_submitted_again_ends_with_the_bytes_of_one_that_was_not(desk, place):
    job = submit(desk, "pipeline", "encode.batch_rows=1")
    await_file(place / "out" / "codes" / "shard-00001.note.json", desk, job)
    assert kill_processes("gsl_dist.cluster.pipeline", "configs") == 1
    assert finish(desk, job).status == "FAILED"
    assert not (place / "out" / "codes" / "codes.json").exists()
    while kill_processes("gsl_dist.cluster.job", sig=0):
        time.sleep(0.1)  # the stage ends with its job
    state = finish(desk, submit(desk, "pipeline", "encode.batch_rows=1"))
    remarks = {step.what: step.remark for step in state.steps}
    assert state.status == "SUCCEEDED" and remarks["codebook"] == "whole already" and "shard" in remarks["encode"]
    killed = digest_files(place / "out")
    shutil.rmtree(place / "out")
    assert finish(desk, submit(desk, "pipeline", "encode.batch_rows=1")).status == "SUCCEEDED"
    assert digest_files(place / "out") == killed


@pytest.mark.slow
def test_a_job_that_is_stopped_goes_on_where_it_was(desk, place):
    finish(desk, submit(desk, "codebook", path="configs/codebook.yaml"))
    job = submit(desk, "encode", "batch_rows=1", path="configs/encode.yaml")
    first = place / "out" / "codes" / "shard-00000.parquet"
    await_file(first.with_name("shard-00000.note.json"), desk, job)
    written = first.stat().st_mtime_ns
    assert desk.stop(job)
    assert finish(desk, job).status == "STOPPED" and not desk.stop(job)
    assert finish(desk, submit(desk, "encode", "batch_rows=1", path="configs/encode.yaml")).status == "SUCCEEDED"
    assert first.stat().st_mtime_ns == written


@pytest.mark.slow
def test_scripts_run_by_plain_ray_job_submit_and_refuse_to_write_into_their_copy(desk, cluster, place):
    shutil.copytree(JOBS, place / "jobs")

    def run(*words):
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster.address]
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=200)

    script = ["--working-dir", ".", "--", sys.executable, "jobs/codebook.py", "configs/codebook.yaml"]
    # Relative inputs are in the copy as well, but what is written there would be lost.
    (place / ".rayignore").unlink()
    lost = run(*script)
    assert lost.returncode == 1 and "GSL_ROOT: got None, but a job runs in a copy that is thrown away" in lost.stdout
    env = json.dumps({"env_vars": {"GSL_ROOT": str(place)}})
    assert run("--runtime-env-json", env, *script).returncode == 0
    assert (place / "out" / "codebook" / "codebook.json").exists()
    whole = ["--working-dir", ".", "--", sys.executable, "jobs/pipeline.py", "configs"]
    assert run("--runtime-env-json", env, *whole).returncode == 0
    assert {path.name for path in (place / "out").iterdir()} >= {"codebook", "codes", "index", "evaluation.json"}
