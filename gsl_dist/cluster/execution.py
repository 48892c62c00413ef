"""Which way an encoder is computed while a corpus is encoded: by torch, or as a graph by ONNX Runtime, float32 or int8.

Ways differ in speed, by the network and by the machine, and in the last digits, or in int8 some more. So one is decided
on for all shards of a folder, by the driver, before the first of them: it is timed on rows of the corpus, and what it
gives is compared with what torch gives. The decision lies beside the shards, with the graph; every worker does as it
says, and so does a relaunch. This module does not know how shards are made.
"""

# Shapes: N items, D dims of a representation

from __future__ import annotations

import functools
import logging
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from gsl_dist.cluster.graph import FIELD, GraphEncoder, check_installed, export_graph, name_runtime, quantize_graph
from gsl_dist.cluster.model import load_encoder, tell_path
from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict, fingerprint_config
from gsl_dist.data import Corpus
from gsl_dist.encoders import Encoder
from gsl_dist.errors import ArtefactError, ConfigError, DataError
from gsl_dist.fit import embed
from gsl_dist.quantizers import open_quantizer
from gsl_dist.quantizers.base import decode
from gsl_dist.storage import FileEntry, Folder

logger = logging.getLogger(__name__)

Execution = Literal["torch", "onnx", "int8", "fastest"]
GRAPH, NOTE = "encoder.onnx", "execution.json"
SAMPLE_ROWS = 512
"""Rows of the corpus, evenly spread, by which ranges are measured and ways are compared."""
MOST_NOISE = 0.1
"""What int8 may add to the squared error of codes for `fastest` to take it, as a share of that error."""
_WORTH = 1.1  # times as fast as torch, for another way to be taken
_ROUNDS = 5
_TINY = 1e-12


@dataclass(frozen=True)
class Asked:
    """What a config says of it.

    Args:
        execution: the way, or that the fastest is sought.
        model: the model folder.
        threads: of one worker.
        made_by: the hash of the settings and inputs of the shards.
    """

    execution: Execution
    model: str
    threads: int
    made_by: str


class Way(Strict):
    """How fast one way was, and how near to what torch gives.

    Args:
        rows_per_s: with the threads of a worker, the best of some rounds; with one thread, of the time that it had, so
            that what else the machine does decides nothing.
        cosine: mean cosine of its vectors with those of torch.
        noise: mean squared distance between them, as a share of that between vectors and their codes.
        equal_codes: share of the bytes of codes that are the same.
    """

    rows_per_s: float
    cosine: float
    noise: float
    equal_codes: float


class Decision(Strict):
    """The way that all shards of a folder go.

    Args:
        made_by: the hash of the settings and inputs that it was decided for.
        asked: what the config says.
        path: what was decided.
        graph: the file of the graph; None for torch.
        runtime: what computes it, with its version.
        machine: where ways were measured.
        ways: what was measured, by path.
    """

    made_by: str
    asked: Execution
    path: Literal["torch", "onnx", "int8"]
    graph: FileEntry | None = None
    runtime: str = "torch"
    machine: str = ""
    ways: dict[str, Way] = {}

    @property
    def mark(self) -> str:
        """Give a hash of all that decides the bytes of shards."""
        return fingerprint_config(self.made_by, self.path, self.runtime, self.graph and self.graph.sha256)


def check_execution(execution: Execution, model: str | None, gpus: float) -> None:
    """See to it that there is a choice.

    Raises:
        ConfigError: there is no encoder, or it is computed on a GPU.
    """
    if execution == "torch":
        return
    if model is None:
        raise ConfigError(FIELD, execution, "without a model nothing is computed: leave it out")
    if gpus:
        allowed = "graphs are computed on the CPU: set resources.gpus to 0, or leave it at torch"
        raise ConfigError(FIELD, execution, allowed)


def settle_execution(folder: Folder, asked: Asked, corpus: Corpus, codebook: Codebook) -> Decision:
    """Give the way that the shards of a folder go: as decided earlier for the same settings, or now.

    Raises:
        ConfigError: what makes or computes graphs is not installed, or the encoder cannot be written as one.
        DataError: no row of the corpus can be read.
    """
    if known := _find_decision(folder, asked.made_by):
        return known
    check_installed()
    encoder, _ = load_encoder(asked.model)
    items = _read_sample(corpus)
    with _use_threads(asked.threads):
        contents = _make_graphs(encoder, items, asked.execution)
        graphs = {path: GraphEncoder(content, asked.threads) for path, content in contents.items()}
        clock = time.process_time if asked.threads == 1 else time.perf_counter
        ways = _measure_ways(encoder, graphs, items, codebook, clock)
    path = _choose(ways) if asked.execution == "fastest" else asked.execution
    graph = None
    if path != "torch":
        folder.write_bytes(GRAPH, contents[path])
        graph = folder.pin(GRAPH)
    decided = Decision(
        made_by=asked.made_by,
        asked=asked.execution,
        path=path,
        graph=graph,
        runtime=name_runtime() if graph else "torch",
        machine=f"{platform.machine()}, {asked.threads} thread(s)",
        ways=ways,
    )
    folder.write_sealed(NOTE, decided.model_dump(mode="json"))
    logger.info("encoding by %s; rows a second: %s", path, {name: round(way.rows_per_s) for name, way in ways.items()})
    if decided.ways[path].noise > MOST_NOISE:
        noise = f"{decided.ways[path].noise:.2f} of what codes lose"
        logger.warning("%s is far from float32: it adds %s to the squared error", path, noise)
    return decided


def open_encoder(folder: Folder, decided: Decision, threads: int) -> GraphEncoder:
    """Give what computes the graph that was decided on.

    Raises:
        ConfigError: ONNX Runtime is not installed here, or is another one than the driver has.
        ArtefactError: the graph is damaged.
    """
    assert decided.graph is not None, "torch needs no graph"
    if name_runtime() != decided.runtime:
        raise ConfigError(
            FIELD, decided.path, f"this worker has {name_runtime()}, it was decided for {decided.runtime}"
        )
    folder.check(decided.graph)
    return GraphEncoder(folder.read_bytes(GRAPH), threads, folder.path(GRAPH))


def tell_execution(decided: Decision | None, model: str) -> str:
    """Tell how an encoder was computed, from its file on."""
    weights = tell_path(model)
    if decided is None or decided.path == "torch":
        return weights
    computed = {"onnx": "float32", "int8": "int8, normalizations and the last layer float32"}[decided.path]
    return f"{computed}, by {decided.runtime}" + ("" if weights == "float32" else f"; {weights}")


def _find_decision(folder: Folder, made_by: str) -> Decision | None:
    """Give what was decided for these settings, if its graph is there as it was then."""
    if not folder.exists(NOTE):
        return None
    try:
        decided = Decision.model_validate(folder.read_sealed(NOTE))
        if decided.graph:
            folder.check(decided.graph)
    except (ValidationError, ArtefactError):
        return None
    return decided if decided.made_by == made_by else None


def _read_sample(corpus: Corpus) -> Tensor:
    rows = np.unique(np.linspace(0, corpus.rows - 1, min(corpus.rows, SAMPLE_ROWS)).astype(np.int64))
    items = torch.from_numpy(corpus.take(rows).items)
    if not len(items):
        raise DataError("corpus", f"{len(rows)} rows", f"none can be read, and {FIELD} is measured by some")
    # Two at the least: of one row, what writes graphs takes the count for a constant.
    return items if len(items) > 1 else torch.cat([items, items])


def _make_graphs(encoder: Encoder, items: Tensor, execution: Execution) -> dict[str, bytes]:
    """Give the graphs that are asked for; where the fastest is sought, those that there can be."""
    graphs: dict[str, bytes] = {}
    try:
        graphs["onnx"] = export_graph(encoder, items)
        if execution != "onnx":
            graphs["int8"] = quantize_graph(graphs["onnx"], items)
    except ConfigError as error:
        if execution != "fastest":
            raise
        logger.info("not all ways were tried: %s", error)
    return graphs if execution == "fastest" else {execution: graphs[execution]}


def _measure_ways(
    encoder: Encoder, graphs: dict[str, GraphEncoder], items: Tensor, codebook: Codebook, clock: Callable[[], float]
) -> dict[str, Way]:
    """Time torch and each graph turn by turn, and compare what they give."""
    computed = {"torch": functools.partial(embed, encoder, items)}
    computed |= {path: functools.partial(embed, graph, items) for path, graph in graphs.items()}
    given = {path: compute() for path, compute in computed.items()}
    best = dict.fromkeys(computed, float("inf"))
    for _ in range(_ROUNDS):
        for path, compute in computed.items():
            start = clock()
            compute()
            best[path] = min(best[path], clock() - start)
    return {path: _compare(given["torch"], y_ND, codebook, len(items) / best[path]) for path, y_ND in given.items()}


def _compare(y_ND: Tensor, other_ND: Tensor, codebook: Codebook, rows_per_s: float) -> Way:
    quantizer = open_quantizer(codebook)
    (lists_N, codes_NM), (others_N, other_codes_NM) = (quantizer.encode(x, codebook) for x in (y_ND, other_ND))
    lost = float((y_ND - decode(lists_N, codes_NM, codebook)).square().sum(1).mean())
    same_NM = (codes_NM == other_codes_NM) & (lists_N == others_N)[:, None]
    return Way(
        rows_per_s=rows_per_s,
        cosine=float(F.cosine_similarity(y_ND, other_ND).mean()),
        noise=float((y_ND - other_ND).square().sum(1).mean()) / max(lost, _TINY),
        equal_codes=float(same_NM.float().mean()),
    )


def _choose(ways: dict[str, Way]) -> Literal["torch", "onnx", "int8"]:
    near = {path: way for path, way in ways.items() if way.noise <= MOST_NOISE}
    best = max(near, key=lambda path: near[path].rows_per_s)
    worth = ways[best].rows_per_s >= _WORTH * ways["torch"].rows_per_s
    if best == "torch" or not worth:
        return "torch"
    return "int8" if best == "int8" else "onnx"


@contextmanager
def _use_threads(threads: int) -> Iterator[None]:
    """Compute with as many threads as a worker has, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
