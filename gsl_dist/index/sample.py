"""Queries held out and their true neighbours, kept beside the versions, to see how well a service answers.

    <index>/sample/<version>-<digest>.arrow    vector, ids and distances of the k nearest, a row a query

`gsl tune` leaves them; a router asks a few of them now and then and tells the share of true neighbours it found. They
are those of the rows that the version was made of: where rows were written over it since, `lay_over` says what is true
now, since new rows are measured exactly.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.errors import ArtefactError
from gsl_dist.hits import NO_ID, Effort, Hits, merge_topk
from gsl_dist.index.overlay import Overlay
from gsl_dist.storage import Folder

SAMPLE = "sample"
_DIGITS = 32


@dataclass(frozen=True)
class Sample:
    """Queries and their nearest rows; of distances, smaller is nearer.

    Shapes: queries_QD (Q, D) float32; truth (Q, k).
    """

    queries_QD: FloatArray
    truth: Hits

    def lay_over(self, overlay: Overlay, rows_Q: IdArray) -> tuple[FloatArray, IdArray]:
        """Give some queries and their nearest ids now, -1 where rows that are gone have left less than k."""
        queries_qD, k = self.queries_QD[rows_Q], self.truth.ids.shape[1]
        ids, distances = self.truth.ids[rows_Q], self.truth.distances[rows_Q]
        gone = np.isin(ids, np.array(sorted(overlay.hidden), np.int64))
        kept = Hits(np.where(gone, NO_ID, ids), np.where(gone, np.float32(np.inf), distances), 1, 1)
        whole = merge_topk([kept, overlay.search(queries_qD, Effort(k))], k)
        # Rows behind the k nearest are not known: what is farther than the last one known may not be next.
        known = whole.distances <= distances[:, -1:]
        return queries_qD, np.where(known, whole.ids, NO_ID)


def keep_sample(index: Folder, version: str, sample: Sample) -> None:
    """Write a sample; it takes the place of the one before."""
    columns = {
        "vector": pa.array(sample.queries_QD.tolist(), pa.list_(pa.float32())),
        "ids": pa.array(sample.truth.ids.tolist(), pa.list_(pa.int64())),
        "distances": pa.array(sample.truth.distances.tolist(), pa.list_(pa.float32())),
    }
    sink, table = io.BytesIO(), pa.table(columns)
    with pa.ipc.new_file(sink, table.schema) as stream:
        stream.write_table(table)
    folder, before = index.child(SAMPLE), _list_names(index, version)
    name = f"{version}-{_digest(sink.getvalue())}.arrow"
    folder.write_bytes(name, sink.getvalue())
    for other in before:
        if other != name:
            folder.delete(other)


def read_sample(index: Folder, version: str) -> Sample | None:
    """Give the sample of a version, if one was left.

    Raises:
        ArtefactError: it is damaged, or is no sample.
    """
    folder, names = index.child(SAMPLE), _list_names(index, version)
    if not names:
        return None
    name, content = names[0], folder.read_bytes(names[0])
    if name != f"{version}-{_digest(content)}.arrow":
        raise ArtefactError(folder.path(name), "its content differs from the digest in its name")
    try:
        with pa.ipc.open_file(pa.py_buffer(content)) as stream:
            table = stream.read_all()
        table.validate(full=True)
        queries, ids, distances = (np.array(table[name].to_pylist()) for name in ("vector", "ids", "distances"))
        truth = Hits(ids.astype(np.int64), distances.astype(np.float32), 1, 1, version)
        assert queries.ndim == ids.ndim == 2 and ids.shape == distances.shape, "rows of equal length"
    except (pa.ArrowException, ValueError, KeyError, AssertionError) as error:
        raise ArtefactError(folder.path(name), f"it is no sample of queries ({error})") from error
    return Sample(queries.astype(np.float32), truth)


def _list_names(index: Folder, version: str) -> list[str]:
    names = index.child(SAMPLE).names(suffix=".arrow")
    return [name for name in names if re.fullmatch(rf"{re.escape(version)}-[0-9a-f]{{{_DIGITS}}}\.arrow", name)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
