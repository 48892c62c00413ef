"""The report page: complete, self-contained, and refused when a figure is missing."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from gsl_dist.errors import BadInput
from gsl_dist.report import Pictures, Report, ResultRow, embed_picture, write_report

REPORT = {
    "dataset": "Fashion-MNIST",
    "classes": ["Coat", "Pullover", "<Shirt & co>"],
    "database_size": 7000,
    "query_size": 1000,
    "train_size": 5000,
    "bytes_per_item": 4,
    "bits": 32,
    "map_coded": 0.8123,
    "map_float": 0.8341,
    "map_two_step": 0.7012,
    "quantization_error": 0.0456,
    "quantization_error_two_step": 0.1789,
    "recall_at_10_vs_exact": 0.432,
    "shards": 2,
    "replicas": 1,
    "served_p50_ms": 2.24,
    "served_p99_ms": 6.61,
    "served_batch_qps": 61234.4,
    "inprocess_batch_qps": 55123.4,
    "echo_p50_ms": 1.04,
    "seconds_by_stage": {
        "build": 2.5,
        "train": 312.0,
        "codebook": 3.25,
        "encode": 9.75,
        "serve": 6.5,
        "evaluate": 14.0,
    },
    "map_by_bits": [
        {"bits": 16, "snapped": 0.78, "two_step": 0.61},
        {"bits": 32, "snapped": 0.8123, "two_step": 0.7012},
        {"bits": 64, "snapped": 0.825, "two_step": 0.78},
    ],
    "history": {
        "snapped": [
            {"epoch": 1, "phase": "warm-up", "loss": 2.0, "quantization_error": None},
            {"epoch": 2, "phase": "warm-up", "loss": 1.2, "quantization_error": None},
            {"epoch": 3, "phase": "snap", "loss": 1.0, "quantization_error": 0.2},
            {"epoch": 4, "phase": "snap", "loss": 0.8, "quantization_error": 0.05},
        ],
        "two_step": [
            {"epoch": epoch, "phase": "warm-up", "loss": 2.0 / epoch, "quantization_error": 0.3 / epoch}
            for epoch in range(1, 5)
        ],
    },
    "recall_by_probes": [
        {"probes": 1, "recall_at_10": 0.31, "latency_ms": 0.05},
        {"probes": 8, "recall_at_10": 0.42, "latency_ms": 0.11},
    ],
    "configs": {"train": {"epochs": 4, "loss": "proxy"}, "serve": {"port": 8000}},
    "software": {"numpy": "2.4.6", "faiss": "1.15.1"},
    "commit": "abc1234",
    "seed": 7,
    "machine": {"cores": 2},
}


def make_pictures():
    rng = np.random.default_rng(0)
    image = lambda *shape: rng.integers(0, 256, shape, dtype=np.uint8)
    mixed = [(image(28, 28), "Coat" if place % 3 else "Pullover", float(place)) for place in range(10)]
    escaped = [(image(28, 28), "<Shirt & co>", float(place)) for place in range(10)]
    return Pictures([ResultRow(image(28, 28), "Coat", mixed), ResultRow(image(120, 90, 3), "<Shirt & co>", escaped)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    write_report(REPORT, make_pictures(), folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_json_holds_every_figure_sorted(folder):
    text = (folder / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == REPORT
    assert list(json.loads(text)) == sorted(Report.model_fields)
    assert text.startswith('{\n  "bits": 32,')


def test_page_loads_nothing(page):
    references = re.findall(r"""(?:src|href|srcset|data)\s*=\s*["']([^"']*)""", page)
    assert references and all(reference.startswith(("data:image/png;base64,", "#")) for reference in references)
    assert not re.search(r"<(script|link|iframe|object)\b|@import|https?://", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_page_shows_every_query_and_marks_each_neighbour(page):
    assert page.count('class="result"') == 2
    assert page.count("<img ") == 2 + 20
    # Neighbours 0, 3, 6 and 9 of the first query are pullovers; all ten of the second are right.
    assert page.count('<li class="right">') == page.count('aria-hidden="true">✓</span>') == 6 + 10
    assert page.count('<li class="wrong">') == page.count('aria-hidden="true">✗</span>') == 4
    assert "6 of 10 right" in page and "10 of 10 right" in page


def test_only_small_pictures_are_crisp(page):
    assert page.count('class="crisp"') == 21
    assert len(re.findall(r'<img [^>]*alt="[^"]+"', page)) == 22


def test_labels_are_escaped(page):
    assert "<Shirt" not in page
    assert "&lt;Shirt &amp; co&gt;" in page


def test_page_states_the_headline_figures(page):
    for figure in ("0.812", "0.834", "0.701", "0.046", "0.179", "0.432", "2.2", "6.6", "1.0", "61,234", "55,123"):
        assert re.search(rf"<td>{re.escape(figure)}<", page), figure
    assert "Fashion-MNIST in 4 bytes an item" in page
    assert "2 shards by 1 replica," in page
    assert "epochs: 4" in page and "abc1234" in page and "numpy 2.4.6" in page


def test_charts_say_in_words_what_they_draw(page):
    told = re.findall(r'role="img" aria-label="([^"]*)"', page)
    assert len(told) == page.count("<svg ") == 5
    assert "snapped from 2 to 0.8; two-step from 2 to 0.5. Snapping starts after epoch 2." in told[0]
    assert "snapped from 0.2 to 0.05" in told[1]
    assert "16 bits, snapped 0.780, two-step 0.610" in told[2]
    assert "8 probes, 0.420 in 0.11 ms" in told[3]
    assert told[4].startswith("Time by stage: train 5 min 12 s; codebook 3.2 s; encode")


def test_charts_take_their_colours_from_the_page(page):
    assert "#01020" not in page
    assert "var(--snapped)" in page and "prefers-color-scheme: dark" in page


def test_writing_twice_gives_the_same_bytes(folder, tmp_path):
    write_report(REPORT, make_pictures(), tmp_path)
    for name in ("report.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_numpy_figures_are_accepted(tmp_path):
    changed = REPORT | {"map_coded": np.float32(0.5), "seed": np.int64(3)}
    write_report(changed, Pictures([]), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["map_coded"] == 0.5


@pytest.mark.parametrize("key", sorted(Report.model_fields))
def test_a_missing_figure_is_named(key, tmp_path):
    with pytest.raises(BadInput, match=rf"report\.{key}: got None, but this setting is required"):
        write_report({name: value for name, value in REPORT.items() if name != key}, Pictures([]), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("map_coded",), float("nan"), r"report\.map_coded: got nan"),
        (("machine", "gb"), float("inf"), r"report\.machine\.gb: got inf"),
        (("history", "snapped", 1, "phase"), "cool-down", r"report\.history\.snapped\.1\.phase: got 'cool-down'"),
        (("map_codded",), 1.0, "did you mean map_coded"),
        (("map_by_bits",), [], r"report\.map_by_bits"),
        (("configs", "train", "rng"), object(), "cannot be written as JSON"),
    ],
)
def test_a_wrong_figure_is_named(path, value, match, tmp_path):
    report = copy.deepcopy(REPORT)
    *parents, leaf = path
    place = report
    for parent in parents:
        place = place[parent]
    place[leaf] = value
    with pytest.raises(BadInput, match=match):
        write_report(report, Pictures([]), tmp_path)


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8)])
def test_other_pictures_are_refused(image):
    with pytest.raises(BadInput, match="uint8"):
        embed_picture(image)
