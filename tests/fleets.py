"""A whole service in this process, without Ray: replicas, a router, its door."""

import asyncio
import json
import time

import httpx
import numpy as np

from gsl_dist.index.search import open_searcher
from gsl_dist.service.access import Access
from gsl_dist.service.app import Desk, create_app
from gsl_dist.service.door import DirectDoor
from gsl_dist.service.links import Fleet, name_copies, spread_shards
from gsl_dist.service.reading import Limits
from gsl_dist.service.replica import Replica
from gsl_dist.service.router import Router, RouterConfig


def same(hits, expected):
    """Whether hits are those of another way to ask, to the last bit."""
    return np.array_equal(hits.ids, expected.ids) and np.array_equal(hits.distances, expected.distances)


class World:
    """Replicas and a router of one index in this process."""

    def __init__(
        self,
        folder,
        replicas=2,
        copies=1,
        limits=None,
        timeout_s=5.0,
        tokens=None,
        threads=1,
        rpc=None,
        tls=None,
        encode=None,
        compact=None,
        **how,
    ):
        self.folder, self.local, self.threads, self.tls = str(folder), open_searcher(str(folder)), threads, tls
        self.groups = spread_shards(self.local.manifest.shards, replicas)
        self.replicas, self.addresses = {}, {}
        self.parts = {name: shards for group, shards in self.groups.items() for name in name_copies(group, copies)}
        for name in self.parts:
            self.begin(name)
        fleet = Fleet(
            self.resolve, replicas, copies, secret="secret", tls=tls and tls.reach(), timeout_s=timeout_s, load_s=20
        )
        self.router = Router(self.folder, fleet, config=RouterConfig(**how))
        self.desk = Desk(self.router, limits or Limits(), Access(tokens), encode, compact)
        beside = rpc and rpc(self.desk, host="127.0.0.1", port=0)
        self.door = DirectDoor(self.router, create_app(self.desk), host="127.0.0.1", port=0, tls=tls, beside=beside)
        self.rpc = beside
        self.door.start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.door.port}"
        self.verify = tls.reach() if tls else True
        self.await_shards(len(self.local.manifest.shards))

    async def resolve(self, name):
        return self.addresses.get(name)

    def open(self, version, shards):
        return open_searcher(self.folder, version, names=shards)

    def begin(self, name):
        self.replicas[name] = Replica(
            self.open, secret="secret", threads=self.threads, tls=self.tls and self.tls.listen(), grace_s=0.2
        )
        self.holding(name)
        self.addresses[name] = self.replicas[name].start()

    def kill(self, name):
        del self.addresses[name]
        self.replicas.pop(name).stop()

    def holding(self, name, version="v1"):
        return self.replicas[name].hold(version, self.parts[name])

    def call(self, work, timeout_s=20):
        return asyncio.run_coroutine_threadsafe(work, self.door.loop).result(timeout_s)

    def await_shards(self, count):
        end = time.monotonic() + 20
        while time.monotonic() < end:
            answer = httpx.get(f"{self.url}/healthz", verify=self.verify).json()
            if (
                answer.get("shards_answered", 0) == count
                and httpx.get(f"{self.url}/readyz", verify=self.verify).is_success
            ):
                return
            time.sleep(0.02)
        raise AssertionError(f"{count} shards never answered")

    def post(self, body, path="/v1/search", kind="application/json", token=None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": kind} | ({"authorization": f"Bearer {token}"} if token else {})
        return httpx.post(self.url + path, content=content, headers=headers, timeout=20)

    def stop(self):
        self.door.stop()
        for replica in self.replicas.values():
            replica.stop()
