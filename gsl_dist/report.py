"""One page that shows what an index gives: how right, how small, how fast, and what it took.

The figures come in as a plain dict, the pictures as arrays; out go `report.json` and a `report.html` that loads nothing
from anywhere. Charts are SVG inside the page and take their colours from its style sheet, so that they follow light and
dark. This module measures nothing and knows neither indexes nor clusters; it needs the extra `report`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from gsl_dist.config import Strict, check_config
from gsl_dist.errors import BadInput, ConfigError
from gsl_dist.storage import Folder

Picture = NDArray[np.uint8]
STAGES = ("train", "codebook", "encode", "build", "serve", "evaluate")
SMALL_PIXELS = 96
"""Up to this width a picture is shown enlarged, with its pixels kept crisp."""

# Stand-ins that no chart needs as a colour; they become the page's own colours once the chart is SVG.
INK, MUTED, LINE = "#010203", "#010204", "#010205"
SNAPPED, TWO_STEP, FLOAT = "#010206", "#010207", "#010208"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", SNAPPED: "snapped", TWO_STEP: "two-step", FLOAT: "float"}
# Above the axes, where no curve can run through it.
_LEGEND: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0.3}
_ARMS = (("snapped", "snapped", SNAPPED, "-", "o"), ("two_step", "two-step", TWO_STEP, "--", "s"))


class Epoch(Strict):
    """One epoch of one arm; there is no quantization error before there is a codebook."""

    epoch: int = Field(ge=0)
    phase: Literal["warm-up", "snap"]
    loss: float
    quantization_error: float | None


class History(Strict):
    """The epochs of both arms."""

    snapped: list[Epoch] = Field(min_length=1)
    two_step: list[Epoch] = Field(min_length=1)


class BitsPoint(Strict):
    """The mAP of both arms at one code length."""

    bits: int = Field(ge=1)
    snapped: float
    two_step: float


class ProbesPoint(Strict):
    """What one number of probes costs and gives."""

    probes: int = Field(ge=1)
    recall_at_10: float
    latency_ms: float = Field(ge=0)


class Report(Strict):
    """Every figure of the page; a figure that is missing or unknown is refused."""

    dataset: str
    classes: list[str]
    database_size: int
    query_size: int
    train_size: int
    bytes_per_item: float
    bits: int
    map_coded: float
    map_float: float
    map_two_step: float
    quantization_error: float
    quantization_error_two_step: float
    recall_at_10_vs_exact: float
    shards: int
    replicas: int
    served_p50_ms: float
    served_p99_ms: float
    served_batch_qps: float
    inprocess_batch_qps: float
    echo_p50_ms: float
    seconds_by_stage: dict[str, float]
    map_by_bits: list[BitsPoint] = Field(min_length=1)
    history: History
    recall_by_probes: list[ProbesPoint] = Field(min_length=1)
    configs: dict[str, dict[str, Any]]
    software: dict[str, str]
    commit: str
    seed: int
    machine: dict[str, Any]


@dataclass(frozen=True)
class ResultRow:
    """A query and its nearest items, nearest first: (image, label, distance) each.

    Shapes: image (H, W) or (H, W, 3) uint8, and so is each neighbour's.
    """

    image: Picture
    label: str
    neighbours: list[tuple[Picture, str, float]]

    @property
    def right(self) -> int:
        """Give how many neighbours bear the query's label."""
        return sum(label == self.label for _, label, _ in self.neighbours)


@dataclass(frozen=True)
class Pictures:
    """The queries that the page shows."""

    queries: list[ResultRow]


@dataclass(frozen=True)
class Chart:
    """A drawing, and what it says to those who do not see it."""

    title: str
    alt: str
    svg: Markup


def write_report(report: dict[str, Any], pictures: Pictures, folder: Path) -> None:
    """Write `report.json` and a `report.html` that needs no other file.

    Args:
        report: the figures: the fields of `Report`.
        pictures: queries with what was found for them.
        folder: where to write; made if absent.

    Raises:
        BadInput: a figure is missing, unknown, not finite or of the wrong kind, or a picture is not uint8.
    """
    plain = _to_plain(report, "report")
    checked = _check_report(plain)
    page = _render_page(checked, pictures)
    target = Folder(folder)
    target.write_bytes("report.json", (json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    target.write_bytes("report.html", page.encode())


def embed_picture(image: Picture) -> str:
    """Give a picture as the address that holds all of it (a PNG in a `data:` URI).

    Shapes: image (H, W) or (H, W, 3) uint8.

    Raises:
        BadInput: another shape or dtype.
    """
    fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
    if image.dtype != np.uint8 or not fits or not image.size:
        raise BadInput("pictures", (image.shape, str(image.dtype)), "an image must be uint8, (H, W) or (H, W, 3)")
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _to_plain(value: Any, where: str) -> Any:
    """Turn numpy values into Python's own; refuse what JSON cannot say."""
    if isinstance(value, dict):
        return {str(key): _to_plain(child, f"{where}.{key}") for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(child, f"{where}.{place}") for place, child in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(where, value, "it must be a finite number")
    if value is None or isinstance(value, str | int | float):
        return value
    raise BadInput(where, value, f"a {type(value).__name__} cannot be written as JSON")


def _check_report(plain: dict[str, Any]) -> Report:
    try:
        return check_config(Report, plain)
    except ConfigError as error:
        # It is no setting that is wrong, so the error should not read as if a config file were.
        raise BadInput(f"report.{error.field}", _value_at(plain, error.field), error.allowed) from None


def _render_page(report: Report, pictures: Pictures) -> str:
    here = Path(__file__).parent
    jinja = Environment(loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    jinja.filters["embed"] = embed_picture
    return jinja.get_template("report.html").render(
        report=report,
        queries=pictures.queries,
        is_small=lambda image: max(image.shape[:2]) <= SMALL_PIXELS,
        charts=_draw_charts(report),
        configs=yaml.safe_dump(report.configs, sort_keys=False, allow_unicode=True),
    )


def _draw_charts(report: Report) -> dict[str, Chart]:
    return {
        "loss": _chart_history(report.history, "loss", "Loss by epoch"),
        "error": _chart_history(report.history, "quantization_error", "Quantization error by epoch"),
        "bits": _chart_bits(report),
        "probes": _chart_probes(report.recall_by_probes),
        "stages": _chart_stages(report.seconds_by_stage),
    }


def _chart_history(history: History, field: str, title: str) -> Chart:
    told = []
    curves = {}
    for arm, name, *_ in _ARMS:
        epochs = getattr(history, arm)
        curves[arm] = [(epoch.epoch, getattr(epoch, field)) for epoch in epochs if getattr(epoch, field) is not None]
        if curves[arm]:
            told.append(f"{name} from {curves[arm][0][1]:.3g} to {curves[arm][-1][1]:.3g}")
    boundary = _find_boundary(history.snapped)

    def paint(axes: Any) -> None:
        for arm, name, colour, dashes, _ in _ARMS:
            axes.plot(*_columns(curves[arm]), dashes, color=colour, label=name)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(*_span([epoch.epoch for epoch in history.snapped + history.two_step]))
        # Room above the curves for the words at the boundary.
        axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
        if boundary is not None:
            axes.axvline(boundary, color=MUTED, linewidth=1, linestyle=":")
            # Placed in the axes' own height, so that the words stay at the top whatever the values are.
            place = {"xytext": (5, -3), "textcoords": "offset points", "va": "top", "color": MUTED}
            axes.annotate("snapping starts", (boundary, 1), xycoords=("data", "axes fraction"), **place)
        axes.legend(**_LEGEND)

    ending = "" if boundary is None else f". Snapping starts after epoch {math.floor(boundary)}"
    return Chart(title, f"{title}: {'; '.join(told) or 'no values'}{ending}.", _draw(f"history-{field}", paint))


def _chart_bits(report: Report) -> Chart:
    points = sorted(report.map_by_bits, key=lambda point: point.bits)
    bits = [point.bits for point in points]

    def paint(axes: Any) -> None:
        axes.axhline(report.map_float, color=FLOAT, linestyle=":", label="float vectors")
        for arm, name, colour, dashes, marker in _ARMS:
            axes.plot(bits, [getattr(point, arm) for point in points], dashes, marker=marker, color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(bits, labels=[str(value) for value in bits])
        axes.minorticks_off()
        axes.set_xlabel("bits per code")
        axes.legend(**_LEGEND)

    told = "; ".join(f"{p.bits} bits, snapped {p.snapped:.3f}, two-step {p.two_step:.3f}" for p in points)
    alt = f"mAP by bits: {told}; float vectors {report.map_float:.3f}."
    return Chart("mAP by bits per code", alt, _draw("map-bits", paint))


def _chart_probes(points: Sequence[ProbesPoint]) -> Chart:
    points = sorted(points, key=lambda point: point.probes)
    place = {"xytext": (5, -4), "textcoords": "offset points", "va": "top", "color": INK}

    def paint(axes: Any) -> None:
        latencies = [point.latency_ms for point in points]
        axes.plot(latencies, [point.recall_at_10 for point in points], "-o", color=SNAPPED)
        for point in points:
            axes.annotate(str(point.probes), (point.latency_ms, point.recall_at_10), **place)
        axes.margins(x=0.08, y=0.16)
        axes.set_xlabel("milliseconds for one query (a point is labelled with its probes)")

    told = "; ".join(f"{p.probes} probes, {p.recall_at_10:.3f} in {p.latency_ms:.2g} ms" for p in points)
    return Chart("recall@10 against latency, by probes", f"recall@10 by probes: {told}.", _draw("probes", paint))


def _chart_stages(seconds: dict[str, float]) -> Chart:
    known = [stage for stage in STAGES if stage in seconds]
    names = known + [stage for stage in seconds if stage not in STAGES]

    def paint(axes: Any) -> None:
        bars = axes.barh(names, [seconds[name] for name in names], height=0.6, color=SNAPPED)
        axes.bar_label(bars, labels=[_tell_seconds(seconds[name]) for name in names], padding=4, color=INK)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.margins(x=0.14)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(left=False, bottom=False, labelbottom=False)

    told = "; ".join(f"{name} {_tell_seconds(seconds[name])}" for name in names)
    return Chart("Time by stage", f"Time by stage: {told}.", _draw("stages", paint, height=0.6 + 0.36 * len(names)))


def _draw(name: str, paint: Callable[[Any], None], height: float = 3.1) -> Markup:
    """Draw on fresh axes and give SVG that can stand inside a page, in the page's colours and font."""
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10.5,
        "text.color": INK,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.markersize": 5,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LINE,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    stream = io.StringIO()
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        paint(figure.add_subplot())
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _fit_page(stream.getvalue())


def _fit_page(svg: str) -> Markup:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # A fixed size would not shrink on a phone; names of groups would repeat from chart to chart.
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg).replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;\"]*;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Safe as it is: matplotlib has escaped the words in it.
    return Markup(svg)


def _find_boundary(epochs: Sequence[Epoch]) -> float | None:
    """Give the point halfway between the last warm-up epoch and the first that snaps; None if either is not there."""
    first = next((place for place, epoch in enumerate(epochs) if epoch.phase == "snap"), 0)
    return (epochs[first - 1].epoch + epochs[first].epoch) / 2 if first else None


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _span(values: Sequence[int]) -> tuple[float, float]:
    low, high = min(values), max(values)
    gap = max(high - low, 1) * 0.03
    return low - gap, high + gap


def _tell_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def _value_at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, list) and key.isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
    return tree
