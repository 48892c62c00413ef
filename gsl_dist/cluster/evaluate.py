"""The evaluate stage: how well a version answers, measured on queries that it never saw.

Queries pass through the version's own encoder; the version's own shards rank the whole database. Vectors kept by the
encode stage give the float yardsticks: exact search, float mAP and the quantization error. What was measured already,
of the same files and with the same settings, is not measured again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from gsl_dist.artefact import open_card
from gsl_dist.cluster.encode import read_codes
from gsl_dist.cluster.query import QueryEncoder, has_model
from gsl_dist.cluster.session import Progress, stay_quiet
from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.config import Location, Resources, Strict, fingerprint_config, hide_keys
from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.evaluate import evaluate_map, quantization_error, rank_exact, recall_at
from gsl_dist.hits import Effort, Hits
from gsl_dist.index.manifest import Manifest, open_version, version_folder
from gsl_dist.index.overlay import read_schema
from gsl_dist.index.search import LocalSearcher, check_queries, open_searcher
from gsl_dist.storage import Folder, split_location

_TIMED_QUERIES = 200


class EvaluateConfig(Strict):
    """Measures a version with held-out queries."""

    index: Location = Field(description="the index folder")
    version: str | None = Field(default=None, description="None: the promoted one")
    queries: CorpusConfig
    codes: Location | None = Field(default=None, description="codes with vectors kept, for exact search and float mAP")
    label_column: str | None = Field(default=None, description="payload column that holds labels; None: no mAP")
    top: int | None = Field(default=None, ge=1, description="R of mAP@R; None: the whole database")
    probes: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16), description="cells to look into, for recall by probes")
    output: Location = Field(description="the JSON file to write")
    resources: Resources = Resources()


@dataclass(frozen=True)
class Items:
    """The database as the yardsticks see it, in ascending order of ids.

    Shapes: ids (N,); vectors (N, D) float32; decoded (N, D) float32.
    """

    ids: IdArray
    vectors: FloatArray
    decoded: FloatArray


def run_evaluate(config: EvaluateConfig, progress: Progress = stay_quiet) -> dict[str, Any]:
    """Measure what a config asks for, write it as JSON, and give it.

    Raises:
        BadInput: no such version, a missing column, or queries that are in the database.
        ArtefactError: the version or the codes are damaged.
    """
    folder, name = split_location(config.output)
    made_by = _name_inputs(config)
    if done := find_measured(folder, name, made_by):
        return done
    searcher = open_searcher(config.index, config.version, threads=config.resources.threads)
    queries = open_corpus(config.queries).read_all()
    wanted = np.empty(0, np.int64) if queries.labels is None else queries.labels
    if config.label_column and queries.labels is None:
        raise ConfigError("queries.label_column", None, "mAP needs the labels of the queries too")
    if has_model(searcher.manifest):
        QueryEncoder(config.index, searcher.manifest).check(config.queries, "queries")
    vectors_QD = embed_queries(config.index, searcher.manifest, queries.items)
    query_ids = queries.ids if config.queries.id_column else None
    measured: dict[str, Any] = {
        "version": searcher.manifest.version,
        "fingerprint": searcher.manifest.fingerprint,
        "database_size": searcher.rows,
        "query_size": len(queries),
        "bytes_per_item": searcher.manifest.bytes_per_item,
    }
    items = read_items(config.codes, searcher) if config.codes else None
    progress("evaluate", 0, 3, "mAP")
    labels = _read_labels(config, searcher.manifest) if config.label_column else None
    if labels is not None:
        ranked = rank_all(searcher, vectors_QD)
        measured["map_coded"] = evaluate_map(ranked, wanted, labels, top=config.top, query_ids=query_ids)
    progress("evaluate", 1, 3, "exact search")
    if items is not None:
        measured["quantization_error"] = quantization_error(items.vectors, items.decoded)
        if labels is not None:
            exact = _rank_items(vectors_QD, items, len(items.ids), searcher.manifest.metric)
            measured["map_float"] = evaluate_map(exact, wanted, labels, top=config.top, query_ids=query_ids)
        progress("evaluate", 2, 3, "recall by probes")
        truth = _rank_items(vectors_QD, items, min(10, len(items.ids)), searcher.manifest.metric)
        measured["recall_by_probes"] = _recall_by_probes(config, searcher, vectors_QD, truth)
        measured["recall_at_10_vs_exact"] = measured["recall_by_probes"][-1]["recall_at_10"]
    progress("evaluate", 3, 3, "done")
    folder.write_sealed(name, measured | {"config": hide_keys(config.model_dump(mode="json")), "made_by": made_by})
    return measured


def find_measured(folder: Folder, name: str, made_by: str) -> dict[str, Any] | None:
    """Give what was measured if these very inputs were, by the JSON file that says so."""
    if not folder.exists(name):
        return None
    try:
        found = folder.read_sealed(name)
    except ArtefactError:
        return None  # damaged by no crash of ours: it is measured again
    if not isinstance(found, dict) or found.get("made_by") != made_by:
        return None
    return {key: value for key, value in found.items() if key not in ("config", "made_by")}


def _name_inputs(config: EvaluateConfig) -> str:
    manifest = open_version(Folder(config.index), config.version)
    codes = open_card(Folder(config.codes), "codes", verify=False).made_by if config.codes else None
    decided = config.model_dump(mode="json", exclude={"index", "output", "resources"})
    files = [manifest.version, *(entry.sha256 for entry in manifest.files)]
    return fingerprint_config(decided, files, open_corpus(config.queries).fingerprint, codes)


def embed_queries(index: str, manifest: Manifest, items: NDArray[Any]) -> FloatArray:
    """Give query vectors: through the version's encoder if it has one, as they are if not.

    Shapes: items (Q, ...) -> (Q, D) float32.
    """
    if has_model(manifest):
        return QueryEncoder(index, manifest).embed(items)
    return check_queries(items, manifest.dim, manifest.metric)


def rank_all(searcher: LocalSearcher, queries_QD: FloatArray) -> Hits:
    """Rank the whole database for each query by its codes.

    Shapes: (Q, D) -> (Q, N).
    """
    return searcher.find(queries_QD, Effort(searcher.rows, searcher.codebook.lists, 1))


def read_items(codes: str, searcher: LocalSearcher) -> Items:
    """Read the vectors kept with the codes, and what the codes decode to.

    Raises:
        ConfigError: the codes were encoded without keeping vectors.
        ArtefactError: they are damaged, or of another codebook than the version's.
    """
    folder, codebook = Folder(codes), searcher.codebook
    card = open_card(folder, "codes")
    tables = [read_codes(folder, shard["name"], codebook) for shard in card.facts["shards"]]
    if any(table.vectors is None for table in tables):
        raise ConfigError("codes", codes, "they hold no vectors; encode with keep_vectors=true")
    ids = np.concatenate([table.ids for table in tables])
    order = np.argsort(ids)
    vectors = np.concatenate([table.vectors for table in tables]).astype(np.float32)
    decoded = [codebook.decode(table.cells, codebook.unpack(table.codes)) for table in tables]
    return Items(ids[order], vectors[order], np.concatenate(decoded)[order])


def _rank_items(queries_QD: FloatArray, items: Items, k: int, metric: str) -> Hits:
    rows = rank_exact(queries_QD, items.vectors, k, metric)
    return Hits(items.ids[rows.ids], rows.distances, 1, 1)


def _read_labels(config: EvaluateConfig, manifest: Manifest) -> tuple[IdArray, IdArray]:
    folder, parts = version_folder(Folder(config.index), manifest.version), []
    names = read_schema(folder, manifest).names if manifest.shards[0].payload else []
    for shard in manifest.shards:
        if shard.payload is None or config.label_column not in names:
            known = ", ".join(names) or "no columns"
            raise ConfigError("label_column", config.label_column, f"the payload of {manifest.version} has {known}")
        with folder.held(shard.payload) as path:
            parts.append(pq.read_table(path, columns=["id", config.label_column]))
    ids = np.concatenate([part["id"].to_numpy() for part in parts])
    labels = np.concatenate([part[config.label_column].to_numpy() for part in parts])
    order = np.argsort(ids)
    return ids[order], labels[order].astype(np.int64)


def _recall_by_probes(
    config: EvaluateConfig, searcher: LocalSearcher, queries_QD: FloatArray, truth: Hits
) -> list[dict[str, Any]]:
    rows = []
    for probes in sorted({min(probes, searcher.codebook.lists) for probes in config.probes}):
        found = searcher.find(queries_QD, Effort(10, probes, 1))
        recall = recall_at(found.ids, truth.ids, 10)
        rows.append(
            {"probes": probes, "recall_at_10": recall, "latency_ms": _time_single(searcher, queries_QD, probes)}
        )
    return rows


def _time_single(searcher: LocalSearcher, queries_QD: FloatArray, probes: int) -> float:
    spent = []
    for query in queries_QD[:_TIMED_QUERIES]:
        start = time.perf_counter()
        searcher.find(query[None], Effort(10, probes, 1))
        spent.append(time.perf_counter() - start)
    return float(np.median(spent)) * 1e3
