"""The plainest sharded service: a server of faiss a shard, asked over sockets that carry pickles, merged by the client.

The shape of facebookresearch/distributed-faiss, written anew to stand beside this project's service: every server
trains and holds an index of its own rows, a call is a pickled (method, arguments) and its answer a pickled object, and
a client asks all servers at once, each from a thread, and merges what they found. It knows nothing of versions, of
servers that fall, or of who may ask.

Legend: N vectors, D dims, Q queries, k neighbours.
"""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import socketserver
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

Address = tuple[str, int]
_LENGTH = struct.Struct("<Q")


def build_shard(base_ND: NDArray[np.float32], ids_N: NDArray[np.int64], factory: str, folder: Path) -> None:
    """Train an index on the rows of one server and write it with their ids."""
    index = faiss.index_factory(base_ND.shape[1], factory)
    index.train(base_ND)
    index.add(base_ND)
    folder.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(folder / "index.faiss"))
    np.save(folder / "ids.npy", ids_N)


class Shard:
    """What one server answers for.

    Args:
        folder: what `build_shard` wrote.
        threads: of each search.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self._index = faiss.read_index(str(folder / "index.faiss"))
        self._ids_N = np.load(folder / "ids.npy")

    def search(
        self, queries_QD: NDArray[np.float32], k: int, probes: int, refine: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Give distances and ids; with `refine`, so many candidates for a hit are ranked by what is kept of vectors.

        Shapes: (Q, D) -> (Q, k) float32, (Q, k) int64.
        """
        params = faiss.SearchParametersIVF(nprobe=probes)
        if refine is not None:
            params = faiss.IndexRefineSearchParameters(k_factor=refine, base_index_params=params)
        distances_Qk, places_Qk = self._index.search(queries_QD, k, params=params)
        return distances_Qk, np.where(places_Qk < 0, -1, self._ids_N[places_Qk])


class _Door(socketserver.StreamRequestHandler):
    """One client's connection: calls, one after another, until it hangs up."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        while (call := receive(self.request)) is not None:
            method, arguments = call
            send(self.request, getattr(self.server.shard, method)(*arguments))  # type: ignore[attr-defined]


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64


def run_server(folder: Path, threads: int, told: Connection) -> None:
    """Answer for a shard until the process ends; its address is told first."""
    with _Server(("127.0.0.1", 0), _Door) as server:
        server.shard = Shard(folder, threads)  # type: ignore[attr-defined]
        told.send(server.server_address)
        server.serve_forever()


class Servers:
    """A process a shard, for use in a `with` block, which gives their addresses."""

    def __init__(self, folders: Sequence[Path], threads: int) -> None:
        self._folders, self._threads, self._tasks = folders, threads, list[Any]()

    def __enter__(self) -> list[Address]:
        context, addresses = multiprocessing.get_context("spawn"), list[Address]()
        for folder in self._folders:
            hears, tells = context.Pipe(duplex=False)
            task = context.Process(target=run_server, args=(folder, self._threads, tells), daemon=True)
            task.start()
            tells.close()
            self._tasks.append(task)
            addresses.append(hears.recv())
        return addresses

    def __exit__(self, *_: object) -> None:
        for task in self._tasks:
            task.terminate()
            task.join()


class FanOut:
    """A client: a connection and a thread a server."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._lines = [socket.create_connection(address) for address in addresses]
        for line in self._lines:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._threads = ThreadPoolExecutor(len(self._lines))

    def search(
        self, queries_QD: NDArray[np.float32], k: int, probes: int, refine: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Give the nearest of what all servers found, as `Shard.search` does."""
        call = ("search", (queries_QD, k, probes, refine))
        answers = list(self._threads.map(lambda line: ask(line, call), self._lines))
        return merge(*(np.concatenate(parts, axis=1) for parts in zip(*answers, strict=True)), k)

    def close(self) -> None:
        """Hang up."""
        self._threads.shutdown()
        for line in self._lines:
            line.close()


def merge(
    distances_Qn: NDArray[np.float32], ids_Qn: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Give the k smallest distances of each query in their order, and whose they are."""
    order_Qk = np.argsort(distances_Qn, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances_Qn, order_Qk, 1), np.take_along_axis(ids_Qn, order_Qk, 1)


def ask(line: socket.socket, call: tuple[str, tuple[Any, ...]]) -> Any:
    send(line, call)
    return receive(line)


def send(line: socket.socket, thing: Any) -> None:
    body = pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)
    line.sendall(_LENGTH.pack(len(body)) + body)


def receive(line: socket.socket) -> Any:
    """Give what the other side sent; None when it has hung up."""
    head = _read(line, _LENGTH.size)
    if head is None:
        return None
    body = _read(line, *_LENGTH.unpack(head))
    # Pickle is what is measured here. It runs what it is told to run: nothing that strangers reach may read it.
    return None if body is None else pickle.loads(body)  # noqa: S301


def _read(line: socket.socket, length: int) -> bytearray | None:
    body = bytearray(length)
    view, read = memoryview(body), 0
    while read < length:
        if not (came := line.recv_into(view[read:])):
            return None
        read += came
    return body
