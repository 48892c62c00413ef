"""The reference of configs, made of the models that read them: every setting of every stage.

A stage has a section, and so has every group of settings that lies in one or more of them, by the key that it stands
under: `fit`, or `encoder` of `kind: cnn`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gsl_dist.config import Strict, resolve_location
from gsl_dist.plan import Task

STAGES = ("train", "codebook", "encode", "build", "serve", "evaluate", "tune", "match", "compact")
JOBS = ("pipeline", "submit")

_INTRODUCTION = """A stage is told everything by one YAML file. `gsl <stage> FILE key=value` lays settings over it, with
dots for those that lie in others: `fit.epochs=5`. An unknown key is refused, with the nearest that there is. What a
file leaves out has the default below; settings without one are required. Relative paths begin where the command is
given, or at `GSL_ROOT`; a path may be a URI, such as `s3://bucket/prefix` ([where artefacts
lie](../cluster.md#where-artefacts-lie)).
"""
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Any: "anything",
    type(None): "null",
}
_BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}


@dataclass(frozen=True)
class Group:
    """A model of settings, and where it stands.

    Args:
        model: it.
        key: the last part of where it stands: `fit`.
        users: the stages that have it.
    """

    model: type[BaseModel]
    key: str
    users: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name it as a file shows it."""
        kinds = list_kinds(self.model)
        return f"{self.key}: {', '.join(kinds)}" if kinds else self.key

    @property
    def anchor(self) -> str:
        """Name its place on the page; stages have places of their own."""
        return "-".join(["of", self.key.replace("_", "-"), *list_kinds(self.model)])


def list_models() -> dict[str, type[BaseModel]]:
    """Give the models of all files and of `gsl plan`, by the words that stand for them on the command line."""
    stages = {
        name: getattr(importlib.import_module(f"gsl_dist.cluster.{name}"), f"{name.capitalize()}Config")
        for name in (*STAGES, *JOBS)
    }
    return {**stages, "plan": Task}


def list_kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """Give the values of `kind` that choose a model among others; none where there is no choice."""
    kind = model.model_fields.get("kind")
    return tuple(get_args(kind.annotation)) if kind is not None else ()


def list_groups() -> dict[type[BaseModel], Group]:
    """Give every model that lies in another, in the order in which stages come to them."""
    found: dict[type[BaseModel], Group] = {}

    def walk(model: type[BaseModel], stage: str) -> None:
        for key, field in model.model_fields.items():
            for inner in find_models(field.annotation):
                known = found.get(inner, Group(inner, key, ()))
                users = known.users if stage in known.users else (*known.users, stage)
                found[inner] = Group(inner, known.key, users)
                walk(inner, stage)

    for stage, model in list_models().items():
        walk(model, stage)
    return found


def find_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Give the models in an annotation."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from find_models(part)


def write_page() -> str:
    """Give the page: stages, what jobs read, and what lies in these."""
    groups, parts = list_groups(), ["# Configs\n", _INTRODUCTION]
    for name, model in list_models().items():
        if name == "pipeline":
            parts.append("## Jobs and plans {#jobs-and-plans}\n")
        level = "##" if name in STAGES else "###"
        parts.append(f"{level} {name} {{#{name}}}\n\n{_tell_file(name)}\n")
        parts.append(_tell_model(model) + write_table(model, groups, name))
    parts.append("## Groups of settings\n\nBy the key that they stand under.\n")
    for model, group in groups.items():
        users = ", ".join(f"[{user}](#{user})" for user in group.users)
        parts.append(f"### {group.title} {{#{group.anchor}}}\n\n{_tell_model(model)}Used by {users}.\n")
        parts.append(write_table(model, groups, group.anchor))
    return "\n".join(parts)


def write_table(model: type[BaseModel], groups: dict[type[BaseModel], Group], anchor: str) -> str:
    """Give a row for every field of a model; each has a place, `anchor.field`, that links may lead to."""
    rows = [
        f"| `{name}`{{#{anchor}.{name}}} | {say_field(field, groups)} | {say_default(field)} | {say_about(field)} |"
        for name, field in model.model_fields.items()
    ]
    return "| setting | what it may be | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def say_field(field: FieldInfo, groups: dict[type[BaseModel], Group]) -> str:
    """Say what a value may be: its type, and its bounds."""
    kind = "path or URI" if _is_location(field.metadata) else _say_type(field.annotation, groups)
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for known, (name, sign) in _BOUNDS.items()
        if isinstance(rule, known)
    ]
    if any(isinstance(rule, MinLen) and rule.min_length for rule in field.metadata):
        bounds.append("not empty")
    bounds += [f"at most {rule.max_length} long" for rule in field.metadata if isinstance(rule, MaxLen)]
    patterns = [rule.pattern for rule in field.metadata if getattr(rule, "pattern", None)]
    bounds += ["matches `" + pattern.replace("|", "\\|") + "`" for pattern in patterns]
    return ", ".join([kind, *bounds])


def say_default(field: FieldInfo) -> str:
    """Say what a setting is where a file leaves it out."""
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        given = {key: getattr(default, key) for key in sorted(default.model_fields_set)}
        return f"`{json.dumps(given)}`" if given else "its defaults"
    return f"`{default if isinstance(default, str) and default else json.dumps(default)}`"


def say_about(field: FieldInfo) -> str:
    """Say what a setting means; where it is a group that says itself what it is, that."""
    if field.description:
        return field.description.replace("None:", "`null`:").replace("|", "\\|").replace("<", "&lt;")
    inner = list(find_models(field.annotation))
    if len(inner) == 1:
        return (inspect.getdoc(inner[0]) or "").splitlines()[0]
    return "one of these, by its `kind`" if inner else "chooses among the groups of this key"


def _say_type(annotation: Any, groups: dict[type[BaseModel], Group]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in groups:
        group = groups[annotation]
        return f"[{', '.join(list_kinds(annotation)) or group.key}](#{group.anchor})"
    if origin is Literal:
        return " or ".join(f"`{json.dumps(part).strip(chr(34))}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_say_type(part, groups) for part in parts)
    if origin is typing.Annotated:
        return "path or URI" if _is_location(parts[1:]) else _say_type(parts[0], groups)
    if origin in (list, tuple):
        return f"list of {_say_type(parts[0], groups)}"
    if origin is dict:
        return f"{_say_type(parts[1], groups)} by {_say_type(parts[0], groups)}"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _is_location(rules: Any) -> bool:
    return any(isinstance(rule, AfterValidator) and rule.func is resolve_location for rule in rules)


def _tell_model(model: type[BaseModel]) -> str:
    text = inspect.getdoc(model) or ""
    return "" if text == inspect.getdoc(Strict) else f"{text}\n\n"


def _tell_file(name: str) -> str:
    if name == "plan":
        return "Not a file: `gsl plan rows=1e9 dim=128 ...`; see [sizing](../operations.md#sizing)."
    more = f"[the stage](../stages/{name}.md)" if name in STAGES else "[on a cluster](../cluster.md)"
    return f"`configs/<name>/{name}.yaml`; more: {more}."
