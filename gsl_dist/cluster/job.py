"""One stage as a Ray job: a config in, one line of JSON out, and an exit code."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel

from gsl_dist.cluster.session import Progress
from gsl_dist.config import Strict, load_config
from gsl_dist.errors import GslError

C = TypeVar("C", bound=Strict)
log = logging.getLogger("gsl_dist")


def run_job(kind: type[C], run: Callable[[C, Progress], Any]) -> None:
    """Run a stage with the config and overrides of the command line, and exit with 0, or 2 for a caller's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} CONFIG [key=value ...]")
    try:
        made = run(load_config(kind, sys.argv[1], sys.argv[2:]), log_progress)
    except GslError as error:
        log.error("%s", error)
        sys.exit(2)
    sys.stdout.write(json.dumps(summarize(made), sort_keys=True) + "\n")


def log_progress(what: str, done: int, total: int, remark: str) -> None:
    """Write progress to the log, a line each."""
    log.info("%s %d/%d %s", what, done, total, remark)


def summarize(made: Any) -> dict[str, Any]:
    """Give what a stage made as one small dict: facts without lists of files or epochs."""
    plain = made.model_dump(mode="json") if isinstance(made, BaseModel) else dict(made)
    plain = plain.get("facts", plain)
    return {key: value for key, value in plain.items() if isinstance(value, (str, int, float, bool))}
