"""The stages of a folder of configs, one after another, as one job.

Each stage is a process of its own: what it held is given back when it ends, and one that was killed is tried again. No
stage is skipped here: a stage whose artefact is whole finds that out by itself, by checksums, and says so. Hence the
recovery of a pipeline is to run it again, like that of a stage.

This process waits; it knows neither torch nor Ray.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from gsl_dist.cluster.job import MISTAKE, PARENT, PIPELINE, STAGES, Stage, log_progress, open_stage, start_log
from gsl_dist.config import Strict, load_config
from gsl_dist.errors import ConfigError, GslError

if TYPE_CHECKING:
    from gsl_dist.cluster.session import Progress

log = logging.getLogger("gsl_dist")

_ON_DEMAND = ("compact", "serve")


class PipelineConfig(Strict):
    """Which stages of a folder are run, and how often one that fails is tried."""

    stages: tuple[Stage, ...] | None = Field(
        default=None, min_length=1, description="None: those that have a file in the folder, but compact and serve"
    )
    files: dict[Stage, str] = Field(default={}, description="files of another name than <stage>.yaml")
    tries: int = Field(default=3, ge=1, description="how often a stage is run that ends without telling of a mistake")
    pause_s: float = Field(default=5.0, ge=0, description="between the first two tries; then twice as long each time")


@dataclass(frozen=True)
class Call:
    """One stage to run.

    Args:
        stage: its name.
        path: its config.
        overrides: what is laid over it.
    """

    stage: str
    path: Path
    overrides: tuple[str, ...]

    def check(self) -> None:
        """Let a call pass whose config its stage accepts.

        Raises:
            ConfigError: it does not.
        """
        load_config(open_stage(self.stage)[0], self.path, self.overrides)


def plan_calls(folder: Path, overrides: Sequence[str]) -> tuple[PipelineConfig, list[Call]]:
    """Give what the `pipeline.yaml` of a folder says, and the stages to run in their order.

    Args:
        folder: the configs; `pipeline.yaml` may be missing.
        overrides: `key=value` of the pipeline, or `stage.key=value` of one of its stages.

    Raises:
        ConfigError: there is no such folder, a stage has no file in it, or a setting that none takes.
    """
    if not folder.is_dir():
        raise ConfigError("config", str(folder), "it must be a folder with a file for each stage, such as train.yaml")
    own = [override for override in overrides if _owner(override) not in STAGES]
    path = folder / f"{PIPELINE}.yaml"
    config = load_config(PipelineConfig, path if path.exists() else None, own)
    places = {stage: folder / config.files.get(stage, f"{stage}.yaml") for stage in STAGES}
    wanted = config.stages or [s for s in STAGES if s not in _ON_DEMAND and places[s].exists()]
    calls = []
    for stage in sorted(wanted, key=STAGES.index):
        if not places[stage].exists():
            raise ConfigError("stages", stage, f"there is no {places[stage]}")
        laid = (override.partition(".")[2] for override in overrides if _owner(override) == stage)
        calls.append(Call(stage, places[stage], tuple(laid)))
    if idle := [override for override in overrides if _owner(override) in set(STAGES) - set(wanted)]:
        raise ConfigError("override", idle[0], f"the stages that are run are {', '.join(wanted)}")
    if not calls:
        raise ConfigError("config", str(folder), f"it must hold a file for a stage, one of {', '.join(places)}")
    return config, calls


def run_pipeline(config: PipelineConfig, calls: Sequence[Call], progress: Progress = log_progress) -> None:
    """Run stages in their order, each until its artefact is whole.

    Raises:
        GslError: one has failed for good; those before it are done.
    """
    for number, call in enumerate(calls):
        progress(PIPELINE, number, len(calls), call.stage)
        _run_stage(config, call)
    progress(PIPELINE, len(calls), len(calls), "done")


def _run_stage(config: PipelineConfig, call: Call) -> None:
    for attempt in range(1, config.tries + 1):
        code = _start_process(call)
        if code == 0:
            return
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == MISTAKE:
            raise GslError(f"stage {call.stage} was refused; the line before says why")
        log.warning("%s %s in try %d of %d", call.stage, how, attempt, config.tries)
        if attempt < config.tries:
            time.sleep(config.pause_s * 2 ** (attempt - 1))
    raise GslError(f"stage {call.stage} {how} in each of {config.tries} tries")


def _start_process(call: Call) -> int:
    command = [sys.executable, "-m", "gsl_dist.cluster.job", call.stage, str(call.path), *call.overrides]
    return subprocess.run(command, env=os.environ | {PARENT: str(os.getpid())}, check=False).returncode


def main() -> None:
    """Run the pipeline that the command line names, and exit with 0, or 2 if it failed for good."""
    start_log()
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER [key=value ...] [stage.key=value ...]")
    try:
        run_pipeline(*plan_calls(Path(sys.argv[1]), sys.argv[2:]))
    except GslError as error:
        log.error("%s", error)
        sys.exit(MISTAKE)


def _owner(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


if __name__ == "__main__":
    main()
