"""The codebook stage teaches a fitted codebook to rank."""

import pytest
from corpora import write_vectors

from gsl_dist.artefact import open_card
from gsl_dist.cluster.codebook import CodebookConfig, load_codebook, run_codebook
from gsl_dist.config import check_config
from gsl_dist.errors import BadInput, ConfigError
from gsl_dist.storage import Folder

RANKED = {"rounds": 1, "steps": 5, "last_steps": 10, "batch_rows": 128, "neighbours": 40, "held_rows": 100}


def settings(folder, name, **changes):
    tree = {
        "source": "fitted",
        "corpus": {"path": str(folder / "corpus.parquet"), "id_column": "id", "vector_column": "vector"},
        "quantizer": {"kind": "rq", "books": 2, "bits": 3},
        "output": str(folder / name),
    }
    return check_config(CodebookConfig, tree | changes)


@pytest.mark.ray
def test_the_stage_keeps_the_better_codebook_and_notes_both_recalls(ray_session, tmp_path):
    write_vectors(tmp_path / "corpus.parquet", rows=600)
    plain = run_codebook(settings(tmp_path, "plain"))
    seen = []
    ranked = run_codebook(settings(tmp_path, "ranked", ranked=RANKED), lambda what, *rest: seen.append(what))
    recall = ranked.facts["ranked_recall"]
    assert "ranked" in seen and "ranked_recall" not in plain.facts
    assert 0 < recall["before"] <= 1 and ranked.facts["relative_error"] == plain.facts["relative_error"]
    codebook = load_codebook(str(tmp_path / "ranked"))
    differs = codebook.fingerprint != load_codebook(str(tmp_path / "plain")).fingerprint
    assert differs == (recall["after"] > recall["before"])
    assert open_card(Folder(str(tmp_path / "ranked")), "codebook").facts["codebook_fingerprint"] == codebook.fingerprint


@pytest.mark.ray
def test_too_few_rows_are_refused_and_nothing_is_published(ray_session, tmp_path):
    write_vectors(tmp_path / "corpus.parquet", rows=120)
    with pytest.raises(BadInput, match="training rows"):
        run_codebook(settings(tmp_path, "ranked", ranked=RANKED))
    assert not (tmp_path / "ranked" / "codebook.json").exists()


def test_look_ups_alone_cannot_serve_codes_of_residuals(tmp_path):
    quantizer = {"kind": "pq", "sub_vectors": 2, "cells": 4, "residual": True}
    with pytest.raises(ConfigError, match=r"quantizer\.residual must be false"):
        settings(tmp_path, "c", quantizer=quantizer, ranked={"scores": "tables"})


def test_codewords_that_are_given_cannot_be_taught(tmp_path):
    with pytest.raises(ConfigError, match="rabitq has none that could learn"):
        settings(tmp_path, "c", quantizer={"kind": "rabitq"}, ranked={})


def test_a_trained_codebook_is_not_taught_again(tmp_path):
    with pytest.raises(ConfigError, match="ranked is for fitted"):
        check_config(
            CodebookConfig, {"source": "trained", "model": "m", "ranked": RANKED, "output": str(tmp_path / "c")}
        )
