"""The stages of a folder in a row: which, in which order, and what becomes of one that fails."""

import logging
from pathlib import Path

import pytest

pytest.importorskip("ray")
from gsl_dist.cluster import pipeline
from gsl_dist.cluster.job import STAGES, open_stage
from gsl_dist.cluster.pipeline import Call, PipelineConfig, plan_calls, run_pipeline
from gsl_dist.config import load_config
from gsl_dist.errors import ConfigError, GslError

FASHION = Path(__file__).resolve().parents[2] / "configs" / "fashion"


@pytest.fixture
def folder(tmp_path):
    for stage in ("serve", "build", "train", "encode"):
        (tmp_path / f"{stage}.yaml").write_text("")
    return tmp_path


@pytest.fixture
def ends(monkeypatch):
    """Lets processes end with given codes, one after another, and tells which stages were started."""
    codes, started = [], []

    def start(call):
        started.append(call.stage)
        return codes.pop(0)

    monkeypatch.setattr(pipeline, "_start_process", start)
    return codes, started


def name_stages(calls):
    return [call.stage for call in calls]


def make_calls(*stages):
    return [Call(stage, Path(f"{stage}.yaml"), ()) for stage in stages]


def test_stages_with_a_file_are_run_in_the_order_in_which_they_build_on_each_other(folder):
    assert name_stages(plan_calls(folder, [])[1]) == ["train", "encode", "build"]
    assert name_stages(plan_calls(folder, ["stages=[serve, encode]"])[1]) == ["encode", "serve"]
    (folder / "pipeline.yaml").write_text("stages: [build, train]\ntries: 7")
    config, calls = plan_calls(folder, ["pause_s=0"])
    assert name_stages(calls) == ["train", "build"] and (config.tries, config.pause_s) == (7, 0)


def test_overrides_go_to_the_stage_that_they_name(folder):
    calls = plan_calls(folder, ["train.fit.epochs=2", "encode.shards=3", "train.fit.seed=1", "tries=1"])[1]
    laid = {call.stage: call.overrides for call in calls}
    assert laid == {"train": ("fit.epochs=2", "fit.seed=1"), "encode": ("shards=3",), "build": ()}


def test_a_file_may_have_another_name(folder):
    (folder / "small.yaml").write_text("")
    calls = plan_calls(folder, ["stages=[train]", "files.train=small.yaml"])[1]
    assert calls == [Call("train", folder / "small.yaml", ())]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["stages=[tune]"], "there is no .*tune.yaml"),
        (["stages=[]"], "stages"),
        (["stages=[fly]"], "stages"),
        (["trian.fit.epochs=2"], "trian"),
        (["tries=0"], "tries"),
        (["serve.port=1"], "the stages that are run are train, encode, build"),
    ],
)
def test_what_cannot_be_planned_is_refused(folder, overrides, words):
    with pytest.raises(ConfigError, match=words):
        plan_calls(folder, overrides)


def test_a_folder_without_stages_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="it must be a folder with a file for each stage"):
        plan_calls(tmp_path / "none", [])
    with pytest.raises(ConfigError, match="it must hold a file for a stage"):
        plan_calls(tmp_path, [])


def test_a_stage_whose_process_was_lost_is_tried_again_and_only_that(ends):
    codes, started = ends
    codes += [0, -9, 1, 0, 0]
    run_pipeline(PipelineConfig(pause_s=0), make_calls("train", "encode", "build"))
    assert started == ["train", "encode", "encode", "encode", "build"]


def test_a_mistake_is_not_tried_again_and_ends_the_pipeline(ends):
    codes, started = ends
    codes += [0, 2]
    with pytest.raises(GslError, match="stage encode was refused"):
        run_pipeline(PipelineConfig(pause_s=0), make_calls("train", "encode", "build"))
    assert started == ["train", "encode"]


def test_after_so_many_tries_the_pipeline_ends_and_says_how(ends, caplog):
    caplog.set_level(logging.INFO, "gsl_dist")
    codes, started = ends
    codes += [1, -9]
    with pytest.raises(GslError, match="stage train was ended by signal 9 in each of 2 tries"):
        run_pipeline(PipelineConfig(tries=2, pause_s=0), make_calls("train", "encode"))
    assert started == ["train", "train"] and "train ended with exit code 1 in try 1 of 2" in caplog.text


def test_pauses_grow(ends, monkeypatch):
    paused, (codes, _) = [], ends
    monkeypatch.setattr(pipeline.time, "sleep", paused.append)
    codes += [1, 1, 1, 0]
    run_pipeline(PipelineConfig(tries=4, pause_s=3), make_calls("train"))
    assert paused == [3, 6, 12]


def test_the_shipped_pipeline_is_of_configs_that_their_stages_accept():
    _, calls = plan_calls(FASHION, ["encode.shards=2"])
    assert name_stages(calls) == ["train", "codebook", "encode", "build", "tune", "evaluate", "match"]
    for call in calls:
        call.check()
    encode = next(call for call in calls if call.stage == "encode")
    assert load_config(open_stage("encode")[0], encode.path, encode.overrides).shards == 2
    assert set(STAGES) >= set(name_stages(calls))


def test_a_config_that_its_stage_refuses_is_found_before_any_stage_runs():
    _, calls = plan_calls(FASHION, ["build.vectors=float23"])
    with pytest.raises(ConfigError, match="vectors: got 'float23'"):
        [call.check() for call in calls]
