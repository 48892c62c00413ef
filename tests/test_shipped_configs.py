"""Every config that is shipped loads into its stage's class."""

import importlib
from pathlib import Path

import pytest

from gsl_dist.config import load_config

pytest.importorskip("ray")

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SHIPPED = sorted(CONFIGS.rglob("*.yaml"))
STAGES = {"train", "codebook", "encode", "build", "serve", "evaluate", "tune", "compact", "match"}
JOBS = {"pipeline", "submit"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_config_loads_into_its_stage(path):
    module = importlib.import_module(f"gsl_dist.cluster.{path.stem}")
    load_config(getattr(module, f"{path.stem.capitalize()}Config"), path)


def test_the_example_has_a_file_for_every_stage():
    assert {path.stem for path in (CONFIGS / "fashion").iterdir()} == STAGES | JOBS
