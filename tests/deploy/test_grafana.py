"""The dashboard asks for nothing that a service does not tell."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("faiss")
from gsl_dist.service.meters import Meters

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "gsl_dist.json"


def test_every_figure_of_the_dashboard_is_one_that_a_service_counts():
    told = {name for family in Meters().registry.collect() for name in (family.name, f"{family.name}_total")}
    told |= {f"{name}_bucket" for name in told}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = [name for panel in panels for goal in panel["targets"] for name in re.findall(r"gsl_\w+", goal["expr"])]
    assert len(panels) >= 10 and set(asked) <= told
    assert {"gsl_requests_total", "gsl_stage_seconds_bucket", "gsl_recall", "gsl_partial_answers_total"} <= set(asked)


def test_panels_have_names_and_numbers_of_their_own_and_do_not_overlap():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
