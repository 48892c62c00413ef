"""Which rows go into which shard of a version: cut by id, or by cell.

By id a shard is a run of the corpus, whatever cells its rows lie in: a query looks into its cells in every shard. By
cell each cell lies in one shard with all of its rows, the cells dealt out so that shards are about as long: a query
finds what it looks for in few of them. Both hold the rows of one index and answer as it does.
"""

# Shapes: C cells, R lists

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import Codebook, IdArray
from gsl_dist.index.stream import Piece, Portion

Sharding = Literal["id", "cell"]


def cut_by_id(location: str, pieces: Sequence[Piece], shards: int | None) -> list[Portion]:
    """Give each shard a run of the corpus: a file of codes each, or so many runs that differ by one row at most."""
    if shards is None:
        runs: list[tuple[Piece, ...]] = [(piece,) for piece in pieces]
    else:
        edges = np.cumsum([0, *(piece.stop for piece in pieces)]).tolist()
        shards = max(1, min(shards, edges[-1]))
        cuts = [edges[-1] * shard // shards for shard in range(shards + 1)]
        runs = [_take_run(pieces, edges, start, stop) for start, stop in itertools.pairwise(cuts)]
    return [
        Portion(name_shard(shard), location, run, sum(piece.rows for piece in run)) for shard, run in enumerate(runs)
    ]


def cut_by_cell(
    location: str, pieces: Sequence[Piece], shards: int, sizes_R: IdArray, codebook: Codebook
) -> list[Portion]:
    """Give each shard all rows of its own cells.

    Args:
        location: the folder of codes.
        pieces: all files of codes.
        shards: how many.
        sizes_R: the rows of each list; a cell has several of them where lines cut it.
        codebook: of the codes.
    """
    sizes_C = sizes_R.reshape(codebook.cells, codebook.edge_count).sum(1)
    shards_R = np.repeat(deal_cells(sizes_C, shards), codebook.edge_count)
    portions = []
    for shard in range(shards):
        own_R = shards_R == shard
        portions.append(Portion(name_shard(shard), location, tuple(pieces), int(sizes_R[own_R].sum()), own_R))
    return portions


def deal_cells(sizes_C: IdArray, shards: int) -> NDArray[np.int64]:
    """Deal cells out, the longest first, each to the shard that has the fewest rows yet; give each cell's shard."""
    shards_C = np.empty(len(sizes_C), np.int64)
    lightest = [(0, 0, shard) for shard in range(shards)]
    for cell in np.argsort(-sizes_C, kind="stable").tolist():
        rows, cells, shard = lightest[0]
        shards_C[cell] = shard
        heapq.heapreplace(lightest, (rows + int(sizes_C[cell]), cells + 1, shard))
    return shards_C


def name_shard(shard: int) -> str:
    """Give the name of a shard by its number."""
    return f"shard-{shard:05d}"


def _take_run(pieces: Sequence[Piece], edges: list[int], start: int, stop: int) -> tuple[Piece, ...]:
    run = []
    for piece, edge in zip(pieces, edges, strict=False):
        first, last = max(start - edge, 0), min(stop - edge, piece.stop)
        if first < last:
            inside = (piece.dropped >= first) & (piece.dropped < last)
            run.append(Piece(piece.name, first, last, piece.dropped[inside]))
    return tuple(run)
