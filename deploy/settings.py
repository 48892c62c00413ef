"""What a deployment may choose, and the names and ports that all of its files share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from gsl_dist.cluster.serve import ServeConfig
from gsl_dist.config import Strict, check_config

NAME = "gsl"
"""What every thing of a deployment is called, or begins with."""
USER = 10_001
"""The user that containers run as."""
TOKENS = "/etc/gsl/tokens"
CONFIGS = "/etc/gsl/configs"
CACHE = "/cache"


def _served(field: str) -> int:
    return int(ServeConfig.model_fields[field].default)


class Ports(Strict):
    """Every port that somebody listens at; those of the service are the serve stage's own."""

    direct: int = Field(default=_served("port"), description="the router: the fast way")
    serve: int = Field(default=_served("serve_port"), description="Ray Serve's door")
    grpc: int = 8081
    gcs: int = Field(default=6379, description="Ray's head, for its nodes")
    dashboard: int = Field(default=8265, description="jobs are submitted here")
    client: int = 10_001
    agent: int = Field(default=52_365, description="each node's own health")
    # Ray's usual 8080 is where the router listens.
    metrics: int = Field(default=8090, description="what Ray counts, on each node")
    redis: int = 6379


class Image(Strict):
    """The images; `name:tag-serve` and `name:tag-train`."""

    name: str = Field(min_length=1)
    tag: str = Field(min_length=1)
    python: str = Field(default="3.12", pattern=r"^3\.\d+$")
    ray: str = Field(default="2.60.0", pattern=r"^\d+\.\d+\.\d+$", description="the same on every machine")
    pull: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"

    def target(self, target: str) -> str:
        """Name the image of a target of the Dockerfile."""
        return f"{self.name}:{self.tag}-{target}"


class Volume(Strict):
    """The volume that all machines mount, where `root` is a folder."""

    size: str = Field(pattern=r"^\d+[GT]i$")
    storage_class: str | None = Field(default=None, description="one that many nodes may write to; None: the usual one")


class Node(Strict):
    """A kind of machine, and between how many of them the autoscaler chooses."""

    cpus: int = Field(ge=1)
    memory_gb: int = Field(ge=1)
    gpus: int = Field(default=0, ge=0)
    least: int = Field(default=0, ge=0)
    most: int = Field(default=1, ge=1)


class Nodes(Strict):
    """The head, which does no work, workers with and without GPUs, and those that serve."""

    head: Node
    cpu: Node
    gpu: Node
    serve: Node


class Machines(Strict):
    """Machines that are there, without Kubernetes."""

    head: str
    workers: tuple[str, ...] = ()
    user: str = Field(description="who may log in at each by SSH")


class DeployConfig(Strict):
    """A deployment."""

    image: Image
    namespace: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    root: str = Field(pattern=r"^(/|[a-z0-9]+://)", description="GSL_ROOT: a folder on the shared volume, or a URI")
    volume: Volume
    nodes: Nodes
    serve: dict[str, Any]
    cache_gb: int = Field(default=100, ge=2, description="of a node's disk, for shards, where `root` is a URI")
    machines: Machines
    ports: Ports = Ports()
    operator_namespace: str = "default"
    monitoring_namespace: str = "monitoring"
    redis_image: str = "redis:7.4-bookworm"

    @field_validator("serve")
    @classmethod
    def _is_accepted(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if taken := {"host", "port", "serve_port", "grpc_port", "tokens", "cache"} & set(settings):
            raise ValueError(f"{', '.join(sorted(taken))} follow from the deployment")
        check_config(ServeConfig, settings)
        return settings

    @property
    def is_shared_folder(self) -> bool:
        """Tell whether artefacts lie on a volume, and not in a store that is named by a URI."""
        return "://" not in self.root

    @property
    def service(self) -> dict[str, Any]:
        """Give all settings of the serve stage."""
        ports = self.ports
        ours = {"host": "0.0.0.0", "port": ports.direct, "serve_port": ports.serve, "grpc_port": ports.grpc}
        # A file that is being fetched lies there beside those that are kept.
        near = {} if self.is_shared_folder else {"cache": {"folder": CACHE, "limit_gb": self.cache_gb * 0.8}}
        return {**self.serve, **ours, **near, "tokens": f"{TOKENS}/tokens.json"}
