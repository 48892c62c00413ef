"""The serve stage: a version's shards behind one HTTP service, kept alive by Ray Serve.

Serve owns the life of the processes: it deploys them, asks for their health and restarts the dead. A query does not
pass through it: the router listens on a port of its own and asks its replicas over TCP (`router.py`, `replica.py`,
`app.py`, none of which knows Ray). Serve's ordinary HTTP route leads to the same app.

The classes here are shells around those plain objects. Everything a caller can get wrong is refused in the driver,
before anything is deployed.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus, LoggingConfig

from gsl_dist.cluster.app import DirectDoor, Handover, Limits, bind_port, create_app
from gsl_dist.cluster.replica import Replica, is_loopback
from gsl_dist.cluster.router import Router, spread_shards
from gsl_dist.cluster.session import Progress, start_session, stay_quiet
from gsl_dist.config import Location, Resources, Strict
from gsl_dist.errors import ConfigError, GslError
from gsl_dist.index.coarse import open_coarse
from gsl_dist.index.manifest import Manifest, open_version, verify_version
from gsl_dist.index.search import open_searcher
from gsl_dist.storage import Folder

APP = "gsl"
_ASK_S = 2.0
_POLL_S = 0.1
# Serve's own defaults (5 requests at once, health every 10 s) suit models that take seconds.
_LIFE = {
    "max_ongoing_requests": 1000,
    "health_check_period_s": 2.0,
    "graceful_shutdown_wait_loop_s": 0.2,
    "graceful_shutdown_timeout_s": 5.0,
}


class ServeConfig(Strict):
    """How a version is served."""

    index: Location = Field(description="the index folder")
    version: str | None = Field(default=None, description="the version; the promoted one if not given")
    replicas: int = Field(default=1, ge=1, description="processes that the shards are spread over")
    host: str = Field(default="127.0.0.1", description="where to listen; 0.0.0.0 lets other machines in")
    port: int = Field(default=8080, ge=0, le=65535, description="the direct port; 0 for any free one")
    route_prefix: str = Field(default="/", pattern=r"^/", description="the path below which Serve's own door answers")
    serve_port: int = Field(default=8000, ge=1, le=65535, description="the port of Serve's own door")
    coarse: Literal["router", "replicas"] = Field(
        default="router", description="who finds the lists of a query: the router once for all, or each replica"
    )
    resources: Resources = Field(default=Resources(), description="what each replica takes; cpus are its threads")
    timeout_s: float = Field(default=10.0, gt=0, description="how long a replica may take over a query")
    start_timeout_s: float = Field(default=300.0, gt=0, description="how long the service may take to start")
    max_batch: int = Field(default=4096, ge=1, description="queries in one request")
    max_body_bytes: int = Field(default=64 << 20, ge=1 << 10, description="bytes of one request, and of its hits")


@dataclass(frozen=True)
class Service:
    """A service that answers.

    Args:
        url: its direct port: the fast way.
        serve_url: Ray Serve's ordinary door.
        replicas: the shards that each replica holds.
        version: the version served.
    """

    url: str
    serve_url: str
    replicas: dict[str, list[str]]
    version: str


class ReplicaShell:
    """The Serve deployment around one `Replica`."""

    def __init__(self, config: ServeConfig, version: str, shards: list[str]) -> None:
        threads = config.resources.threads
        searcher = open_searcher(config.index, version, names=shards, threads=threads)
        host = reachable_host(config.host)
        self._replica = Replica(searcher, host=host, threads=threads, max_bytes=config.max_body_bytes)
        self._address = self._replica.start()

    def address(self) -> str:
        """Give the address at which the replica answers."""
        return self._address

    def pid(self) -> int:
        """Give the process, for those who look for it on its node."""
        return os.getpid()

    def check_health(self) -> None:
        """Search once; Serve restarts a replica that cannot."""
        self._replica.probe()


class RouterShell:
    """The Serve deployment around one `Router` and its direct door."""

    def __init__(
        self, config: ServeConfig, manifest: Manifest, groups: dict[str, list[str]], *replicas: DeploymentHandle
    ) -> None:
        self._handles = dict(zip(groups, replicas, strict=True))
        limits = Limits(config.max_batch, config.max_body_bytes)
        coarse = open_coarse(Folder(config.index), manifest) if config.coarse == "router" else None
        router = Router(
            manifest,
            groups,
            self._resolve,
            coarse=coarse,
            timeout_s=config.timeout_s,
            max_bytes=config.max_body_bytes,
        )
        app = create_app(router, config.index, limits)
        self._door = DirectDoor(router, app, host=config.host, port=config.port)
        self._door.start()
        self._url = f"http://{reachable_host(config.host)}:{self._door.port}"
        global _served_app
        _served_app = create_app(Handover(self._door), config.index, limits)

    def address(self) -> str:
        """Give the url of the direct door."""
        return self._url

    async def _resolve(self, name: str) -> str | None:
        # Serve's handles may not block an event loop, and this one answers queries.
        return await asyncio.to_thread(self._ask, name)

    def _ask(self, name: str) -> str | None:
        try:
            return str(self._handles[name].address.remote().result(timeout_s=_ASK_S))
        except (RayError, RayServeException, TimeoutError):
            return None

    def __del__(self) -> None:
        # Serve calls this on an instance whose constructor failed, too.
        if "_door" in self.__dict__:
            self._door.stop()


# Serve builds the app of its own door after the constructor and hands it no instance; a process holds one router.
_served_app: FastAPI | None = None


def _take_app() -> FastAPI:
    assert _served_app is not None
    return _served_app


def serve(config: ServeConfig) -> Service:
    """Deploy a version on the running Ray and give its addresses once every shard answers.

    A service that runs already is replaced.

    Raises:
        BadInput: no such version, or a setting that does not fit it.
        ArtefactError: a file of the version is damaged.
        GslError: Ray Serve could not start it.
    """
    manifest = _check_version(config)
    groups = spread_shards(manifest.shards, config.replicas)
    stop_service()
    if is_loopback(config.host) and config.port:
        bind_port(config.host, config.port).close()
    http = HTTPOptions(host=config.host, port=config.serve_port)
    ray_serve.start(http_options=http, logging_config=LoggingConfig(enable_access_log=False))
    target = ray_serve.RunTarget(
        _bind(config, manifest, groups), APP, config.route_prefix, LoggingConfig(enable_access_log=False)
    )
    deadline = time.monotonic() + config.start_timeout_s
    ray_serve.run_many([target], wait_for_applications_running=False)
    _await_running(deadline)
    url = str(ray_serve.get_app_handle(APP).address.remote().result(timeout_s=_ASK_S * 5))
    serve_url = f"http://{reachable_host(config.host)}:{config.serve_port}{config.route_prefix}".rstrip("/")
    for door in (url, serve_url):
        _await_answer(door, deadline)
    return Service(url, serve_url, groups, manifest.version)


def run_serve(config: ServeConfig, progress: Progress = stay_quiet) -> dict[str, Any]:
    """Serve a version on the cluster that `RAY_ADDRESS` names, or on this machine, and give its addresses.

    Raises:
        BadInput, ArtefactError, GslError: as `serve`.
    """
    _check_version(config)
    start_session(config.replicas * config.resources.cpus)
    progress("serve", 0, 1, f"{config.replicas} replicas")
    service = serve(config)
    progress("serve", 1, 1, service.url)
    return {"url": service.url, "serve_url": service.serve_url, "version": service.version}


def stop_service() -> None:
    """Stop the service, and Serve with it if nothing else runs there."""
    applications = ray_serve.status().applications
    if APP in applications:
        ray_serve.delete(APP)
    if not set(applications) - {APP}:
        ray_serve.shutdown()


def reachable_host(host: str) -> str:
    """Give the address by which this process is reached: loopback stays loopback, else the node's."""
    return "127.0.0.1" if is_loopback(host) else str(ray.util.get_node_ip_address())


def _check_version(config: ServeConfig) -> Manifest:
    index = Folder(config.index)
    manifest = open_version(index, config.version)
    if config.replicas > len(manifest.shards):
        allowed = f"version {manifest.version} has {len(manifest.shards)} shards and every replica holds one or more"
        raise ConfigError("replicas", config.replicas, allowed)
    if config.resources.workers != 1:
        raise ConfigError("resources.workers", config.resources.workers, "`replicas` says how many processes serve")
    # A version far away is not read twice: there the replicas alone verify what they open.
    faults = verify_version(index, manifest.version) if index.is_local else []
    if faults:
        raise faults[0]
    return manifest


def _bind(config: ServeConfig, manifest: Manifest, groups: dict[str, list[str]]) -> ray_serve.Application:
    replica, router = (
        ray_serve.deployment(ReplicaShell),
        ray_serve.deployment(ray_serve.ingress(_take_app)(RouterShell)),
    )
    takes: dict[str, Any] = {"num_cpus": config.resources.cpus, "num_gpus": config.resources.gpus}
    if config.resources.memory_gb is not None:
        takes["memory"] = int(config.resources.memory_gb * 2**30)
    replicas = [
        replica.options(name=name, ray_actor_options=takes, **_LIFE).bind(config, manifest.version, shards)
        for name, shards in groups.items()
    ]
    # The router waits more than it works, so it takes no core of its own from the replicas.
    return router.options(name="router", ray_actor_options={"num_cpus": 0}, **_LIFE).bind(
        config, manifest, groups, *replicas
    )


def _await_running(deadline: float) -> None:
    while True:
        state = ray_serve.status().applications[APP]
        if state.status == ApplicationStatus.RUNNING:
            return
        failed = state.status == ApplicationStatus.DEPLOY_FAILED
        if failed or time.monotonic() > deadline:
            reasons = [state.message, *(part.message for part in state.deployments.values())]
            stop_service()
            raise GslError(f"the service did not start: {_last_line(reasons) if failed else _tell_wait(state)}")
        time.sleep(_POLL_S)


def _tell_wait(state: ApplicationStatusOverview) -> str:
    waits = ", ".join(name for name, part in state.deployments.items() if part.status != DeploymentStatus.HEALTHY)
    cpus = ray.cluster_resources().get("CPU", 0)
    return f"in the time given {waits} found no room or loaded no shards (the cluster has {cpus:g} CPUs)"


def _last_line(messages: list[str]) -> str:
    # Serve reports a traceback as text; what went wrong is its last line.
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["no reason was given; look into the logs of Ray Serve"])[-1]


def _await_answer(url: str, deadline: float) -> None:
    last = "nothing"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/healthz", timeout=_ASK_S)
            last = f"status {answer.status_code}"
            if answer.is_success and answer.json()["status"] == "ok":
                return
        except (httpx.TransportError, ValueError) as error:
            last = type(error).__name__
        time.sleep(_POLL_S)
    raise GslError(f"{url} does not answer ({last}); Ray Serve may run already, on another port: see `serve status`")
