"""The reference of the command line, made of the functions that `gsl --help` is made of."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from typer.models import OptionInfo
from typer.utils import get_params_from_function

from gsl_dist import jobs
from gsl_dist.cli import app

STAGES = ("train", "codebook", "encode", "build", "serve", "evaluate", "tune", "match", "compact")
JOBS = tuple(command.__name__ for command in (jobs.submit, jobs.status, jobs.logs, jobs.stop, jobs.pipeline))

_INTRODUCTION = """`gsl COMMAND --help` tells the same. A mistake of the caller is one line on standard error and exit
code 2 ([errors](../errors.md)). `GSL_ROOT` says where relative paths of configs begin, `RAY_ADDRESS` which cluster is
used: without it a stage starts Ray on this machine.
"""


def list_commands() -> dict[str, Callable[..., Any]]:
    """Give the functions behind the commands: stages in their order, then jobs, then all others."""
    found = {(info.name or info.callback.__name__): info.callback for info in app.registered_commands if info.callback}
    return {name: found[name] for name in [*STAGES, *JOBS, *(name for name in found if name not in STAGES + JOBS)]}


def write_page() -> str:
    """Give the page, a section a command."""
    commands = list_commands()
    parts = ["# Commands\n", _INTRODUCTION, "| command | |\n|---|---|"]
    parts.extend(f"| [gsl {name}](#gsl-{name}) | {_read_help(function)[0]} |" for name, function in commands.items())
    parts.append("")
    for name, function in commands.items():
        parts.extend(_write_command(name, function))
    return "\n".join(parts)


def _write_command(name: str, function: Callable[..., Any]) -> Iterator[str]:
    told, example = inspect.cleandoc(function.__doc__ or ""), ""
    if "Example:" in told:
        told, example = told.split("Example:")
    yield f"## gsl {name}\n\n{told.strip()}\n"
    if example:
        yield f"```\n{example.strip()}\n```\n"
    if name in STAGES:
        yield f"Settings: [{name}](configs.md#{name}). More: [the stage](../stages/{name}.md).\n"
    rows = [_write_parameter(name, meta) for name, meta in get_params_from_function(function).items()]
    yield "| | | |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _read_help(function: Callable[..., Any]) -> list[str]:
    return inspect.cleandoc(function.__doc__ or "").splitlines()


def _write_parameter(name: str, meta: Any) -> str:
    given = meta.default
    if not isinstance(given, OptionInfo):
        return f"| `{given.metavar or name.upper()}` | {_say_need(given)} | {_escape(given.help)} |"
    shown = ", ".join(f"`{word}`" for word in given.param_decls or [f"--{name.replace('_', '-')}"])
    parts = [_escape(given.help)]
    if given.default is not None and not isinstance(given.default, bool):
        parts.append(f"by default `{given.default}`")
    if given.envvar:
        parts.append(f"or in `{given.envvar}`")
    return f"| {shown} | {_say_type(meta.annotation)} | {'; '.join(parts)} |"


def _say_need(given: Any) -> str:
    return "required" if given.default is ... else "optional"


def _say_type(annotation: Any) -> str:
    if annotation is bool:
        return "flag"
    words = {"int": "integer", "float": "number", "str": "text", "Path": "path"}
    return next((word for name, word in words.items() if name in str(annotation)), str(annotation))


def _escape(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("{", "&#123;")
