import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from gsl_dist.calls import Answer
from gsl_dist.client import AsyncClient, Client
from gsl_dist.errors import ConfigError, GslError, QueryError, ShardUnavailable
from gsl_dist.hits import Effort, Hits
from gsl_dist.wire import HITS_TYPE, pack_hits, unpack_query

HITS = Hits(np.array([[4, -1]]), np.array([[0.5, 1.0]], np.float32), 2, 3, "v1")


def answering(handle):
    """A client whose server is a function."""
    client = Client("http://gsl.test/")
    client._ask = handle
    return client


def say(content, status=200, headers=()):
    return Answer(status, dict(headers), content if isinstance(content, bytes) else json.dumps(content).encode())


@contextlib.contextmanager
def listening(protocol="HTTP/1.1"):
    """A server that says what it was asked, and what of it came over one connection."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = protocol

        def do_POST(self):
            asked.append((self.path, self.client_address, self.headers))
            body = json.dumps({"path": self.path, "got": len(self._read())}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def _read(self):
            return self.rfile.read(int(self.headers.get("content-length") or 0))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_importing_it_loads_neither_torch_nor_ray_nor_faiss():
    code = "import sys, gsl_dist.client, gsl_dist.measure; print({'torch', 'ray', 'faiss'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("queries", [[1, 2, 3], [[1.0, 2.0, 3.0]], np.ones((1, 3), np.float64), np.ones(3, np.float16)])
def test_anything_like_an_array_is_sent_as_float32_rows(queries):
    sent = []

    def handle(call):
        sent.append((call.path, unpack_query(call.body)))
        return say(pack_hits(HITS), headers={"content-type": HITS_TYPE})

    hits = answering(handle).search(queries, 2, 4)
    path, (rows, effort, _) = sent[0]
    assert (path, rows.shape, effort) == ("/v1/search", (1, 3), Effort(2, 4))
    assert hits.is_partial and hits.ids.tolist() == [[4, -1]]


@pytest.mark.parametrize("queries", [["a", "b"], [[1.0], [1.0, 2.0]], [[True, False]], 3.0, np.ones((1, 2, 3)), None])
def test_what_is_no_vector_is_refused_before_it_is_sent(queries):
    with pytest.raises(QueryError) as caught:
        answering(lambda call: pytest.fail("sent")).search(queries)
    assert caught.value.field == "vectors"


@pytest.mark.parametrize("k, probes, field", [(0, None, "k"), (2.5, None, "k"), (True, None, "k"), (1, 0, "probes")])
def test_counts_are_checked_before_they_are_sent(k, probes, field):
    with pytest.raises(QueryError) as caught:
        answering(lambda call: pytest.fail("sent")).search([1.0], k, probes)
    assert caught.value.field == field


def test_a_refusal_comes_back_with_its_fields():
    body = {"code": "too_large", "message": "m", "field": "vectors", "value": "'9 rows'", "allowed": "1 to 4"}
    with pytest.raises(QueryError) as caught:
        answering(lambda call: say(body, 413)).search([1.0])
    error = caught.value
    assert (error.field, error.value, error.allowed, error.status) == ("vectors", "'9 rows'", "1 to 4", 413)


def test_missing_shards_come_back_by_name():
    body = {"code": "shards_unavailable", "message": "m", "field": None, "missing": ["s1"], "total": 3}
    with pytest.raises(ShardUnavailable) as caught:
        answering(lambda call: say(body, 503)).search([1.0], require_all=True)
    assert (caught.value.missing, caught.value.total) == (["s1"], 3)


@pytest.mark.parametrize("answer", [say(b"oops", 500), say(b"hello"), say([1], 502), say(b"", 299), say(b"", 599)])
def test_a_server_that_is_none_of_ours_is_named(answer):
    client = answering(lambda call: answer)
    for ask in (lambda: client.search([1.0]), client.versions):
        with pytest.raises(GslError, match=r"http://gsl\.test"):
            ask()


def test_a_refused_connection_names_the_url():
    with (
        Client("http://127.0.0.1:1") as client,
        pytest.raises(GslError, match=r"http://127\.0\.0\.1:1 cannot be reached"),
    ):
        client.health()


def test_a_late_answer_is_an_error_that_names_the_url():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout_s=0.05) as client, pytest.raises(GslError, match=f"{url} did not answer in time"):
            client.health()

        async def ask():
            async with AsyncClient(url, timeout_s=0.05) as client:
                await client.health()

        with pytest.raises(GslError, match=f"{url} did not answer in time"):
            asyncio.run(ask())


def test_what_is_no_http_is_an_error_that_names_the_url():
    with socket.create_server(("127.0.0.1", 0)) as odd:
        url = f"http://127.0.0.1:{odd.getsockname()[1]}"

        def speak():
            heard, _ = odd.accept()
            with heard:
                heard.recv(1000)
                heard.sendall(b"220 ready\r\n")

        threading.Thread(target=speak, daemon=True).start()
        with Client(url) as client, pytest.raises(GslError, match=f"{url} cannot be reached"):
            client.health()


def test_one_connection_carries_question_after_question():
    with listening() as (url, asked), Client(url, token="t") as client:
        for _ in range(5):
            client.versions()
    assert len({address for _, address, _ in asked}) == 1
    assert {headers["authorization"] for *_, headers in asked} == {"Bearer t"}


def test_a_connection_that_the_server_closed_is_made_again():
    with listening(protocol="HTTP/1.0") as (url, asked), Client(url) as client:
        for _ in range(3):
            client.versions()
    assert len({address for _, address, _ in asked}) == 3


def test_a_path_before_the_routes_is_kept():
    with listening() as (url, _), Client(f"{url}/gsl/") as client:
        assert client.versions()["path"] == "/gsl/v1/versions"


def test_threads_may_share_a_client():
    with listening() as (url, asked), Client(url) as client:
        threads = [threading.Thread(target=client.delete, args=([1],)) for _ in range(8)]
        answers = []
        client._ask, ask = lambda call: answers.append(ask(call)) or say({"seq": 1}), client._ask
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(asked) == 8 and all(json.loads(answer.body)["got"] == len(b'{"ids":[1]}') for answer in answers)


@pytest.mark.parametrize("numbers", [[float("nan")], [float("inf")]])
def test_what_is_no_number_is_not_written(numbers):
    with pytest.raises(QueryError) as caught:
        answering(lambda call: pytest.fail("sent")).upsert([1], [numbers])
    assert caught.value.field == "vectors"


def test_a_url_without_a_scheme_is_refused():
    with pytest.raises(ConfigError, match="http://"):
        Client("localhost:8080")
