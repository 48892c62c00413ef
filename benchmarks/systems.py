"""What `served.py` sets side by side: systems that are built once, started, and asked by several clients at once.

A system is a plain description, so that it travels to the processes that ask it. Those here are this project's service
and the plain pickled one; `databases.py` has the others. Every index of inverted lists has as many of them, and all are
given the same two cores: two processes of one thread, or one of two.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pickled import Address, FanOut, Servers, build_shard

Array = NDArray[Any]
Effort = tuple[int, ...]
CORES, SHARDS = 2, 4
PROBES = tuple((count,) for count in (1, 2, 4, 8, 16, 32, 64))
REFINED = ((2, 2), (4, 4), (8, 4), (16, 4), (16, 10), (32, 10), (64, 10), (96, 20))


class Asker:
    """One client with its connection."""

    has_batches = True

    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        """Give the ids of one query's nearest: (D,) -> at most (k,)."""
        raise NotImplementedError

    def ask_batch(self, queries: Array, k: int, effort: Effort) -> Array:
        """Give the ids of the nearest of many queries by one call: (Q, D) -> (Q, k), -1 where there is none."""
        raise NotImplementedError

    def close(self) -> None:
        """Hang up."""


@dataclass(frozen=True)
class System(ABC):
    """One system with one index.

    Args:
        name: as tables have it.
        keeps: what it holds of an item, the id apart.
        bytes_per_item: how much that is.
        efforts: what it is asked at, by what it has to turn.
        cells: inverted lists in all, where it has any.
    """

    name: str
    keeps: str
    bytes_per_item: float
    efforts: Sequence[Effort]
    cells: int = 0

    @property
    @abstractmethod
    def wire(self) -> str:
        """Say how it is asked."""

    @property
    @abstractmethod
    def software(self) -> str:
        """Name what runs, with its version."""

    @abstractmethod
    def build(self, base: NDArray[np.float32], folder: Path) -> None:
        """Make the index in a folder."""

    @abstractmethod
    def serve(self, folder: Path) -> contextlib.AbstractContextManager[Any]:
        """Answer for as long as the block lasts, which is given what `connect` needs."""

    @abstractmethod
    def connect(self, address: Any) -> Asker:
        """Give a client."""


# this project


@dataclass(frozen=True)
class Ours(System):
    """This project's service: Ray Serve, replicas of one thread, the direct port.

    Args:
        quantizer: the settings of the codes.
        vectors: what is kept beside them.
        layout: of the lists.
        body: what requests carry, and who sends them: this project's client `binary`, plain ones `json` and `bytes`.
    """

    quantizer: dict[str, Any] = field(default_factory=dict)
    vectors: str | None = None
    layout: str = "plain"
    body: str = "binary"

    @property
    def wire(self) -> str:
        """Say how it is asked."""
        sent = {"binary": "binary by its client", "json": "JSON by http.client", "bytes": "binary by http.client"}
        return f"HTTP, {sent[self.body]}; {CORES} replicas"

    @property
    def software(self) -> str:
        """Name what runs, with its version."""
        return f"gsl_dist, Ray {version('ray')}"

    def build(self, base: NDArray[np.float32], folder: Path) -> None:
        """Run the stages codebook, encode and build."""
        from gsl_dist.cluster.build import BuildConfig, run_build
        from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
        from gsl_dist.cluster.encode import EncodeConfig, run_encode
        from gsl_dist.cluster.session import start_session
        from gsl_dist.config import check_config

        np.save(folder / "base.npy", base)
        corpus, resources = {"path": str(folder / "base.npy")}, {"workers": CORES}
        codebook, codes = str(folder / "codebook"), str(folder / "codes")
        fit = {"source": "fitted", "corpus": corpus, "quantizer": self.quantizer | {"cells": self.cells}}
        encode = {"corpus": corpus, "codebook": codebook, "output": codes, "shards": SHARDS, "keep_vectors": True}
        build = {"codes": codes, "codebook": codebook, "index": str(folder / "index")}
        build |= {"vectors": self.vectors, "code_layout": self.layout, "resources": resources}
        start_session(CORES)
        run_codebook(check_config(CodebookConfig, fit | {"output": codebook, "resources": resources}))
        run_encode(check_config(EncodeConfig, encode | {"batch_rows": 16_384, "resources": resources}))
        run_build(check_config(BuildConfig, build))
        for path in (folder / "base.npy", folder / "codes"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[str]:
        """Serve the index by Ray Serve."""
        import ray

        from gsl_dist.cluster.serve import ServeConfig, serve, stop_service

        ray.init(address="local", num_cpus=CORES, include_dashboard=False, log_to_driver=False)
        try:
            yield serve(ServeConfig(index=str(folder / "index"), port=0, replicas=CORES)).url
        finally:
            stop_service()
            ray.shutdown()

    def connect(self, address: str) -> Asker:
        """Give a client of the kind of body."""
        return {"binary": _OwnAsker, "json": _JsonAsker, "bytes": _PlainAsker}[self.body](address)


class _OwnAsker(Asker):
    def __init__(self, url: str) -> None:
        from gsl_dist.client import Client

        self._client = Client(url, timeout_s=60)

    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        return self.ask_batch(query, k, effort)[0]

    def ask_batch(self, queries: Array, k: int, effort: Effort) -> Array:
        probes, refine = (*effort, None)[:2]
        return self._client.search(queries, k, probes, refine=refine).ids

    def close(self) -> None:
        self._client.close()


class _PlainAsker(Asker):
    """What asking takes where a client does no more than it must."""

    has_batches = False

    def __init__(self, url: str) -> None:
        self._line = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)

    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        from gsl_dist.hits import Effort as Asked
        from gsl_dist.wire import QUERY_TYPE, pack_query, unpack_hits

        probes, refine = (*effort, None)[:2]
        return unpack_hits(self._post(pack_query(query[None], Asked(k, probes, refine)), QUERY_TYPE)).ids[0]

    def close(self) -> None:
        self._line.close()

    def _post(self, body: bytes, kind: str) -> bytes:
        self._line.request("POST", "/v1/search", body, {"content-type": kind})
        return self._line.getresponse().read()


class _JsonAsker(_PlainAsker):
    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        asked = {"vectors": [query.tolist()], "k": k, "probes": effort[0]}
        asked |= {"refine": effort[1]} if len(effort) > 1 else {}
        return np.array(json.loads(self._post(json.dumps(asked).encode(), "application/json"))["ids"][0])


# pickles over sockets


@dataclass(frozen=True)
class Pickled(System):
    """Servers of faiss that are asked by pickles.

    Args:
        factory: the words of a server's index, `{cells}` for its lists.
    """

    factory: str = ""

    @property
    def wire(self) -> str:
        """Say how it is asked."""
        return f"pickles over TCP; {CORES} servers"

    @property
    def software(self) -> str:
        """Name what runs, with its version."""
        return f"faiss {version('faiss-cpu')}"

    def build(self, base: NDArray[np.float32], folder: Path) -> None:
        """Train and fill a server's index for each, one after another."""
        ids = np.arange(len(base))
        for part in range(CORES):
            words = self.factory.format(cells=self.cells // CORES)
            build_shard(base[part::CORES], ids[part::CORES], words, folder / f"shard-{part}")

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[list[Address]]:
        """Start a process for each server."""
        with Servers(sorted(folder.glob("shard-*")), CORES // 2) as addresses:
            yield addresses

    def connect(self, address: list[Address]) -> Asker:
        """Give a client."""
        return _PickledAsker(address)


class _PickledAsker(Asker):
    def __init__(self, addresses: list[Address]) -> None:
        self._fan_out = FanOut(addresses)

    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        return self.ask_batch(query[None], k, effort)[0]

    def ask_batch(self, queries: Array, k: int, effort: Effort) -> Array:
        return self._fan_out.search(queries, k, *effort)[1]

    def close(self) -> None:
        self._fan_out.close()
