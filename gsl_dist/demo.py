"""The main job on shipped images, from nothing to a report: train, codebook, encode, build, serve, evaluate.

Beside the main run stand its controls. The two-step arm is the same network, loss, steps and seed without snapping,
its codebook fitted after training. Both arms are also scored at other code lengths; the two-step network does not
depend on them, so one training serves them all.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gsl_dist.artefact import Card
from gsl_dist.client import Client
from gsl_dist.cluster.build import BuildConfig, list_software, run_build
from gsl_dist.cluster.codebook import CodebookConfig, load_codebook, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.cluster.evaluate import EvaluateConfig, embed_queries, run_evaluate
from gsl_dist.cluster.model import load_encoder
from gsl_dist.cluster.serve import ServeConfig, Service, serve, stop_service
from gsl_dist.cluster.session import Progress, stage_clock, start_session
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict, check_config
from gsl_dist.data import FASHION_CLASSES, Batch, CorpusConfig, fashion_folder, open_corpus
from gsl_dist.encoders import Encoder
from gsl_dist.evaluate import evaluate_map, quantization_error
from gsl_dist.fit import embed
from gsl_dist.hits import Effort
from gsl_dist.index.lists import make_lists
from gsl_dist.index.manifest import Manifest, open_version
from gsl_dist.index.search import LocalSearcher, open_searcher
from gsl_dist.measure import measure_latency, measure_throughput
from gsl_dist.quantizers import open_quantizer
from gsl_dist.report import Pictures, ResultRow, write_report
from gsl_dist.storage import Folder

MAIN_BITS, OTHER_BITS = 16, (8, 32)
WORKERS = 2
SNAPPED = {"variant": "spring", "weight": 1.0, "neighbours": 16}
TWO_STEP = {"variant": "none"}
_SHOWN, _BATCH, _TIMED = 8, 1024, 300
_MADE = ("model", "two-step", "codebook", "codes", "index", *(f"model-{bits}" for bits in OTHER_BITS))


@dataclass
class Demo:
    """One run: where it writes, its seed, and what it measured so far."""

    output: Path
    seed: int
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)

    def place(self, name: str) -> str:
        """Give the folder of an artefact."""
        return str(self.output / name)

    def settle(self, kind: type[Strict], stage: str, tree: dict[str, Any]) -> Any:
        """Check the settings of a stage and keep them for the report."""
        config = check_config(kind, tree)
        self.configs[stage] = config.model_dump(mode="json")
        return config


@dataclass(frozen=True)
class Held:
    """Database and queries in memory, for scoring."""

    database: Batch
    queries: Batch


def run_demo(output: Path, seed: int, progress: Progress) -> dict[str, Any]:
    """Run the main job and its controls, write `report.json` and `report.html`, and give the report.

    What an earlier demo left in the folder is made anew, so that every figure is of this run.
    """
    for name in _MADE:
        Folder(output).clear(name)
    demo = Demo(output, seed, progress)
    start_session(WORKERS)
    held = Held(open_corpus(images("database")).read_all(), open_corpus(images("queries")).read_all())
    snapped, manifest = make_index(demo)
    measured = measure_version(demo, manifest)
    two_step, scores = score_arms(demo, held)
    with serving(demo) as service:
        speed = measure_service(demo, service, held)
        pictures = show_neighbours(demo, service, held)
    main = scores[MAIN_BITS]
    report = {
        **describe_run(demo, manifest, held),
        **{key: measured[key] for key in ("bytes_per_item", "map_coded", "map_float", "quantization_error")},
        **{key: measured[key] for key in ("recall_at_10_vs_exact", "recall_by_probes")},
        "map_two_step": main["two_step"].map,
        "quantization_error_two_step": main["two_step"].error,
        "map_by_bits": [
            {"bits": bits} | {arm: score.map for arm, score in row.items()} for bits, row in scores.items()
        ],
        "history": {"snapped": take_history(snapped), "two_step": take_history(two_step)},
        **speed,
    }
    write_report(report, pictures, output)
    return report


def images(part: str) -> CorpusConfig:
    """Name one part of the shipped images as a corpus: train, database or queries."""
    tree: dict[str, Any] = {
        "path": str(fashion_folder() / f"{part}.parquet"),
        "id_column": "id",
        "image_column": "image",
        "label_column": "label",
        "payload_columns": ["label"] if part == "database" else [],
        "image": {"height": 28, "width": 28, "channels": 1},
    }
    return check_config(CorpusConfig, tree)


def train_settings(demo: Demo, bits: int, snap: dict[str, Any], output: str) -> dict[str, Any]:
    """Give the settings of one training; the arms differ in `snap` alone."""
    return {
        "corpus": images("train").model_dump(),
        "output": demo.place(output),
        "encoder": {"kind": "cnn", "dim": 48, "channels": [16, 32, 64]},
        "loss": {"kind": "proxy", "temperature": 0.2},
        "quantizer": {"kind": "pq", "sub_vectors": bits // 4, "bits": 4, "cells": 16, "residual": False},
        "snap": snap,
        "fit": {"epochs": 20, "warmup_epochs": 5, "batch_size": 256, "learning_rate": 2e-3, "seed": demo.seed},
        "resources": {"workers": WORKERS, "cpus": 1},
    }


def make_index(demo: Demo) -> tuple[Card, Manifest]:
    """Run the stages from images to a promoted version."""
    train = demo.settle(TrainConfig, "train", train_settings(demo, MAIN_BITS, SNAPPED, "model"))
    with stage_clock(demo.seconds, "train"):
        model = run_train(train, demo.progress)
    own = {"source": "trained", "model": demo.place("model"), "output": demo.place("codebook")}
    with stage_clock(demo.seconds, "codebook"):
        run_codebook(demo.settle(CodebookConfig, "codebook", own), demo.progress)
    shared = {"model": demo.place("model"), "codebook": demo.place("codebook")}
    encode = {
        "corpus": images("database").model_dump(),
        **shared,
        "output": demo.place("codes"),
        "shards": 4,
        "keep_vectors": True,
        "resources": {"workers": WORKERS, "cpus": 1},
    }
    with stage_clock(demo.seconds, "encode"):
        run_encode(demo.settle(EncodeConfig, "encode", encode), demo.progress)
    build = {"codes": demo.place("codes"), **shared, "index": demo.place("index")}
    with stage_clock(demo.seconds, "build"):
        manifest = run_build(demo.settle(BuildConfig, "build", build), demo.progress)
    return model, manifest


def measure_version(demo: Demo, manifest: Manifest) -> dict[str, Any]:
    """Run the evaluate stage over the built version."""
    settings = {
        "index": demo.place("index"),
        "version": manifest.version,
        "queries": images("queries").model_dump(),
        "codes": demo.place("codes"),
        "label_column": "label",
        "probes": [1, 2, 4, 8, 16],
        "output": str(demo.output / "evaluation.json"),
    }
    with stage_clock(demo.seconds, "evaluate"):
        return run_evaluate(demo.settle(EvaluateConfig, "evaluate", settings), demo.progress)


@dataclass(frozen=True)
class Score:
    """What codes of one network and codebook are worth."""

    map: float
    error: float


def score_arms(demo: Demo, held: Held) -> tuple[Card, dict[int, dict[str, Score]]]:
    """Train the controls and score both arms at every code length."""
    settings = train_settings(demo, MAIN_BITS, TWO_STEP, "two-step/model")
    with stage_clock(demo.seconds, "train two-step control"):
        two_step = run_train(check_config(TrainConfig, settings), demo.progress)
    scores: dict[int, dict[str, Score]] = {}
    for bits in sorted((MAIN_BITS, *OTHER_BITS)):
        model = "model" if bits == MAIN_BITS else f"model-{bits}"
        with stage_clock(demo.seconds, f"train at {bits} bits"):
            run_train(check_config(TrainConfig, train_settings(demo, bits, SNAPPED, model)), demo.progress)
        fitted = fit_afterwards(demo, bits)
        own = Codebook.load(Folder(demo.place(model)), "codebook.safetensors")
        scores[bits] = {
            "snapped": score_codes(demo.place(model), own, held),
            "two_step": score_codes(demo.place("two-step/model"), fitted, held),
        }
    demo.seconds.pop(f"train at {MAIN_BITS} bits")
    return two_step, scores


def fit_afterwards(demo: Demo, bits: int) -> Codebook:
    """Fit the two-step network's codebook, after its training."""
    output = demo.place(f"two-step/codebook-{bits}")
    settings = {
        "source": "fitted",
        "model": demo.place("two-step/model"),
        "corpus": images("train").model_dump(),
        "quantizer": train_settings(demo, bits, TWO_STEP, "")["quantizer"],
        "lloyd": {"iterations": 25},
        "seed": demo.seed,
        "output": output,
        "resources": {"workers": WORKERS, "cpus": 1},
    }
    run_codebook(check_config(CodebookConfig, settings), demo.progress)
    return load_codebook(output)


def score_codes(model: str, codebook: Codebook, held: Held) -> Score:
    """Score the codes that a trained model gives the database."""
    return score_representations(load_encoder(model)[0], codebook, held)


def score_representations(
    encoder: Encoder, codebook: Codebook, held: Held, *, coded_by: torch.nn.Module | None = None
) -> Score:
    """Rank the database by its codes for every query, in this process, and give mAP and quantization error.

    Args:
        encoder: gives the vectors of queries.
        codebook: of the codes.
        held: database and queries.
        coded_by: gives the vectors of the database; None: the encoder too.
    """
    y_ND = embed(coded_by or encoder, torch.from_numpy(held.database.items))
    queries_QD = embed(encoder, torch.from_numpy(held.queries.items)).numpy()
    cells_N, codes_NM = (part.numpy() for part in open_quantizer(codebook).encode(y_ND, codebook))
    lists = make_lists(codebook, held.database.ids, cells_N, codebook.pack(codes_NM))
    searcher = LocalSearcher(_blank_manifest(codebook), codebook, lists, ("shard-00000",))
    hits = searcher.find(queries_QD, Effort(len(y_ND), codebook.lists, 1))
    order = np.argsort(held.database.ids)
    labels = held.database.ids[order], labels_of(held.database)[order]
    ranked = evaluate_map(hits, labels_of(held.queries), labels, query_ids=held.queries.ids)
    return Score(ranked, quantization_error(y_ND.numpy(), codebook.decode(cells_N, codes_NM)))


@contextlib.contextmanager
def serving(demo: Demo) -> Iterator[Service]:
    """Serve the promoted version while the block lasts, on free ports."""
    settings = {"index": demo.place("index"), "replicas": 2, "port": 0}
    with stage_clock(demo.seconds, "serve"):
        service = serve(demo.settle(ServeConfig, "serve", settings))
    demo.progress("serve", 1, 1, service.url)
    try:
        yield service
    finally:
        stop_service()


def measure_service(demo: Demo, service: Service, held: Held) -> dict[str, float]:
    """Time single queries against an echo, and batches against the same shards in this process."""
    manifest = open_version(Folder(demo.place("index")))
    queries = embed_queries(demo.place("index"), manifest, held.queries.items)
    batch = np.resize(queries, (_BATCH, queries.shape[1]))
    searcher = open_searcher(demo.place("index"), threads=WORKERS)
    speed = measure_latency(service.url, queries, 10, manifest.cells, _TIMED)
    with Client(service.url) as client:
        served = measure_throughput(lambda part: client.search(part, 10, manifest.cells), batch, _BATCH, 15)
    local = measure_throughput(lambda part: searcher.search(part, 10, probes=manifest.cells), batch, _BATCH, 15)
    figures = {key: speed[key] for key in ("served_p50_ms", "served_p99_ms", "echo_p50_ms")}
    return figures | {"served_batch_qps": served, "inprocess_batch_qps": local}


def show_neighbours(demo: Demo, service: Service, held: Held) -> Pictures:
    """Ask the service for the neighbours of the first query of some classes."""
    labels = labels_of(held.queries)
    firsts = [int(np.argmax(labels == label)) for label in np.unique(labels)[:_SHOWN]]
    manifest = open_version(Folder(demo.place("index")))
    vectors = embed_queries(demo.place("index"), manifest, held.queries.items[firsts])
    with Client(service.url) as client:
        hits = client.search(vectors, 10, manifest.cells)
    row_of = {int(found): row for row, found in enumerate(held.database.ids)}
    shown = []
    for query, ids, distances in zip(firsts, hits.ids, hits.distances, strict=True):
        rows = [row_of[int(found)] for found in ids]
        near = [
            (_picture(held.database, row), _name(held.database, row), float(d))
            for row, d in zip(rows, distances, strict=True)
        ]
        shown.append(ResultRow(_picture(held.queries, query), _name(held.queries, query), near))
    return Pictures(shown)


def describe_run(demo: Demo, manifest: Manifest, held: Held) -> dict[str, Any]:
    """Give what was run, on what, and how long each stage took."""
    return {
        "dataset": "Fashion-MNIST, 12,000 images",
        "classes": list(FASHION_CLASSES),
        "database_size": len(held.database),
        "query_size": len(held.queries),
        "train_size": open_corpus(images("train")).rows,
        "bits": MAIN_BITS,
        "shards": len(manifest.shards),
        "replicas": demo.configs["serve"]["replicas"],
        "seconds_by_stage": demo.seconds,
        "configs": demo.configs,
        "software": list_software(),
        "commit": read_commit(),
        "seed": demo.seed,
        "machine": {"cores": os.cpu_count()},
    }


def labels_of(batch: Batch) -> NDArray[np.int64]:
    """Give the labels, which every part of the shipped set has."""
    assert batch.labels is not None
    return batch.labels


def take_history(model: Card) -> list[dict[str, Any]]:
    """Give the epochs of a training as the report wants them."""
    kept = ("epoch", "phase", "loss", "quantization_error")
    return [{key: record[key] for key in kept} for record in model.facts["history"]]


def read_commit() -> str:
    """Give the commit of the source tree, or the empty string outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _blank_manifest(codebook: Codebook) -> Manifest:
    # Nothing is published here: the searcher only asks how many shards there are.
    return Manifest.model_construct(version="", shards=[None], dim=codebook.dim, cells=codebook.cells)


def _picture(batch: Batch, row: int) -> Any:
    return batch.items[row, :, :, 0]


def _name(batch: Batch, row: int) -> str:
    return FASHION_CLASSES[int(labels_of(batch)[row])]
