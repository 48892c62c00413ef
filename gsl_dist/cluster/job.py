"""One stage as a Ray job: a config in, one line of JSON out, and an exit code; and progress that its log tells of.

`python -m gsl_dist.cluster.job STAGE CONFIG [key=value ...]` does what `jobs/STAGE.py` does, for machines on which the
package is installed and there are no scripts. Progress is written a line a step, and `read_progress` reads it back from
the log of whichever job: that is all there is between a stage and those who follow it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import BaseModel

from gsl_dist.config import ROOT, Strict, load_config
from gsl_dist.errors import BadInput, ConfigError, GslError

if TYPE_CHECKING:
    from gsl_dist.cluster.session import Progress

C = TypeVar("C", bound=Strict)
log = logging.getLogger("gsl_dist")

Stage = Literal["train", "codebook", "encode", "build", "tune", "evaluate", "match", "compact", "serve"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""Every stage, in the order in which they build on each other."""
PIPELINE = "pipeline"
"""What several stages in a row are called, in logs too."""
PARENT = "GSL_PARENT"
"""The process that a stage ends with, where it is part of a pipeline."""

MISTAKE = 2
"""The exit code that says: the caller has to put something right, trying again will not help."""
_COPIES = "working_dir_files"
_LINE = re.compile(r"^\S+ \S+ INFO (\S+) (\d+)/(\d+) ?(.*)$")


class Step(NamedTuple):
    """How far something is: so many of so many steps, in a stage or, where none is named, in the whole job."""

    stage: str
    what: str
    done: int
    total: int
    remark: str


def open_stage(name: str) -> tuple[type[Strict], Callable[..., Any]]:
    """Give the config class of a stage and the function that runs it; one word a stage names both.

    Raises:
        BadInput: there is no such stage.
    """
    if name not in STAGES:
        raise BadInput("stage", name, f"the stages are {', '.join(STAGES)}")
    module = importlib.import_module(f"gsl_dist.cluster.{name}")
    return getattr(module, f"{name.capitalize()}Config"), getattr(module, f"run_{name}")


def run_job(kind: type[C], run: Callable[[C, Progress], Any]) -> None:
    """Run a stage with the config and overrides of the command line, and exit with 0, or 2 for a caller's mistake."""
    start_log()
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} CONFIG [key=value ...]")
    sys.exit(carry_out(kind, run, sys.argv[1], sys.argv[2:]))


def carry_out(kind: type[C], run: Callable[[C, Progress], Any], path: str, overrides: Sequence[str]) -> int:
    """Run a stage, write what it made as a line of JSON, and give the exit code."""
    told: list[str] = []

    def tell(what: str, done: int, total: int, remark: str) -> None:
        told.append(what)
        log_progress(what, done, total, remark)

    try:
        config = load_config(kind, path, overrides)
        _check_places(config)
        made = run(config, tell)
    except GslError as error:
        log.error("%s", error)
        return error.exit_code
    if not told:  # a stage has nothing to tell where its artefact is whole
        log_progress(run.__name__.removeprefix("run_"), 1, 1, "whole already")
    sys.stdout.write(json.dumps(summarize(made), sort_keys=True) + "\n")
    return 0


def start_log() -> None:
    """Write what happens to the log of the job, a line each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Of HTTP every request would be a line, and faiss tells how it is loaded.
    for library in ("httpx", "faiss"):
        logging.getLogger(library).setLevel(logging.WARNING)


def log_progress(what: str, done: int, total: int, remark: str) -> None:
    """Write progress to the log, a line each."""
    log.info("%s %d/%d %s", what, done, total, remark)


def read_progress(text: str) -> list[Step]:
    """Give how far each thing is by the log of a job, in the order in which they began."""
    stage, steps = "", dict[tuple[str, str], Step]()
    for line in text.splitlines():
        if not (found := _LINE.match(line)):
            continue
        what, done, total, remark = found[1], int(found[2]), int(found[3]), found[4]
        if what == PIPELINE:
            stage = remark
        place = ("" if what == PIPELINE else stage, what)
        steps[place] = Step(*place, done, total, remark)
    return list(steps.values())


def summarize(made: Any) -> dict[str, Any]:
    """Give what a stage made as one small dict: facts without lists of files or epochs."""
    plain = made.model_dump(mode="json") if isinstance(made, BaseModel) else dict(made)
    plain = plain.get("facts", plain)
    return {key: value for key, value in plain.items() if isinstance(value, (str, int, float, bool))}


def _check_places(config: Strict) -> None:
    """Let a config pass that names no place in the copy of the working directory that a job runs in.

    Raises:
        ConfigError: it does: what is written there is lost with the job, and other machines do not see it.
    """
    here = os.getcwd()
    if f"{os.sep}{_COPIES}{os.sep}" in here and f'"{here}' in config.model_dump_json():
        allowed = "a job runs in a copy that is thrown away: set it to the folder or URI where relative paths begin"
        raise ConfigError(ROOT, os.environ.get(ROOT), allowed)


def end_with(parent: int) -> None:
    """End this process when the one that started it has ended: two at work on one artefact would be one too many."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Run the stage that the command line names."""
    start_log()
    if len(sys.argv) < 3:
        sys.exit("usage: python -m gsl_dist.cluster.job STAGE CONFIG [key=value ...]")
    if parent := os.environ.pop(PARENT, None):
        end_with(int(parent))
    try:
        kind, run = open_stage(sys.argv[1])
    except BadInput as error:
        log.error("%s", error)
        sys.exit(MISTAKE)
    sys.exit(carry_out(kind, run, sys.argv[2], sys.argv[3:]))


if __name__ == "__main__":
    main()
