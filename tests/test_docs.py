"""What is written is where it is said to be: links of every page, and the site made of docs/ and of the code."""

import importlib
import os
import pkgutil
import posixpath
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml
from browsers import start_browser
from typer.testing import CliRunner

import gsl_dist
from gsl_dist import errors
from gsl_dist.config import Strict, check_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    page
    for page in (
        *ROOT.glob("*.md"),
        *(p for top in ("docs", "deploy", "gsl_dist", "tests") for p in ROOT.glob(f"{top}/**/*.md")),
    )
    if "build" not in page.parts
)
STAGES = ("train", "codebook", "encode", "build", "serve", "evaluate", "tune", "match", "compact", "pipeline", "submit")


def read_prose(page):
    """A page without its code: what stands there is no link, and no heading."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def list_links(page):
    return re.findall(r"!?\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", read_prose(page)))


def list_anchors(page):
    """Anchors as code hosts give them: lower case, spaces to dashes, all else that is no letter, digit or dash gone."""
    text = read_prose(page)
    named = [
        re.sub(r"\s*\{#.*\}$|[`*]|\]\([^)]*\)|\[", "", title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    ]
    slugs = [re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in named]
    return {*slugs, *re.findall(r"\{#([\w.-]+)\}", text), *re.findall(r'id="([\w.-]+)"', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_anchors_that_are_there(page):
    lost = []
    for link in list_links(page):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link) or is_made(page, target):
            continue
        place = (page.parent / unquote(target)).resolve() if target else page
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in list_anchors(place)):
            lost.append(link)
    assert lost == []


def is_made(page, target):
    """Pages of the site that are made of the code, when it is built."""
    place = posixpath.normpath(posixpath.join(page.relative_to(ROOT).parent.as_posix(), target))
    return place.startswith("docs/reference/") or place == "docs/deploy.md"


def list_configs():
    """Configs that pages show whole: those of the page of a stage, and others that say which file they are."""
    for page in PAGES:
        for text in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            named = re.match(r"# configs/\w+/(\w+)\.yaml\n", text)
            stage = named[1] if named else page.stem if page.parent.name == "stages" else None
            if stage in STAGES:
                yield pytest.param(stage, text, id=f"{page.stem}: {text.splitlines()[0]}")


@pytest.mark.parametrize(("stage", "text"), list_configs())
def test_a_config_that_a_page_shows_loads_into_its_stage(stage, text):
    pytest.importorskip("ray")
    kind = getattr(importlib.import_module(f"gsl_dist.cluster.{stage}"), f"{stage.capitalize()}Config")
    assert check_config(kind, yaml.safe_load(text))


def test_pages_point_at_no_server_by_an_insecure_or_local_address():
    shown = {str(page.relative_to(ROOT)): [link for link in list_links(page) if ":" in link] for page in PAGES}
    assert {
        page: bad for page, links in shown.items() if (bad := [x for x in links if not x.startswith("https://")])
    } == {}


def test_every_alert_and_every_metric_is_told_of_in_operations():
    pytest.importorskip("prometheus_client")
    from gsl_dist.service.meters import Meters

    told = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())["groups"][0]["rules"]
    metrics = {metric.name for metric in Meters().registry.collect()}
    assert {name for name in [*(rule["alert"] for rule in rules), *metrics] if f"`{name}" not in told} == set()


def test_every_error_and_every_code_of_an_answer_is_told_of_in_errors():
    told = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    source = (ROOT / "gsl_dist" / "service" / "app.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'_refuse\(\w+, "(\w+)"', source)) | set(re.findall(r'\d{3}: "(\w+)"', source))
    kinds = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.GslError)
    }
    assert len(codes) > 6 and {name for name in codes | kinds if f"`{name}`" not in told} == set()


class Page(HTMLParser):
    """The places of a page, what it leads to and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.places, self.links, self.loads, self.tags, self.text = set(), [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.places |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.loads += [found[name] for name in ("src", "href") if tag not in ("a", "base") and found.get(name)]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="the extra docs is not installed")
    pytest.importorskip("ray")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    how = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=how, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return {path.relative_to(place).as_posix(): Page(path) for path in place.rglob("*.html")} | {"": place}


def open_maker(name):
    """Import a module of docs/site, as mkdocs does."""
    sys.path.insert(0, str(ROOT / "docs" / "site"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def list_pages(site):
    return {name: page for name, page in site.items() if name and name != "404.html"}


def test_every_link_and_anchor_inside_the_site_leads_somewhere(site):
    lost = []
    for name, page in list_pages(site).items():
        for link in page.links:
            if urlparse(link).scheme:
                continue
            target, _, anchor = unquote(link).partition("#")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if target else name
            place = posixpath.join(place, "index.html") if (site[""] / place).is_dir() else place
            if not (site[""] / place).exists() or (anchor and place in site and anchor not in site[place].places):
                lost.append((name, link))
    assert lost == []


def test_the_site_loads_nothing_from_another_server(site):
    loaded = {(name, link) for name, page in list_pages(site).items() for link in page.loads if urlparse(link).netloc}
    assert loaded == set()
    made = [path for kind in ("*.css", "*.js") for path in site[""].glob(kind)]
    assert len(made) == 2 and not [path for path in made if "http" in path.read_text(encoding="utf-8")]


def test_formulas_are_markup_that_needs_no_script(site):
    with_formulas = {
        page.relative_to(ROOT / "docs") for page in PAGES if re.search(r"^```math|\$`", page.read_text(), re.M)
    }
    assert len(with_formulas) >= 3
    for page in with_formulas:
        built = site[page.with_suffix(".html").as_posix()]
        written = (ROOT / "docs" / page).read_text()
        assert built.tags.count("math") == written.count("```math") + len(re.findall(r"\$`", written))
        assert "merror" not in built.tags and not [text for text in built.text if "$`" in text]


@pytest.mark.parametrize("text", [r"\frac{1", r"\unheard x", r"\operatorname*{arg\,max}_c"])
def test_a_formula_that_would_be_shown_as_it_is_written_is_refused(text):
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="the extra docs is not installed")
    with pytest.raises(exceptions.PluginError, match="cannot be shown"):
        open_maker("formulas").show_formula(text)


def test_every_page_of_results_is_in_the_menu_without_being_listed(site):
    there = {page.with_suffix(".html").name for page in (ROOT / "docs" / "results").glob("*.md")} - {"README.html"}
    assert there and there <= set(site["results/index.html"].links)


def test_a_site_on_a_disk_can_be_searched(site):
    from selenium.webdriver.support.ui import WebDriverWait

    with start_browser() as browser:
        browser.get((site[""] / "index.html").as_uri())
        field = browser.find_element("css selector", ".md-search__input")
        WebDriverWait(browser, 20).until(lambda _: field.is_displayed())
        field.click()
        field.send_keys("keep_vectors")

        def read_hits(_):
            return [hit.text for hit in browser.find_elements("css selector", ".md-search-result__item")]

        hits = WebDriverWait(browser, 20).until(read_hits)
    assert any("keep_vectors" in hit for hit in hits)


def test_every_page_has_one_title_and_is_reached_from_the_first(site):
    pages = list_pages(site)
    assert {name for name, page in pages.items() if page.tags.count("h1") != 1} == set()
    seen, open_pages = set(), ["index.html"]
    while open_pages:
        name = open_pages.pop()
        seen.add(name)
        found = {
            posixpath.normpath(posixpath.join(posixpath.dirname(name), x.partition("#")[0])) for x in pages[name].links
        }
        open_pages += [place for place in found if place in pages and place not in seen]
    assert seen == set(pages)


def test_a_page_of_results_that_no_list_names_is_listed_by_its_title(tmp_path):
    (tmp_path / "README.md").write_text("# Results\n\n- [Second](b.md)\n")
    for name, title in {"a": "First", "b": "Second", "c": "Third"}.items():
        (tmp_path / f"{name}.md").write_text(f"# {title}\n")
    results = open_maker("results")
    assert results.list_pages(tmp_path) == ["README.md", "b.md", "a.md", "c.md"]
    listed = results.add_missing((tmp_path / "README.md").read_text(), tmp_path)
    assert listed == "# Results\n\n- [Second](b.md)\n- [First](a.md)\n- [Third](c.md)\n"


def read_schema(model):
    """The fields of a model and of all models in it, as its JSON schema tells them: not as the page was made."""
    schema = model.model_json_schema()
    return [schema, *schema.get("$defs", {}).values()]


def test_every_field_of_every_config_is_on_the_page_of_configs(site):
    page = site["reference/configs.html"]
    fields = {place.split(".")[-1] for place in page.places if "." in place}
    for stage in STAGES:
        model = getattr(importlib.import_module(f"gsl_dist.cluster.{stage}"), f"{stage.capitalize()}Config")
        own, *others = read_schema(model)
        assert {f"{stage}.{name}" for name in own["properties"]} <= page.places
        for inner in others:
            names = set(inner.get("properties", {}))
            holders = {place.rpartition(".")[0] for place in page.places if place.rpartition(".")[2] in names}
            assert not names or any({f"{holder}.{name}" for name in names} <= page.places for holder in holders), inner
            assert names <= fields


def test_every_config_model_of_the_package_is_reached_from_a_stage(site):
    for found in pkgutil.walk_packages(gsl_dist.__path__, "gsl_dist."):
        if "pb2" not in found.name:
            importlib.import_module(found.name)
    models, left = set(), [Strict]
    while left:
        left += (kinds := left.pop().__subclasses__())
        # Other tests may have brought in models of their own, and the deployment's.
        own = (kind for kind in kinds if kind.__module__.startswith("gsl_dist."))
        models |= {kind for kind in own if kind.__name__.endswith("Config") and not kind.__name__.startswith("_")}
    text = " ".join(" ".join(site["reference/configs.html"].text).split())
    told = {model.__name__: " ".join(model.__doc__.splitlines()[0].replace("`", " ").split()) for model in models}
    squeezed = text.replace(" ", "")
    assert {name for name, first in told.items() if first.replace(" ", "") not in squeezed} == set()


def test_every_setting_says_what_it_means():
    fields = open_maker("fields")
    models = [*fields.list_models().values(), *fields.list_groups()]
    silent = {
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if name != "kind" and not field.description and not list(fields.find_models(field.annotation))
    }
    assert silent == set()


def test_every_command_and_every_option_is_on_the_page_of_commands(site):
    from gsl_dist.cli import app

    page, run = site["reference/commands.html"], CliRunner().invoke
    text = " ".join(page.text)
    commands = re.findall(r"^│ (\w+)\s", run(app, ["--help"], env={"COLUMNS": "120"}).output, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        assert f"gsl-{command}" in page.places
        told = run(app, [command, "--help"], env={"COLUMNS": "160"}).output
        for option in set(re.findall(r"(--[a-z][a-z-]+)", told.partition("─ Options")[2])) - {"--help"}:
            assert option in text, (command, option)


def test_every_route_and_every_field_of_it_is_on_the_page_of_http(site):
    pytest.importorskip("fastapi")
    from gsl_dist.service.app import Desk, create_app

    page = site["reference/http.html"]
    for path, methods in create_app(Desk(None)).openapi()["paths"].items():
        for method, said in methods.items():
            assert "-".join([method, *path.strip("/").split("/")]) in page.places
            schemas = [
                body.get("content", {}).get("application/json", {}).get("schema", {})
                for body in [said.get("requestBody", {}), said["responses"]["200"]]
            ]
            assert {name for schema in schemas for name in schema.get("properties", {})} <= set(page.text), path
            assert set(said["responses"]) <= {text.strip() for text in page.text} | {"200"}


def test_every_public_method_of_the_clients_is_on_the_page_of_python(site):
    from gsl_dist.client import AsyncClient, Client

    for kind in (Client, AsyncClient):
        names = {name for name in vars(kind) if not name.startswith("_")}
        assert {f"{kind.__name__.lower()}-{name}" for name in names} <= site["reference/python.html"].places
