import subprocess
import sys

import httpx
import numpy as np
import pytest

from gsl_dist.client import Client
from gsl_dist.errors import ConfigError, GslError, QueryError, ShardUnavailable
from gsl_dist.hits import Effort, Hits
from gsl_dist.wire import HITS_TYPE, pack_hits, unpack_query

HITS = Hits(np.array([[4, -1]]), np.array([[0.5, 1.0]], np.float32), 2, 3, "v1")


def answering(handle):
    """A client whose server is a function."""
    client = Client("http://gsl.test/")
    client._http = httpx.Client(transport=httpx.MockTransport(handle))
    return client


def test_importing_it_loads_neither_torch_nor_ray_nor_faiss():
    code = "import sys, gsl_dist.client, gsl_dist.measure; print({'torch', 'ray', 'faiss'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("queries", [[1, 2, 3], [[1.0, 2.0, 3.0]], np.ones((1, 3), np.float64), np.ones(3, np.float16)])
def test_anything_like_an_array_is_sent_as_float32_rows(queries):
    sent = []

    def handle(request):
        sent.append((request.url.path, unpack_query(request.content)))
        return httpx.Response(200, content=pack_hits(HITS), headers={"content-type": HITS_TYPE})

    hits = answering(handle).search(queries, 2, 4)
    path, (rows, effort, _) = sent[0]
    assert (path, rows.shape, effort) == ("/v1/search", (1, 3), Effort(2, 4))
    assert hits.is_partial and hits.ids.tolist() == [[4, -1]]


@pytest.mark.parametrize("queries", [["a", "b"], [[1.0], [1.0, 2.0]], [[True, False]], 3.0, np.ones((1, 2, 3)), None])
def test_what_is_no_vector_is_refused_before_it_is_sent(queries):
    with pytest.raises(QueryError) as caught:
        answering(lambda request: pytest.fail("sent")).search(queries)
    assert caught.value.field == "vectors"


@pytest.mark.parametrize("k, probes, field", [(0, None, "k"), (2.5, None, "k"), (True, None, "k"), (1, 0, "probes")])
def test_counts_are_checked_before_they_are_sent(k, probes, field):
    with pytest.raises(QueryError) as caught:
        answering(lambda request: pytest.fail("sent")).search([1.0], k, probes)
    assert caught.value.field == field


def test_a_refusal_comes_back_with_its_fields():
    body = {"code": "too_large", "message": "m", "field": "vectors", "value": "'9 rows'", "allowed": "1 to 4"}
    with pytest.raises(QueryError) as caught:
        answering(lambda request: httpx.Response(413, json=body)).search([1.0])
    error = caught.value
    assert (error.field, error.value, error.allowed, error.status) == ("vectors", "'9 rows'", "1 to 4", 413)


def test_missing_shards_come_back_by_name():
    body = {"code": "shards_unavailable", "message": "m", "field": None, "missing": ["s1"], "total": 3}
    with pytest.raises(ShardUnavailable) as caught:
        answering(lambda request: httpx.Response(503, json=body)).search([1.0], require_all=True)
    assert (caught.value.missing, caught.value.total) == (["s1"], 3)


@pytest.mark.parametrize(
    "answer", [httpx.Response(500, text="oops"), httpx.Response(200, text="hello"), httpx.Response(502, json=[1])]
)
def test_a_server_that_is_none_of_ours_is_named(answer):
    client = answering(lambda request: answer)
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
    def handle(request):
        raise httpx.ReadTimeout("late")

    with pytest.raises(GslError, match=r"http://gsl\.test did not answer in time"):
        answering(handle).health()


def test_a_url_without_a_scheme_is_refused():
    with pytest.raises(ConfigError, match="http://"):
        Client("localhost:8080")
