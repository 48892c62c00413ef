"""How a benchmark writes what it measured: figures, spread, commit and machine, whole or not at all."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from gsl_dist.cluster.build import list_software
from gsl_dist.demo import read_commit
from gsl_dist.storage import Folder

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, figures: dict[str, Any]) -> None:
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    Folder(RESULTS).write_json(
        f"{name}.json", figures | {"commit": read_commit(), "machine": machine, "software": list_software()}
    )


def spread(values: list[float]) -> dict[str, Any]:
    kept = np.asarray(values, dtype=np.float64)
    return {"mean": kept.mean(), "sd": kept.std(ddof=1) if len(kept) > 1 else 0.0, "values": kept.tolist()}
