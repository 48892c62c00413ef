"""Rows of regions where torch holds them, a GPU above all, and the search over them.

It finds what the compiled scan of the lists finds (`gsl_dist.quantizers.line` has the formula), by a few operations on
whole matrices instead of loops: cells and regions are ranked for many queries at once; the rows of a query's regions
are numbered through, number j lying in the first region that ends behind j; what these numbers lead to is gathered and
summed up. Queries with about as many rows to look at are taken together, so that no matrix is more than half empty.

Rows equally near are ordered by id, as merging answers orders them, whatever order a device works in: distance and the
rank of the row's id are one whole number, and the least are sought.

This module knows neither files nor ids: rows come as arrays and go out as ranks.
"""

# Shapes: N rows, D dims, C cells, E lines of each, R = C E regions, L levels, M sub-vectors, K codewords, Q queries,
# k neighbours, w cells ranked, r regions looked into, b queries taken together, W rows of each looked at together

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gsl_dist.codebook import CodeArray, Codebook, FloatArray, IdArray
from gsl_dist.hits import FAR
from gsl_dist.quantizers.base import as_tensor
from gsl_dist.quantizers.lines import read_edges, read_levels

BATCH_BYTES = 1 << 30
"""What a search takes besides the rows, by default."""

MOST_ROWS = (1 << 31) - 1
"""Ranks are kept, and compared, as numbers of 32 bits."""

_ROW_BYTES, _REGION_BYTES = 9, 24
# What is held at once for a query: for each cell, region ranked, region looked into, codeword, and neighbour wanted.
_QUERY_BYTES = (48, 64, 96, 12, 64)
# The same for a row that is measured, and for each number of its code.
_MEASURED_BYTES, _WORD_BYTES = 96, 13
_COPIED_ROWS = 1 << 20
_HIGH, _LOW_BITS, _ALL_BUT_SIGN = 1 << 32, 0xFFFFFFFF, 0x7FFFFFFF
_NOWHERE = int(np.float32(FAR).view(np.int32)) * _HIGH


class RowArrays(NamedTuple):
    """Rows of a codebook of lines, region after region.

    Args:
        offsets_R: where each region begins, and where the last one ends.
        codes: packed, as the codebook packs them.
        squares_N: the squared length of what each code stands for, measured from `centre_D`.
        ranks_N: the place of each row among all rows ordered by id.
        centre_D: the point that all is measured from.

    Shapes: offsets (R + 1,) int64, codes (N, code_bytes) uint8, squares (N,) float32, ranks (N,), centre (D,) float32.
    """

    offsets_R: IdArray
    codes: CodeArray
    squares_N: FloatArray
    ranks_N: NDArray[np.integer]
    centre_D: FloatArray


class Ranked(NamedTuple):
    """The regions that queries look into, as rows are found in them.

    Shapes: ends (Q, r), rows in a region and those before it; shifts (Q, r), what makes the number of one of these rows
        a place in the lists; own and steps (Q, r), what a row adds for its cell, and for a whole line; looked (Q, M K),
        for its codewords.
    """

    ends_Qr: Tensor
    shifts_Qr: Tensor
    own_Qr: Tensor
    steps_Qr: Tensor
    looked_Qn: Tensor


def measure_bytes(codebook: Codebook, rows: int) -> int:
    """Give what rows and tables take on a device: M + 10 bytes a row, 24 a region, and the codebook.

    A row has a byte for each choice, whatever their bits, and for the level; 4 for its squared length, 4 for its rank,
    and one for whether a filter lets it through.
    """
    numbers = codebook.cells * (codebook.dim + 3) + codebook.books.size
    numbers += 0 if codebook.rotation is None else codebook.rotation.size
    return rows * (codebook.choices + _ROW_BYTES) + codebook.lists * _REGION_BYTES + 4 * numbers


class Regions:
    """Rows on a device, ready to be searched; `measure_bytes` says what they take.

    Threads may share it; one of them at a time searches for as many queries as are taken together.

    Args:
        codebook: of lines.
        arrays: the rows, copied.
        device: where to.
        batch_bytes: what a search may take besides; as many queries, and rows of a query, are looked at together. One
            query's distances to all cells, and its k nearest, are taken however much that is.
    """

    def __init__(
        self, codebook: Codebook, arrays: RowArrays, device: torch.device | str, *, batch_bytes: int = BATCH_BYTES
    ) -> None:
        assert len(arrays.squares_N) <= MOST_ROWS and codebook.lists <= MOST_ROWS, (len(arrays.codes), codebook.lists)
        like = torch.zeros((), device=device)
        self.codebook, self._like, self._batch_bytes, self._lock = codebook, like, batch_bytes, threading.Lock()
        self._mask: tuple[CodeArray, Tensor] | None = None
        self._offsets_R = torch.tensor(arrays.offsets_R, device=like.device)
        self._words_NM = torch.empty(len(arrays.codes), codebook.choices, dtype=torch.uint8, device=like.device)
        for start in range(0, len(arrays.codes), _COPIED_ROWS):
            some = slice(start, start + _COPIED_ROWS)
            self._words_NM[some] = torch.tensor(codebook.unpack(arrays.codes[some]))
        self._squares_N = torch.tensor(arrays.squares_N, device=like.device)
        self._ranks_N = torch.tensor(arrays.ranks_N, dtype=torch.int32, device=like.device)
        self._centre_D = as_tensor(arrays.centre_D, like)
        self._hold_tables()

    def _hold_tables(self) -> None:
        codebook, like = self.codebook, self._like
        assert codebook.feet is not None, codebook.kind
        self._rotation_DD = None if codebook.rotation is None else as_tensor(codebook.rotation, like)
        self._coarse_CD = as_tensor(codebook.coarse, like) - self._centre_D
        self._norms_C = self._coarse_CD.square().sum(1)
        self._cells_C = torch.arange(codebook.cells, device=like.device)
        self._edges_CE, self._levels_L = read_edges(codebook, like), read_levels(codebook, like)
        self._feet_CE = as_tensor(codebook.feet, like)
        # A line of each cell at a time: all at once they would be long.
        lengths_EC = [(self._coarse_CD[ends_C] - self._coarse_CD).square().sum(1) for ends_C in self._edges_CE.T]
        self._slopes_CE = (self._feet_CE * self._feet_CE - self._feet_CE) * torch.stack(lengths_EC, dim=1)
        self._books_MKd = as_tensor(codebook.books, like)
        self._starts_M = torch.arange(codebook.sub_vectors, device=like.device) * codebook.codewords

    @torch.inference_mode()
    def search(
        self, queries_QD: FloatArray, k: int, probes: int, *, cells: int, mask_N: CodeArray | None = None
    ) -> tuple[FloatArray, IdArray]:
        """Give the k nearest rows of each query in the `probes` regions that come first, nearest first.

        Args:
            queries_QD: finite.
            k: neighbours wanted.
            probes: regions to look into.
            cells: nearest cells whose regions are ranked.
            mask_N: 1 for each row that may be found, 0 for the others; all may by default.

        Shapes: (Q, D) -> squared distances (Q, k) float32, ranks (Q, k) int64, -1 where there is no further row.
        """
        turned_QD, found = self._turn(torch.tensor(queries_QD, device=self._like.device)), []
        with self._lock:
            mask = self._hold_mask(mask_N)
        for some_qD in turned_QD.split(max(1, self._batch_bytes // 2 // self._measure_query(cells, probes, k))):
            # Not around all of them: a single query would wait for the end of a long batch.
            with self._lock:
                found.append(self._search_chunk(some_qD, k, (cells, probes), mask))
        distances, ranks = zip(*found, strict=True)
        return np.concatenate(distances), np.concatenate(ranks)

    def _turn(self, queries_QD: Tensor) -> Tensor:
        turned_QD = queries_QD if self._rotation_DD is None else queries_QD @ self._rotation_DD.T
        return turned_QD - self._centre_D

    def _search_chunk(
        self, turned_QD: Tensor, k: int, reach: tuple[int, int], mask: Tensor | None
    ) -> tuple[FloatArray, IdArray]:
        ranked = self._rank_regions(turned_QD, *reach)
        keys_Qk = torch.full((len(turned_QD), k), _NOWHERE, device=self._like.device)
        for some_b, most, width in self._split(ranked.ends_Qr[:, -1], k):
            part, best_bk = Ranked(*(every[some_b] for every in ranked)), keys_Qk[some_b]
            for start in range(0, most, width):
                found_bW = self._measure_rows(part, (start, min(start + width, most)), mask)
                best_bk = torch.cat([best_bk, found_bW], dim=1).topk(k, dim=1, largest=False).values
            keys_Qk[some_b] = best_bk
        return _read_answers(keys_Qk, turned_QD)

    def _rank_regions(self, turned_QD: Tensor, cells: int, probes: int) -> Ranked:
        """Find the regions to look into, and make what is the same for all rows of a region or with a codeword."""
        dots_QC = turned_QD @ self._coarse_CD.T
        # Without |q|^2, which changes no order; it is added at the end.
        reach_QC = self._norms_C - 2 * dots_QC
        near_Qw = _pick_least(reach_QC, self._cells_C, cells)
        own_Qw, others_QwE = reach_QC.gather(1, near_Qw), self._edges_CE[near_Qw]
        other_QwE = reach_QC.gather(1, others_QwE.flatten(1)).view(others_QwE.shape)
        scores_QwE = torch.lerp(own_Qw[..., None], other_QwE, self._feet_CE[near_Qw]) + self._slopes_CE[near_Qw]
        edges = others_QwE.shape[2]
        regions_QwE = near_Qw[..., None] * edges + torch.arange(edges, device=self._like.device)
        regions_Qr = _pick_least(scores_QwE.flatten(1), regions_QwE.flatten(1), probes)
        firsts_Qr = self._offsets_R[regions_Qr]
        counts_Qr = self._offsets_R[regions_Qr + 1] - firsts_Qr
        ends_Qr = counts_Qr.cumsum(1)
        own_Qr = -2 * dots_QC.gather(1, regions_Qr // edges)
        steps_Qr = -2 * dots_QC.gather(1, self._edges_CE.flatten()[regions_Qr]) - own_Qr
        parts_MQd = turned_QD.unflatten(1, self._books_MKd.shape[::2]).transpose(0, 1)
        looked_QMK = -2 * (parts_MQd @ self._books_MKd.mT).transpose(0, 1)
        return Ranked(ends_Qr, firsts_Qr - ends_Qr + counts_Qr, own_Qr, steps_Qr, looked_QMK.flatten(1))

    def _split(self, counts_Q: Tensor, k: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield queries to be taken together, the most rows that one has, and of how many there is room at a time.

        All of them have half as many rows or more.
        """
        rows = max(1, self._batch_bytes // 2 // (_MEASURED_BYTES + _WORD_BYTES * self.codebook.choices))
        order_Q = counts_Q.argsort(descending=True, stable=True)
        # Negative, since a search wants what ascends.
        counts, start = -counts_Q[order_Q].cpu().numpy(), 0
        while start < len(counts) and counts[start]:
            most = -int(counts[start])
            width = min(most, rows)
            alike = int(np.searchsorted(counts, -((most + 1) // 2), side="right"))
            stop = min(start + max(1, rows // (width + k)), alike)
            yield order_Q[start:stop], most, width
            start = stop

    def _measure_rows(self, ranked: Ranked, span: tuple[int, int], mask: Tensor | None) -> Tensor:
        """Give the keys of some rows of each query, from one number of them to another.

        Shapes: -> (b, W) int64.
        """
        ends_br, shifts_br, own_br, steps_br, looked_bn = ranked
        numbers_bW = torch.arange(*span, device=self._like.device).repeat(len(ends_br), 1)
        at_bW = torch.searchsorted(ends_br, numbers_bW, right=True).clamp_(max=ends_br.shape[1] - 1)
        is_there_bW = numbers_bW < ends_br[:, -1:]
        rows_bW = (numbers_bW + shifts_br.gather(1, at_bW)).clamp_(max=len(self._ranks_N) - 1)
        words_bWM = self._words_NM[rows_bW]
        places_bWM = words_bWM[..., :-1] + self._starts_M
        distances_bW = looked_bn.gather(1, places_bWM.flatten(1)).view(places_bWM.shape).sum(2)
        distances_bW += self._squares_N[rows_bW] + own_br.gather(1, at_bW)
        distances_bW += self._levels_L[words_bWM[..., -1].int()] * steps_br.gather(1, at_bW)
        if mask is not None:
            is_there_bW &= mask[rows_bW]
        return _make_keys(distances_bW.masked_fill_(~is_there_bW, torch.inf), self._ranks_N[rows_bW])

    def _measure_query(self, cells: int, probes: int, k: int) -> int:
        """Give what one query takes while regions are ranked for it, and until its rows are found."""
        codebook = self.codebook
        words = codebook.sub_vectors * codebook.codewords
        counts = (codebook.cells, cells * codebook.edge_count, probes, words, k)
        return sum(count * each for count, each in zip(counts, _QUERY_BYTES, strict=True))

    def _hold_mask(self, mask_N: CodeArray | None) -> Tensor | None:
        """Give a mask where the rows are; the last one is kept there, for filters are asked for more than once."""
        if mask_N is None:
            return None
        if self._mask is None or self._mask[0] is not mask_N:
            self._mask = None
            self._mask = mask_N, torch.tensor(mask_N, dtype=torch.bool, device=self._like.device)
        return self._mask[1]


def _read_answers(keys_Qk: Tensor, turned_QD: Tensor) -> tuple[FloatArray, IdArray]:
    """Give squared distances and ranks; where no row was found, what stands for that."""
    distances_Qk, ranks_Qk = _read_keys(keys_Qk)
    is_empty_Qk = keys_Qk >= _NOWHERE
    distances_Qk = (distances_Qk + turned_QD.square().sum(1, keepdim=True)).clamp_(min=0)
    distances_Qk = distances_Qk.masked_fill_(is_empty_Qk, float(FAR))
    return distances_Qk.cpu().numpy(), ranks_Qk.masked_fill_(is_empty_Qk, -1).cpu().numpy()


def _pick_least(values_Qn: Tensor, ranks_Qn: Tensor, count: int) -> Tensor:
    """Give the ranks of the least values, least first; of equal values, the lowest ranks."""
    keys_Qn = _make_keys(values_Qn, ranks_Qn)
    return keys_Qn.topk(min(count, keys_Qn.shape[1]), dim=1, largest=False).values & _LOW_BITS


def _make_keys(values: Tensor, ranks: Tensor) -> Tensor:
    """Give whole numbers that are ordered as values are, and as ranks are where values are equal.

    Of a float, the bits as a whole number are in its order, once all but the sign are flipped in negative ones. What
    has overflowed is as far as can be.
    """
    bits = torch.where(values < float(FAR), values, float(FAR)).view(torch.int32)
    return (bits ^ ((bits >> 31) & _ALL_BUT_SIGN)).long() * _HIGH + ranks


def _read_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `_make_keys`."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _ALL_BUT_SIGN)).view(torch.float32), keys & _LOW_BITS
