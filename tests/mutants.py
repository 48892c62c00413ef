"""Requests that are nearly right: valid ones of every route and kind of body, and what becomes of them byte by byte.

A byte is flipped, a run of them cut out, doubled or moved, a number put in the place of another; words that JSON, Arrow
and HTTP have a meaning for are put in anywhere. All of it is drawn from a seed.
"""

import http.client
import io
import json
import socket
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from worlds import make_queries, make_vectors

from gsl_dist.hits import Effort
from gsl_dist.service.reading import ARROW_TYPE
from gsl_dist.wire import QUERY_TYPE, pack_query

JSON = "application/json"
WORDS = [
    *(b"null", b"true", b"NaN", b"-1", b"0", b"1e999", b"1e-999", b"9223372036854775807", b"9223372036854775808"),
    *(b"18446744073709551616", b'""', b"[]", b"{}", b"[[]]", b'"\\ud800"', b'"\\u0000"', b"\xff\xfe", b"\x00", b"0.5"),
    *(b'"id"', b'"label"', b'"$in"', b'"$not"', b'"$gte"', b'"#here"', b'"../v1"', b"[" * 300, b'{"$not":' * 300),
    *(b'"payload"', b'"group_by"', b'"where"', b'"ids"', b'"timeout_s"', b'"k"', b'"within"', b'"2020-01-01"'),
]
NUMBERS = [0, 1, 2, 127, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]


class Asked(NamedTuple):
    """A request."""

    method: str
    path: str
    kind: str
    body: bytes


def list_requests(dim=16):
    """Give valid requests of every route and kind of body."""
    vectors, written = make_queries(2, dim=dim), make_vectors(3, dim)
    rich = {"vectors": vectors.tolist(), "k": 5, "probes": 4, "offset": 2, "group_by": "label", "group_size": 2}
    rich |= {
        "payload": ["title", "label"],
        "where": {"$or": [{"label": {"$in": [1, 2]}}, {"$not": {"id": {"$lt": 9}}}]},
    }
    rich |= {"within": 1e3, "require_all": False, "timeout_s": 5.0, "refine": 2}
    items = [
        {"id": 1000 + row, "vector": vector.tolist(), "payload": {"label": row, "title": f"new {row}"}}
        for row, vector in enumerate(written)
    ]
    said = [
        ("/v1/search", {"vectors": vectors.tolist()}),
        ("/v1/search", rich),
        ("/v1/search", {"ids": [3, 4], "k": 3, "payload": ["title"]}),
        ("/v1/search", {"items": ["aGVsbG8=", [[1, 2], [3, 4]]]}),
        ("/v1/echo", {"vectors": vectors.tolist(), "k": 3}),
        ("/v1/items/fetch", {"ids": [1, 2, 10**12], "payload": ["label"]}),
        ("/v1/items", {"items": items}),
        ("/v1/items/payload", {"items": [{"id": 3, "payload": {"title": "another", "label": 4}}]}),
        ("/v1/items/delete", {"ids": [1001, 1002]}),
        ("/v1/promote", {"version": "v1"}),
    ]
    asked = [Asked("POST", path, JSON, json.dumps(body).encode()) for path, body in said]
    efforts = [Effort(5), Effort(3, 4, 2, None, {"label": {"$gte": 1}}, 1e3)]
    asked += [Asked("POST", "/v1/search?payload=label", QUERY_TYPE, pack_query(vectors, effort)) for effort in efforts]
    asked += [Asked("POST", "/v1/echo", QUERY_TYPE, pack_query(vectors, efforts[0]))]
    asked += [Asked("POST", "/v1/search?k=3&probes=4", ARROW_TYPE, body) for body in write_streams(vectors)]
    asked.append(Asked("POST", "/v1/compact", JSON, b""))
    routes = ("/livez", "/readyz", "/healthz", "/metrics", "/v1/versions", "/openapi.json")
    return asked + [Asked("GET", route, JSON, b"") for route in routes]


def write_streams(vectors):
    """Give vectors as streams of Arrow of two kinds."""
    for kind in (pa.list_(pa.float32(), vectors.shape[1]), pa.list_(pa.float64())):
        sink = io.BytesIO()
        table = pa.table({"vector": pa.array(vectors.tolist(), kind)})
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        yield sink.getvalue()


def mutate(text, rng, others=()):
    """Give bytes that differ in some places."""
    changed = bytearray(text)
    for _ in range(int(rng.integers(1, 4))):
        at, length = int(rng.integers(len(changed) + 1)), int(rng.geometric(0.15))
        kind = int(rng.integers(7))
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = changed[at : at + length]
        elif kind == 3:
            changed[at : at + length * int(rng.integers(2))] = WORDS[rng.integers(len(WORDS))]
        elif kind == 4:
            at -= at % 4
            changed[at : at + 4] = int(rng.choice(NUMBERS)).to_bytes(4, "little")
        elif kind == 5:
            del changed[at:]
        elif others:
            other = others[rng.integers(len(others))]
            start = int(rng.integers(len(other) + 1))
            changed[at : at + length] = other[start : start + length]
    return bytes(changed)


def mutate_request(asked, rng, requests):
    """Give a request that differs in its body, its parameters, its kind, or in where it goes."""
    other = requests[rng.integers(len(requests))]
    if not asked.body or rng.random() < 0.05:
        asked = asked._replace(path=other.path, method=other.method)
    if rng.random() < 0.05:
        asked = asked._replace(kind=other.kind)
    if "?" in asked.path and rng.random() < 0.3:
        place, _, params = asked.path.partition("?")
        text = mutate(params.encode(), rng).decode("latin-1")
        asked = asked._replace(path=f"{place}?{''.join(c if 32 < ord(c) < 127 else f'%{ord(c):02x}' for c in text)}")
    bodies = [request.body for request in requests]
    return asked._replace(body=mutate(asked.body, rng, bodies)) if asked.body else asked


class Sender:
    """Sends requests one after another and gives the status of each answer; an answer that does not come is an error.

    Args:
        url: the service.
        timeout_s: how long an answer may take.
    """

    def __init__(self, url, timeout_s=20.0):
        self._place, self._timeout_s = urlsplit(url), timeout_s
        self._connection = http.client.HTTPConnection(self._place.netloc, timeout=timeout_s)

    def send(self, asked):
        """Give the status and the body of the answer; after a failure the service hangs up, so that is tried twice."""
        for is_last in (False, True):
            try:
                self._connection.request(asked.method, asked.path, asked.body, {"content-type": asked.kind})
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except ConnectionError:
                self._connection.close()
                if is_last:
                    raise

    def send_raw(self, text):
        """Send bytes as they are, to the end, and give the status of the first answer; None where there is none."""
        with socket.create_connection((self._place.hostname, self._place.port), self._timeout_s) as connection:
            connection.sendall(text)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while chunk := connection.recv(1 << 16):
                    answer += chunk
            except ConnectionResetError:
                pass
        return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else None


def write_raw(asked, host):
    """Give a request as it goes over the wire."""
    head = f"{asked.method} {asked.path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: {asked.kind}\r\n"
    return f"{head}content-length: {len(asked.body)}\r\n\r\n".encode() + asked.body


def attack(url, count, seed, *, requests=None, raw_share=0.02):
    """Send so many mutants and give how often which status came, and those requests that made the service fail."""
    rng, sender, requests, statuses, failed = (
        np.random.default_rng(seed),
        Sender(url),
        requests or list_requests(),
        {},
        [],
    )
    for _ in range(count):
        asked = mutate_request(requests[rng.integers(len(requests))], rng, requests)
        if rng.random() < raw_share:
            status, told = sender.send_raw(mutate(write_raw(asked, "localhost"), rng)), b""
        else:
            status, told = sender.send(asked)
        statuses[status] = statuses.get(status, 0) + 1
        if status is not None and status >= 500:
            failed.append((status, asked, told))
    return statuses, failed


def attack_rpc(place, count, seed, *, dim=16):
    """Send so many mutants of messages to the gRPC door, as `attack` does to the HTTP door."""
    import grpc

    from gsl_dist.service.rpc import SERVICE
    from gsl_dist.service.search_pb2 import SearchRequest

    vectors = make_queries(2, dim=dim).astype("<f4").tobytes()
    rich = {"probes": 4, "refine": 2, "within": 1e3, "where": '{"label": {"$in": [1, 2]}}', "offset": 2}
    rich |= {"group_by": "label", "group_size": 2, "payload": ["title", "label"]}
    messages = [
        SearchRequest(vectors=vectors, dim=dim, k=5, **more).SerializeToString() for more in ({}, rich, {"recall": 0.5})
    ]
    rng, statuses, failed = np.random.default_rng(seed), {}, []
    with grpc.insecure_channel(place) as channel:
        ask = channel.unary_unary(f"/{SERVICE}/Search")
        for _ in range(count):
            body = mutate(messages[rng.integers(len(messages))], rng, messages)
            try:
                status = ask(body, timeout=20) and "OK"
            except grpc.RpcError as error:
                status = error.code().name
            statuses[status] = statuses.get(status, 0) + 1
            if status not in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"):
                failed.append((status, body))
    return statuses, failed
