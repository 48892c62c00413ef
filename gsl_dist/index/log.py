"""The write log of an index: what was written since its versions were made, commit by commit.

    <index>/log/0000000000000042-9f86d081-6a09e667f3bcc908b2fb1366ea957d3e.arrow    number, writer, digest of a commit

A commit is a file of its own, on the disk as a whole before anybody is told that it is written; so a log can lie
wherever versions can, and nothing of it is ever half there. Numbers follow on one another and on that of the version
they lie over, so that a commit that is gone is missed. Two writers that take the same number by mistake both
stay, in the order of their names. A row is one write of one item: `upsert` gives it a vector and a payload, `payload`
other values in some columns, `delete` ends it. What rows say of columns is JSON, so that a log outlives versions with
other columns; vectors are those of one space, and a log whose space is not that of a version does not lie over it.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from gsl_dist.codebook import FloatArray
from gsl_dist.errors import ArtefactError
from gsl_dist.storage import Folder

Operation = Literal["upsert", "payload", "delete"]

LOG = "log"
_SCHEMA = pa.schema(
    [("operation", pa.string()), ("id", pa.int64()), ("vector", pa.list_(pa.float32())), ("payload", pa.string())]
)


@dataclass(frozen=True)
class Write:
    """One write of one item.

    Args:
        operation: what happens to it.
        id: the item.
        vector: where it lies from now on; of an upsert.
        payload: values by column; all that it has, of an upsert, and those that change, of `payload`.
    """

    operation: Operation
    id: int
    vector: FloatArray | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)


class WriteLog:
    """The log of one index.

    Args:
        index: the index folder.
    """

    def __init__(self, index: Folder) -> None:
        self._folder, self._writer = index.child(LOG), uuid.uuid4().hex[:8]
        self.last = max((number for number, _ in self._list()), default=0)

    def append(self, writes: Sequence[Write], space: str, after: int = 0) -> int:
        """Write a commit and give its number, once it is where no crash undoes it.

        Args:
            writes: what was written.
            space: of their vectors.
            after: the last commit that the version holds, which may have been forgotten here.
        """
        number = max(self.last, after) + 1
        sink = io.BytesIO()
        table = _tabulate(writes).replace_schema_metadata({"space": space})
        with pa.ipc.new_file(sink, table.schema) as stream:
            stream.write_table(table)
        content = sink.getvalue()
        self._folder.write_bytes(f"{number:016d}-{self._writer}-{_digest(content)}.arrow", content)
        self.last = number
        return number

    def read(self, after: int, space: str) -> Iterator[tuple[int, list[Write]]]:
        """Give the commits with a higher number, in their order.

        Raises:
            ArtefactError: one is missing, cannot be read, or is about vectors of another space.
        """
        last = after
        for number, name in self._list():
            if number > last + 1:
                raise ArtefactError(self._folder.path(name), f"commit {last + 1} should lie before it and is missing")
            if number > after:
                last = number
                yield number, self._read_commit(name, space)

    def forget(self, until: int) -> int:
        """Remove the commits up to a number, which no version needs any more, and give how many there were."""
        gone = [name for number, name in self._list() if number <= until]
        for name in gone:
            self._folder.delete(name)
        return len(gone)

    def _read_commit(self, name: str, space: str) -> list[Write]:
        path, content = self._folder.path(name), self._folder.read_bytes(name)
        if _digest(content) != name.removesuffix(".arrow").rpartition("-")[2]:
            raise ArtefactError(path, "its content differs from the digest in its name")
        try:
            with pa.ipc.open_file(pa.py_buffer(content)) as stream:
                table = stream.read_all()
            table.validate(full=True)
            found = table.schema.metadata[b"space"].decode()
            rows = table.cast(_SCHEMA, safe=True).to_pylist()
        except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(path, f"it is no commit of a write log ({error or type(error).__name__})") from error
        if found != space:
            reason = f"its vectors are of the space {found}, and the version is of {space}"
            raise ArtefactError(path, f"{reason}: compact the version that they were written over first")
        return [
            Write(
                row["operation"],
                row["id"],
                None if row["vector"] is None else np.array(row["vector"], np.float32),
                json.loads(row["payload"]),
            )
            for row in rows
        ]

    def _list(self) -> list[tuple[int, str]]:
        names = self._folder.names(suffix=".arrow")
        return [(int(name[:16]), name) for name in names if name[:16].isdecimal()]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _tabulate(writes: Sequence[Write]) -> pa.Table:
    columns = {
        "operation": [write.operation for write in writes],
        "id": [write.id for write in writes],
        "vector": [None if write.vector is None else write.vector.tolist() for write in writes],
        "payload": [json.dumps(dict(write.payload)) for write in writes],
    }
    return pa.table(columns, schema=_SCHEMA)
