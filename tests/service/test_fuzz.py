"""Whatever is sent, the service answers: it refuses by name, and neither fails nor hangs."""

import io

import httpx
import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn")
from fleets import World
from mutants import JSON, Asked, Sender, attack, list_requests
from worlds import make_index, make_queries

from gsl_dist.service.reading import ARROW_TYPE, Limits

ROWS = 400
PAYLOAD = pa.table(
    {
        "label": np.arange(ROWS) % 7,
        "title": [f"title {row}" if row % 5 else None for row in range(ROWS)],
        "when": pa.array(np.arange(ROWS), pa.timestamp("s")),
        "tags": pa.array([[1, row] for row in range(ROWS)]),
        "price": np.arange(ROWS) / 3,
        "sold": np.arange(ROWS) % 2 == 0,
    }
)


@pytest.fixture
def world(tmp_path):
    make_index(tmp_path, payload=PAYLOAD, vectors="float16")
    world = World(tmp_path, limits=Limits(batch=64, body_bytes=1 << 20))
    yield world
    world.stop()


def write_stream(table, **how):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**how)) as stream:
        stream.write_table(table)
    return sink.getvalue()


def test_valid_requests_of_every_route_are_answered(world):
    sender = Sender(world.url)
    statuses = {asked: sender.send(asked)[0] for asked in list_requests()}
    # All that is wrong with any of them: this service has no encoder, and runs no stages.
    wrong = {asked for asked, status in statuses.items() if status != 200}
    assert {asked.path for asked in wrong if not asked.body.startswith(b'{"items":')} == {"/v1/compact"}
    assert len(wrong) == 2
    assert {asked.path.partition("?")[0] for asked in statuses} == set(list_paths(world)) | {"/openapi.json"}


def list_paths(world):
    return httpx.get(f"{world.url}/openapi.json").json()["paths"]


def has_body(world, operation):
    return "requestBody" in list_paths(world)[operation.path][operation.method]


@pytest.mark.parametrize("seed", range(2))
def test_mutants_of_valid_requests_make_no_route_fail_or_hang(world, seed):
    statuses, failed = attack(world.url, 1000, seed)
    assert failed == [] and statuses[400] > 500 and statuses[200] > 50
    assert httpx.get(f"{world.url}/healthz").json()["status"] == "ok"


def test_what_the_page_describes_is_what_the_routes_do(world):
    schemathesis = pytest.importorskip("schemathesis")
    import hypothesis

    schema, seen = schemathesis.openapi.from_url(f"{world.url}/openapi.json"), set()
    schema.validate()
    # Which columns and dimension an index has, no page can say: what it allows may be refused.
    left_out = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:
            if mode == schemathesis.GenerationMode.NEGATIVE and not has_body(world, operation):
                continue

            @hypothesis.settings(
                max_examples=15,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                seen.add(
                    (case.operation.label, case.call_and_validate(excluded_checks=left_out, timeout=20).status_code)
                )

            ask()
    assert {label for label, status in seen if status < 400} >= {"GET /livez", "POST /v1/items/delete"}


def test_the_page_declares_what_it_says_of_tokens(world):
    page = httpx.get(f"{world.url}/openapi.json").json()
    named = {
        name for path in page["paths"].values() for route in path.values() for way in route["security"] for name in way
    }
    assert named == set(page["components"]["securitySchemes"]) == {"bearer"}


VECTORS = pa.array(make_queries(2).tolist(), pa.list_(pa.float32(), 16))


@pytest.mark.parametrize(
    "table, field",
    [
        (pa.table({"vector": VECTORS[:0]}), "vectors"),
        (pa.Table.from_arrays([VECTORS, VECTORS], ["vector", "vector"]), "body"),
        (pa.table({"vector": pa.array([[], []], pa.list_(pa.float32(), 0))}), "vectors"),
        (pa.table({"vector": pa.array([[1e300] * 16])}), "vectors"),
    ],
    ids=["no rows", "two columns", "no numbers", "too large"],
)
def test_odd_streams_are_refused_by_name(world, table, field):
    answer = world.post(write_stream(table), kind=ARROW_TYPE)
    assert (answer.status_code, answer.json()["field"]) == (400, field)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_few_bytes_cannot_stand_for_more_than_there_is_memory_for(world, codec):
    width = 1 << 20
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(width, np.float32)), width)
    body = write_stream(pa.table({"vector": zeros}), compression=codec)
    answer = world.post(body, kind=ARROW_TYPE)
    assert len(body) < 100_000 and answer.status_code == 400 and "not compressed" in answer.json()["message"]


def test_columns_whose_values_cannot_be_told_apart_are_no_groups(world):
    body = {"vectors": make_queries(1).tolist(), "k": 3, "group_by": "tags"}
    answer = world.post(body)
    assert (answer.status_code, answer.json()["field"]) == (400, "group_by")


def test_a_filter_as_deep_as_json_allows_is_refused(world):
    where = '{"$not":' * 900 + '{"label":1}' + "}" * 900
    body = f'{{"vectors":{make_queries(1).tolist()},"where":{where}}}'
    status, _ = Sender(world.url).send(Asked("POST", "/v1/search", JSON, body.encode()))
    assert status == 400
