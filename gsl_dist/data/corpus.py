"""A corpus: rows with an id, an item (vector or image), perhaps a label and a payload, read by range of rows.

`read(start, stop)` streams; any division of the rows into ranges gives the same rows. An image that cannot be decoded
becomes a `Reject` and is left out; a value that no index can hold (NaN, a missing id) is an error that names the row.
"""

# Shapes: N rows, D dims, H, W, channels of an image

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import model_validator

from gsl_dist.config import Location, Strict
from gsl_dist.data.images import SUFFIXES, ImageConfig, decode_image
from gsl_dist.data.sources import Chunk, ImageSource, TableSource, VectorSource
from gsl_dist.errors import DataError
from gsl_dist.storage import Folder, split_location

Format = Literal["auto", "parquet", "arrow", "npy", "fvecs", "bvecs", "images"]
_BY_SUFFIX = {".parquet": "parquet", ".arrow": "arrow", ".npy": "npy", ".fvecs": "fvecs", ".bvecs": "bvecs"}
_BY_SUFFIX |= dict.fromkeys(SUFFIXES, "images")
_DECODERS = 4
_CUT = 1 << 14


class CorpusConfig(Strict):
    """Where rows are and which columns mean what."""

    path: Location
    format: Format = "auto"
    id_column: str | None = None
    vector_column: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    payload_columns: list[str] = []
    image: ImageConfig = ImageConfig()
    normalize: bool = False

    @model_validator(mode="after")
    def _one_item_column(self) -> CorpusConfig:
        if self.vector_column and self.image_column:
            raise ValueError("give vector_column or image_column, not both")
        return self


@dataclass(frozen=True)
class Reject:
    """A row that could not be read, and why."""

    row: int
    source: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Rows that could be read, and those that could not.

    Shapes: ids (N,) int64; items (N, D) float32 or (N, H, W, channels) uint8; labels (N,) int64.
    """

    ids: NDArray[np.int64]
    items: NDArray[Any]
    labels: NDArray[np.int64] | None = None
    payload: pa.Table | None = None
    rejects: list[Reject] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class Corpus:
    """An open corpus; only metadata was read.

    Args:
        rows: rows of the source, unreadable ones included.
        kind: what the items are.
        item_shape: (D,) or (H, W, channels).
        label_names: the classes that labels number, where the source has names.
        payload_schema: the columns that go with a row.
    """

    def __init__(self, config: CorpusConfig, folder: Folder, names: list[str], kind: str) -> None:
        self.config, self._folder = config, folder
        self._source = _open_source(config, folder, names, kind)
        self.rows = self._source.rows
        if self.rows == 0:
            raise DataError("corpus.path", config.path, "it must hold at least one row; it is empty")
        self.kind: Literal["vectors", "images"] = "images" if kind == "images" or config.image_column else "vectors"
        self.has_labels = bool(config.label_column) or bool(getattr(self._source, "classes", []))
        self.label_names = self._find_label_names()
        self.payload_schema = self._find_payload_schema()
        self.item_shape = self._find_shape()

    @property
    def fingerprint(self) -> str:
        """Give a hash that changes with the config, and with the names and sizes of the files."""
        sizes = [[name, self._folder.size(name)] for name in self._source.names]
        settings = self.config.model_dump(mode="json", exclude={"path"})
        return hashlib.sha256(json.dumps([settings, sizes, self.rows], sort_keys=True).encode()).hexdigest()[:32]

    def read(self, start: int, stop: int, *, batch_rows: int = 1024) -> Iterator[Batch]:
        """Give source rows [start, stop) in order, in batches.

        Raises:
            DataError: a vector that is not finite, or an id that is missing, negative or no integer.
        """
        with ThreadPoolExecutor(_DECODERS) as decoders:
            for chunk in self._source.read(start, stop, batch_rows):
                yield self._make_batch(chunk, decoders)

    def read_all(self) -> Batch:
        """Give all rows at once."""
        return merge_batches(list(self.read(0, self.rows)))

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """Give chosen rows, by row numbers in ascending order."""
        batches = []
        for block in np.split(rows, np.flatnonzero(np.diff(rows // _CUT)) + 1) if len(rows) else []:
            # A stretch of the source is read and thinned out: sampled rows are spread, not gathered.
            first = int(block[0])
            for chunk in self._source.read(first, int(block[-1]) + 1, 1024):
                wanted = block[(block >= chunk.start) & (block < chunk.start + _count(chunk))] - chunk.start
                if len(wanted):
                    with ThreadPoolExecutor(_DECODERS) as decoders:
                        batches.append(self._make_batch(_pick(chunk, wanted), decoders, wanted + chunk.start))
        return merge_batches(batches)

    def _make_batch(self, chunk: Chunk, decoders: ThreadPoolExecutor, rows: NDArray[np.int64] | None = None) -> Batch:
        rows = np.arange(chunk.start, chunk.start + _count(chunk)) if rows is None else rows
        ids = self._read_ids(chunk, rows)
        if self.kind == "vectors":
            vectors = self._read_vectors(chunk, rows)
            return Batch(ids, vectors, self._read_labels(chunk), self._read_payload(chunk))
        items, kept, rejects = self._decode(chunk, rows, decoders)
        labels, payload = self._read_labels(chunk), self._read_payload(chunk)
        return Batch(
            ids[kept],
            items,
            None if labels is None else labels[kept],
            None if payload is None else payload.take(kept),
            rejects,
        )

    def _read_ids(self, chunk: Chunk, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if chunk.table is None or self.config.id_column is None:
            return rows.astype(np.int64)
        column = chunk.table[self.config.id_column]
        field_name = f"column {self.config.id_column}"
        if not pa.types.is_integer(column.type):
            raise DataError(field_name, str(column.type), "ids must be integers, 0 or more, that fit int64")
        if column.null_count:
            row = int(rows[np.argmax(column.is_null().to_numpy())])
            raise DataError(field_name, f"row {row} is null", "every row needs an id")
        try:
            ids = column.cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid:
            raise DataError(field_name, str(column.type), "ids must fit int64") from None
        if len(ids) and ids.min() < 0:
            row = int(np.argmin(ids))
            raise DataError(field_name, f"{ids[row]} in row {rows[row]}", "ids must be 0 or more")
        return np.asarray(ids, np.int64)

    def _read_vectors(self, chunk: Chunk, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        if chunk.vectors is not None:
            vectors = chunk.vectors
        else:
            assert chunk.table is not None and self.config.vector_column is not None
            vectors = _flatten(chunk.table[self.config.vector_column], self.config.vector_column, rows)
        if hasattr(self, "item_shape") and len(vectors) and vectors.shape[1] != self.item_shape[0]:
            raise DataError("vector", f"{vectors.shape[1]} numbers in row {rows[0]}", f"others have {self.item_shape[0]}")
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            row = int(rows[np.argmin(finite)])
            raise DataError("vector", f"NaN or infinity in row {row}", "every number must be finite")
        if self.config.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(vectors, np.float32)

    def _decode(
        self, chunk: Chunk, rows: NDArray[np.int64], decoders: ThreadPoolExecutor
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[Reject]]:
        named = _read_contents(chunk, self.config.image_column, rows)
        outcomes = list(decoders.map(lambda pair: _try_decode(pair[1], self.config.image), named))
        kept = np.array([n for n, outcome in enumerate(outcomes) if not isinstance(outcome, str)], np.int64)
        rejects = [
            Reject(int(rows[n]), named[n][0], outcome) for n, outcome in enumerate(outcomes) if isinstance(outcome, str)
        ]
        shape = (0, self.config.image.height, self.config.image.width, self.config.image.channels)
        items = np.stack([outcomes[n] for n in kept]) if len(kept) else np.empty(shape, np.uint8)
        return items, kept, rejects

    def _read_labels(self, chunk: Chunk) -> NDArray[np.int64] | None:
        if not self.has_labels:
            return None
        if chunk.files is not None:
            return np.array([self.label_names.index(name) for _, name, _ in chunk.files], np.int64)
        assert chunk.table is not None and self.config.label_column is not None
        column = chunk.table[self.config.label_column]
        if column.null_count:
            raise DataError(f"column {self.config.label_column}", "a null", "every row needs a label")
        if self.label_names:
            return np.asarray(pc.index_in(column, pa.array(self.label_names)).to_numpy(), np.int64)
        return column.to_numpy().astype(np.int64)

    def _read_payload(self, chunk: Chunk) -> pa.Table | None:
        if self.payload_schema is None or chunk.table is None:
            return None
        return chunk.table.select(self.config.payload_columns)

    def _find_label_names(self) -> list[str]:
        if isinstance(self._source, ImageSource):
            return self._source.classes
        if self.config.label_column is None or not isinstance(self._source, TableSource):
            return []
        kind = self._source.schema.field(self.config.label_column).type
        if pa.types.is_integer(kind):
            return []
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"column {self.config.label_column}", str(kind), "labels must be integers or strings")
        names: set[str] = set()
        for chunk in self._source.read(0, self.rows, 65_536):
            assert chunk.table is not None
            names |= set(pc.unique(chunk.table[self.config.label_column]).to_pylist())
        return sorted(name for name in names if name is not None)

    def _find_payload_schema(self) -> pa.Schema | None:
        if not self.config.payload_columns:
            return None
        if not isinstance(self._source, TableSource):
            raise DataError("corpus.payload_columns", self.config.payload_columns, "only tables have columns")
        return pa.schema([self._source.schema.field(name) for name in self.config.payload_columns])

    def _find_shape(self) -> tuple[int, ...]:
        if self.kind == "images":
            return (self.config.image.height, self.config.image.width, self.config.image.channels)
        if isinstance(self._source, VectorSource):
            return (self._source.dim,)
        first = next(self._source.read(0, 1, 1))
        return (self._read_vectors(first, np.zeros(1, np.int64)).shape[1],)


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open a file or a folder of files as a corpus.

    Raises:
        DataError: nothing is there, formats are mixed, columns are missing, or a file is damaged.
    """
    whole = Folder(config.path)
    names = whole.names()
    if names or whole.names(folders=True):
        folder = whole
    else:
        folder, name = split_location(config.path)
        if not folder.exists(name):
            raise DataError("corpus.path", config.path, "there is no such file or folder")
        names = [name] if name in folder.names() else []
    kind = _find_format(config, folder, names)
    names = [name for name in names if _BY_SUFFIX.get(_suffix(name)) == kind or len(names) == 1]
    if not names and kind != "images":
        raise DataError("corpus.path", config.path, f"it must hold at least one {kind} file; it is empty")
    return Corpus(config, folder, names, kind)


def split_rows(rows: int, parts: int) -> list[tuple[int, int]]:
    """Cut a number of rows into nearly equal ranges, none of them empty."""
    bounds = np.linspace(0, rows, min(parts, rows) + 1).astype(int).tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def merge_batches(batches: Sequence[Batch]) -> Batch:
    """Join batches into one.

    Raises:
        DataError: there is no batch.
    """
    if not batches:
        raise DataError("rows", 0, "at least one row is needed")
    labels = [batch.labels for batch in batches if batch.labels is not None]
    payload = [batch.payload for batch in batches if batch.payload is not None]
    return Batch(
        np.concatenate([batch.ids for batch in batches]),
        np.concatenate([batch.items for batch in batches]),
        np.concatenate(labels) if labels else None,
        pa.concat_tables(payload) if payload else None,
        [reject for batch in batches for reject in batch.rejects],
    )


def _open_source(
    config: CorpusConfig, folder: Folder, names: list[str], kind: str
) -> TableSource | VectorSource | ImageSource:
    if kind == "images":
        return ImageSource(folder) if len(names) != 1 else _single_image(folder, names[0])
    if kind not in ("parquet", "arrow"):
        return VectorSource(folder, names, kind)
    item = config.vector_column or config.image_column
    if item is None:
        raise DataError("corpus.vector_column", None, "a table needs vector_column or image_column")
    columns = dict.fromkeys([item, *filter(None, (config.id_column, config.label_column)), *config.payload_columns])
    return TableSource(folder, names, kind, list(columns))


def _single_image(folder: Folder, name: str) -> ImageSource:
    source = ImageSource(folder)
    source.names, source.rows, source.classes = [name], 1, []
    return source


def _find_format(config: CorpusConfig, folder: Folder, names: list[str]) -> str:
    if config.format != "auto":
        return config.format
    found = {_BY_SUFFIX[_suffix(name)] for name in names if _suffix(name) in _BY_SUFFIX}
    if not names:
        found = {"images"} if ImageSource(folder).rows else set()
    if len(found) != 1:
        what = f"{config.path} holds {', '.join(sorted(found)) or 'no file of a known format'}"
        raise DataError("corpus.format", what, f"it must hold one of {', '.join(sorted(set(_BY_SUFFIX.values())))}")
    return found.pop()


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _count(chunk: Chunk) -> int:
    for part in (chunk.table, chunk.vectors, chunk.files):
        if part is not None:
            return len(part)
    return 0


def _pick(chunk: Chunk, wanted: NDArray[np.int64]) -> Chunk:
    return Chunk(
        chunk.start,
        None if chunk.table is None else chunk.table.take(wanted),
        None if chunk.vectors is None else chunk.vectors[wanted],
        None if chunk.files is None else [chunk.files[n] for n in wanted],
    )


def _flatten(column: pa.ChunkedArray, name: str, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    if not (pa.types.is_fixed_size_list(array.type) or pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise DataError(f"column {name}", str(array.type), "vectors must be lists of floats")
    if array.null_count:
        row = int(rows[np.argmax(array.is_null().to_numpy(zero_copy_only=False))])
        raise DataError(f"column {name}", f"row {row} is null", "every row needs a vector")
    if len(array) == 0:
        return np.empty((0, 0), np.float32)
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    if (lengths != lengths[0]).any():
        row = int(rows[np.argmax(lengths != lengths[0])])
        raise DataError(f"column {name}", f"another length in row {row}", f"every vector must have {lengths[0]} numbers")
    values = array.flatten()
    if not pa.types.is_floating(values.type) and not pa.types.is_integer(values.type):
        raise DataError(f"column {name}", str(array.type), "vectors must be lists of floats")
    return values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(array), -1)


def _read_contents(chunk: Chunk, column: str | None, rows: NDArray[np.int64]) -> list[tuple[str, bytes | None]]:
    if chunk.files is not None:
        return [(name, content) for name, _, content in chunk.files]
    assert chunk.table is not None and column is not None
    values = chunk.table[column]
    if pa.types.is_struct(values.type):
        # Hugging Face writes images as {bytes, path}.
        values = pc.struct_field(values, "bytes")
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        raise DataError(f"column {column}", str(values.type), "images must be encoded bytes (png, jpeg, webp)")
    return [(f"row {row}", value) for row, value in zip(rows, values.to_pylist(), strict=True)]


def _try_decode(content: bytes | None, image: ImageConfig) -> NDArray[np.uint8] | str:
    if content is None:
        return "no image"
    try:
        return decode_image(content, image)
    except ValueError as error:
        return str(error)
