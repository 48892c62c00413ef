"""What a match leaves: Parquet files of hits, a row for each query or a row for each hit.

    lists    query_id int64, ids fixed_size_list<int64>[k], distances fixed_size_list<float32>[k], nearest first;
             id -1 where there is no further hit
    rows     query_id int64, rank int32 from 1, id int64, distance float32

Distances are as users see them.
"""

# Shapes: Q queries, k neighbours, n hits

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gsl_dist.codebook import IdArray
from gsl_dist.data.tables import ParquetFile
from gsl_dist.hits import FAR, NO_ID, Hits, merge_topk
from gsl_dist.storage import Folder

Form = Literal["lists", "rows"]

_READ_ROWS = 1 << 14


def make_schema(form: Form, k: int) -> pa.Schema:
    """Give the columns of a file."""
    if form == "lists":
        found = [("ids", pa.list_(pa.int64(), k)), ("distances", pa.list_(pa.float32(), k))]
    else:
        found = [("rank", pa.int32()), ("id", pa.int64()), ("distance", pa.float32())]
    return pa.schema([("query_id", pa.int64()), *found])


def make_table(query_ids: IdArray, hits: Hits, form: Form) -> pa.Table:
    """Write down what queries found; `hits` as users see them.

    Shapes: query_ids (Q,), hits of (Q, k).
    """
    ids, distances, k = hits.ids, hits.distances, hits.ids.shape[1]
    schema = make_schema(form, k)
    if form == "lists":
        lists = [pa.FixedSizeListArray.from_arrays(pa.array(column.ravel()), k) for column in (ids, distances)]
        return pa.table([pa.array(query_ids), *lists], schema=schema)
    queries_n, ranks_n = found = np.nonzero(ids != NO_ID)
    columns = [query_ids[queries_n], ranks_n.astype(np.int32) + 1, ids[found], distances[found]]
    return pa.table([pa.array(column) for column in columns], schema=schema)


def drop_own(query_ids: IdArray, hits: Hits, k: int) -> Hits:
    """Leave out of each query's hits the item that it is itself, and give the k nearest others."""
    is_own = hits.ids == query_ids[:, None]
    others = replace(hits, ids=np.where(is_own, NO_ID, hits.ids), distances=np.where(is_own, FAR, hits.distances))
    return merge_topk([others], k)


def read_pairs(folder: Folder, name: str, form: Form) -> Iterator[tuple[IdArray, IdArray]]:
    """Yield the hits of a file as pairs of ids, the query first, so many at a time.

    Shapes: (n,), (n,).
    """
    file = ParquetFile(folder, name)
    columns = ["query_id", "ids" if form == "lists" else "id"]
    for _, batch in file.blocks(list(range(len(file.counts))), columns, _READ_ROWS):
        queries_n: NDArray[np.int64] = batch.column("query_id").to_numpy()
        if form == "rows":
            yield queries_n, batch.column("id").to_numpy()
            continue
        ids_Qk = batch.column("ids").flatten().to_numpy().reshape(len(queries_n), -1)
        found_n, ranks_n = np.nonzero(ids_Qk != NO_ID)
        yield queries_n[found_n], ids_Qk[found_n, ranks_n]
