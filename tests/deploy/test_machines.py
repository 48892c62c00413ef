"""The Dockerfile and `ray up`'s file are accepted by those who read them, and name the ports of the manifests."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("ray")
pytest.importorskip("jsonschema")
import jsonschema
import ray

sys.path.append(str(Path(__file__).resolve().parents[2] / "deploy"))
from settings import USER, DeployConfig

from gsl_dist.config import load_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CONFIG = load_config(DeployConfig, DEPLOY / "settings.yaml")
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
PROJECT = (ROOT / "pyproject.toml").read_text()


def read_stages():
    """The instructions of each stage of the Dockerfile, by its name, and what it is built on."""
    text = re.sub(
        r"\\\n", " ", "\n".join(line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line[:1] != "#")
    )
    stages, bases = {}, {}
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            bases[name], stages[name] = base, []
        elif stages:
            stages[name].append((word, rest.strip()))
    return stages, bases


STAGES, BASES = read_stages()


def trace(stage):
    """A stage and those that it is built on, the last first."""
    while stage in STAGES:
        yield stage
        stage = BASES[stage]


def say(stage, word):
    return [rest for each in trace(stage) for told, rest in STAGES[each] if told == word]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_hadolint_has_nothing_to_say_of_the_dockerfile():
    ran = subprocess.run([HADOLINT, "--no-color", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


@pytest.mark.parametrize("target", ["serve", "train"])
def test_a_target_runs_as_nobody_in_particular_and_tells_its_health(target):
    assert say(target, "USER")[0] == str(USER) and len(say(target, "HEALTHCHECK")) == 1
    assert f":{CONFIG.ports.agent}/" in say(target, "HEALTHCHECK")[0]
    copied = [copy for copy in say(target, "COPY") if copy.startswith("--from")]
    # Compilers, sources and caches of the build stay behind.
    assert len(copied) == 1 and copied[0].endswith("/opt/gsl /opt/gsl") and list(trace(target))[-1] == "base"
    assert json.loads(say(target, "CMD")[0])[:2] == ["ray", "start"]
    exposed = set(map(int, say(target, "EXPOSE")[0].split()))
    assert {CONFIG.ports.direct, CONFIG.ports.serve, CONFIG.ports.dashboard} <= exposed


def read_extras(name):
    block = re.search(rf"^{name} = \[(.*?)\]$", PROJECT, re.M | re.S)[1]
    found = re.findall(r'"([^"]+)"', block)
    inner = [extra for each in found if (m := re.match(r"gsl_dist\[(.*)\]", each)) for extra in m[1].split(",")]
    return found + [each for extra in inner for each in read_extras(extra)]


def list_installed(stage):
    text = " ".join(say(stage, "RUN"))
    extras = [extra for group in re.findall(r'"\.\[([a-z,]+)\]"', text) for extra in group.split(",")]
    return [each for extra in extras for each in read_extras(extra)], text


def test_serving_is_installed_without_torch_and_training_with_it():
    serving, text = list_installed("build")
    assert not [name for name in serving if name.startswith("torch")] and "TORCH" not in text
    assert any(name.startswith("ray[serve]") for name in serving) and any("faiss-cpu" in name for name in serving)
    training, text = list_installed("build-train")
    assert any(name.startswith("torch>=") for name in training) and "$TORCH" in text
    torch = next(name for name in training if name.startswith("torch>="))
    assert f'TORCH="{torch}"' in (DEPLOY / "Dockerfile").read_text()


def test_a_service_starts_where_there_is_no_torch():
    code = "import sys; sys.modules['torch'] = None"
    code += "; import gsl_dist.cluster.serve, gsl_dist.cluster.pipeline, gsl_dist.cli"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


def test_all_machines_have_one_ray_and_it_is_one_that_the_package_works_with():
    text = "".join(path.read_text() for path in [DEPLOY / "Dockerfile", *DEPLOY.rglob("*.yaml")])
    assert set(re.findall(r"ray==([\d.]+)|rayVersion: ([\d.]+)", text)) == {
        (CONFIG.image.ray, ""),
        ("", CONFIG.image.ray),
    }
    from packaging.requirements import Requirement

    wanted = {
        Requirement(each) for extra in ("cluster", "serve") for each in read_extras(extra) if each.startswith("ray")
    }
    assert len(wanted) == 2 and all(CONFIG.image.ray in each.specifier for each in wanted)


def test_what_an_image_is_made_of_is_not_kept_from_it():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = [word for copy in say("build", "COPY") for word in shlex.split(copy)[:-1] if not copy.startswith("--")]
    assert ignored[1] == "*" and {f"!{name}".rstrip("/") for name in sources} <= {line.rstrip("/") for line in ignored}
    assert all((ROOT / name).exists() for name in sources)


def test_ray_up_is_accepted_by_rays_own_schema_and_names_the_same_ports():
    told = yaml.safe_load((DEPLOY / "ray-up.yaml").read_text())
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(told, schema)
    head, worker = told["head_start_ray_commands"][-1], told["worker_start_ray_commands"][-1]
    assert f"--port={CONFIG.ports.gcs}" in head and f"$RAY_HEAD_IP:{CONFIG.ports.gcs}" in worker
    for command in (head, worker):
        assert f"--metrics-export-port={CONFIG.ports.metrics}" in command and f"GSL_ROOT={CONFIG.root}" in command
        assert f"--dashboard-agent-listen-port={CONFIG.ports.agent}" in command


def test_ray_takes_every_option_that_is_given_to_it():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    text = (DEPLOY / "ray-up.yaml").read_text() + (DEPLOY / "Dockerfile").read_text().partition("CMD")[2]
    used = {
        word.partition("=")[0]
        for line in text.splitlines()
        if "ray start" in line or '"ray"' in line
        for word in re.findall(r"--[a-z-]+=?", line)
    }
    assert len(used) >= 6 and used <= known
