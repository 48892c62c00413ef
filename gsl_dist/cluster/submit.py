"""Stages handed to a cluster as a Ray job, and jobs looked after: how far they are, what they write, and their end.

A job gets a copy of the working directory, the config by its path in it, and `GSL_ROOT`, the place where the relative
paths of configs begin: by default the folder that one submits from, which suits a cluster that shares its disk; else a
shared folder or a URI. Everything that can be refused is refused before anything is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import shlex
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from ray.dashboard.modules import dashboard_sdk
from ray.dashboard.modules.job import sdk
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from gsl_dist.cluster.job import PIPELINE, STAGES, Step, read_progress
from gsl_dist.cluster.pipeline import plan_calls
from gsl_dist.config import ROOT, Strict, load_config
from gsl_dist.errors import BadInput, ConfigError, GslError

SETTINGS = "submit.yaml"
ADDRESS = "http://127.0.0.1:8265"
_OVER = ("STOPPED", "SUCCEEDED", "FAILED")
_KIND = "gsl"


class EntryConfig(Strict):
    """What the process takes that starts a job and waits for it; the work is done in Ray's workers."""

    cpus: float | None = Field(default=None, ge=0, description="logical cores; None: it is placed where there is room")
    gpus: float | None = Field(default=None, ge=0, description="GPUs; None: none")
    memory_gb: float | None = Field(default=None, gt=0, description="memory to reserve; None: none")
    resources: dict[str, float] = Field(default={}, description="what else the cluster counts: {head: 1}")


class SubmitConfig(Strict):
    """Where jobs run, and what they find there."""

    address: str | None = Field(
        default=None, description=f"the cluster's dashboard; None: RAY_API_SERVER_ADDRESS, or {ADDRESS}"
    )
    working_dir: str = Field(
        default=".",
        min_length=1,
        description="what jobs get a copy of, but what .gitignore and .rayignore name",
    )
    root: str | None = Field(
        default=None,
        pattern=r"^(/|[a-z0-9]+://)",
        description="where relative paths begin: a shared folder or a URI; None: here",
    )
    env: dict[str, str] = Field(default={}, description="environment variables of the job and its workers")
    pip: list[str] = Field(default=[], description="packages to install for the job, unless its machines have them")
    excludes: list[str] = Field(default=[], description="what else of working_dir is not copied, as in .gitignore")
    python: str = Field(default="python", min_length=1, description="the interpreter on the cluster")
    entry: EntryConfig = EntryConfig()


class JobState(Strict):
    """A job as the cluster knows it, and how far it is by its log."""

    job: str
    stage: str
    config: str
    status: str
    message: str
    started: str | None
    seconds: float | None
    steps: list[Step] = []

    @property
    def is_over(self) -> bool:
        """Tell whether it has ended, well or not."""
        return self.status in _OVER


def find_settings(given: Path | None, config: Path) -> SubmitConfig:
    """Give the settings of a file or, if none is given, of the `submit.yaml` beside a config; else what is usual.

    Raises:
        ConfigError: the file cannot be read, or holds a setting that there is none of.
    """
    beside = (config if config.is_dir() else config.parent) / SETTINGS
    return load_config(SubmitConfig, given or (beside if beside.exists() else None))


class JobDesk:
    """Hands jobs to one cluster and looks after them.

    Args:
        address: of the cluster's dashboard; None: as `SubmitConfig.address` says.

    Raises:
        ConfigError: no cluster answers there.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
        # What Ray's client tells of its own doings (addresses, packages) is no news to who submits.
        for module in (sdk, dashboard_sdk):
            module.logger.setLevel(logging.WARNING)
        with self._own_errors():
            self._client = JobSubmissionClient(self.address)

    def submit(self, stage: str, path: Path, overrides: Sequence[str], settings: SubmitConfig) -> str:
        """Start a stage, or the stages of a folder, and give the name of the job.

        Raises:
            BadInput: there is no such stage, a setting is refused, or the config is not in the working directory.
        """
        folder, laid = _name_call(stage, path, overrides)
        for call in plan_calls(folder, laid)[1]:
            call.check()
        inside = _find_inside(settings.working_dir, folder)
        entry = settings.entry
        job = f"gsl-{stage}-{uuid.uuid4().hex[:8]}"
        with self._own_errors(job):
            self._client.submit_job(
                entrypoint=shlex.join([settings.python, "-m", "gsl_dist.cluster.pipeline", inside, *laid]),
                submission_id=job,
                runtime_env=_describe_env(settings),
                metadata={"made_by": _KIND, "stage": stage, "config": str(path)},
                entrypoint_num_cpus=entry.cpus,
                entrypoint_num_gpus=entry.gpus,
                entrypoint_memory=int(entry.memory_gb * 2**30) if entry.memory_gb else None,
                entrypoint_resources=entry.resources or None,
            )
        return job

    def list_jobs(self) -> list[JobState]:
        """Give every job that was submitted to the cluster, the oldest first, without their steps."""
        with self._own_errors():
            found = [job for job in self._client.list_jobs() if job.type == JobType.SUBMISSION]
        return sorted((_describe(job) for job in found), key=lambda state: state.started or "")

    def describe(self, job: str) -> JobState:
        """Give how a job stands, with its steps.

        Raises:
            BadInput: the cluster knows no such job.
        """
        with self._own_errors(job):
            state = _describe(self._client.get_job_info(job))
            return state.model_copy(update={"steps": read_progress(self._client.get_job_logs(job))})

    def read_log(self, job: str) -> str:
        """Give what a job has written so far.

        Raises:
            BadInput: the cluster knows no such job.
        """
        with self._own_errors(job):
            return str(self._client.get_job_logs(job))

    def follow_log(self, job: str, write: Callable[[str], Any]) -> JobState:
        """Hand on what a job writes until it ends, and give how it did.

        Raises:
            BadInput: the cluster knows no such job.
        """

        async def copy() -> None:
            async for text in self._client.tail_job_logs(job):
                write(text)

        self.describe(job)
        with self._own_errors(job):
            asyncio.run(copy())
        return self.describe(job)

    def stop(self, job: str) -> bool:
        """End a job and tell whether there was anything to end; its stages go on when they are submitted again.

        Raises:
            BadInput: the cluster knows no such job.
        """
        with self._own_errors(job):
            return bool(self._client.stop_job(job))

    @contextlib.contextmanager
    def _own_errors(self, job: str | None = None) -> Iterator[None]:
        """Raise ours instead of what Ray's client makes of HTTP."""
        try:
            yield
        except OSError as error:  # of requests as well
            allowed = "no Ray cluster answers there: ray start --head starts one, and shows its dashboard's address"
            raise ConfigError("address", self.address, allowed) from error
        except (RuntimeError, ValueError) as error:
            if "status code 404" in str(error):
                allowed = f"the cluster at {self.address} has no such job; gsl status lists those it has"
                raise BadInput("job", job, allowed, status=404) from error
            raise GslError(f"the cluster at {self.address} refused it: {str(error).strip().splitlines()[0]}") from error


def _name_call(stage: str, path: Path, overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """Give one stage as a pipeline of one: a folder, and what is laid over its settings."""
    if stage == PIPELINE:
        return path, list(overrides)
    if stage not in STAGES:
        raise BadInput("stage", stage, f"the stages are {', '.join(STAGES)}, and {PIPELINE} for those of a folder")
    own = [f"stages=[{stage}]", f"files.{stage}={path.name}"]
    return path.parent, [*own, *(f"{stage}.{override}" for override in overrides)]


def _find_inside(working_dir: str, folder: Path) -> str:
    """Give the path of a folder of configs as a job sees it."""
    if "://" in working_dir:
        return folder.as_posix()
    base = Path(working_dir).resolve()
    if not base.is_dir():
        raise ConfigError("working_dir", working_dir, "it must be a folder, or the URI of a zip file")
    if not folder.resolve().is_relative_to(base):
        raise ConfigError("config", str(folder), f"it must lie in working_dir {base}, all that a job sees from here")
    return folder.resolve().relative_to(base).as_posix()


def _describe_env(settings: SubmitConfig) -> dict[str, Any]:
    root = settings.root or os.environ.get(ROOT) or os.getcwd()
    env = {"working_dir": settings.working_dir, "env_vars": {ROOT: root, **settings.env}}
    wanted = {"pip": settings.pip, "excludes": settings.excludes}
    return env | {name: value for name, value in wanted.items() if value}


def _describe(job: JobDetails) -> JobState:
    told, started, ended = job.metadata or {}, job.start_time, job.end_time
    return JobState(
        job=job.submission_id,
        stage=told.get("stage", ""),
        config=told.get("config", job.entrypoint),
        status=str(job.status.value),
        message=job.message or "",
        started=_show_time(started) if started else None,
        seconds=round(((ended or time.time() * 1e3) - started) / 1e3, 1) if started else None,
    )


def _show_time(milliseconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(milliseconds / 1e3, datetime.timezone.utc)
    return moment.isoformat(timespec="seconds")
