"""One YAML file a stage becomes one frozen model; what it does not know, it refuses.

Every config class lives beside its owner and derives from `Strict`. A file is read, `key=value` overrides are laid
over it, and pydantic checks the whole; the error names the full path of the key, the value, and for an unknown key the
nearest known one. There is no inheritance between files and no default that differs from the class.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import posixpath
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gsl_dist.errors import ConfigError, hide_key


class Strict(BaseModel):
    """The base of every config: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(Strict):
    """What a stage may take from the cluster; the same words in every stage."""

    workers: int = Field(default=1, ge=1, description="processes that work side by side")
    cpus: float = Field(default=1.0, gt=0, description="logical cores for each")
    gpus: float = Field(default=0.0, ge=0, description="GPUs for each")
    memory_gb: float | None = Field(default=None, gt=0, description="memory to reserve for each, if any")

    @property
    def threads(self) -> int:
        """Give the number of compute threads one worker should start."""
        return max(1, int(self.cpus))


ROOT = "GSL_ROOT"
"""Names the folder or URI where relative paths begin; without it they begin where the process was started."""


def resolve_location(location: str) -> str:
    """Make a local path absolute, since workers run in other folders; leave URIs alone."""
    if "://" in location:
        return location.rstrip("/")
    if not location:
        raise ValueError("a path may not be empty")
    path, root = os.path.expanduser(location), os.environ.get(ROOT)
    return _place_below(root, path) if root and not os.path.isabs(path) else os.path.abspath(path)


def hide_keys(tree: Any) -> Any:
    """Give settings without the keys that locations in them bear."""
    if isinstance(tree, Mapping):
        return {name: hide_keys(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [hide_keys(part) for part in tree]
    return hide_key(tree) if isinstance(tree, str) else tree


def _place_below(root: str, path: str) -> str:
    below = posixpath.normpath(path)
    if "://" not in root:
        return os.path.abspath(os.path.join(root, below))
    if below.split("/")[0] == "..":
        raise ValueError(f"a path may not lead out of {ROOT}={root}")
    return root.rstrip("/") if below == "." else f"{root.rstrip('/')}/{below}"


Location = Annotated[str, AfterValidator(resolve_location)]
"""A path or a URI that `pyarrow.fs` understands, made absolute when a config is loaded."""

C = TypeVar("C", bound=Strict)


def load_config(kind: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, lay the overrides over it and check the whole.

    Args:
        kind: the config class.
        path: the YAML file; None: overrides alone.
        overrides: `key=value` with dotted keys; values are read as YAML.

    Raises:
        ConfigError: no such file, not a mapping, an unknown key, or a value out of range.
    """
    tree = {} if path is None else _read_tree(path)
    for override in overrides:
        _lay_over(tree, override)
    return check_config(kind, tree)


def check_config(kind: type[C], tree: dict[str, Any]) -> C:
    """Turn a plain tree of settings into a config, or raise one `ConfigError` for the first thing wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _explain(kind, error) from None


def fingerprint_config(*parts: Any) -> str:
    """Give a short hash that changes when any setting, or anything else given, changes."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _read_tree(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("config", str(path), f"it must be a readable YAML file ({error.strerror})") from error
    except UnicodeDecodeError:
        raise ConfigError("config", str(path), "it must be YAML in UTF-8") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError("config", str(path), f"it must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError("config", str(path), f"it must hold keys and values, not a {type(tree).__name__}")
    return tree


def _lay_over(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError("override", override, "it must read key=value, such as optimizer.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(key, text, "it must be a YAML value") from None
    *parents, leaf = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(key, override, f"{parent} is a single value and has no keys below it")
        tree = child
    tree[leaf] = value


def _explain(kind: type[BaseModel], error: ValidationError) -> ConfigError:
    # Unknown keys first: a misspelt key also shows up as a missing one, and the misspelling is what to mend.
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = ".".join(_drop_tags(kind, problem["loc"])) or kind.__name__
    if problem["type"] == "extra_forbidden":
        return ConfigError(where, problem["input"], _nearest_key(kind, problem["loc"]))
    if problem["type"] == "missing":
        return ConfigError(where, None, "this setting is required")
    wanted = problem["msg"].removeprefix("Value error, ")
    return ConfigError(where, problem["input"], wanted[0].lower() + wanted[1:])


def _nearest_key(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    known = sorted({name for model in _models_at(kind, loc[:-1]) for name in model.model_fields})
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"there is no such setting; {hint}known here: {', '.join(known)}"


def _drop_tags(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    # Pydantic puts the tag of a union between the keys; the path shown is the one that the file has.
    return [
        str(part)
        for at, part in enumerate(loc)
        if not any(part not in model.model_fields and _is_tag(model, part) for model in _models_at(kind, loc[:at]))
    ]


def _models_at(kind: Any, loc: tuple[int | str, ...]) -> Iterator[type[BaseModel]]:
    """Yield the models that a path of keys may lead to; tags of unions in the path are skipped."""
    for model in _models_in(kind):
        if not loc:
            yield model
        elif loc[0] in model.model_fields:
            yield from _models_at(model.model_fields[str(loc[0])].annotation, loc[1:])
        elif isinstance(loc[0], int) or _is_tag(model, loc[0]):
            yield from _models_at(model, loc[1:])


def _models_in(kind: Any) -> Iterator[type[BaseModel]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    elif isinstance(kind, types.UnionType) or typing.get_origin(kind) is not None:
        for part in typing.get_args(kind):
            yield from _models_in(part)


def _is_tag(model: type[BaseModel], tag: int | str) -> bool:
    field = model.model_fields.get("kind")
    return field is not None and tag in typing.get_args(field.annotation)
