"""What a service counts of itself, as Prometheus reads it at `/metrics`."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gsl_dist.index.manifest import Manifest
from gsl_dist.index.overlay import Overlay
from gsl_dist.service.traces import Tracer

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_STAGES = ("read", "queue", "coarse", "fanout", "merge", "request")


class Meters:
    """The figures of one router: rates, latencies by stage, failures, what is served and how well.

    Args:
        tracer: makes spans of stages; None: nobody does.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("gsl_requests", "Requests answered.", ["route", "status"], registry=own)
        self.queries = Counter("gsl_queries", "Vectors searched for.", registry=own)
        self.open = Gauge("gsl_requests_open", "Requests being answered.", registry=own)
        self.partial = Counter("gsl_partial_answers", "Answers that shards were missing from.", registry=own)
        self.hedges = Gauge("gsl_hedged_questions", "Questions that a second copy was asked as well.", registry=own)
        stage = "Seconds by stage: read, queue, coarse, fanout, merge of a search; request is the whole."
        self._seconds = Histogram("gsl_stage_seconds", stage, ["stage"], buckets=_SECONDS, registry=own)
        self._stages = {name: self._seconds.labels(name) for name in _STAGES}
        self.version = Gauge("gsl_version", "1 for the version that is served.", ["version"], registry=own)
        self.shards = Gauge("gsl_shards", "Shards of the version that is served.", registry=own)
        self.rows = Gauge("gsl_rows", "Rows of the version that is served.", registry=own)
        self.replicas = Gauge("gsl_replicas", "Replicas of the version that is served.", ["state"], registry=own)
        self.new_rows = Gauge("gsl_new_rows", "Rows written over the version.", registry=own)
        self.hidden_rows = Gauge("gsl_hidden_rows", "Rows of the version deleted or replaced since.", registry=own)
        self.log_seq = Gauge("gsl_log_seq", "The last commit of the write log that queries see.", registry=own)
        self.recall = Gauge("gsl_recall", "Share of true neighbours found for queries held out.", ["k"], registry=own)

    def note(self, stage: str, start: float) -> float:
        """Note how long a stage took since a time of `perf_counter`, and give the time now."""
        now = time.perf_counter()
        self._stages[stage].observe(now - start)
        if self.tracer is not None and stage != "request":
            self.tracer.note(stage, now - start)
        return now

    def tell_version(self, manifest: Manifest) -> None:
        """Tell which version is served from now on."""
        self.version.clear()
        self.version.labels(manifest.version).set(1)
        self.shards.set(len(manifest.shards))
        self.rows.set(manifest.rows)

    def tell_writes(self, overlay: Overlay) -> None:
        """Tell what lies over the version."""
        self.new_rows.set(overlay.rows)
        self.hidden_rows.set(len(overlay.hidden))
        self.log_seq.set(overlay.seq)

    def expose(self) -> bytes:
        """Give all figures in the text format of Prometheus."""
        return bytes(generate_latest(self.registry))
