"""What it takes to answer a question beyond one search: whose vectors, which page, groups, and payload.

All of it is about one `Served`, so that every part of an answer is of one version.
"""

# Shapes: Q queries, D dims, k neighbours

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.errors import QueryError
from gsl_dist.hits import FAR, NO_ID, Effort, Hits
from gsl_dist.index.manifest import Manifest
from gsl_dist.index.search import MAX_K, check_queries
from gsl_dist.service.reading import Question
from gsl_dist.service.served import Served

Encode = Callable[[Manifest, list[Any]], Awaitable[FloatArray]]
"""Gives the vectors of raw items by the encoder of a version."""


async def answer_question(served: Served, question: Question, encode: Encode | None = None) -> Hits:
    """Give the hits that a question asks for.

    Raises:
        QueryError: it cannot be answered.
        ShardUnavailable: no shard answered, or one did not that is needed.
    """
    start = time.monotonic()
    queries_QD, own_Q = await _find_queries(served, question, encode)
    effort = question.effort
    # An item is the nearest to itself, and is not asked for.
    wanted = effort.k + question.offset
    reach = wanted + (own_Q is not None)
    while True:
        left_s = None if question.timeout_s is None else max(1e-3, question.timeout_s - (time.monotonic() - start))
        # A point that was measured for k holds for the few more that a page takes.
        asked = _reach_further(effort, min(reach, MAX_K))
        hits = await served.search(queries_QD, asked, require_all=question.require_all, timeout_s=left_s)
        keep_Qk = hits.ids != NO_ID if own_Q is None else (hits.ids != NO_ID) & (hits.ids != own_Q[:, None])
        if question.group_by is not None:
            keep_Qk &= await _keep_few(served, hits.ids, question.group_by, question.group_size)
        is_short = (keep_Qk.sum(1) < wanted) & (hits.ids[:, -1] != NO_ID)
        if question.group_by is None or not is_short.any() or reach >= MAX_K:
            break
        reach = min(4 * reach, MAX_K)
    hits = _cut(hits, keep_Qk, question.offset, effort.k, served.manifest.metric)
    if question.payload:
        # Hits are of the shards that answered; one that has stopped since leaves nulls.
        fetched = await served.fetch(hits.ids.ravel(), question.payload, require_all=question.require_all)
        hits = replace(hits, payload=fetched.table)
    return hits


async def _find_queries(served: Served, question: Question, encode: Encode | None) -> tuple[FloatArray, IdArray | None]:
    """Give the vectors to search for, checked, and whose they are if they are those of items."""
    manifest = served.manifest
    if question.queries is not None:
        return question.queries, None
    if question.ids is not None:
        fetched = await served.fetch(question.ids, (), vectors=True)
        if not fetched.is_here_n.all():
            absent = int(question.ids[np.argmin(fetched.is_here_n)])
            raise QueryError("ids", absent, "there is no such item", 404)
        return check_queries(fetched.vectors_nD, manifest.dim, manifest.metric), question.ids
    if encode is None:
        raise QueryError("items", f"{len(question.items or [])} items", "this service has no encoder; give vectors")
    encoded = await encode(manifest, question.items or [])
    return check_queries(encoded, manifest.dim, manifest.metric), None


def _reach_further(effort: Effort, reach: int) -> Effort:
    if reach == effort.k or effort.refine is None:
        return effort._replace(k=reach)
    return effort._replace(k=reach, refine=max(1, min(effort.refine, MAX_K // reach)))


async def _keep_few(served: Served, ids_Qk: IdArray, column: str, most: int) -> NDArray[np.bool_]:
    """Tell which hits are among the first few of their query that share a value; those without one are on their own."""
    values = (await served.fetch(ids_Qk.ravel(), (column,), require_all=False)).table[column].combine_chunks()
    try:
        numbers = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    except pa.ArrowNotImplementedError:
        raise QueryError(
            "group_by", column, f"values of type {values.type} cannot be told apart; group by others"
        ) from None
    keep_Qk = np.ones(ids_Qk.shape, bool)
    for row, numbers_k in enumerate(numbers.reshape(ids_Qk.shape)):
        seen: dict[int, int] = {}
        for place, number in enumerate(numbers_k.tolist()):
            seen[number] = seen.get(number, 0) + 1
            keep_Qk[row, place] = number < 0 or seen[number] <= most
    return keep_Qk


def _cut(hits: Hits, keep_Qk: NDArray[np.bool_], offset: int, k: int, metric: str) -> Hits:
    """Leave out hits that are not kept, and the first few, and give k."""
    if keep_Qk.all() and offset == 0 and hits.ids.shape[1] == k:
        return hits
    order_Qk = np.argsort(~keep_Qk, axis=1, kind="stable")[:, offset : offset + k]
    is_kept = np.take_along_axis(keep_Qk, order_Qk, 1)
    nothing = FAR if metric == "l2" else -FAR
    ids = np.where(is_kept, np.take_along_axis(hits.ids, order_Qk, 1), NO_ID)
    distances = np.where(is_kept, np.take_along_axis(hits.distances, order_Qk, 1), nothing).astype(np.float32)
    return replace(hits, ids=ids, distances=distances)
