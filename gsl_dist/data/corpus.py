"""A corpus: rows of vectors or images with an id each, read in order, by range or by number, in bounded memory.

Whatever the format, vectors are checked here (NaN and infinity are errors, since no index can hold them) and images are
decoded here by a few threads. An image that cannot be read becomes a `Reject`: it is left out of the batch and listed,
never fatal and never silent. This module does not know the formats.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gsl_dist.config import fingerprint_config
from gsl_dist.data.images import FolderSource, decode_image, decode_modalities
from gsl_dist.data.source import CorpusConfig, Raw, Source, SourceFile, find_files
from gsl_dist.data.tables import TableSource
from gsl_dist.data.vectors import VectorSource
from gsl_dist.errors import DataError, GslError

_DECODERS = min(8, os.cpu_count() or 1)
_SOURCES: dict[str, Any] = {
    "parquet": TableSource,
    "arrow": TableSource,
    "npy": VectorSource,
    "fvecs": VectorSource,
    "bvecs": VectorSource,
    "images": FolderSource,
}


@dataclass(frozen=True)
class Reject:
    """A row that could not be read: its number in the corpus, the file it lies in, and why."""

    row: int
    source: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Rows that were read, and those that could not be.

    Shapes: ids (N,) int64; items (N, D) float32 or (N, H, W, Ch) uint8; labels (N,) int64.
    """

    ids: NDArray[np.int64]
    items: NDArray[Any]
    labels: NDArray[np.int64] | None = None
    payload: pa.Table | None = None
    rejects: list[Reject] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


class Corpus:
    """Reads the rows of a source; made by `open_corpus`.

    Attributes:
        rows: how many rows the source has, rejected ones included.
        kind: what an item is.
        item_shape: (D,) or (H, W, Ch); of items of several modalities see `decode_modalities`.
        fingerprint: a hash of the config and of the files' names, sizes, rows and local times of change.
    """

    def __init__(self, config: CorpusConfig, source: Source, files: list[SourceFile]) -> None:
        self.config, self._source = config, source
        self.rows, self.has_labels, self.payload_schema = source.rows, source.has_labels, source.payload_schema
        self.kind: Literal["vectors", "images"] = "images" if source.dim is None else "vectors"
        self.item_shape: tuple[int, ...] = config.image_shape if source.dim is None else (source.dim,)
        listed = [[file.name, file.bytes, file.mtime_ns, rows] for file, rows in zip(files, source.counts, strict=True)]
        self.fingerprint = fingerprint_config(config, listed)

    @property
    def label_names(self) -> list[str] | None:
        """Give the names that labels index; None where labels are integers. The first call reads the label column."""
        return self._source.label_names

    def read(self, start: int, stop: int, *, batch_rows: int = 1024) -> Iterator[Batch]:
        """Yield source rows [start, stop) in order.

        Raises:
            DataError: the range is not inside the corpus, or a row holds what no index can.
            ArtefactError: a file is cut short or altered.
        """
        if not 0 <= start <= stop <= self.rows:
            raise DataError("rows", (start, stop), f"a range must lie within 0 and {self.rows}")
        if batch_rows < 1:
            raise DataError("batch_rows", batch_rows, "it must be at least 1")
        return self._finish_all(self._source.read(start, stop, batch_rows))

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """Read the rows with these numbers, which must be sorted."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted[0] < 0 or wanted[-1] >= self.rows or (np.diff(wanted) < 0).any()):
            raise DataError("rows", rows, f"row numbers must be sorted and lie within 0 and {self.rows - 1}")
        return self._merge(self._finish_all(self._source.take(wanted, 1024)))

    def read_all(self) -> Batch:
        """Read the whole corpus into memory."""
        return self._merge(self.read(0, self.rows))

    def _merge(self, batches: Iterator[Batch]) -> Batch:
        return merge_batches([self._make_empty(), *batches])

    def _make_empty(self) -> Batch:
        dtype = np.uint8 if self.kind == "images" else np.float32
        none = np.empty(0, dtype=np.int64)
        payload = self.payload_schema.empty_table() if self.payload_schema is not None else None
        items = np.empty((0, *self.item_shape), dtype=dtype)
        return Batch(none, items, none if self.has_labels else None, payload)

    def _finish_all(self, raws: Iterator[Raw]) -> Iterator[Batch]:
        if self.kind == "vectors":
            yield from (_check_vectors(raw, normalize=self.config.normalize) for raw in raws)
            return
        with ThreadPoolExecutor(_DECODERS) as pool:
            for raw in raws:
                yield _decode_images(raw, self.config, pool)


def open_corpus(config: CorpusConfig) -> Corpus:
    """Open a corpus by its metadata alone.

    Raises:
        DataError: nothing there, no rows, a missing column, or files that disagree.
        ArtefactError: a file is cut short, or not of its format.
    """
    folder, files, kind = find_files(config)
    source = _SOURCES[kind](config, folder, files, kind)
    if not source.rows:
        raise DataError("corpus.path", config.path, "it must hold at least one row")
    return Corpus(config, source, files)


def split_rows(rows: int, parts: int) -> list[tuple[int, int]]:
    """Cut rows into contiguous ranges that differ by one row at most; fewer than `parts` if there are fewer rows."""
    parts = min(rows, parts)
    edges = [rows * part // parts for part in range(parts + 1)] if parts else [0]
    return list(itertools.pairwise(edges))


def merge_batches(batches: list[Batch]) -> Batch:
    """Put batches of one corpus one behind the other.

    Raises:
        DataError: there are none.
    """
    if not batches:
        raise DataError("batches", batches, "at least one is needed")
    labels = [batch.labels for batch in batches if batch.labels is not None]
    payloads = [batch.payload for batch in batches if batch.payload is not None]
    return Batch(
        ids=np.concatenate([batch.ids for batch in batches]),
        items=np.concatenate([batch.items for batch in batches]),
        labels=np.concatenate(labels) if labels else None,
        payload=pa.concat_tables(payloads) if payloads else None,
        rejects=[reject for batch in batches for reject in batch.rejects],
    )


def _check_vectors(raw: Raw, *, normalize: bool) -> Batch:
    vectors = np.asarray(raw.items)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        at = int(np.argmin(finite))
        where = f"NaN or infinity in row {raw.rows[at]} of {raw.names[at]}"
        raise DataError("vectors", where, "every number must be finite and fit float32")
    if normalize:
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if not lengths.all():
            where = f"only zeros in row {raw.rows[np.argmin(lengths)]}"
            raise DataError("vectors", where, "with corpus.normalize every vector needs a length above 0")
        vectors = (vectors / lengths[:, None]).astype(np.float32)
    return Batch(raw.ids, vectors, raw.labels, raw.payload)


def _decode_images(raw: Raw, config: CorpusConfig, pool: ThreadPoolExecutor) -> Batch:
    outcomes = list(pool.map(lambda at: _try_decode(raw, at, config), range(len(raw.rows))))
    rejects = [outcome for outcome in outcomes if isinstance(outcome, Reject)]
    kept = [outcome for outcome in outcomes if not isinstance(outcome, Reject)]
    items = np.stack(kept) if kept else np.empty((0, *config.image_shape), dtype=np.uint8)
    batch = Batch(raw.ids, items, raw.labels, raw.payload, rejects)
    if not rejects:
        return batch
    keep = np.array([not isinstance(outcome, Reject) for outcome in outcomes])
    return replace(
        batch,
        ids=raw.ids[keep],
        labels=raw.labels[keep] if raw.labels is not None else None,
        payload=raw.payload.filter(pa.array(keep)) if raw.payload is not None else None,
    )


def _try_decode(raw: Raw, at: int, config: CorpusConfig) -> NDArray[np.uint8] | Reject:
    row, source = int(raw.rows[at]), raw.names[at]
    try:
        content: Any = raw.items[at]
        if config.modalities:
            return decode_modalities(content, config)
        if content is None:
            return Reject(row, source, "the image is null")
        return decode_image(content, config.image)
    except (OSError, ValueError, GslError) as error:
        return Reject(row, source, str(error))
