"""What was written over a version: rows that are new, rows that are gone, and columns that changed.

New rows are measured exactly, every one of them, until the next version holds their codes: they are few. Rows of the
version that were deleted or replaced are hidden, and changed columns patched, by whoever holds these rows
(`Payload.hide`, `Payload.patch`): `Overlay.apply` gives the tables that say so. All of it can be made again from the
write log.
"""

# Shapes: N new rows, D dims, Q queries, k neighbours

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.errors import QueryError
from gsl_dist.filters import list_columns, parse_where
from gsl_dist.hits import NO_ID, Effort, Hits, cut_within, merge_topk, show_distances
from gsl_dist.index.log import Write, WriteLog
from gsl_dist.index.manifest import Manifest, version_folder
from gsl_dist.index.search import LocalSearcher, check_effort, check_queries, open_searcher
from gsl_dist.index.selection import filter_rows
from gsl_dist.storage import Folder

_LEAST_ROWS = 64
_PLACE = "#place"


class Overlay:
    """The writes over one version, as they stand now.

    Args:
        manifest: the version.
        schema: its payload columns, `id` among them.
    """

    def __init__(self, manifest: Manifest, schema: pa.Schema) -> None:
        self.manifest, self.schema, self.seq = manifest, schema, manifest.log_seq
        self.hidden: set[int] = set()
        self.patched: dict[int, dict[str, Any]] = {}
        self._vectors_ND = np.empty((_LEAST_ROWS, manifest.dim), np.float32)
        self._ids_N = np.full(_LEAST_ROWS, NO_ID)
        self._rows: list[dict[str, Any]] = []
        self._places: dict[int, int] = {}
        self._table: pa.Table | None = None

    @property
    def rows(self) -> int:
        """Give the number of new rows."""
        return len(self._places)

    def check(self, writes: Iterable[Write]) -> list[Write]:
        """Let writes pass that fit the version, with vectors as they are searched.

        Raises:
            QueryError: an id, a vector or a value is not as it should be; the error names the place.
        """
        return [self._check(write, f"items[{place}]") for place, write in enumerate(writes)]

    def fit(self, writes: Iterable[Write]) -> list[Write]:
        """Leave out of payloads what this version has no place for: it has other columns than when it was written."""
        return [
            Write(write.operation, write.id, write.vector, {k: v for k, v in write.payload.items() if self._has(k, v)})
            for write in writes
        ]

    def apply(self, writes: Sequence[Write], seq: int) -> list[pa.Table]:
        """Take writes over, and give what whoever holds the version's rows must be told."""
        patches: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
        gone: list[int] = []
        for write in writes:
            if write.operation == "payload":
                if write.id in self._places:
                    self._rows[self._places[write.id]] |= write.payload
                elif write.id not in self.hidden:
                    self.patched.setdefault(write.id, {}).update(write.payload)
                    columns = tuple(sorted(write.payload))
                    patches.setdefault(columns, {}).setdefault(write.id, {}).update(write.payload)
                continue
            if write.id not in self.hidden:
                gone.append(write.id)
            self.hidden.add(write.id)
            self.patched.pop(write.id, None)
            self._remove(write.id)
            if write.vector is not None:
                self._append(write)
        self._table, self.seq = None, seq
        hides = [pa.table({"id": np.unique(np.array(gone, np.int64))})] if gone else []
        return hides + [self._tabulate(rows, columns) for columns, rows in patches.items() if columns]

    def search(self, queries_QD: FloatArray, effort: Effort) -> Hits:
        """Give the k nearest new rows of each query; of distances, smaller is nearer.

        Shapes: (Q, D) -> (Q, k).
        Raises:
            QueryError: the filter asks for what there is not.
        """
        places_n = self._choose(effort.where)
        ids_n, vectors_nD = self._ids_N[places_n], self._vectors_ND[places_n]
        dots_Qn = queries_QD @ vectors_nD.T
        far_Qn = -dots_Qn
        if self.manifest.metric != "ip":
            squares_n = np.square(vectors_nD).sum(1)
            far_Qn = np.maximum(np.square(queries_QD).sum(1, keepdims=True) + squares_n - 2 * dots_Qn, 0)
        k = min(effort.k, len(ids_n))
        nearest_Qk = np.argpartition(far_Qn, k - 1, axis=1)[:, :k] if k else np.empty((len(queries_QD), 0), np.int64)
        found = Hits(ids_n[nearest_Qk], np.take_along_axis(far_Qn, nearest_Qk, 1).astype(np.float32), 0, 0)
        return merge_topk([found], effort.k)

    def fetch(self, ids_n: IdArray, names: Sequence[str]) -> tuple[NDArray[np.bool_], FloatArray, pa.Table]:
        """Give which items are new rows, their vectors, and the values of columns; null for all others.

        Shapes: (n,) -> (n,), (n, D), n rows.
        """
        places = [self._places.get(int(item)) for item in ids_n]
        is_here_n = np.array([place is not None for place in places], bool)
        vectors_nD = self._vectors_ND[[place or 0 for place in places]] * is_here_n[:, None]
        rows = [{} if place is None else self._rows[place] for place in places]
        columns = {name: _cast([row.get(name) for row in rows], self.schema.field(name)) for name in names}
        return is_here_n, vectors_nD, pa.table(columns)

    def dump(self) -> tuple[IdArray, FloatArray, pa.Table]:
        """Give all new rows by ascending id: ids, vectors and payload.

        Shapes: -> (N,), (N, D), N rows.
        """
        places_N = np.array([self._places[item] for item in sorted(self._places)], np.int64)
        return self._ids_N[places_N], self._vectors_ND[places_N], self._whole().take(pa.array(places_N))

    def patches(self) -> list[pa.Table]:
        """Give the changed columns of rows that the version holds, a table for each choice of columns."""
        groups: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
        for item, values in self.patched.items():
            groups.setdefault(tuple(sorted(values)), {})[item] = values
        return [self._tabulate(rows, columns) for columns, rows in groups.items() if columns]

    def changes(self) -> list[pa.Table]:
        """Give all that whoever opens the version's rows must be told."""
        hides = [pa.table({"id": np.array(sorted(self.hidden), np.int64)})] if self.hidden else []
        return hides + self.patches()

    def _check(self, write: Write, field: str) -> Write:
        if isinstance(write.id, bool) or not isinstance(write.id, int) or not 0 <= write.id < 2**63:
            raise QueryError(f"{field}.id", write.id, "an id is a whole number from 0 to 2^63 - 1")
        for name, value in write.payload.items():
            if name not in self.schema.names or name == "id":
                known = ", ".join(name for name in self.schema.names if name != "id") or "none"
                raise QueryError(f"{field}.payload", name, f"the payload columns of this version are: {known}")
            if not self._has(name, value):
                kind = self.schema.field(name).type
                raise QueryError(f"{field}.payload.{name}", value, f"the column holds values of type {kind}")
        if write.operation != "upsert":
            return write
        try:
            vector = check_queries(write.vector if write.vector is not None else [], *self._shape)[0]
        except QueryError as error:
            raise QueryError(f"{field}.vector", error.value, error.allowed) from None
        with np.errstate(over="ignore"):
            is_near_enough = np.isfinite(np.square(vector).sum())
        if not is_near_enough:
            allowed = "the square of its length must be a float32, or no query would find it"
            raise QueryError(f"{field}.vector", f"numbers up to {np.abs(vector).max():.3g}", allowed)
        return Write("upsert", write.id, vector, write.payload)

    def _has(self, name: str, value: Any) -> bool:
        """Tell whether a column can hold a value."""
        if name not in self.schema.names or name == "id":
            return False
        try:
            _cast([value], self.schema.field(name))
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            return False
        return True

    @property
    def _shape(self) -> tuple[int, str]:
        return self.manifest.dim, self.manifest.metric

    def _append(self, write: Write) -> None:
        place = len(self._rows)
        if place == len(self._ids_N):
            # Searches under way go on with the arrays that they have.
            self._ids_N = np.concatenate([self._ids_N, np.full(place, NO_ID)])
            self._vectors_ND = np.concatenate([self._vectors_ND, np.empty_like(self._vectors_ND)])
        self._vectors_ND[place], self._ids_N[place] = write.vector, write.id
        self._rows.append({"id": write.id, **write.payload})
        self._places[write.id] = place

    def _remove(self, item: int) -> None:
        place = self._places.pop(item, None)
        if place is not None:
            self._ids_N[place] = NO_ID

    def _choose(self, where: Mapping[str, Any] | None) -> NDArray[np.int64]:
        """Give the places of the rows that a filter lets through."""
        count = len(self._rows)
        if where is None or not count:
            return np.flatnonzero(self._ids_N[:count] != NO_ID)
        clause = parse_where(where)
        for name in sorted(list_columns(clause)):
            if name not in self.schema.names:
                raise QueryError(
                    f"where.{name}", name, f"the columns of this version are {', '.join(self.schema.names)}"
                )
        table = self._whole().append_column(_PLACE, pa.array(np.arange(count)))
        places_n = filter_rows(table, clause)[_PLACE].to_numpy()
        return places_n[self._ids_N[places_n] != NO_ID]

    def _whole(self) -> pa.Table:
        """Give the payload of all places, those of rows that are gone among them."""
        if self._table is None:
            columns = {field.name: _cast([row.get(field.name) for row in self._rows], field) for field in self.schema}
            self._table = pa.table(columns)
        return self._table

    def _tabulate(self, rows: Mapping[int, Mapping[str, Any]], columns: Sequence[str]) -> pa.Table:
        values = {name: _cast([row.get(name) for row in rows.values()], self.schema.field(name)) for name in columns}
        return pa.table({"id": np.array(list(rows), np.int64), **values})


def read_overlay(
    index: Folder, manifest: Manifest, log: WriteLog | None = None, *, until: int | None = None
) -> Overlay:
    """Make the overlay of a version from the write log, up to a commit if one is given.

    Raises:
        ArtefactError: the log is damaged, or is about vectors of another space.
    """
    overlay = Overlay(manifest, read_schema(version_folder(index, manifest.version), manifest))
    for seq, writes in (log or WriteLog(index)).read(manifest.log_seq, manifest.space):
        if until is not None and seq > until:
            break
        overlay.apply(overlay.fit(writes), seq)
    return overlay


def read_schema(folder: Folder, manifest: Manifest) -> pa.Schema:
    """Give the payload columns of a version, `id` among them.

    Raises:
        ArtefactError: the payload is damaged.
    """
    first = next((shard.payload for shard in manifest.shards if shard.payload), None)
    if first is None:
        return pa.schema([("id", pa.int64())])
    with folder.held(first) as path:
        return pq.read_schema(path).remove_metadata()


def lay_over(searcher: LocalSearcher, overlay: Overlay) -> None:
    """Tell an open searcher what was written over its rows; new rows stay with the overlay."""
    assert searcher.payload is not None, "opened without"
    for change in overlay.changes():
        if change.column_names == ["id"]:
            searcher.payload.hide(change["id"].to_numpy())
        else:
            searcher.payload.patch(change)


@dataclass(frozen=True)
class WrittenSearcher:
    """A version in this process, with what was written over it: what a service would answer.

    Args:
        searcher: the open shards; they have been told.
        overlay: the new rows.
    """

    searcher: LocalSearcher
    overlay: Overlay

    @property
    def manifest(self) -> Manifest:
        """Give the version."""
        return self.searcher.manifest

    def search(self, queries: ArrayLike, k: int = 10, **asked: Any) -> Hits:
        """Give the k nearest items of each query, as `LocalSearcher.search` does."""
        manifest = self.manifest
        matrix = check_queries(queries, manifest.dim, manifest.metric)
        effort = check_effort(Effort(k, **asked), manifest)
        found = [self.searcher.find(matrix, effort), self.overlay.search(matrix, effort)]
        return cut_within(show_distances(merge_topk(found, effort.k), manifest.metric), effort.within, manifest.metric)


def open_written(location: str, version: str | None = None) -> WrittenSearcher:
    """Open a version and lay over it what was written since.

    Raises:
        BadInput, ArtefactError: as `open_searcher` and `read_overlay`.
    """
    searcher = open_searcher(location, version)
    overlay = read_overlay(Folder(location), searcher.manifest)
    lay_over(searcher, overlay)
    return WrittenSearcher(searcher, overlay)


def _cast(values: list[Any], field: pa.Field) -> pa.Array:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_temporal(kind):
        # A date or a time is told as ISO 8601.
        return pa.array([None if value is None else str(value) for value in values], pa.string()).cast(kind)
    return pa.array(values, kind)
