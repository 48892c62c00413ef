"""The serve stage: a version's shards behind one HTTP service, kept alive by Ray Serve.

Serve owns the life of the processes: it deploys them, asks for their health and restarts the dead. A query does not
pass through it: the router listens on a port of its own and asks its replicas over TCP (`gsl_dist.service`, which knows
nothing of Ray). Serve's ordinary HTTP route leads to the same app.

The classes here are shells around those plain objects. Everything a caller can get wrong is refused in the driver,
before anything is deployed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import ray
from fastapi import FastAPI
from pydantic import Field
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus, LoggingConfig

from gsl_dist.cache import Cache
from gsl_dist.cluster.device import Device, check_device, place_searcher
from gsl_dist.cluster.session import Progress, find_cause, own_errors, start_session, stay_quiet
from gsl_dist.codebook import FloatArray
from gsl_dist.config import Location, Resources, Strict, check_config
from gsl_dist.errors import ConfigError, GslError
from gsl_dist.index.manifest import Manifest, open_version, verify_version
from gsl_dist.index.search import LocalSearcher, open_searcher
from gsl_dist.service.access import Access, read_tokens
from gsl_dist.service.app import Desk, create_app
from gsl_dist.service.door import DirectDoor, bind_port
from gsl_dist.service.links import Fleet, name_copies, spread_shards
from gsl_dist.service.meters import Meters
from gsl_dist.service.reading import Limits
from gsl_dist.service.replica import Replica, is_loopback
from gsl_dist.service.router import Coarse, Router, RouterConfig
from gsl_dist.service.tls import Tls
from gsl_dist.service.traces import open_tracer
from gsl_dist.storage import Folder

APP, ENCODER = "gsl", "encoder"
_ASK_S, _ENCODE_S = 2.0, 30.0
_POLL_S = 0.1
_NODE = "ray.io/node-id"
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
    grpc_port: int | None = Field(default=None, ge=1, le=65535, description="the port for gRPC; None: there is none")
    route_prefix: str = Field(default="/", pattern=r"^/", description="the path below which Serve's own door answers")
    serve_port: int = Field(default=8000, ge=1, le=65535, description="the port of Serve's own door")
    copies: int = Field(default=1, ge=1, description="processes that hold the same shards and stand in for each other")
    coarse: Coarse = Field(
        default="router", description="who finds the lists of a query: the router once for all, or each replica"
    )
    follow_s: float = Field(
        default=1.0, gt=0, description="how often to look which version is promoted, where none is named here"
    )
    probe_s: float | None = Field(
        default=10.0, gt=0, description="how often recall is measured, where gsl tune left a sample; None: never"
    )
    encoder: bool = Field(default=False, description="encode raw items in the service: one process more, with torch")
    tokens: Location | None = Field(
        default=None, description="the file of tokens that gsl token writes; needed where other machines are let in"
    )
    traces: str | None = Field(
        default=None, description="where spans are sent, as OTLP over HTTP: http://127.0.0.1:4318/v1/traces"
    )
    cache: Cache | None = Field(
        default=None, description="keeps shards of a store on the replicas' disks; None: fetched at each start"
    )
    tls: Tls | None = Field(default=None, description="HTTPS at the direct port and encrypted links to the replicas")
    device: Device = Field(default="auto", description="what searches codes of lines: auto, cpu or cuda")
    resources: Resources = Field(default=Resources(), description="what each replica takes; cpus are its threads")
    timeout_s: float = Field(default=10.0, gt=0, description="how long a replica may take over a query")
    start_timeout_s: float = Field(default=300.0, gt=0, description="how long the service may take to start")
    max_batch: int = Field(default=4096, ge=1, description="queries in one request")
    max_body_bytes: int = Field(default=64 << 20, ge=1 << 10, description="bytes of one request, and of its hits")
    max_requests: int = Field(default=256, ge=1, description="requests answered at once; the next are told 429")
    max_new_rows: int = Field(default=100_000, ge=0, description="rows written over a version before it is compacted")


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

    def __init__(self, config: ServeConfig, group: str, secret: str) -> None:
        threads = config.resources.threads

        def open_held(version: str, shards: tuple[str, ...]) -> LocalSearcher:
            check_room(config.index, version, shards)
            searcher = open_searcher(config.index, version, names=shards, threads=threads, cache=config.cache)
            return place_searcher(searcher, config.device)

        self._replica = Replica(
            open_held,
            host=reachable_host(config.host),
            threads=threads,
            max_bytes=config.max_body_bytes,
            secret=secret,
            tls=config.tls.listen() if config.tls else None,
        )
        # Opened before anybody asks, so that Serve counts a replica as running when it can answer. One that is started
        # anew opens what is promoted by then, and whatever else the router names.
        manifest = open_version(Folder(config.index), config.version)
        if shards := spread_shards(manifest.shards, config.replicas)[group]:
            self._replica.hold(manifest.version, shards)
        self._address = self._replica.start()
        _settle_heap()

    def address(self) -> str:
        """Give the address at which the replica answers."""
        return self._address

    def pid(self) -> int:
        """Give the process, for those who look for it on its node."""
        return os.getpid()

    def check_health(self) -> None:
        """Search once; Serve restarts a replica that cannot."""
        self._replica.probe()


class EncoderShell:
    """The Serve deployment that makes vectors of raw items: the one process of a service that has torch."""

    def __init__(self, config: ServeConfig) -> None:
        # Here and not above: a replica comes from this module as well, and does without torch.
        import torch

        torch.set_num_threads(config.resources.threads)
        self._index = config.index
        self._open: dict[str, Any] = {}

    def encode(self, version: str, items: list[Any]) -> FloatArray:
        """Give the vectors of items by the encoder of a version (Q, D)."""
        from gsl_dist.cluster.query import QueryEncoder

        if version not in self._open:
            # Another version takes over: of the one before, queries under way may still come.
            self._open = dict([*self._open.items()][-1:])
            self._open[version] = QueryEncoder(self._index, open_version(Folder(self._index), version))
        vectors: FloatArray = self._open[version].encode(items)
        return vectors


class RouterShell:
    """The Serve deployment around one `Router` and its direct door."""

    def __init__(self, config: ServeConfig, names: list[str], secret: str, *replicas: DeploymentHandle) -> None:
        self._handles = dict(zip(names, replicas, strict=True))
        fleet = Fleet(
            self._resolve,
            config.replicas,
            config.copies,
            hands=config.resources.threads + 1,
            secret=secret,
            tls=config.tls.reach() if config.tls else None,
            max_bytes=config.max_body_bytes,
            timeout_s=config.timeout_s,
            load_s=config.start_timeout_s,
        )
        follow_s = None if config.version else config.follow_s
        how = RouterConfig(config.coarse, follow_s, config.max_new_rows, config.start_timeout_s, config.probe_s)
        meters = Meters(open_tracer(config.traces) if config.traces else None)
        router = Router(config.index, fleet, version=config.version, config=how, meters=meters)
        desk = Desk(
            router,
            Limits(config.max_batch, config.max_body_bytes, config.max_requests),
            Access(read_tokens(config.tokens) if config.tokens else None),
            self._encode if config.encoder else None,
            functools.partial(compact_away, config.index),
        )
        app = create_app(desk)
        beside = None
        if config.grpc_port is not None:
            from gsl_dist.service.rpc import RpcDoor

            beside = RpcDoor(desk, host=config.host, port=config.grpc_port, tls=config.tls)
        self._door = DirectDoor(router, app, host=config.host, port=config.port, tls=config.tls, beside=beside)
        self._door.start()
        self._url = f"{'https' if config.tls else 'http'}://{reachable_host(config.host)}:{self._door.port}"
        global _served_app
        _served_app = create_app(dataclasses.replace(desk, hop=self._door.hop))
        _settle_heap()

    def address(self) -> str:
        """Give the url of the direct door."""
        return self._url

    async def _encode(self, manifest: Manifest, items: list[Any]) -> FloatArray:
        answer = self._handles[ENCODER].encode.remote(manifest.version, items)
        try:
            vectors: FloatArray = await asyncio.to_thread(answer.result, timeout_s=_ENCODE_S)
        except (RayError, RayServeException, TimeoutError) as error:
            raise find_cause(error) or GslError(f"the encoder did not answer ({type(error).__name__})") from error
        return vectors

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
    for port in (config.port, config.grpc_port):
        if is_loopback(config.host) and port:
            bind_port(config.host, port).close()
    http = HTTPOptions(host=config.host, port=config.serve_port)
    ray_serve.start(http_options=http, logging_config=LoggingConfig(enable_access_log=False))
    target = ray_serve.RunTarget(
        _bind(config, list(groups)), APP, config.route_prefix, LoggingConfig(enable_access_log=False)
    )
    deadline = time.monotonic() + config.start_timeout_s
    ray_serve.run_many([target], wait_for_applications_running=False)
    _await_running(deadline)
    url = str(ray_serve.get_app_handle(APP).address.remote().result(timeout_s=_ASK_S * 5))
    serve_url = f"http://{reachable_host(config.host)}:{config.serve_port}{config.route_prefix}".rstrip("/")
    for door in (url, serve_url):
        _await_answer(door, deadline, config.tls)
    return Service(url, serve_url, groups, manifest.version)


def build_app(settings: dict[str, Any]) -> ray_serve.Application:
    """Give the service as Ray Serve's own config files name it: `import_path`, with the settings as its `args`.

    Raises:
        BadInput, ArtefactError: as `serve`.
    """
    config = check_config(ServeConfig, settings)
    return _bind(config, list(spread_shards(_check_version(config).shards, config.replicas)))


def run_serve(config: ServeConfig, progress: Progress = stay_quiet) -> dict[str, Any]:
    """Serve a version on the cluster that `RAY_ADDRESS` names, or on this machine, and give its addresses.

    Raises:
        BadInput, ArtefactError, GslError: as `serve`.
    """
    _check_version(config)
    start_session(config.replicas * config.copies * config.resources.cpus)
    progress("serve", 0, 1, f"{config.replicas * config.copies} replicas")
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
    check_device(config.device, manifest.kind)
    if config.encoder and not manifest.model:
        allowed = f"version {manifest.version} was built without a model: vectors are what it is searched for"
        raise ConfigError("encoder", True, allowed)
    if not is_loopback(config.host) and config.tokens is None:
        raise ConfigError("tokens", None, f"{config.host} lets other machines in: name a file of tokens (gsl token)")
    if config.tokens is not None:
        read_tokens(config.tokens)
    if config.tls is not None:
        config.tls.listen()
    if config.resources.workers != 1:
        raise ConfigError("resources.workers", config.resources.workers, "`replicas` says how many processes serve")
    # A version far away is not read twice: there the replicas alone verify what they open.
    faults = verify_version(index, manifest.version) if index.is_local else []
    if faults:
        raise faults[0]
    return manifest


def _bind(config: ServeConfig, groups: list[str]) -> ray_serve.Application:
    replica, router = (
        ray_serve.deployment(ReplicaShell),
        ray_serve.deployment(ray_serve.ingress(_take_app)(RouterShell)),
    )
    takes: dict[str, Any] = {"num_cpus": config.resources.cpus, "num_gpus": config.resources.gpus}
    if config.resources.memory_gb is not None:
        takes["memory"] = int(config.resources.memory_gb * 2**30)
    # Only this router and these replicas know it, and it lives as long as they do.
    secret = secrets.token_hex(32)
    names = {name: group for group in groups for name in name_copies(group, config.copies)}
    places = keep_apart(config.copies, takes)
    # The first copies of all parts would share nodes otherwise, and a node's loss a part of the load.
    turns = [(number // config.copies + number) % config.copies for number in range(len(names))]
    replicas = [
        replica.options(name=name, ray_actor_options=takes | places[turn], **_LIFE).bind(config, group, secret)
        for (name, group), turn in zip(names.items(), turns, strict=True)
    ]
    if config.encoder:
        encoder = ray_serve.deployment(EncoderShell).options(name=ENCODER, ray_actor_options={"num_cpus": 0}, **_LIFE)
        names[ENCODER] = ENCODER
        replicas.append(encoder.bind(config))
    # The router waits more than it works, so it takes no core of its own from the replicas.
    return router.options(name="router", ray_actor_options={"num_cpus": 0}, **_LIFE).bind(
        config, list(names), secret, *replicas
    )


def keep_apart(copies: int, takes: Mapping[str, float]) -> list[dict[str, Any]]:
    """Give for each copy of a part what keeps it on other nodes than the rest, where there are enough that have room.

    The nodes are dealt out, and a copy avoids those of the others. One that joins later is open to all; where none is
    left that a copy does not avoid, it takes any: copies on one node are better than fewer.

    Args:
        copies: how many a part has.
        takes: what each takes, as options of an actor.
    """
    if copies == 1:
        return [{}]
    counted = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    needs = {counted[name]: amount for name, amount in takes.items()}
    alive = [node for node in ray.nodes() if node["Alive"]]
    fit = [node for node in alive if all(node["Resources"].get(name, 0) >= need for name, need in needs.items())]
    nodes = sorted(node["NodeID"] for node in fit)
    if len(nodes) < copies:
        return [{}] * copies
    avoided = [[node for at, node in enumerate(nodes) if at % copies != copy] for copy in range(copies)]
    return [
        {"label_selector": {_NODE: f"!in({','.join(others)})"}, "fallback_strategy": [{"label_selector": {}}]}
        for others in avoided
    ]


async def compact_away(index: str) -> str:
    """Make the next version in a process of its own, and give its name."""
    from gsl_dist.cluster.compact import CompactConfig, run_compact

    config = CompactConfig(index=index, promote=False)
    # It waits for the tasks that do the work, and takes no core from them.
    work = ray.remote(num_cpus=0)(run_compact).remote(config)
    with own_errors():
        made: Manifest = await asyncio.to_thread(ray.get, work)
    return made.version


def _settle_heap() -> None:
    """Take what a process holds for good out of what Python looks through for garbage, while queries wait."""
    gc.collect()
    gc.freeze()


def check_room(index: str, version: str, shards: tuple[str, ...]) -> None:
    """Let shards be opened for which the machine has memory left.

    Raises:
        ConfigError: it has not; what is served now is served on.
    """
    entries = [entry for entry in open_version(Folder(index), version).shards if entry.name in shards]
    needed, left = sum(entry.index.bytes for entry in entries), psutil.virtual_memory().available
    if needed > left:
        raise ConfigError("version", version, f"its shards take {needed >> 20} MB, and {left >> 20} MB are free here")


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


def _await_answer(url: str, deadline: float, tls: Tls | None) -> None:
    last, verify = "nothing", tls.reach() if tls else True
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/healthz", timeout=_ASK_S, verify=verify)
            last = f"status {answer.status_code}"
            if answer.is_success and answer.json()["status"] == "ok":
                return
        except (httpx.TransportError, ValueError) as error:
            last = type(error).__name__
        time.sleep(_POLL_S)
    raise GslError(f"{url} does not answer ({last}); Ray Serve may run already, on another port: see `serve status`")
