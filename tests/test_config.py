import os

import pytest
from pydantic import Field

from gsl_dist.config import (
    ROOT,
    Location,
    Resources,
    Strict,
    check_config,
    fingerprint_config,
    load_config,
    resolve_location,
)
from gsl_dist.errors import ConfigError


class RoundConfig(Strict):
    radius: float = Field(default=1.0, gt=0)


class StageConfig(Strict):
    output: Location
    epochs: int = Field(default=3, ge=1)
    names: list[str] = []
    parts: list[RoundConfig] = []
    round: RoundConfig = RoundConfig()
    spare: RoundConfig | None = None
    resources: Resources = Resources()


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "stage.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refuse(kind, tree):
    with pytest.raises(ConfigError) as caught:
        check_config(kind, tree)
    assert "\n" not in str(caught.value)
    return caught.value


def train_tree(**changed):
    tree = {
        "corpus": {"path": "c.npy"},
        "output": "m",
        "encoder": {"kind": "mlp"},
        "loss": {"kind": "proxy"},
        "quantizer": {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 1},
    }
    return tree | changed


def test_a_file_and_its_overrides_become_one_config(write):
    path = write("output: out\nepochs: 5\nresources: {workers: 2}\n")
    config = load_config(StageConfig, path, ["epochs=7", "round.radius=2.5", "names=[a, b]", "resources.cpus=3"])
    assert (config.epochs, config.round.radius, config.names) == (7, 2.5, ["a", "b"])
    assert (config.resources.workers, config.resources.cpus) == (2, 3)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        check_config(StageConfig, {"output": "o"}).epochs = 4


@pytest.mark.parametrize(
    "tree, path, nearest",
    [
        ({"outptu": "o"}, "outptu", "output"),
        ({"output": "o", "resources": {"worker": 2}}, "resources.worker", "workers"),
        ({"output": "o", "round": {"raduis": 2}}, "round.raduis", "radius"),
        ({"output": "o", "spare": {"raduis": 2}}, "spare.raduis", "radius"),
        ({"output": "o", "parts": [{}, {"raduis": 2}]}, "parts.1.raduis", "radius"),
    ],
)
def test_unknown_key_names_nearest(tree, path, nearest):
    error = refuse(StageConfig, tree)
    assert error.field == path and f"did you mean {nearest}?" in error.allowed


def test_unknown_key_like_nothing_lists_what_is_known():
    error = refuse(StageConfig, {"output": "o", "round": {"zzzz": 1}})
    assert error.allowed == "there is no such setting; known here: radius"


@pytest.mark.parametrize(
    "changed, path, nearest",
    [
        ({"encoder": {"kind": "cnn", "chanels": [4]}}, "encoder.chanels", "channels"),
        ({"encoder": {"kind": "mlp", "hiden": [4]}}, "encoder.hiden", "hidden"),
        ({"loss": {"kind": "proxy", "temprature": 1}}, "loss.temprature", "temperature"),
        ({"quantizer": {"kind": "pq", "sub_vector": 4, "bits": 4}}, "quantizer.sub_vector", "sub_vectors"),
        ({"fit": {"epoch": 4}}, "fit.epoch", "epochs"),
        ({"corpus": {"path": "c", "image": {"hight": 3}}}, "corpus.image.hight", "height"),
    ],
)
def test_unknown_key_of_a_stage_is_named_as_the_file_has_it(changed, path, nearest):
    train = pytest.importorskip("gsl_dist.cluster.train")
    error = refuse(train.TrainConfig, train_tree(**changed))
    assert error.field == path and f"did you mean {nearest}?" in error.allowed


def test_unknown_key_of_one_kind_does_not_offer_the_keys_of_another():
    train = pytest.importorskip("gsl_dist.cluster.train")
    error = refuse(train.TrainConfig, train_tree(encoder={"kind": "mlp", "channel": [4]}))
    assert "channels" not in error.allowed and "hidden" in error.allowed


def test_a_bad_value_inside_a_union_is_named_as_the_file_has_it():
    train = pytest.importorskip("gsl_dist.cluster.train")
    assert refuse(train.TrainConfig, train_tree(encoder={"kind": "mlp", "dim": 0})).field == "encoder.dim"


@pytest.mark.parametrize("encoder", [{"kind": "cn"}, {"dim": 4}, "cnn", None, [1]])
def test_a_kind_that_does_not_exist_names_the_field(encoder):
    train = pytest.importorskip("gsl_dist.cluster.train")
    assert refuse(train.TrainConfig, train_tree(encoder=encoder)).field.startswith("encoder")


@pytest.mark.parametrize(
    "tree, field",
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.5}, "epochs"),
        ({"epochs": "many"}, "epochs"),
        ({"round": {"radius": 0}}, "round.radius"),
        ({"round": {"radius": float("nan")}}, "round.radius"),
        ({"round": {"radius": float("inf")}}, "round.radius"),
        ({"round": 3}, "round"),
        ({"resources": {"workers": 0}}, "resources.workers"),
        ({"resources": {"gpus": -1}}, "resources.gpus"),
        ({"parts": [{"radius": 1}, {"radius": -1}]}, "parts.1.radius"),
        ({"output": ""}, "output"),
        ({"output": 3}, "output"),
    ],
)
def test_a_value_out_of_range_is_named(tree, field):
    assert refuse(StageConfig, {"output": "o"} | tree).field == field


def test_a_required_setting_is_named():
    error = refuse(StageConfig, {})
    assert (error.field, error.allowed) == ("output", "this setting is required")


def test_a_misspelt_required_key_is_reported_as_misspelt():
    assert refuse(StageConfig, {"ouput": "o"}).field == "ouput"


@pytest.mark.parametrize(
    "override, match",
    [
        ("epochs", "key=value"),
        ("=3", "key=value"),
        ("epochs=[", "YAML value"),
        ("epochs.deep=3", "epochs is a single value"),
        ("names.first=a", "names is a single value"),
        ("epochs=", "epochs"),
        ("=", "key=value"),
        ("epochz=3", "did you mean epochs"),
        ("resources.workers.x=1", "workers"),
        (".epochs=3", "no such setting"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(write, override, match):
    with pytest.raises(ConfigError, match=match):
        load_config(StageConfig, write("output: o\nepochs: 3\nnames: [a]\n"), [override])


@pytest.mark.parametrize(
    "content, match",
    [
        (b"output: [", "it must be YAML"),
        (b"- 1\n- 2\n", "not a list"),
        (b"just words", "not a str"),
        (b"output: \xff\xfe\n", "UTF-8"),
        (b"output: a\x00b\n", "it must be YAML"),
        (b"", "this setting is required"),
        (b"1: 2\noutput: o\n", "1"),
        (b"? [a, b]\n: 2\n", "YAML"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(write, content, match):
    with pytest.raises(ConfigError, match=match) as caught:
        load_config(StageConfig, write(content))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match="readable YAML file") as caught:
            load_config(StageConfig, path)
        assert caught.value.field == "config"


def test_paths_become_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_config(StageConfig, {"output": "a/../b/"}).output == str(tmp_path / "b")
    assert check_config(StageConfig, {"output": "~/b"}).output == os.path.expanduser("~/b")
    assert check_config(StageConfig, {"output": "s3://bucket/b/"}).output == "s3://bucket/b"


def test_a_fingerprint_changes_with_every_setting_and_only_with_settings():
    one = StageConfig(output="o", epochs=3)
    assert fingerprint_config(one, "x") == fingerprint_config(StageConfig(output="o"), "x")
    others = [(one,), (one, "y"), (StageConfig(output="o", epochs=4), "x"), (StageConfig(output="p"), "x")]
    assert len({fingerprint_config(*parts) for parts in [*others, (one, "x")]}) == 5


@pytest.mark.parametrize("cpus, threads", [(0.5, 1), (1, 1), (2.9, 2), (4, 4)])
def test_threads_are_whole_cores_and_at_least_one(cpus, threads):
    assert Resources(cpus=cpus).threads == threads


@pytest.mark.parametrize(
    "root, path, place",
    [
        ("/shared/gsl", "build/codes", "/shared/gsl/build/codes"),
        ("/shared/gsl/", "../x", "/shared/x"),
        ("s3://bucket/gsl/", "./build//codes/", "s3://bucket/gsl/build/codes"),
        ("s3://bucket", ".", "s3://bucket"),
        ("s3://bucket", "/local", "/local"),
        ("/shared", "gs://other/x/", "gs://other/x"),
    ],
)
def test_relative_paths_begin_at_the_root_that_is_set(monkeypatch, root, path, place):
    monkeypatch.setenv(ROOT, root)
    assert resolve_location(path) == place


def test_a_relative_path_does_not_lead_out_of_a_store(monkeypatch):
    monkeypatch.setenv(ROOT, "s3://bucket/gsl")
    with pytest.raises(ValueError, match="lead out of GSL_ROOT"):
        resolve_location("build/../../x")
