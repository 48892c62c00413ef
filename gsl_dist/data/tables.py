"""Tables: Parquet and Arrow files with a column of vectors or of encoded images.

A file is a row of blocks (row groups, record batches); only the blocks that hold wanted rows are touched, and of those
one batch at a time. Opening reads the footers, and one row where the width of a list is not in its type. Arrow files
are memory-mapped where they are local.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gsl_dist.data.source import CorpusConfig, Format, Raw, Rows, Source, SourceFile, readable, spread_rows
from gsl_dist.errors import DataError
from gsl_dist.storage import Folder

_BUFFER_BYTES = 1 << 22
_OPENERS = 8
_LIST_TYPES = (pa.lib.Type_FIXED_SIZE_LIST, pa.lib.Type_LIST, pa.lib.Type_LARGE_LIST)


class ParquetFile:
    """A Parquet file; its blocks are row groups."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        with readable(folder.path(name), "Parquet"), folder.open(name) as stream:
            file = pq.ParquetFile(stream)
            self.schema: pa.Schema = file.schema_arrow
            groups = range(file.metadata.num_row_groups)
            self.counts = [file.metadata.row_group(group).num_rows for group in groups]

    def blocks(self, numbers: list[int], columns: list[str], batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the blocks in batches, each with the number in the file of its first row."""
        with readable(self.folder.path(self.name), "Parquet"), self.folder.open(self.name) as stream:
            # With a buffer, a column of a row group is read in pieces instead of being held whole.
            file = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            for number in numbers:
                first = sum(self.counts[:number])
                for batch in file.iter_batches(batch_rows, row_groups=[number], columns=columns):
                    yield first, batch
                    first += batch.num_rows


class ArrowFile:
    """An Arrow file, or a local Arrow stream (what Hugging Face writes); its blocks are record batches."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.folder, self.name = folder, name
        with readable(folder.path(name), "Arrow"):
            self._batches, self.schema = self._open()
            self.counts = [self._batch(number).num_rows for number in range(self._length)]

    def blocks(self, numbers: list[int], columns: list[str], batch_rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the blocks in batches, each with the number in the file of its first row."""
        for number in numbers:
            with readable(self.folder.path(self.name), "Arrow"):
                block = self._batch(number).select(columns)
            for at in range(0, block.num_rows, batch_rows):
                yield sum(self.counts[:number]) + at, block.slice(at, batch_rows)

    def _open(self) -> tuple[Any, pa.Schema]:
        with self.folder.local(self.name) if self.folder.is_local else contextlib.nullcontext() as path:
            stream = pa.memory_map(str(path)) if path else self.folder.open(self.name)
        try:
            reader = pa.ipc.open_file(stream)
            return reader, reader.schema
        except pa.ArrowInvalid:
            stream.seek(0)
            found = pa.ipc.open_stream(stream)
        if not self.folder.is_local:
            raise DataError("corpus.path", self.name, "a remote Arrow stream cannot be read in parts: write Parquet")
        return list(found), found.schema  # memory-mapped: only the places of the arrays are held

    @property
    def _length(self) -> int:
        return len(self._batches) if isinstance(self._batches, list) else int(self._batches.num_record_batches)

    def _batch(self, number: int) -> pa.RecordBatch:
        return self._batches[number] if isinstance(self._batches, list) else self._batches.get_batch(number)


class TableSource(Source):
    """The rows of Parquet or Arrow files."""

    def __init__(self, config: CorpusConfig, folder: Folder, files: list[SourceFile], kind: Format) -> None:
        self._config = config
        opener: Any = ParquetFile if kind == "parquet" else ArrowFile
        with ThreadPoolExecutor(_OPENERS) as pool:
            self._files = list(pool.map(lambda file: opener(folder, file.name), files))
        self.counts = [sum(file.counts) for file in self._files]
        self.rows = sum(self.counts)
        self._items = self._find_items()
        named = [*self._items, config.id_column, config.label_column, *config.payload_columns]
        self._columns = list(dict.fromkeys(name for name in named if name))
        self._check_columns()
        self._check_types()
        self.has_labels = config.label_column is not None
        self.payload_schema = self._find_payload()
        self.dim = self._find_dim() if config.vector_column and self.rows else None

    def read(self, start: int, stop: int, batch_rows: int) -> Iterator[Raw]:
        """Yield rows [start, stop) in order, touching only the blocks that hold them."""
        before = 0
        for file, count in zip(self._files, self.counts, strict=True):
            first, last = max(start - before, 0), min(stop - before, count)
            if first < last:
                edges = np.concatenate([[0], np.cumsum(file.counts)])
                numbers = [n for n in range(len(file.counts)) if edges[n] < last and edges[n + 1] > first]
                for at, batch in file.blocks(numbers, self._columns, batch_rows):
                    low, high = max(first - at, 0), min(last - at, batch.num_rows)
                    if low < high:
                        rows = np.arange(before + at + low, before + at + high, dtype=np.int64)
                        yield self._make_raw(file.name, rows, batch.slice(low, high - low))
            before += count

    def take(self, rows: Rows, batch_rows: int) -> Iterator[Raw]:
        """Yield the rows with these numbers, touching only the blocks that hold them."""
        for number, inside in spread_rows(self.counts, rows):
            file, before = self._files[number], sum(self.counts[:number])
            numbers = [part for part, _ in spread_rows(file.counts, inside)]
            for at, batch in file.blocks(numbers, self._columns, batch_rows):
                some = inside[np.searchsorted(inside, at) : np.searchsorted(inside, at + batch.num_rows)]
                if len(some):
                    yield self._make_raw(file.name, some + before, batch.take(pa.array(some - at)))

    @cached_property
    def label_names(self) -> list[str] | None:
        """Give the sorted label strings; the label column is read once to find them."""
        name = self._config.label_column
        if name is None or not _is_text(self._type(name)):
            return None
        found: set[str] = set()
        for file in self._files:
            for _, batch in file.blocks(list(range(len(file.counts))), [name], 1 << 16):
                found.update(pc.unique(_plain(batch.column(name))).to_pylist())
        return sorted(text for text in found if text is not None)

    def _make_raw(self, file: str, rows: Rows, batch: pa.RecordBatch) -> Raw:
        config = self._config
        items = self._read_items(batch, rows, file)
        ids = self._read_integers(batch, config.id_column, rows, file) if config.id_column else rows
        if len(ids) and ids.min() < 0:
            at = int(np.argmin(ids))
            raise DataError("corpus.id_column", f"{ids[at]} in row {rows[at]} of {file}", "ids must be 0 or more")
        labels = self._read_integers(batch, config.label_column, rows, file) if config.label_column else None
        payload = None
        if self.payload_schema is not None:
            kept = [_plain(batch.column(name)) for name in config.payload_columns]
            payload = pa.table(kept, schema=self.payload_schema)
        return Raw(rows, [file] * len(rows), items, ids, labels, payload)

    def _read_items(self, batch: pa.RecordBatch, rows: Rows, file: str) -> Any:
        config = self._config
        if config.vector_column:
            return self._read_vectors(_plain(batch.column(config.vector_column)), rows, file)
        read = {name: _read_images(_plain(batch.column(name))) for name in self._items}
        if config.image_column:
            return read[config.image_column]
        # An item is a tuple of images; of those that this corpus does not have there are none.
        columns = [[None] * len(rows) if part.absent else read[part.column] for part in config.modalities]
        return list(zip(*columns, strict=True))

    def _read_integers(self, batch: pa.RecordBatch, name: str, rows: Rows, file: str) -> Rows:
        column, role = _plain(batch.column(name)), "id_column" if name == self._config.id_column else "label_column"
        if column.null_count:
            at = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"corpus.{role}", f"null in {name!r}, row {rows[at]} of {file}", "every row needs a value")
        if _is_text(column.type):
            column = pc.index_in(column.cast(pa.string()), value_set=pa.array(self.label_names, pa.string()))
        try:
            numbers = column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            raise DataError(f"corpus.{role}", f"{name!r} in {file}", "its values must fit a signed int64") from None
        return np.array(numbers, dtype=np.int64)

    def _read_vectors(self, column: pa.Array, rows: Rows, file: str) -> NDArray[np.float32]:
        if column.null_count:
            at = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise DataError("corpus.vector_column", f"null in row {rows[at]} of {file}", "every row needs a vector")
        widths = np.asarray(pc.list_value_length(column).to_numpy(zero_copy_only=False))
        wrong = np.flatnonzero(widths != self.dim)
        if len(wrong):
            value = f"{widths[wrong[0]]} dims in row {rows[wrong[0]]} of {file}"
            raise DataError("corpus.vector_column", value, f"every vector must have {self.dim}, as the first one")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which is refused later
            flat = np.array(column.flatten().to_numpy(zero_copy_only=False), dtype=np.float32)
        return flat.reshape(len(rows), int(self.dim or 0))

    def _find_items(self) -> list[str]:
        vector, image = self._config.vector_column, self._config.image_column
        images = [part.column for part in self._config.modalities if not part.absent]
        if sum(map(bool, (vector, image, images))) != 1:
            known = ", ".join(self._files[0].schema.names)
            wanted = f"name exactly one of vector_column, image_column and modalities; the columns are {known}"
            raise DataError("corpus.vector_column", vector, wanted)
        return images or [str(vector or image)]

    def _check_columns(self) -> None:
        for file in self._files:
            for name in self._columns:
                if name not in file.schema.names:
                    known = ", ".join(file.schema.names)
                    raise DataError(f"corpus.{self._role(name)}", name, f"the columns of {file.name} are {known}")
                kind, wanted = file.schema.field(name).type, self._type(name)
                if kind != wanted:
                    reason = f"{self._files[0].name} has {wanted}, and all files must agree"
                    raise DataError(f"corpus.{self._role(name)}", f"{name!r} as {kind} in {file.name}", reason)

    def _check_types(self) -> None:
        config = self._config
        rules = [
            ("vector_column", _is_vector, "lists of float16, float32 or float64"),
            ("image_column", _is_image, "binary, or a struct whose `bytes` is binary"),
            ("modalities", _is_image, "binary, or a struct whose `bytes` is binary"),
            ("id_column", pa.types.is_integer, "integers"),
            ("label_column", lambda kind: _is_whole(kind) or _is_text(kind), "integers or strings"),
        ]
        for role, accepts, wanted in rules:
            for name in self._items if role == "modalities" and config.modalities else [getattr(config, role)]:
                if name and not accepts(_plain_type(self._type(name))):
                    raise DataError(f"corpus.{role}", f"{name!r} of {self._type(name)}", f"it must hold {wanted}")

    def _find_payload(self) -> pa.Schema | None:
        names = self._config.payload_columns
        return pa.schema([(name, _plain_type(self._type(name))) for name in names]) if names else None

    def _find_dim(self) -> int:
        [item] = self._items
        kind = _plain_type(self._type(item))
        if pa.types.is_fixed_size_list(kind):
            dim = int(kind.list_size)
        else:
            file = next(file for file, count in zip(self._files, self.counts, strict=True) if count)
            number = next(n for n, count in enumerate(file.counts) if count)
            _, batch = next(file.blocks([number], [item], 1))
            dim = int(pc.list_value_length(_plain(batch.column(item)))[0].as_py() or 0)
        if dim < 1:
            raise DataError("corpus.vector_column", item, "the first row must hold a vector of at least one dim")
        return dim

    def _role(self, name: str) -> str:
        roles = ("vector_column", "image_column", "id_column", "label_column")
        found = next((role for role in roles if getattr(self._config, role) == name), "payload_columns")
        return "modalities" if self._config.modalities and name in self._items else found

    def _type(self, name: str) -> pa.DataType:
        # Asked for after the first file is known to have the column; a missing one is reported with its own message.
        schema = self._files[0].schema
        if name not in schema.names:
            raise DataError(f"corpus.{self._role(name)}", name, f"the columns are {', '.join(schema.names)}")
        return schema.field(name).type


def _read_images(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    contents: list[bytes | None] = column.to_pylist()
    return contents


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _plain(column: pa.Array) -> pa.Array:
    """Strip extension types and dictionaries, which differ from file to file, down to what they stand for."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _is_whole(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain_type(kind)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_vector(kind: pa.DataType) -> bool:
    return kind.id in _LIST_TYPES and bool(pa.types.is_floating(kind.value_type))


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
