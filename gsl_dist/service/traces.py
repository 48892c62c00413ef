"""Spans of requests and of their stages, for whoever collects them by OpenTelemetry; only if asked for.

A stage is told when it has ended, with the time at which it began, so that a service without a tracer pays nothing.
Whoever calls with a `traceparent` sees its request as part of their own trace.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from gsl_dist.errors import ConfigError

_NAME = "gsl_dist"


class Tracer:
    """Makes spans.

    Args:
        tracer: OpenTelemetry's.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer

    @contextlib.contextmanager
    def trace(self, route: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """Hold a span while a request is answered."""
        from opentelemetry.propagate import extract

        with self._tracer.start_as_current_span(route, context=extract(dict(headers))) as span:
            yield span

    def note(self, stage: str, seconds: float) -> None:
        """Make a span of a stage that has just ended."""
        end = time.time_ns()
        self._tracer.start_span(stage, start_time=end - int(seconds * 1e9)).end(end)


def open_tracer(endpoint: str) -> Tracer:
    """Give a tracer that sends spans to an endpoint.

    Raises:
        ConfigError: what sends them is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("traces", endpoint, "this needs pip install 'gsl_dist[traces]'") from None
    provider = TracerProvider(resource=Resource.create({"service.name": _NAME}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracer(provider.get_tracer(_NAME))
