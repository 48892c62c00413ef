"""The gRPC door gives the answers of the HTTP door."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("grpc")
import grpc
from fleets import World
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from mutants import attack_rpc
from worlds import make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.errors import ConfigError
from gsl_dist.service.access import make_token
from gsl_dist.service.reading import Limits
from gsl_dist.service.rpc import SERVICE, RpcDoor
from gsl_dist.service.search_pb2 import DESCRIPTOR, SearchReply, SearchRequest
from gsl_dist.wire import unpack_table

READ = make_token("reader", "read")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rpc")
    make_index(folder, payload=pa.table({"label": np.arange(400) % 7}))
    world = World(folder, rpc=RpcDoor, tokens=[READ[1]])
    yield world
    world.stop()


@pytest.fixture
def ask(world):
    with grpc.insecure_channel(f"127.0.0.1:{world.rpc.port}") as channel:
        method = channel.unary_unary(
            f"/{SERVICE}/Search",
            request_serializer=SearchRequest.SerializeToString,
            response_deserializer=SearchReply.FromString,
        )

        def ask(token=READ[0], timeout=10, **fields):
            shown = [("authorization", f"Bearer {token}")] if token else []
            return method(SearchRequest(**fields), timeout=timeout, metadata=shown)

        yield ask


def pack(queries):
    return {"vectors": queries.astype("<f4").tobytes(), "dim": queries.shape[1]}


def test_both_doors_give_the_same_answer(world, ask):
    queries, where = make_queries(5), {"label": {"$in": [1, 2, 3]}}
    asked = {"k": 4, "probes": 8, "offset": 2}
    answer = ask(**pack(queries), **asked, where=json.dumps(where), payload=["label"])
    with Client(world.url, token=READ[0]) as client:
        expected = client.search(queries, **asked, where=where, payload=["label"])
    assert np.frombuffer(answer.ids, "<i8").reshape(-1, answer.k).tolist() == expected.ids.tolist()
    assert np.array_equal(np.frombuffer(answer.distances, "<f4").reshape(-1, answer.k), expected.distances)
    assert (answer.shards_answered, answer.shards_total, answer.version) == (3, 3, "v1")
    assert unpack_table(answer.payload).equals(expected.payload)


@pytest.mark.parametrize(
    "fields, code, word",
    [
        ({}, "INVALID_ARGUMENT", "vectors"),
        ({"vectors": b"123", "dim": 16}, "INVALID_ARGUMENT", "vectors"),
        (pack(make_queries(1, dim=15)), "INVALID_ARGUMENT", "vectors"),
        (pack(make_queries(1)) | {"k": 10**6}, "INVALID_ARGUMENT", "k"),
        (pack(make_queries(1)) | {"probes": 99}, "INVALID_ARGUMENT", "probes"),
        (pack(make_queries(1)) | {"where": "{"}, "INVALID_ARGUMENT", "where"),
        (pack(make_queries(1)) | {"where": '{"colour": 1}'}, "INVALID_ARGUMENT", "where.colour"),
        (pack(make_queries(1)) | {"within": float("nan")}, "INVALID_ARGUMENT", "within"),
        (pack(make_queries(1)) | {"version": "v9"}, "NOT_FOUND", "version"),
        (pack(make_queries(1)) | {"token": None}, "UNAUTHENTICATED", "token"),
        (pack(make_queries(1)) | {"token": "wrong"}, "UNAUTHENTICATED", "token"),
    ],
)
def test_what_is_refused_says_why(ask, fields, code, word):
    with pytest.raises(grpc.RpcError) as caught:
        ask(**fields)
    assert caught.value.code().name == code and word in caught.value.details()


def test_too_much_at_once_is_put_off(world, ask):
    world.router.open_requests = world.desk.limits.concurrent
    with pytest.raises(grpc.RpcError) as caught:
        ask(**pack(make_queries(1)))
    world.router.open_requests = 0
    assert caught.value.code().name == "RESOURCE_EXHAUSTED"


def test_a_port_that_is_taken_is_named_when_the_door_opens(world, tmp_path):
    make_index(tmp_path)

    def take(desk, *, host, port):
        return RpcDoor(desk, host=host, port=world.rpc.port)

    with pytest.raises(ConfigError, match=str(world.rpc.port)):
        World(tmp_path, rpc=take)


def test_the_messages_are_those_of_the_proto(tmp_path):
    # python -m grpc_tools.protoc -I. --python_out=. gsl_dist/service/search.proto
    pytest.importorskip("grpc_tools")
    path, made = "gsl_dist/service/search.proto", tmp_path / "set"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={made}", path]
    subprocess.run(command, cwd=ROOT, check=True)
    [described] = FileDescriptorSet.FromString(made.read_bytes()).file
    for field in (field for message in described.message_type for field in message.field):
        field.ClearField("json_name")  # follows from the name
    assert described == FileDescriptorProto.FromString(DESCRIPTOR.serialized_pb)


def test_mutants_of_messages_are_answered_or_refused_by_name(tmp_path):
    make_index(tmp_path, payload=pa.table({"label": np.arange(400) % 7, "title": np.arange(400).astype(str)}))
    world = World(tmp_path, rpc=RpcDoor, limits=Limits(batch=64, body_bytes=1 << 20))
    statuses, failed = attack_rpc(f"127.0.0.1:{world.rpc.port}", 1500, seed=1)
    assert not failed and {"OK", "INVALID_ARGUMENT"} <= set(statuses), statuses
    world.stop()
