"""Who may ask what."""

import httpx
import pytest

pytest.importorskip("uvicorn")
from fleets import World
from worlds import make_index, make_queries

from gsl_dist.client import Client
from gsl_dist.errors import ArtefactError, ConfigError, Denied, Overloaded
from gsl_dist.service.access import Access, add_token, make_token, read_tokens
from gsl_dist.service.reading import Limits

READ, ADMIN = make_token("reader", "read"), make_token("keeper", "admin")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closed")
    make_index(folder)
    world = World(folder, tokens=[READ[1], ADMIN[1]])
    yield world
    world.stop()


def test_without_a_token_nothing_is_told(world):
    for path, method in [("/v1/search", "POST"), ("/v1/items", "POST"), ("/v1/versions", "GET"), ("/metrics", "GET")]:
        for header in (None, "Bearer", "Bearer wrong", f"Basic {ADMIN[0]}", ADMIN[0]):
            answer = httpx.request(method, world.url + path, headers={"authorization": header} if header else {})
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


def test_who_may_read_may_not_write(world):
    body = {"vectors": make_queries(1).tolist(), "k": 2}
    for token in (READ[0], ADMIN[0]):
        assert world.post(body, token=token).status_code == 200
    for path, sent in [("/v1/items/delete", {"ids": [1]}), ("/v1/promote", {"version": "v1"})]:
        refused = world.post(sent, path, token=READ[0])
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert world.post(sent, path, token=ADMIN[0]).status_code == 200


def test_a_client_shows_its_token_and_tells_what_is_denied(world):
    with Client(world.url, token=READ[0]) as client:
        assert len(client.search(make_queries(2), 3, 8)) == 2
        with pytest.raises(Denied, match="admin"):
            client.delete([1])
    with Client(world.url) as client, pytest.raises(Denied, match="token"):
        client.versions()


def test_whether_it_lives_is_told_to_everybody(world):
    for path in ("/livez", "/readyz", "/healthz", "/"):
        assert httpx.get(world.url + path).status_code == 200


def test_the_service_keeps_no_token_but_its_digest(tmp_path):
    place = str(tmp_path / "tokens.json")
    text, token = make_token("one", "read")
    add_token(place, token)
    add_token(place, make_token("two", "admin")[1])
    assert text not in (tmp_path / "tokens.json").read_text()
    assert [known.name for known in read_tokens(place)] == ["one", "two"]
    Access(read_tokens(place)).check(f"Bearer {text}", "read")
    with pytest.raises(ConfigError, match="another"):
        add_token(place, make_token("one", "read")[1])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tokens": [{"name": "a"}]}', '{"tokens": 3}'])
def test_a_file_that_holds_no_tokens_is_refused(tmp_path, content):
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"tokens\.json"):
        read_tokens(str(tmp_path / "tokens.json"))


def test_more_requests_than_may_be_answered_at_once_are_put_off(tmp_path):
    make_index(tmp_path)
    world = World(tmp_path, limits=Limits(concurrent=1))
    world.router.open_requests = 1
    answer = world.post({"vectors": make_queries(1).tolist()})
    assert (answer.status_code, answer.json()["code"]) == (429, "overloaded") and int(
        answer.headers["retry-after"]
    ) >= 1
    with Client(world.url, timeout_s=0.5) as client, pytest.raises(Overloaded):
        client.search(make_queries(1))
    world.router.open_requests = 0
    assert world.post({"vectors": make_queries(1).tolist()}).status_code == 200
    text = httpx.get(f"{world.url}/metrics").text
    assert 'gsl_requests_total{route="/v1/search",status="429"}' in text and "gsl_stage_seconds_bucket" in text
    world.stop()
