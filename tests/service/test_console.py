"""The console, as somebody at a browser meets it.

Those that look at the page need Debian's `chromium` and `chromium-driver`, or another Chromium with its driver on the
path, and are skipped without.
"""

import base64
import hashlib
import io
import json
import re

import httpx
import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("uvicorn")
from browsers import start_browser
from fleets import World
from PIL import Image
from worlds import make_codebook, make_index, make_queries, make_vectors

from gsl_dist.client import Client
from gsl_dist.service.access import make_token
from gsl_dist.service.console import open_console
from gsl_dist.service.reading import Limits

ROWS, BIG = 400, 2**62 + 1
READ, ADMIN = make_token("reader", "read"), make_token("keeper", "admin")
TRAP = '<img src="x" onerror="window.trapped = 1"><b>bold</b>'


def draw_picture(row, kind="PNG"):
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), (row % 256, 80, 120)).save(sink, kind)
    return sink.getvalue()


def make_payload():
    titles = [TRAP if row % 2 else f"title {row}" for row in range(ROWS)]
    return pa.table({"label": np.arange(ROWS) % 7, "title": titles})


def test_the_policy_of_the_page_allows_its_own_script_and_style_alone():
    page, headers = open_console()
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        [part] = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    assert not re.search(r"\s(on\w+|style)=\"", page.decode().split("<script>")[0]), "a policy of hashes forbids these"


def test_the_page_comes_in_one_piece_and_sets_no_markup_from_text():
    page = open_console()[0].decode()
    assert not re.findall(r"https?://", page.replace("^https?:", "")), "nothing is asked of other servers"
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", page)


def test_the_service_gives_the_page_with_its_policy(tmp_path):
    make_index(tmp_path)
    world = World(tmp_path, tokens=[READ[1]])
    answer = httpx.get(world.url)
    world.stop()
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.content == open_console()[0] and "script-src 'sha256-" in answer.headers["content-security-policy"]


@pytest.fixture(scope="module")
def chromium():
    with start_browser() as browser:
        yield browser


class Visitor:
    """Somebody who looks at the console of a world: types, clicks, reads."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def open(self, place=""):
        self.browser.get("about:blank")  # another place of the same page would not load it anew
        self.browser.get(f"{self.url}/{place}")
        self.wait(lambda: self.text("#state") != "connecting")
        return self

    def wait(self, what):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 20, 0.05, (StaleElementReferenceException,)).until(lambda _: what())

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def text(self, selector):
        return self.browser.find_element("css selector", selector).text

    def click(self, selector):
        self.wait(lambda: self.all(selector) and self.all(selector)[0].is_displayed())
        self.all(selector)[0].click()

    def type(self, selector, text):
        field = self.browser.find_element("css selector", selector)
        field.clear()
        field.send_keys(text)

    def search_vector(self, vector, mark=", "):
        self.type("#vector", mark.join(map(str, vector.tolist())))
        self.click("#go")
        return self.read_answer("Nearest to the vector")

    def read_answer(self, title):
        self.wait(lambda: self.text("#answer h2") == title and self.all("#answer[aria-busy=false]"))
        return self.read_ids()

    def read_ids(self):
        return [int(cell.text) for cell in self.all("#answer .id")]

    def read_notice(self):
        self.wait(lambda: self.text("#notice-title"))
        return self.text("#notice-title"), self.text("#notice-text")

    def click_word(self, word, inside="#answer button"):
        next(button for button in self.all(inside) if button.text == word).click()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looked-at")
    make_index(folder, payload=make_payload(), vectors="float16")
    world = World(folder, replicas=3, limits=Limits(body_bytes=1 << 20))
    with Client(world.url) as client:
        client.upsert([BIG], make_vectors(1, seed=9), {"label": 3, "title": "large id"})
    yield world
    world.stop()


@pytest.fixture
def visitor(chromium, world):
    return Visitor(chromium, world.url).open()


@pytest.mark.parametrize("mark", [", ", " ", " ;\n"])
def test_a_pasted_vector_gives_the_hits_of_the_client(visitor, world, mark):
    query = make_queries(1)[0]
    with Client(world.url) as client:
        hits = client.search(query, 10, payload=["label"])
    assert visitor.search_vector(query, mark) == hits.ids[0].tolist()
    shown = [float(cell.text) for cell in visitor.all("#answer .distance")[:10]]
    np.testing.assert_allclose(shown, hits.distances[0], rtol=1e-4)
    facts = visitor.text("#answer .facts")
    assert "3 of 3" in facts and "v1" in facts and " ms" in facts and "fan-out" in facts


def test_settings_of_the_form_reach_the_search(visitor, world):
    query = make_queries(1)[0]
    with Client(world.url) as client:
        hits = client.search(query, 4, 3, where={"label": {"$in": [1, 2, 3]}}, group_by="label", within=1000.0)
    visitor.click("#more summary")
    visitor.type("#k", "4")
    visitor.click_word("probes", "#effort option")
    visitor.click_word("label", "#group_by option")
    visitor.type("#amount", "3")
    visitor.type("#where", '{"label": {"$in": [1, 2, 3]}}')
    visitor.type("#within", "1e3")
    found = visitor.search_vector(query)
    assert found == [item for item in hits.ids[0].tolist() if item >= 0] and len(found) == 3
    visitor.click("#columns label:first-child")
    visitor.search_vector(query)
    visitor.wait(lambda: [cell.text for cell in visitor.all("#answer th")] == ["", "id", "squared L2", "title", ""])


def test_pages_follow_on_one_another(visitor, world):
    query = make_queries(1)[0]
    with Client(world.url) as client:
        pages = [client.search(query, 10, offset=offset).ids[0].tolist() for offset in (0, 10)]
    first = visitor.search_vector(query)
    visitor.click_word("Next")
    visitor.wait(lambda: visitor.text(".pager span") == "11 to 20")
    second = visitor.read_ids()
    visitor.click_word("Previous")
    visitor.wait(lambda: visitor.text(".pager span") == "1 to 10")
    assert [first, second] == pages and visitor.read_ids() == first


def test_like_this_searches_for_those_and_back_leads_back(visitor, world):
    first = visitor.search_vector(make_queries(1)[0])[0]
    with Client(world.url) as client:
        expected = client.search(ids=[first], k=10).ids[0].tolist()
        further = client.search(ids=[expected[0]], k=10).ids[0].tolist()
    visitor.click_word("Like this")
    assert visitor.read_answer(f"Like item {first}") == expected
    visitor.click_word("Like this")
    assert visitor.read_answer(f"Like item {expected[0]}") == further
    visitor.browser.back()
    assert visitor.read_answer(f"Like item {first}") == expected


def test_an_id_beyond_the_numbers_of_javascript_stays_whole(visitor, world):
    assert visitor.search_vector(make_vectors(1, seed=9)[0])[0] == BIG
    visitor.click_word("Like this")
    with Client(world.url) as client:
        assert visitor.read_answer(f"Like item {BIG}") == client.search(ids=[BIG], k=10).ids[0].tolist()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("where", '{"colour": 3}', "where"),
        ("where", '{"label": {"$near": 3}}', "$near"),
        ("where", '{"label": ', "JSON"),
        ("k", "0", "k: got 0"),
        ("within", "near", "within"),
        ("vector", "1, 2, x", "“x”"),
        ("vector", "1, 2, 3", "16 numbers"),
    ],
)
def test_what_is_wrong_is_told_with_its_field_and_the_field_is_marked(visitor, field, value, told):
    visitor.click("#more summary")
    visitor.type("#vector", " ".join(map(str, make_queries(1)[0].tolist())))
    visitor.type(f"#{field}", value)
    visitor.click("#go")
    title, text = visitor.read_notice()
    assert title == "The request is refused" and told in text
    assert [marked.get_attribute("id") for marked in visitor.all("[aria-invalid]")] == [field]
    visitor.click("#notice-close")
    assert not visitor.all("[aria-invalid]") and not visitor.all("#notice")[0].is_displayed()


def test_an_item_that_is_not_there_and_a_request_too_large_are_told(visitor, tmp_path):
    visitor.open("#like=999999")
    assert visitor.read_notice() == ("There is no such thing", "ids: got 999999, but there is no such item")
    (tmp_path / "large.png").write_bytes(bytes(1 << 20))
    visitor.click("[value=image] + span")
    visitor.all("#image")[0].send_keys(str(tmp_path / "large.png"))
    visitor.wait(lambda: visitor.read_notice()[0] == "That is too much for one request")


def test_markup_in_a_payload_is_text_and_runs_nothing(visitor):
    visitor.search_vector(make_queries(1)[0])
    assert TRAP in [cell.text for cell in visitor.all("#answer .value")]
    visitor.open("#like=1")
    visitor.read_answer("Like item 1")
    visitor.click_word("Edit")
    visitor.wait(lambda: visitor.all("#payload")[0].get_attribute("value"))
    assert not visitor.all("main img[src=x], main b") and visitor.browser.execute_script("return !window.trapped")


def test_an_image_where_there_is_no_encoder_is_answered_kindly(visitor, tmp_path):
    (tmp_path / "one.png").write_bytes(draw_picture(1))
    visitor.click("[value=image] + span")
    visitor.all("#image")[0].send_keys(str(tmp_path / "one.png"))
    title, text = visitor.read_notice()
    assert title == "This service cannot read images" and "without an encoder" in text
    assert visitor.all("#preview")[0].is_displayed()


def test_an_image_is_searched_for_by_the_encoder(chromium, tmp_path):
    async def encode(manifest, items):
        seen.extend(items)
        return make_queries(len(items))

    seen, folder = [], tmp_path / "index"
    make_index(folder)
    world = World(folder, encode=encode)
    visitor = Visitor(chromium, world.url).open()
    visitor.click("[value=image] + span")
    # Dropped on the form, as from a folder.
    visitor.browser.execute_script(
        """
        const files = new DataTransfer(), bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
        files.items.add(new File([bytes], "a.png", {type: "image/png"}));
        document.getElementById("query").dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true}));
        """,
        base64.b64encode(draw_picture(7)).decode(),
    )
    found = visitor.read_answer("Nearest to the image")
    assert seen == [draw_picture(7)] and found == world.local.search(make_queries(1), 10).ids[0].tolist()
    world.stop()


def test_pictures_in_payloads_are_shown_and_other_text_is_not_taken_for_one(chromium, tmp_path):
    rows = range(40)
    columns = {
        "bytes": [draw_picture(row, "WEBP") for row in rows],  # JSON shows them as hexadecimal digits
        "uri": [f"data:image/png;base64,{base64.b64encode(draw_picture(row)).decode()}" for row in rows],
        "text": [base64.b64encode(draw_picture(row, "JPEG")).decode() for row in rows],
        "path": ["/9j/is the beginning of a path, not of a picture, however long it goes on and on"] * len(rows),
    }
    make_index(tmp_path, rows=len(rows), payload=pa.table(columns))
    world = World(tmp_path)
    visitor = Visitor(chromium, world.url).open()
    visitor.search_vector(make_queries(1)[0])
    visitor.browser.execute_script("document.querySelectorAll('#answer img').forEach(each => each.loading = 'eager')")
    loaded = "return [...document.querySelectorAll('#answer img')].filter(each => each.naturalWidth === 8).length"
    visitor.wait(lambda: visitor.browser.execute_script(loaded) == 30)
    assert visitor.text(".cards dl").split()[:3] == ["uri", "text", "path"] and len(visitor.all("#answer img")) == 30
    world.stop()


def test_a_partial_answer_says_which_shards_are_missing(chromium, tmp_path):
    make_index(tmp_path, payload=make_payload())
    world = World(tmp_path, replicas=3, timeout_s=0.5)
    [shard] = world.parts[list(world.parts)[1]]
    world.kill(list(world.parts)[1])
    visitor = Visitor(chromium, world.url).open()
    found = visitor.search_vector(make_queries(1)[0])
    [shares] = [told.text for told in visitor.all(".partial")]
    assert "2 of 3 shards answered" in shares and shard in shares
    with Client(world.url) as client:
        assert found == client.search(make_queries(1)).ids[0].tolist()
    world.stop()


@pytest.fixture
def closed(chromium, tmp_path):
    make_index(tmp_path, version="v2", codebook=make_codebook(seed=5), shards=2, seed=3)
    make_index(tmp_path, payload=make_payload())
    world = World(tmp_path, tokens=[READ[1], ADMIN[1]])
    yield Visitor(chromium, world.url).open()
    world.stop()


def test_promoting_takes_a_token_and_changes_the_version_shown(closed):
    assert closed.read_notice()[0] == "A token is needed"
    closed.click("#notice-token")
    closed.type("#read", READ[0])
    closed.click("#ask-yes")
    closed.wait(lambda: closed.text("#state").startswith("v1, 2 replicas"))
    closed.click("nav a[href='#versions']")
    closed.click("#named button")
    closed.click("#ask-yes")
    closed.wait(lambda: closed.text("#notice-title") == "The token does not allow this")
    closed.click("#named button")
    closed.type("#admin", ADMIN[0])
    closed.click("#ask-yes")
    closed.wait(lambda: closed.text("#notice-title") == "v2 is served")
    assert closed.text("#state").startswith("v2") and "v2" in closed.text("#about")
    assert [button.text for button in closed.all("#named button")] == ["Roll back"]
    closed.click("#named button")
    closed.click("#ask-yes")
    closed.wait(lambda: closed.text("#notice-title") == "v1 is served")
    assert READ[0] not in closed.browser.current_url and ADMIN[0] not in closed.browser.current_url


def test_items_are_changed_and_deleted_with_the_admin_token(closed):
    with Client(closed.url, token=ADMIN[0]) as client:
        closed.click("#access")
        closed.type("#admin", ADMIN[0])
        closed.click("#ask-yes")
        closed.wait(lambda: closed.text("#state").startswith("v1"))
        closed.click("nav a[href='#items']")
        closed.type("#edit-id", "4")
        closed.click("#look")
        closed.wait(lambda: closed.all("#payload")[0].get_attribute("value"))
        assert json.loads(closed.all("#payload")[0].get_attribute("value")) == {"label": 4, "title": "title 4"}
        closed.type("#payload", '{"title": "another"}')
        closed.click("#save")
        closed.click("#ask-yes")
        closed.wait(lambda: closed.text("#notice-title") == "Item 4 is changed")
        assert client.fetch([4])[0]["payload"] == {"label": 4, "title": "another"}
        closed.click("#delete")
        closed.click("#ask-yes")
        closed.wait(lambda: closed.text("#notice-title") == "Item 4 is deleted")
        assert client.fetch([4]) == [None]
        closed.click("#look")
        closed.wait(lambda: closed.text("#notice-title") == "There is no such thing")


def test_what_was_written_is_compacted_by_a_button_that_is_there_when_it_is_needed(chromium, tmp_path):
    async def compact():
        return make_index(tmp_path, version="v2", rows=ROWS - 1).version

    make_index(tmp_path)
    world = World(tmp_path, compact=compact)
    visitor = Visitor(chromium, world.url).open("#versions")
    assert not visitor.all("#compact")[0].is_displayed()
    with Client(world.url) as client:
        client.delete([5])
    visitor.click("#refresh")
    visitor.click("#compact")
    visitor.click("#ask-yes")
    visitor.wait(lambda: visitor.text("#notice-title") == "v2 is served")
    assert "399 rows" in visitor.text("#notice-text") and visitor.text("#state").startswith("v2")
    world.stop()


def test_a_busy_service_and_one_that_is_gone_are_told(chromium, tmp_path):
    make_index(tmp_path)
    world = World(tmp_path, limits=Limits(concurrent=1))
    visitor = Visitor(chromium, world.url).open()
    world.router.open_requests = 1
    visitor.type("#vector", " ".join(map(str, make_queries(1)[0].tolist())))
    visitor.click("#go")
    title, text = visitor.read_notice()
    assert title == "The service is busy" and "Try again in 1 s" in text
    world.stop()
    visitor.click("#go")
    visitor.wait(lambda: visitor.text("#notice-title") == "The service cannot be reached")


def test_the_page_fits_a_phone(visitor):
    sizes = "return [document.documentElement.scrollWidth, window.innerWidth]"
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    visitor.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        visitor.search_vector(make_queries(1)[0])
        for view in ("search", "versions", "items"):
            visitor.click(f"nav a[href='#{view}']")
            width, room = visitor.browser.execute_script(sizes)
            assert width <= room == 360
    finally:
        visitor.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
