"""The shards of a version, once more: without rows that are gone, with columns as they are now, and new ones beside.

The codebook stays, so nothing is encoded again. A file in which nothing changed is taken over as it is: a link to the
same bytes, or a copy where there are no links. The others are written anew, a shard in memory at a time.
"""

# Shapes: N rows of a shard, n new rows, D dims

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, Codebook, FloatArray, IdArray
from gsl_dist.index.lists import Lists, make_lists, name_file
from gsl_dist.index.manifest import Manifest, ShardEntry, open_codebook, version_folder
from gsl_dist.index.refine import VectorStore, keep_vectors
from gsl_dist.index.search import open_shard, open_store
from gsl_dist.index.selection import Places, find_sorted, replace_values
from gsl_dist.storage import FileEntry, Folder


@dataclass(frozen=True)
class Changes:
    """What has become of a version's rows.

    Args:
        gone_n: the ids of rows that are no longer in it.
        patches: tables of `id` and columns that have other values now.
    """

    gone_n: IdArray
    patches: tuple[pa.Table, ...] = ()


@dataclass(frozen=True)
class NewRows:
    """Rows that a version did not have, by ascending id.

    Shapes: ids_n, lists_n (n,) int64; codes (n, code_bytes) uint8, packed; vectors_nD (n, D), or None; payload n rows.
    """

    ids_n: IdArray
    lists_n: IdArray
    codes: CodeArray
    vectors_nD: FloatArray | NDArray[np.float16] | None = None
    payload: pa.Table | None = None


def find_present(index: Folder, manifest: Manifest, entry: ShardEntry, ids_n: IdArray) -> IdArray:
    """Give those of some ids that a shard holds."""
    places = _open_lists(index, manifest, entry, open_codebook(index, manifest)).places
    return ids_n[find_sorted(places.ids_N, ids_n) >= 0]


def revise_shard(index: Folder, manifest: Manifest, entry: ShardEntry, changes: Changes, target: str) -> ShardEntry:
    """Write a shard of a version as it is after changes, into the folder of another version of the same index.

    Raises:
        ArtefactError: a file of the shard is damaged.
    """
    source, folder = version_folder(index, manifest.version), version_folder(index, target)
    codebook = open_codebook(index, manifest)
    lists = _open_lists(index, manifest, entry, codebook)
    ids_N = lists.places.ids_N
    goes_N = np.isin(ids_N, changes.gone_n)
    patches = [table for table in changes.patches if np.isin(table["id"].to_numpy(), ids_N).any()]
    kept_index, kept_payload, kept_vectors = entry.index, entry.payload, entry.vectors
    if goes_N.any():
        kept_index = _write_lists(folder, manifest, codebook, entry.name, _leave_out(lists, changes.gone_n))
        kept_vectors = kept_vectors and _rewrite_vectors(source, folder, manifest, entry, changes.gone_n)
    else:
        for file in filter(None, (kept_index, kept_vectors)):
            folder.take(source, file)
    if kept_payload and (goes_N.any() or patches):
        kept_payload = _rewrite_payload(source, folder, kept_payload, changes.gone_n, patches)
    elif kept_payload:
        folder.take(source, kept_payload)
    rows = len(ids_N) - int(goes_N.sum())
    return ShardEntry(name=entry.name, rows=rows, index=kept_index, payload=kept_payload, vectors=kept_vectors)


def write_rows(index: Folder, manifest: Manifest, name: str, rows: NewRows, target: str) -> ShardEntry:
    """Write new rows as a shard of another version of the same index, in the layout of this one."""
    folder, codebook = version_folder(index, target), open_codebook(index, manifest)
    file_entry = _write_lists(folder, manifest, codebook, name, (rows.ids_n, rows.lists_n, rows.codes))
    entry = ShardEntry(name=name, rows=len(rows.ids_n), index=file_entry)
    if rows.payload is not None:
        file = f"{name.replace('shard', 'payload')}.parquet"
        with folder.whole(file) as path:
            pq.write_table(rows.payload, path)
        entry = entry.model_copy(update={"payload": folder.pin(file)})
    if manifest.vectors:
        assert rows.vectors_nD is not None, "a version that keeps vectors gets them"
        file = f"{name.replace('shard', 'vectors')}.{manifest.vectors}"
        with folder.whole(file) as path:
            keep_vectors(rows.ids_n, rows.vectors_nD, manifest.vectors).write(path)
        entry = entry.model_copy(update={"vectors": folder.pin(file)})
    return entry


def _open_lists(index: Folder, manifest: Manifest, entry: ShardEntry, codebook: Codebook) -> Lists:
    return open_shard(version_folder(index, manifest.version), entry, codebook)


def _write_lists(
    folder: Folder, manifest: Manifest, codebook: Codebook, name: str, rows: tuple[IdArray, IdArray, CodeArray]
) -> FileEntry:
    lists, file = make_lists(codebook, *rows, manifest.coarse_search, manifest.code_layout), name_file(name, codebook)
    with folder.whole(file) as path:
        lists.write(path)
    return folder.pin(file)


def _leave_out(lists: Lists, gone_n: IdArray) -> tuple[IdArray, IdArray, CodeArray]:
    ids_N, lists_N, codes = lists.read()
    stays_N = ~np.isin(ids_N, gone_n)
    return ids_N[stays_N], lists_N[stays_N], codes[stays_N]


def _rewrite_vectors(
    source: Folder, folder: Folder, manifest: Manifest, entry: ShardEntry, gone_n: IdArray
) -> FileEntry:
    assert entry.vectors is not None, entry.name
    store = open_store(source, manifest, entry)
    stays_N = ~np.isin(store.ids_N, gone_n)
    with folder.whole(entry.vectors.name) as written:
        VectorStore(store.ids_N[stays_N], store.kept_ND[stays_N], store.low_D, store.step_D).write(written)
    return folder.pin(entry.vectors.name)


def _rewrite_payload(
    source: Folder, folder: Folder, file: FileEntry, gone_n: IdArray, patches: list[pa.Table]
) -> FileEntry:
    with source.held(file) as path:
        table = pq.read_table(path)
    rows = Places.of(table["id"].to_numpy())
    for patch in patches:
        at_n = find_sorted(rows.ids_N, patch["id"].to_numpy())
        rows_n = np.where(at_n < 0, -1, rows.places_N[at_n])
        for name in patch.column_names:
            if name != "id":
                column = replace_values(table[name], rows_n, patch[name])
                table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
    table = table.filter(pa.array(~np.isin(table["id"].to_numpy(), gone_n)))
    with folder.whole(file.name) as written:
        pq.write_table(table, written)
    return folder.pin(file.name)
