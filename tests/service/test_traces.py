"""Spans tell where the time of a request went."""

import httpx
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("opentelemetry.sdk")
from fleets import World
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from worlds import make_index, make_queries

from gsl_dist.service.traces import Tracer


def test_a_request_is_a_span_of_its_callers_trace_and_its_stages_lie_in_it(tmp_path):
    make_index(tmp_path)
    world, kept, provider = World(tmp_path), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    world.router.meters.tracer = Tracer(provider.get_tracer("test"))
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {"vectors": make_queries(2).tolist(), "k": 3}
    headers = {"traceparent": f"00-{trace}-{parent}-01"}
    assert httpx.post(f"{world.url}/v1/search", json=body, headers=headers).status_code == 200
    spans = {span.name: span for span in kept.get_finished_spans()}
    whole = spans["/v1/search"]
    assert f"{whole.context.trace_id:032x}" == trace and f"{whole.parent.span_id:016x}" == parent
    assert whole.attributes["http.response.status_code"] == 200
    for stage in ("read", "coarse", "fanout", "merge"):
        assert spans[stage].parent.span_id == whole.context.span_id
        assert whole.start_time - 1_000_000 <= spans[stage].start_time <= spans[stage].end_time <= whole.end_time
    world.stop()
