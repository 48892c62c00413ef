"""Machines as they are: the Dockerfile, and the file by which `ray up` starts Ray on machines without Kubernetes."""

from __future__ import annotations

from typing import Any

from settings import CACHE, NAME, USER, DeployConfig

from gsl_dist.config import ROOT

_SERVE, _ALL = "cpu,serve,grpc,vlq", "cpu,train,cluster,serve,grpc,vlq"


def render_dockerfile(config: DeployConfig) -> str:
    """Give the Dockerfile: `serve` holds no torch, `train` everything."""
    ports = config.ports
    health = f"http://127.0.0.1:{ports.agent}/api/local_raylet_healthz"
    exposed = " ".join(map(str, (ports.direct, ports.serve, ports.grpc, ports.dashboard, ports.metrics)))
    return f"""\
#   docker build -f deploy/Dockerfile --target serve -t {config.image.target("serve")} .
#   docker build -f deploy/Dockerfile --target train -t {config.image.target("train")} .
ARG PYTHON={config.image.python}

FROM python:${{PYTHON}}-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PATH=/opt/gsl/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# KubeRay asks for the health of a node by wget; libgomp is for faiss and torch.
# hadolint ignore=DL3008
RUN apt-get update \\
    && apt-get install -y --no-install-recommends libgomp1 procps wget \\
    && rm -rf /var/lib/apt/lists/* \\
    && useradd --uid {USER} --create-home {NAME} \\
    && install -d -o {NAME} /data {CACHE}

FROM base AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gsl_dist gsl_dist
RUN python -m venv /opt/gsl && /opt/gsl/bin/pip install --no-cache-dir "ray=={config.image.ray}" ".[{_SERVE}]"

FROM build AS build-train
# One with or without CUDA, from whichever index pip is told of.
ARG TORCH="torch>=2.4,<2.16"
RUN /opt/gsl/bin/pip install --no-cache-dir "ray=={config.image.ray}" "$TORCH" ".[{_ALL}]"

FROM base AS run
USER {USER}
WORKDIR /home/{NAME}
EXPOSE {exposed}
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \\
    CMD {_show_words(["bash", "-c", f"wget -q -T 3 -O- {health} | grep -q success"])}
CMD {_show_words(["ray", "start", "--head", "--block", "--dashboard-host=0.0.0.0", f"--port={ports.gcs}"])}

FROM run AS serve
COPY --from=build /opt/gsl /opt/gsl

FROM run AS train
COPY --from=build-train /opt/gsl /opt/gsl
"""


def render_machines(config: DeployConfig) -> dict[str, list[dict[str, Any]]]:
    """Give what `ray up` reads: machines that are there, reached by SSH, with the package in a virtual environment."""
    ports, machines = config.ports, config.machines
    env = f"export PATH=$HOME/.venv/bin:$PATH {ROOT}={config.root}"
    common = f"--metrics-export-port={ports.metrics} --dashboard-agent-listen-port={ports.agent}"
    head = f"--head --port={ports.gcs} --dashboard-host=0.0.0.0 --dashboard-port={ports.dashboard}"
    up = {
        "cluster_name": NAME,
        "provider": {"type": "local", "head_ip": machines.head, "worker_ips": list(machines.workers)},
        "auth": {"ssh_user": machines.user},
        "max_workers": len(machines.workers),
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "file_mounts": {f"/home/{machines.user}/gsl_dist": "."},
        "rsync_exclude": [".git", ".venv", "build"],
        "setup_commands": [
            "python3 -m venv $HOME/.venv",
            f'$HOME/.venv/bin/pip install --quiet "ray=={config.image.ray}" "$HOME/gsl_dist[{_ALL}]"',
        ],
        "head_start_ray_commands": [
            f"{env}; ray stop",
            f"{env}; ulimit -n 65536; ray start {head} {common} --ray-client-server-port={ports.client}"
            " --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            f"{env}; ray stop",
            f"{env}; ulimit -n 65536; ray start --address=$RAY_HEAD_IP:{ports.gcs} {common}",
        ],
    }
    return {"ray-up.yaml": [up]}


def _show_words(words: list[str]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"
