"""What a version is asked for in bulk: the rows of a corpus, through its encoder if it has one, or its own items.

Either is a number of rows, read by range in bounded memory. Own items are the vectors that the version keeps, or else
what their codes stand for: shard by shard, within a shard by id.
"""

# Shapes: Q queries, D dims, N rows

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gsl_dist.artefact import open_card
from gsl_dist.codebook import Codebook, FloatArray, IdArray
from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import DataError
from gsl_dist.index.lists import open_lists
from gsl_dist.index.manifest import Manifest, ShardEntry, open_codebook, version_folder
from gsl_dist.index.search import check_queries, open_store
from gsl_dist.storage import Folder

if TYPE_CHECKING:
    from gsl_dist.encoders import Encoder

_READ_ROWS = 1024
# Of a row of codes: its id, list and place in the order, as they lie and joined.
_ROW_BYTES = 40


class Asked(NamedTuple):
    """Queries with an id each, and the rows that could not be read.

    Shapes: ids (Q,) int64; vectors (Q, D) float32, as `check_queries` gives them.
    """

    ids: IdArray
    vectors: FloatArray
    rejects: list[dict[str, Any]]


class Queries(Protocol):
    """Rows to ask for; `fingerprint` tells which they are."""

    rows: int
    fingerprint: str

    def read(self, start: int, stop: int) -> Iterator[Asked]:
        """Yield rows [start, stop) in order, some at a time."""


class CorpusQueries:
    """The rows of a corpus.

    Raises:
        DataError: they are not of the shape that the version's encoder, or the version, takes.
    """

    def __init__(self, config: CorpusConfig, index: Folder, manifest: Manifest, gpus: float = 0) -> None:
        self._corpus, self._manifest, self._gpus = open_corpus(config), manifest, gpus
        self._model = version_folder(index, manifest.version).child("model") if manifest.model else None
        self.rows, self.fingerprint = self._corpus.rows, self._corpus.fingerprint
        check_shape(self._corpus.item_shape, manifest, self._model)

    def read(self, start: int, stop: int) -> Iterator[Asked]:
        """Yield rows [start, stop) in order; those that cannot be read are left out and told.

        Raises:
            DataError, QueryError: a row holds what cannot be asked for.
        """
        for batch in self._corpus.read(start, stop, batch_rows=_READ_ROWS):
            rejects = [asdict(reject) for reject in batch.rejects]
            yield Asked(batch.ids, self._embed(batch.items), rejects)

    def _embed(self, items: NDArray[Any]) -> FloatArray:
        if self._model is not None and len(items):
            # Here, since queries that are vectors are searched for without torch.
            import torch

            from gsl_dist.fit import embed

            items = embed(self._encoder, torch.from_numpy(items)).cpu().numpy()
        if not len(items):
            return np.empty((0, self._manifest.dim), np.float32)
        return check_queries(items, self._manifest.dim, self._manifest.metric)

    @cached_property
    def _encoder(self) -> Encoder:
        from gsl_dist.cluster.model import check_modalities, load_encoder, pick_device

        assert self._model is not None, "asked for where there is one"
        encoder, card = load_encoder(self._model.location)
        check_modalities(card, encoder, self._corpus.config, "queries")
        return encoder.to(pick_device(self._gpus))


class OwnQueries:
    """The items of a version itself."""

    def __init__(self, index: Folder, manifest: Manifest) -> None:
        self._folder, self._manifest = version_folder(index, manifest.version), manifest
        self._index, self.rows, self.fingerprint = index, manifest.rows, "own"

    def read(self, start: int, stop: int) -> Iterator[Asked]:
        """Yield rows [start, stop) in order.

        Raises:
            ArtefactError: a file is damaged.
        """
        before = 0
        for entry in self._manifest.shards:
            first, last = max(start - before, 0), min(stop - before, entry.rows)
            if first < last:
                yield from self._read_shard(entry, first, last)
            before += entry.rows

    def _read_shard(self, entry: ShardEntry, first: int, last: int) -> Iterator[Asked]:
        ids_N, give = self._open_kept(entry) if self._manifest.vectors else self._open_codes(entry)
        for start in range(first, last, _READ_ROWS):
            rows_n = np.arange(start, min(start + _READ_ROWS, last))
            vectors = check_queries(give(rows_n), self._manifest.dim, self._manifest.metric)
            yield Asked(ids_N[rows_n], vectors, [])

    def _open_kept(self, entry: ShardEntry) -> tuple[IdArray, Callable[[NDArray[np.int64]], FloatArray]]:
        store = open_store(self._folder, self._manifest, entry)
        return store.ids_N, store.read

    def _open_codes(self, entry: ShardEntry) -> tuple[IdArray, Callable[[NDArray[np.int64]], FloatArray]]:
        with self._folder.held(entry.index) as path:
            ids_N, lists_N, codes = open_lists(path, self._codebook).read()
        order_N = np.argsort(ids_N)

        def give(rows_n: NDArray[np.int64]) -> FloatArray:
            some_n = order_N[rows_n]
            return self._codebook.decode(lists_N[some_n], self._codebook.unpack(codes[some_n]))

        return ids_N[order_N], give

    @cached_property
    def _codebook(self) -> Codebook:
        return open_codebook(self._index, self._manifest)


def measure_queries(manifest: Manifest, is_own: bool) -> int:
    """Give the bytes that reading queries takes, batches apart: the codes of a shard, where these are what is read."""
    if not is_own or manifest.vectors:
        return 0
    return max(shard.rows for shard in manifest.shards) * (2 * manifest.bytes_per_item + _ROW_BYTES)


def check_shape(shape: tuple[int, ...], manifest: Manifest, model: Folder | None) -> None:
    """Let items pass that the version's encoder takes, or the version where it has none.

    Raises:
        DataError: they are of another shape.
    """
    if model is not None:
        wanted = tuple(open_card(model, "model", verify=False).facts["item_shape"])
        if shape != wanted:
            raise DataError("queries", f"items of shape {shape}", f"the encoder was trained on {wanted}")
    elif shape != (manifest.dim,):
        raise DataError("queries", f"items of shape {shape}", f"the index holds vectors of {manifest.dim} numbers")


def gather_rows(parts: Iterator[Asked], rows: int) -> Iterator[Asked]:
    """Yield the same queries so many at a time, however they were read; the last batch may be smaller."""
    held: list[Asked] = []
    for part in parts:
        held.append(part)
        while sum(len(one.ids) for one in held) >= rows:
            whole = _join(held)
            yield Asked(whole.ids[:rows], whole.vectors[:rows], whole.rejects)
            held = [Asked(whole.ids[rows:], whole.vectors[rows:], [])]
    if held and (len(held[0].ids) or held[1:] or held[0].rejects):
        yield _join(held)


def _join(parts: list[Asked]) -> Asked:
    ids, vectors = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
    return Asked(ids, vectors, [reject for part in parts for reject in part.rejects])
