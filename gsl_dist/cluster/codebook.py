"""The codebook stage: the one global codebook that every shard of a version shares.

`source: trained` takes the codebook that the network landed on, bit for bit. `source: fitted` trains one: workers
embed their slice of a bounded sample and send statistics to the coordinator; nobody sees the whole corpus, and the
driver sees no row. With `ranked`, one worker then teaches the codewords to rank true neighbours first, on a smaller
sample: for embeddings that somebody's model gave. `ranked.scores: tables` makes it a composite codebook, whose codes
add up and are searched as fast as product codes.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import ray
import torch
from pydantic import Field, model_validator

from gsl_dist.artefact import CODEBOOK, Card, find_finished, open_card, publish_card
from gsl_dist.artefact import load_codebook as load_codebook
from gsl_dist.cluster.coordinator import Agenda, Seat, check_rows, start_coordinator
from gsl_dist.cluster.model import check_modalities, load_encoder, load_trained_codebook, pick_device
from gsl_dist.cluster.session import Progress, own_errors, start_session, stay_quiet, watch_remarks
from gsl_dist.codebook import WITHOUT_PRODUCTS, Codebook
from gsl_dist.config import Location, Resources, Strict, fingerprint_config
from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import ConfigError, DataError
from gsl_dist.fit import embed
from gsl_dist.quantizers import LloydConfig, QuantizerConfig, Rows, Trained, make_quantizer
from gsl_dist.quantizers.coordinate import Turn
from gsl_dist.ranked import Gain, RankedConfig, earn_ranked
from gsl_dist.storage import Folder

_READ_ROWS = 8192


class CodebookConfig(Strict):
    """Gives the codebook of an index: the network's own, or one fitted to a corpus."""

    output: Location = Field(description="the codebook folder to make")
    source: Literal["trained", "fitted"] = Field(
        default="trained", description="the codebook that the network landed on, or one fitted to a corpus"
    )
    model: Location | None = Field(default=None, description="the model folder; None: the corpus holds vectors")
    corpus: CorpusConfig | None = Field(default=None, description="what to fit to, for `fitted`")
    quantizer: QuantizerConfig | None = Field(default=None, description="the shape, for `fitted`")
    metric: Literal["l2", "ip", "cosine"] = Field(
        default="l2",
        description="what nearest means, for `fitted`: distance, inner product, or cosine of vectors of length 1",
    )
    lloyd: LloydConfig = LloydConfig()
    ranked: RankedConfig | None = Field(default=None, description="teach a fitted codebook to rank; None: leave it")
    seed: int = Field(default=0, ge=0, description="of everything drawn")
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _has_source(self) -> CodebookConfig:
        if self.source == "trained" and (self.model is None or self.corpus or self.quantizer):
            raise ValueError("source: trained takes a model, and neither corpus nor quantizer")
        if self.source == "trained" and self.ranked:
            raise ValueError("source: trained is the codebook that the network landed on; ranked is for fitted")
        if self.source == "fitted" and (self.corpus is None or self.quantizer is None):
            raise ValueError("source: fitted takes a corpus and a quantizer")
        if self.source == "trained" and self.metric != "l2":
            raise ValueError("source: trained lands by distances; metric is for fitted")
        if self.metric == "ip" and self.ranked:
            raise ValueError("ranked learns which rows are near; with metric: ip there is no such thing")
        if self.metric == "ip" and self.quantizer and self.quantizer.kind in WITHOUT_PRODUCTS:
            raise ValueError(
                f"metric: ip is nothing that quantizer.kind: {self.quantizer.kind} can measure, but cosine"
            )
        if self.ranked and self.quantizer and self.quantizer.kind == "rabitq":
            raise ValueError("ranked teaches codewords, and quantizer.kind: rabitq has none that could learn")
        if self.ranked and self.ranked.scores == "tables" and self.quantizer and _codes_residuals(self.quantizer):
            raise ValueError("ranked.scores: tables needs codes of whole vectors: quantizer.residual must be false")
        return self


def _codes_residuals(quantizer: QuantizerConfig) -> bool:
    return quantizer.residual and quantizer.cells > 1


def run_codebook(config: CodebookConfig, progress: Progress = stay_quiet) -> Card:
    """Make the codebook folder that a config describes.

    Raises:
        ConfigError, DataError: settings or corpus cannot be used.
        ArtefactError: the model is damaged, or has no codebook of its own.
    """
    folder = Folder(config.output)
    inputs = [open_corpus(config.corpus).fingerprint] if config.corpus else []
    inputs += [open_card(Folder(config.model), "model").made_by] if config.model else []
    decided = config.model_dump(mode="json", exclude={"output", "resources"})
    if config.metric == "l2":
        del decided["metric"]  # folders made before there were others stay finished
    made_by = fingerprint_config(decided, inputs)
    if done := find_finished(folder, "codebook", made_by):
        return done
    facts: dict[str, Any] = {}
    if config.source == "trained":
        codebook = load_trained_codebook(str(config.model))
    else:
        codebook, facts = _fit(config, progress)
    codebook.save(folder, CODEBOOK)
    facts |= {"codebook_fingerprint": codebook.fingerprint, "source": config.source}
    dumped = json.loads(config.model_dump_json())
    return publish_card(
        folder, Card(kind="codebook", made_by=made_by, files=[folder.pin(CODEBOOK)], config=dumped, facts=facts)
    )


def check_lengths(x_ND: torch.Tensor, metric: str) -> None:
    """Let vectors pass if a metric can measure them: the cosine wants length 1.

    Raises:
        DataError: one has another length.
    """
    if metric != "cosine":
        return
    lengths_N = x_ND.norm(dim=1)
    if not torch.allclose(lengths_N, torch.ones_like(lengths_N), atol=1e-3):
        length = float(lengths_N[(lengths_N - 1).abs().argmax()])
        allowed = "the metric is cosine, which wants length 1: set corpus.normalize=true, or scale them before"
        raise DataError("vectors", f"one of length {length:.4g}", allowed)


def _fit(config: CodebookConfig, progress: Progress) -> tuple[Codebook, dict[str, Any]]:
    assert config.corpus is not None and config.quantizer is not None
    corpus = open_corpus(config.corpus)
    if config.model is None and corpus.kind != "vectors":
        raise ConfigError("model", None, "a corpus of images needs a model that turns them into vectors")
    dim = corpus.item_shape[0]
    if config.model:
        encoder, card = load_encoder(config.model)
        check_modalities(card, encoder, config.corpus)
        dim = encoder.dim
    check_rows(corpus.rows, config.lloyd, make_quantizer(config.quantizer, dim))
    start_session(config.resources.workers * config.resources.cpus)
    workers = config.resources.workers
    agenda = Agenda(config.quantizer, dim, config.lloyd, config.seed)
    with own_errors():
        coordinator, attempt = start_coordinator(), uuid.uuid4().hex
        work = ray.remote(num_cpus=config.resources.cpus, num_gpus=config.resources.gpus)(_take_part)
        parts = [work.remote(config, agenda, Seat(coordinator, attempt, rank, workers)) for rank in range(workers)]
        progress("codebook", 0, 1, f"{workers} workers")
        with watch_remarks(coordinator, lambda remark: _draw_turn(remark, progress)):
            trained = ray.get(parts)[0]
        progress("codebook", 1, 1, f"quantization error {trained.relative_error:.3f}")
        codebook, facts = trained.codebook, {"relative_error": trained.relative_error}
        if config.ranked:
            teach = ray.remote(num_cpus=config.resources.cpus, num_gpus=config.resources.gpus)(_teach)
            progress("ranked", 0, 1, f"mining {config.ranked.neighbours} neighbours a row")
            gain = ray.get(teach.remote(config, codebook))
            progress("ranked", 1, 1, f"recall@10 {gain.before:.3f} before, {gain.after:.3f} after")
            codebook, facts["ranked_recall"] = gain.codebook, {"before": gain.before, "after": gain.after}
    return replace(codebook, metric=config.metric), facts


def _draw_turn(remark: tuple[str, Turn], progress: Progress) -> None:
    phase, turn = remark
    progress(phase, turn.number + 1, turn.of, f"quantization error {turn.error:.3f}" if turn.error else "")


def _take_part(config: CodebookConfig, agenda: Agenda, seat: Seat) -> Trained | None:
    """Train the codebook with the other workers; only the first gives it to the driver."""
    rows = _read_sample(config, seat.rank, seat.workers, config.lloyd.sample_rows)
    trained = seat.attend(0, agenda, rows, remark=True)
    return trained if seat.rank == 0 else None


def _teach(config: CodebookConfig, codebook: Codebook) -> Gain:
    assert config.ranked is not None
    rows = _read_sample(config, 0, 1, config.ranked.sample_rows + config.ranked.held_rows)
    return earn_ranked(rows.x_ND, codebook, config.ranked, seed=config.seed)


def _read_sample(config: CodebookConfig, rank: int, workers: int, rows: int) -> Rows:
    """Read and embed one worker's slice of a sample of the corpus; rows that were rejected leave their numbers free."""
    assert config.corpus is not None
    torch.set_num_threads(config.resources.threads)
    corpus = open_corpus(config.corpus)
    sample = np.unique(np.linspace(0, corpus.rows - 1, min(corpus.rows, rows)).astype(np.int64))
    bounds = np.linspace(0, len(sample), workers + 1).astype(int)
    start, stop = int(bounds[rank]), int(bounds[rank + 1])
    encoder = load_encoder(config.model)[0].to(pick_device(config.resources.gpus)) if config.model else None
    x_ND = torch.empty(stop - start, encoder.dim if encoder else corpus.item_shape[0])
    filled, rejected = 0, list[int]()
    for first in range(start, stop, _READ_ROWS):
        batch = corpus.take(sample[first : min(stop, first + _READ_ROWS)])
        items = torch.from_numpy(batch.items)
        x_ND[filled : filled + len(items)] = embed(encoder, items).cpu() if encoder else items
        check_lengths(x_ND[filled : filled + len(items)], config.metric)
        filled, rejected = filled + len(items), rejected + [reject.row for reject in batch.rejects]
    numbers_N = np.arange(start, stop)[~np.isin(sample[start:stop], rejected)]
    return Rows(x_ND[:filled], start, len(sample), numbers_N=numbers_N)
