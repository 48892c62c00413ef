"""Writes what a cluster is set up by: images, KubeRay's manifests, `ray up`, Prometheus; all of deploy/settings.yaml.

Ports, names and paths are in many of those files and have to agree: they are written down once, here or where the
service has them, and nobody edits the files that come of it. `python deploy/render.py` after a change of settings.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from machines import render_dockerfile, render_machines
from manifests import render_manifests
from monitoring import render_monitoring
from settings import DeployConfig

from gsl_dist.config import load_config

HERE = Path(__file__).resolve().parent
_NOTE = "# Written by deploy/render.py of deploy/settings.yaml: change those.\n"


def render(config: DeployConfig) -> dict[str, str]:
    """Give the content of every file by its path in this folder."""
    texts = {"Dockerfile": _NOTE + render_dockerfile(config)}
    for make in (render_machines, render_manifests, render_monitoring):
        texts |= {path: _NOTE + _dump(documents) for path, documents in make(config).items()}
    return texts


class _Dumper(yaml.SafeDumper):
    """Shows texts of several lines as lines."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def _dump(documents: list[dict[str, Any]]) -> str:
    # By way of JSON nothing is the same object twice, and YAML needs no anchors.
    plain = json.loads(json.dumps(documents))
    return "---\n".join(yaml.dump(each, Dumper=_Dumper, sort_keys=False, width=120) for each in plain)


def main(write: Callable[[Path, str], Any] = Path.write_text) -> None:
    """Write every file."""
    for path, text in render(load_config(DeployConfig, HERE / "settings.yaml")).items():
        (HERE / path).parent.mkdir(parents=True, exist_ok=True)
        write(HERE / path, text)


if __name__ == "__main__":
    main()
