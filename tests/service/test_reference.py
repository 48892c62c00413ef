"""The page of the API, as a document, as the service gives it, and as the browser of a closed network shows it."""

import json
import re

import httpx
import jsonschema
import pytest

pytest.importorskip("uvicorn")
from fleets import World
from worlds import make_index

from gsl_dist.service.app import Desk, create_app
from gsl_dist.service.console import open_console
from gsl_dist.service.reference import Row, open_reference, read_routes


@pytest.fixture(scope="module")
def document():
    return create_app(Desk(None)).openapi()


def test_every_route_and_every_field_of_it_is_on_the_page(document):
    page = open_reference(document)[0].decode()
    for route in read_routes(document):
        assert f'<h2 id="{route.name}">{route.method} {route.path}</h2>' in page
        section = page.split(f'<h2 id="{route.name}">')[1].split("</section>")[0]
        bodies = [route.body] if route.body else []
        assert all(
            f"<code>{row.name}</code>" in section for body in [*bodies, route.answers["200"]] for row in body.rows
        )
        assert re.findall(r"<tr><td>(\d+)<td>", section) == list(route.answers)


def test_rows_say_what_a_field_may_be_and_whether_it_must_be_there():
    items = {
        "type": "array",
        "items": {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}},
    }
    count = {"type": "integer", "minimum": 1, "default": 10, "description": "how many"}
    schema = {"properties": {"items": items, "k": count, "at": {"type": ["string", "null"]}}, "required": ["items"]}
    said = {"summary": "Ask", "requestBody": {"content": {"application/json": {"schema": schema}}}, "responses": {}}
    [route] = read_routes({"paths": {"/v1/ask": {"post": said}}})
    assert route.name == "post-v1-ask" and route.body.rows == (
        Row("items", "list of object", "", True),
        Row("items[].id", "integer", "", True),
        Row("k", "integer, at least 1, by default 10", "how many", False),
        Row("at", "string or null", "", False),
    )


def test_a_bound_that_every_integer_keeps_is_not_told(document):
    [fetch] = [route for route in read_routes(document) if route.path == "/v1/items/fetch"]
    assert fetch.body.rows[0] == Row("ids", "list of integer, at least 0", "", True)


def test_examples_are_what_their_schemas_allow(document):
    for methods in document["paths"].values():
        for said in methods.values():
            for body in [said.get("requestBody", {}), *said["responses"].values()]:
                shown = body.get("content", {}).get("application/json", {})
                if "example" in shown:
                    jsonschema.validate(shown["example"], shown["schema"])


def test_the_page_runs_nothing_and_names_no_other_server(document):
    page, headers = open_reference(document)
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'" and "script-src" not in rules and rules["img-src"] == "data:"
    assert rules["style-src"] == headers["content-security-policy"].split("style-src ")[1].split(";")[0]
    text = page.decode()
    assert "<script" not in text and not re.search(r"(src|href)=\"?(https?:)?//", text)
    assert not re.search(r"\s(on\w+|style)=\"", text), "a policy of hashes forbids these"


def test_text_of_the_document_is_no_markup_of_the_page(document):
    odd = json.loads(json.dumps(document).replace("Find the nearest items", "<img src=x onerror=alert(1)>"))
    assert b"<img" not in open_reference(odd)[0]


def test_the_service_gives_it_with_its_policy_to_whoever_asks(tmp_path, document):
    make_index(tmp_path)
    world = World(tmp_path)
    answer, gone = httpx.get(f"{world.url}/docs"), httpx.get(f"{world.url}/redoc")
    world.stop()
    page, headers = open_reference(document)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.content == page and headers.items() <= dict(answer.headers).items()
    assert gone.status_code == 404, "a page that fetches its script from elsewhere"


def test_it_leads_to_the_console_and_back():
    assert '<a href=".">' in open_reference({"paths": {}})[0].decode() and 'href="docs"' in open_console()[0].decode()
