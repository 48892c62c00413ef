"""The tune stage: what it takes to find a share of the true neighbours, measured on queries held out.

Every reasonable number of probes, and of candidates for each hit where the version keeps vectors, is tried with the
version's own shards in this process. What no other setting beats in both recall and time is the curve; it is kept in
the manifest, so that a query may say `recall=0.95` instead of `probes=37`, and some queries are left with their true
neighbours for services to measure themselves by. True neighbours are found by comparing with all vectors, read from the
corpus or from those that the version keeps, so many at a time. With an `output`, a curve that is there is kept.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gsl_dist.cluster.evaluate import embed_queries, find_measured
from gsl_dist.cluster.session import Progress, stay_quiet
from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.config import Location, Resources, Strict, fingerprint_config, hide_keys
from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import ConfigError
from gsl_dist.evaluate import rank_exact, recall_at
from gsl_dist.hits import Effort, Hits, merge_topk
from gsl_dist.index.manifest import Point, note_points, open_version
from gsl_dist.index.sample import Sample, keep_sample
from gsl_dist.index.search import MAX_K, LocalSearcher, open_searcher
from gsl_dist.storage import Folder, split_location

_CHUNK_ROWS = 65_536
_REFINES = (1, 2, 4, 8, 16, 32)
_ENOUGH = 0.9995
_TIMED_QUERIES = 200
_SAMPLE_QUERIES, _SAMPLE_K = 200, 10


class TuneConfig(Strict):
    """Measures the recall and latency of a version, and keeps the curve in its manifest."""

    index: Location = Field(description="the index folder")
    version: str | None = Field(default=None, description="None: the promoted one")
    queries: CorpusConfig = Field(description="queries held out, not in the index")
    corpus: CorpusConfig | None = Field(
        default=None, description="what was indexed, to find true neighbours; None: the vectors that the version keeps"
    )
    k: tuple[int, ...] = Field(default=(10,), min_length=1, description="neighbours; a query takes the next larger k")
    target: float = Field(default=0.95, gt=0, le=1, description="the recall whose setting is shown")
    sample_queries: int = Field(default=1000, ge=1, description="queries to measure with, at most")
    output: Location | None = Field(default=None, description="a JSON file for the whole curve; None: manifest alone")
    resources: Resources = Resources()


def run_tune(config: TuneConfig, progress: Progress = stay_quiet) -> dict[str, Any]:
    """Measure, keep the curve in the manifest, and give it with the setting that reaches the target.

    Raises:
        BadInput: no such version, or queries of another shape than its vectors.
        ConfigError: there are no vectors to find true neighbours among.
    """
    made_by = _name_inputs(config)
    if done := _find_kept(config, made_by):
        return done
    searcher = open_searcher(config.index, config.version, threads=config.resources.threads)
    queries_QD = _read_queries(config, searcher)
    progress("tune", 0, 1, "true neighbours")
    found = find_truth(config, searcher, queries_QD)
    truth = found.ids
    few = slice(0, _SAMPLE_QUERIES)
    kept = replace(found, ids=found.ids[few, :_SAMPLE_K], distances=found.distances[few, :_SAMPLE_K])
    keep_sample(Folder(config.index), searcher.manifest.version, Sample(queries_QD[few], kept))
    points = [point for k in sorted(set(config.k)) for point in measure_curve(searcher, queries_QD, truth, k, progress)]
    manifest = note_points(Folder(config.index), searcher.manifest, points)
    shown = {"version": manifest.version, "queries": len(queries_QD), "target": config.target}
    curve = [point.model_dump() for point in points]
    if config.output:
        folder, name = split_location(config.output)
        dumped = hide_keys(config.model_dump(mode="json"))
        folder.write_sealed(name, shown | {"points": curve, "config": dumped, "made_by": made_by})
    return shown | _choose(config, points) | {"points": curve}


def _name_inputs(config: TuneConfig) -> str:
    manifest = open_version(Folder(config.index), config.version)
    decided = config.model_dump(mode="json", exclude={"index", "output", "resources"})
    files = [manifest.version, *(entry.sha256 for entry in manifest.files)]
    corpora = [open_corpus(corpus).fingerprint for corpus in (config.queries, config.corpus) if corpus]
    return fingerprint_config(decided, files, corpora)


def _find_kept(config: TuneConfig, made_by: str) -> dict[str, Any] | None:
    """Give the curve if it was measured of these very inputs, and is the one in the manifest."""
    if config.output is None:
        return None
    found = find_measured(*split_location(config.output), made_by)
    kept = open_version(Folder(config.index), config.version).points
    if found is None or found["points"] != [point.model_dump() for point in kept]:
        return None
    return found | _choose(config, kept)


def find_truth(config: TuneConfig, searcher: LocalSearcher, queries_QD: FloatArray) -> Hits:
    """Give the true nearest neighbours of each query (Q, k); of distances, smaller is nearer.

    Raises:
        ConfigError: the version keeps no vectors, and no corpus is given.
    """
    k, metric = min(max(config.k), searcher.rows), searcher.manifest.metric
    best: Hits | None = None
    for ids_N, x_ND in _read_vectors(config, searcher):
        found = rank_exact(queries_QD, x_ND, min(k, len(x_ND)), metric)
        hits = Hits(ids_N[found.ids], found.distances, 1, 1)
        best = merge_topk([best, hits], k) if best else hits
    assert best is not None, "an index has rows"
    return best


def measure_curve(
    searcher: LocalSearcher, queries_QD: FloatArray, truth_Qk: IdArray, k: int, progress: Progress = stay_quiet
) -> list[Point]:
    """Give the settings that no other beats in both recall and time, the fastest first."""
    measured: list[Point] = []
    refines = [1] if not searcher.stores else [refine for refine in _REFINES if refine * k <= MAX_K]
    for refine in refines:
        for probes in list_probes(searcher.codebook.lists):
            point = _measure(searcher, queries_QD, truth_Qk, Effort(k, probes, refine))
            remark = f"k {k} probes {probes} refine {refine}: {point.recall:.3f}"
            progress("tune", len(measured), len(measured) + 1, remark)
            gained = point.recall - measured[-1].recall if probes > 1 else 1.0
            measured.append(point)
            if point.recall >= _ENOUGH or (gained < 1e-4 and probes * 4 > searcher.codebook.lists):
                break
    return keep_best(measured)


def list_probes(lists: int) -> list[int]:
    """Give numbers of lists to try, each about 1.4 times the one before."""
    steps = np.unique(np.round(np.sqrt(2) ** np.arange(2 * np.log2(lists) + 1)).astype(int))
    return sorted({int(step) for step in steps if step < lists} | {lists})


def keep_best(points: list[Point]) -> list[Point]:
    """Give the points that are not both slower and no better than another, the fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.latency_ms, -point.recall)):
        if not kept or point.recall > kept[-1].recall:
            kept.append(point)
    return kept


def _measure(searcher: LocalSearcher, queries_QD: FloatArray, truth_Qk: IdArray, effort: Effort) -> Point:
    found = searcher.find(queries_QD, effort)
    wanted = truth_Qk[:, : effort.k]
    assert effort.probes is not None and effort.refine is not None, "both are tried"
    return Point(
        k=effort.k,
        recall=recall_at(found.ids, wanted, effort.k),
        probes=effort.probes,
        refine=effort.refine,
        latency_ms=_time_one(searcher, queries_QD, effort),
    )


def _time_one(searcher: LocalSearcher, queries_QD: FloatArray, effort: Effort) -> float:
    spent = []
    for query in queries_QD[:_TIMED_QUERIES]:
        start = time.perf_counter()
        searcher.find(query[None], effort)
        spent.append(time.perf_counter() - start)
    return float(np.median(spent)) * 1e3


def _read_queries(config: TuneConfig, searcher: LocalSearcher) -> FloatArray:
    queries = open_corpus(config.queries)
    batch = queries.take(np.arange(min(queries.rows, config.sample_queries)))
    return embed_queries(config.index, searcher.manifest, batch.items)


def _read_vectors(config: TuneConfig, searcher: LocalSearcher) -> Iterator[tuple[IdArray, NDArray[np.float32]]]:
    if config.corpus is not None:
        corpus = open_corpus(config.corpus)
        for batch in corpus.read(0, corpus.rows, batch_rows=_CHUNK_ROWS):
            if len(batch):
                yield batch.ids, embed_queries(config.index, searcher.manifest, batch.items)
        return
    if not searcher.stores:
        allowed = f"version {searcher.manifest.version} keeps no vectors: give the corpus that it was made of"
        raise ConfigError("corpus", None, allowed)
    for store in searcher.stores:
        for start in range(0, len(store.ids_N), _CHUNK_ROWS):
            rows_n = np.arange(start, min(start + _CHUNK_ROWS, len(store.ids_N)))
            yield store.ids_N[rows_n], store.read(rows_n)


def _choose(config: TuneConfig, points: list[Point]) -> dict[str, Any]:
    """Give the setting that reaches the target at the smallest k, or the best there is."""
    own = [point for point in points if point.k == min(config.k)]
    reaching = [point for point in own if point.recall >= config.target]
    chosen = min(reaching, key=lambda p: p.latency_ms) if reaching else max(own, key=lambda p: p.recall)
    return {"reached": bool(reaching), **chosen.model_dump()}
