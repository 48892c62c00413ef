"""Which rows of a process a filter lets through.

The payload of the shards is read a column at a time, when a filter first asks for it. A filter becomes the rows that it
lets through, once: the last few are kept. Lists then look at those rows only, as `selector` or as `mask`; where they
are few, whoever searches measures every one of them.

What was written after a version was made lies over it: rows that are `hide`n are let through by no filter and no search
without one, and columns that are `patch`ed have other values in some rows.
"""

# Shapes: N rows held here, n rows let through

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, IdArray, Standing
from gsl_dist.errors import QueryError
from gsl_dist.filters import Clause, Condition, list_columns, parse_where
from gsl_dist.storage import FileEntry, Folder

_KEPT_FILTERS = 16
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "$eq": pc.equal,
    "$ne": pc.not_equal,
    "$gt": pc.greater,
    "$gte": pc.greater_equal,
    "$lt": pc.less,
    "$lte": pc.less_equal,
}


@dataclass(frozen=True)
class Places:
    """Where in its lists each row is, by id.

    Shapes: ids_N (N,) int64, ascending; places_N (N,) int64, numbers of rows in list order.
    """

    ids_N: IdArray
    places_N: NDArray[np.int64]

    @classmethod
    def of(cls, ids_N: IdArray) -> Places:
        """Make the table of rows whose ids are given in list order; it takes 16 bytes a row."""
        order_N = np.argsort(ids_N, kind="stable")
        return cls(ids_N[order_N], order_N)


def find_sorted(ids_N: IdArray, wanted_n: IdArray) -> NDArray[np.int64]:
    """Give where in ascending ids each wanted one stands, -1 where it does not.

    Shapes: (N,), (n,) -> (n,).
    """
    if len(ids_N) == 0:
        return np.full(len(wanted_n), -1)
    at_n = np.minimum(np.searchsorted(ids_N, wanted_n), len(ids_N) - 1)
    return np.where(ids_N[at_n] == wanted_n, at_n, -1)


@dataclass(frozen=True)
class Selection:
    """The rows that a filter lets through.

    Args:
        ids_n: their ids, ascending.
        places_n: their numbers in list order.
        rows: all rows held here.
        stand: gives what the codes of rows stand for.
    """

    ids_n: IdArray
    places_n: NDArray[np.int64]
    rows: int
    stand: Callable[[NDArray[np.int64]], Standing] | None = None

    def __len__(self) -> int:
        return len(self.ids_n)

    @cached_property
    def selector(self) -> faiss.IDSelector:
        """Give them as faiss asks for them: a bit for each possible id, or a set where ids lie far apart."""
        last = int(self.ids_n[-1]) if len(self) else 0
        if last >= 64 * self.rows:
            return faiss.IDSelectorBatch(self.ids_n)
        bits = np.zeros(last // 8 + 1, np.uint8)
        np.bitwise_or.at(bits, self.ids_n // 8, (1 << (self.ids_n % 8)).astype(np.uint8))
        return faiss.IDSelectorBitmap(bits)

    @cached_property
    def standing(self) -> Standing:
        """Give what their codes stand for; it is kept, so it is for few rows."""
        assert self.stand, "made without"
        return self.stand(self.places_n)

    @cached_property
    def mask(self) -> CodeArray:
        """Give 1 for each row in list order that is let through, 0 for the others (N,)."""
        mask_N = np.zeros(self.rows, np.uint8)
        mask_N[self.places_n] = 1
        return mask_N


class Payload:
    """The payload columns of the shards of a process, and the filters on them.

    Args:
        folder: the folder of the version.
        entries: the payload files, none where the version has no payload.
        places: where each row is.
        stand: what the codes of rows stand for.
    """

    def __init__(
        self,
        folder: Folder,
        entries: Sequence[FileEntry],
        places: Callable[[], Places],
        stand: Callable[[NDArray[np.int64]], Standing],
    ) -> None:
        self._folder, self._entries, self._places, self._stand = folder, tuple(entries), places, stand
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._kept: OrderedDict[str, Selection] = OrderedDict()
        self._hidden_n = np.empty(0, np.int64)
        self._rest: Selection | None = None
        self._rows: Places | None = None
        self._lock = threading.RLock()

    @property
    def rest(self) -> Selection | None:
        """Give the rows that are not hidden; None where none is."""
        return self._rest

    def hide(self, ids_n: IdArray) -> None:
        """Let rows be no hits from now on; ids that are not here are passed over."""
        with self._lock:
            places = self._places()
            self._hidden_n = np.union1d(self._hidden_n, ids_n[find_sorted(places.ids_N, ids_n) >= 0])
            self._kept.clear()
            if len(self._hidden_n):
                left_N = np.isin(places.ids_N, self._hidden_n, invert=True, assume_unique=True)
                self._rest = self._select(places.ids_N[left_N], places)

    def is_hidden(self, ids_n: IdArray) -> NDArray[np.bool_]:
        """Tell of each id whether it is hidden (n,)."""
        return np.isin(ids_n, self._hidden_n)

    def patch(self, table: pa.Table) -> None:
        """Give some rows other values in some columns; rows that are not here are passed over.

        Args:
            table: `id` and the columns.
        """
        with self._lock:
            for name in table.column_names:
                if name != "id":
                    rows_n = self._find_rows(table["id"].to_numpy())
                    self._columns[name] = replace_values(self._read(name), rows_n, table[name])
            self._kept.clear()

    def fetch(self, ids_n: IdArray, names: Sequence[str]) -> pa.Table:
        """Give the values of columns for rows by their ids, null for those that are not here or are hidden.

        Raises:
            QueryError: there is no such column.
        """
        with self._lock:
            for name in names:
                self._require(name, "payload")
            rows_n = np.where(self.is_hidden(ids_n), -1, self._find_rows(ids_n))
            taken = pa.array(rows_n, mask=rows_n < 0)
            return pa.table({name: self._read(name).take(taken) for name in names})

    def _find_rows(self, ids_n: IdArray) -> NDArray[np.int64]:
        """Give the row of each id in the columns, -1 where it is not here."""
        if self._rows is None:
            self._rows = Places.of(self._read("id").to_numpy())
        at_n = find_sorted(self._rows.ids_N, ids_n)
        return np.where(at_n < 0, -1, self._rows.places_N[at_n])

    @cached_property
    def schema(self) -> pa.Schema:
        """Give the names and types of the columns, `id` among them."""
        if not self._entries:
            return pa.schema([("id", pa.int64())])
        with self._folder.held(self._entries[0]) as path:
            return pq.read_schema(path).remove_metadata()

    def select(self, where: Mapping[str, Any]) -> Selection:
        """Give the rows that a filter lets through.

        Raises:
            QueryError: it is no filter, or asks for a column that is not there or is of another type.
        """
        clause, key = parse_where(where), json.dumps(where, sort_keys=True)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._apply(clause)
            self._kept.move_to_end(key)
            while len(self._kept) > _KEPT_FILTERS:
                self._kept.popitem(last=False)
            return self._kept[key]

    def _apply(self, clause: Clause) -> Selection:
        names = list_columns(clause)
        for name in sorted(names):
            self._require(name, f"where.{name}")
        table = pa.table({name: self._read(name) for name in {"id", *names}})
        ids_n = np.sort(filter_rows(table, clause)["id"].to_numpy())
        return self._select(np.setdiff1d(ids_n, self._hidden_n, assume_unique=True), self._places())

    def _select(self, ids_n: IdArray, places: Places) -> Selection:
        return Selection(ids_n, places.places_N[find_sorted(places.ids_N, ids_n)], len(places.ids_N), self._stand)

    def _require(self, name: str, field: str) -> None:
        if name not in self.schema.names:
            raise QueryError(field, name, f"the columns of this version are {', '.join(self.schema.names)}")

    def _read(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns and not self._entries:
            self._columns[name] = pa.chunked_array([self._places().ids_N])
        if name not in self._columns:
            chunks: list[pa.Array] = []
            for entry in self._entries:
                with self._folder.held(entry) as path:
                    column = pq.read_table(path, columns=[name])[name]
                chunks += column.cast(_plain(column.type)).chunks
            self._columns[name] = pa.chunked_array(chunks, _plain(self.schema.field(name).type))
        return self._columns[name]


def filter_rows(table: pa.Table, clause: Clause) -> pa.Table:
    """Give the rows of a table that a filter lets through; it has every column that the filter looks at.

    Raises:
        QueryError: a column is of another type than what it is compared with.
    """
    return table.filter(_express(clause, table.schema))


def replace_values(column: pa.ChunkedArray, rows_n: NDArray[np.int64], values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Give a column with other values in some rows, -1 for none; of several for one row the last counts."""
    at_N = np.arange(len(column))
    at_N[rows_n[rows_n >= 0]] = len(column) + np.flatnonzero(rows_n >= 0)
    both = pa.chunked_array([*column.chunks, *values.cast(column.type).chunks], column.type)
    return both.take(pa.array(at_N))


def _express(clause: Clause, schema: pa.Schema) -> pc.Expression:
    if isinstance(clause, Condition):
        return _express_condition(clause, _plain(schema.field(clause.column).type))
    parts = [_express(part, schema) for part in clause.clauses]
    if clause.operator == "$not":
        return ~parts[0]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part if clause.operator == "$and" else whole | part
    return whole


def _express_condition(condition: Condition, kind: pa.DataType) -> pc.Expression:
    column, operator, value = condition
    field = pc.field(column)
    if operator == "$exists":
        return field.is_valid() if value else ~field.is_valid()
    values = value if operator in ("$in", "$nin") else (value,)
    # Whole numbers of any width are compared as the widest, and all as floats where one of either side is.
    is_broken = pa.types.is_floating(kind) or any(isinstance(one, float) for one in values)
    common = (pa.float64() if is_broken else pa.int64()) if _is_number(kind) else kind
    wanted = [_read_value(f"where.{column}.{operator}", one, kind, common) for one in values]
    field = field.cast(common)
    if operator in _COMPARE:
        return _COMPARE[operator](field, wanted[0])
    among = field.isin(pa.array([one.as_py() for one in wanted], common))
    # Without this a null would be "not among them", which a negation would let through.
    among = pc.if_else(field.is_valid(), among, pa.scalar(None, pa.bool_()))
    return among if operator == "$in" else ~among


def _read_value(place: str, value: Any, kind: pa.DataType, common: pa.DataType) -> pa.Scalar:
    fits = {
        "a string": pa.types.is_string(kind) and isinstance(value, str),
        "true or false": pa.types.is_boolean(kind) and isinstance(value, bool),
        "a number": _is_number(kind) and isinstance(value, (int, float)) and not isinstance(value, bool),
        "a date or time as ISO 8601": pa.types.is_temporal(kind) and isinstance(value, str),
    }
    try:
        if any(fits.values()):
            return pa.scalar(value).cast(common) if pa.types.is_temporal(kind) else pa.scalar(value, common)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError) as error:
        raise QueryError(place, value, f"it must be a value of type {kind} ({error})") from None
    raise QueryError(place, value, f"the column holds values of type {kind}")


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _plain(kind: pa.DataType) -> pa.DataType:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_large_string(kind) else kind
