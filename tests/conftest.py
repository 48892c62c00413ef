"""What every test stands on: fixed seeds, and one local Ray for all tests that need it."""

import os
import random
import sys
from pathlib import Path

# Tiny tensors gain nothing from threads, and threads that spin for shared cores lose minutes; set before any import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def ray_session():
    """A Ray on this machine; whatever the tests can import, its workers can."""
    ray = pytest.importorskip("ray")
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(ROOT / "tests"), *([inherited] if inherited else [])]
    from gsl_dist.cluster.session import heard_interrupts

    with heard_interrupts():
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}},
        )
    yield
    ray.shutdown()
