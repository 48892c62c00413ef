"""The commands of `gsl` that hand stages to a cluster and look after them there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from gsl_dist.screen import console

if TYPE_CHECKING:
    from gsl_dist.cluster.submit import JobState

Job = Annotated[str, typer.Argument(metavar="JOB", help="the name that gsl submit gave it")]
Address = Annotated[
    str | None, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="of the dashboard; by default that of this machine")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def submit(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="train, encode ...; pipeline: those of a folder")],
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file; of a pipeline, a folder of them")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings laid over")] = None,
    cluster: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where and how; by default submit.yaml beside CONFIG")
    ] = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="show its log until it ends")] = False,
) -> None:
    """Start a stage, or all stages of a folder, as a job on a Ray cluster; what is whole already is not done again.

    Example: gsl submit pipeline configs/fashion train.fit.epochs=5 --follow
    """
    from gsl_dist.cluster.submit import JobDesk, find_settings

    settings = find_settings(cluster, config)
    desk = JobDesk(address or settings.address)
    job = desk.submit(stage, config, overrides or [], settings)
    console.print(job, highlight=False)
    if follow:
        _leave(desk.follow_log(job, _write))


def status(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="by default all are listed")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Show the jobs of a cluster, or how far one is, stage by stage.

    Example: gsl status gsl-pipeline-3f2a90b1
    """
    from gsl_dist.cluster.submit import JobDesk

    desk = JobDesk(address)
    states = [desk.describe(job)] if job else desk.list_jobs()
    if as_json:
        shown = [{**state.model_dump(), "steps": [step._asdict() for step in state.steps]} for state in states]
        sys.stdout.write(json.dumps(shown[0] if job else shown) + "\n")
        return
    console.print(_show_jobs(states))
    if job:
        console.print(_show_steps(states[0]))
        if states[0].status == "FAILED":
            console.print(f"{states[0].message}\ngsl logs {job} tells more", highlight=False)


def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", help="until it ends; exit code 0 if it did well")] = False,
    address: Address = None,
) -> None:
    """Show what a job writes.

    Example: gsl logs gsl-train-3f2a90b1 --follow
    """
    from gsl_dist.cluster.submit import JobDesk

    desk = JobDesk(address)
    if follow:
        _leave(desk.follow_log(job, _write))
    _write(desk.read_log(job))


def stop(job: Job, address: Address = None) -> None:
    """End a job; submitted again, it goes on where it was.

    Example: gsl stop gsl-train-3f2a90b1
    """
    from gsl_dist.cluster.submit import JobDesk

    told = "is told to stop" if JobDesk(address).stop(job) else "had ended before"
    console.print(f"{job} {told}", highlight=False)


def pipeline(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="configs, a file a stage")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="stages=[train], or train.fit.epochs=5")
    ] = None,
) -> None:
    """Run the stages of a folder one after another, here or on the cluster of RAY_ADDRESS.

    Example: gsl pipeline configs/fashion stages=[train,codebook,encode,build]
    """
    from gsl_dist.cluster.job import start_log
    from gsl_dist.cluster.pipeline import plan_calls, run_pipeline

    config, calls = plan_calls(folder, overrides or [])
    for call in calls:
        call.check()
    start_log()
    run_pipeline(config, calls)


def _show_jobs(states: list[JobState]) -> Table:
    table = Table(Column("job", no_wrap=True), Column("config", overflow="fold"), "status", "started", "seconds")
    for state in states:
        started = (state.started or "")[:16].replace("T", " ")
        table.add_row(
            state.job, state.config, state.status, started, "" if state.seconds is None else f"{state.seconds:.0f}"
        )
    return table


def _show_steps(state: JobState) -> Table:
    table = Table("stage", "what", "done", "of", Column("remark", overflow="fold"))
    for step in state.steps:
        table.add_row(step.stage, step.what, str(step.done), str(step.total), step.remark)
    return table


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _leave(state: JobState) -> None:
    raise typer.Exit(0 if state.status == "SUCCEEDED" else 1)
