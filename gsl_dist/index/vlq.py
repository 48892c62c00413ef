"""Codes of cells and lines (`vlq`) as lists of regions, one after another in a few arrays, and the search over them.

A query is compared with all centroids. Of the nearest cells it ranks the lines by the distance to the point on each
where its rows lie on average, which takes no new distance, and looks into the regions that come first. With the point
y on a line, its cell's centroid c, the neighbouring one s, the level l and the codewords r,

    |q - y - r|^2 = |q|^2 + |y + r|^2 - 2 (1 - l) <q, c> - 2 l <q, s> - 2 sum_m <q_m, r_m>

and |y + r|^2 is kept with every code, so that a code costs M look-ups, one product and one addition. All is measured
from the mean of the centroids, where numbers are small. Regions are ranked whether they hold rows or not, so that a
shard looks where an index of all rows would look.

A list may have any length. Shards with one codebook are joined by concatenation. In the file, a safetensors file,
arrays lie as they lie in memory, and it is mapped, not read: `offsets` (lists + 1) int64; `ids` (N,) int64, ascending
within a region; `codes` (N, code_bytes) uint8, the last byte the level; `squares` (N,) float32, |y + r|^2.

The scan is compiled where numba is installed; without it numpy does the same, several times slower.

Source: as in `gsl_dist.quantizers.lines`; that regions are ranked by where their rows lie, and that |y + r|^2 is kept
with a code, is ours.
"""

# Shapes: N rows, D dims, C cells, E lines of each, R = C E regions, M sub-vectors, K codewords, Q queries, k neighbours

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import CodeArray, Codebook, FloatArray, IdArray
from gsl_dist.errors import ArtefactError, DataError
from gsl_dist.hits import FAR
from gsl_dist.index.coarse import Probed
from gsl_dist.index.mapped import map_arrays, write_arrays
from gsl_dist.index.selection import Places, Selection
from gsl_dist.index.shards import refuse_bad_ids

COMPILED = importlib.util.find_spec("numba") is not None

CELLS_SHARE = 4
"""A query ranks the regions of so many times as many cells as would hold the regions that it looks into."""

_CHUNK_FLOATS, _SQUARE_FLOATS = 1 << 24, 1 << 20
_ARRAYS = {"offsets": np.int64, "ids": np.int64, "codes": np.uint8, "squares": np.float32}


@dataclass(frozen=True)
class Tables:
    """What of a codebook a scan reads, measured from the mean of the centroids.

    Shapes: centre (D,); coarse (C, D); norms (C,), squared lengths; edges (C, E) int32; feet (C, E); lengths (C, E), of
    lines, squared; levels (L,); books (M, K, d).
    """

    centre_D: FloatArray
    coarse_CD: FloatArray
    norms_C: FloatArray
    edges_CE: NDArray[np.int32]
    feet_CE: FloatArray
    lengths_CE: FloatArray
    levels_L: FloatArray
    books_MKd: FloatArray


@dataclass(frozen=True)
class LineLists:
    """The rows of one or more shards of a `vlq` codebook, region after region.

    Args:
        codebook: of all rows.
        offsets_R: where each region begins, and where the last one ends.
        ids_N: ascending within a region.
        codes: packed, as the codebook packs them.
        squares_N: the squared length of what each code stands for, from the mean of the centroids.

    Shapes: offsets (R + 1,) int64, ids (N,) int64, codes (N, code_bytes) uint8, squares (N,) float32.
    """

    codebook: Codebook
    offsets_R: IdArray
    ids_N: IdArray
    codes: CodeArray
    squares_N: FloatArray

    def __post_init__(self) -> None:
        for name in ("offsets_R", "ids_N", "codes", "squares_N"):
            # The same kind of array whether mapped or not: the scan is compiled once for each.
            array = np.asarray(getattr(self, name)).view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def rows(self) -> int:
        """Give the number of rows."""
        return len(self.ids_N)

    @cached_property
    def tables(self) -> Tables:
        """Give what a scan reads of the codebook."""
        return open_tables(self.codebook)

    @cached_property
    def words(self) -> CodeArray:
        """Give the choices of codewords and the levels, a byte each (N, M + 1); where codes are bytes, these."""
        return self.codebook.unpack(self.codes)

    @cached_property
    def places(self) -> Places:
        """Give where each row is, by id."""
        return Places.of(self.ids_N)

    def search(  # noqa: PLR0913 - what a search may be told
        self,
        queries_QD: FloatArray,
        k: int,
        probes: int,
        chosen: Selection | None = None,
        *,
        probed: Probed | None = None,
        threads: int | None = None,
        cells: int | None = None,
    ) -> tuple[FloatArray, IdArray]:
        """Give the k nearest rows of each query in the `probes` regions that come first, nearest first.

        Args:
            queries_QD: finite.
            k: neighbours wanted.
            probes: regions to look into.
            chosen: rows that may be found; all by default.
            probed: None; regions are ranked here.
            threads: that share the queries; as many as faiss has by default.
            cells: nearest cells whose regions are ranked; four times as many as would hold `probes` by default.

        Shapes: (Q, D) -> squared distances (Q, k) float32, ids (Q, k) int64, -1 where there is no further row.
        """
        assert probed is None, "no coarse step ranks regions"
        tables, codebook, threads = self.tables, self.codebook, threads or faiss.omp_get_max_threads()
        reach = count_cells(codebook, probes, cells)
        turned_QD = codebook.rotate(queries_QD) - tables.centre_D
        distances_Qk = np.full((len(turned_QD), k), FAR, np.float32)
        ids_Qk = np.full((len(turned_QD), k), -1, np.int64)
        floats = max(codebook.cells, codebook.sub_vectors * codebook.codewords)
        rows = max(1, min(_CHUNK_FLOATS // floats, -(-len(turned_QD) // threads)))
        mask = np.empty(0, np.uint8) if chosen is None else chosen.mask

        def work(start: int) -> None:
            some = slice(start, start + rows)
            self._search_chunk(turned_QD[some], (reach, probes), mask, (distances_Qk[some], ids_Qk[some]))

        starts = range(0, len(turned_QD), rows)
        if threads == 1 or len(starts) == 1:
            for start in starts:
                work(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, starts))
        return distances_Qk, ids_Qk

    def take(self, places_n: NDArray[np.int64]) -> tuple[IdArray, CodeArray]:
        """Give the regions (n,) and packed codes (n, code_bytes) of rows by their numbers in list order."""
        return np.searchsorted(self.offsets_R, places_n, side="right") - 1, self.codes[places_n]

    def read(self) -> tuple[IdArray, IdArray, CodeArray]:
        """Give all rows as ids (N,), regions (N,) and packed codes (N, code_bytes), in list order."""
        return self.ids_N, np.repeat(np.arange(self.codebook.lists), np.diff(self.offsets_R)), self.codes

    def write(self, path: Path) -> None:
        """Write the lists as one file."""
        arrays: dict[str, NDArray[Any]] = {"offsets": self.offsets_R, "ids": self.ids_N}
        arrays |= {"codes": self.codes, "squares": self.squares_N}
        write_arrays(path, arrays, {"fingerprint": self.codebook.fingerprint})

    def _search_chunk(
        self, turned_QD: FloatArray, reach: tuple[int, int], mask: CodeArray, answers: tuple[FloatArray, IdArray]
    ) -> None:
        tables, (cells, probes), (distances_Qk, ids_Qk) = self.tables, reach, answers
        dots_QC = turned_QD @ tables.coarse_CD.T
        # Without |q|^2, which changes no order; it is added at the end.
        reach_QC = tables.norms_C - 2 * dots_QC
        near_Qw = _pick_cells(reach_QC, cells) if COMPILED else np.argpartition(reach_QC, cells - 1)[:, :cells]
        parts_MQd = turned_QD.reshape(len(turned_QD), *tables.books_MKd.shape[::2]).transpose(1, 0, 2)
        # Products of matrices: einsum would look for the best order of its one product with every call.
        looked_QMK = -2 * np.matmul(parts_MQd, tables.books_MKd.transpose(0, 2, 1)).transpose(1, 0, 2)
        search = _compile_search(*tables.books_MKd.shape[:2]) if COMPILED else _search_plainly
        search(
            (dots_QC, reach_QC, near_Qw, np.ascontiguousarray(looked_QMK)),
            (tables.edges_CE, tables.feet_CE, tables.lengths_CE, tables.levels_L),
            (self.offsets_R, self.ids_N, self.words, self.squares_N, mask),
            probes,
            answers,
        )
        lengths_Q1 = np.square(turned_QD).sum(1, keepdims=True)
        distances_Qk[:] = np.where(ids_Qk >= 0, np.maximum(distances_Qk + lengths_Q1, 0), FAR)


def count_cells(codebook: Codebook, probes: int, cells: int | None = None) -> int:
    """Give how many cells have their regions ranked: so many, or the usual share; at least as many as hold `probes`."""
    wanted = cells or -(-CELLS_SHARE * probes // codebook.edge_count)
    return min(max(wanted, -(-probes // codebook.edge_count)), codebook.cells)


def open_tables(codebook: Codebook) -> Tables:
    """Give what a scan reads of a codebook."""
    assert codebook.edges is not None and codebook.feet is not None and codebook.levels is not None, codebook.kind
    centre_D = _find_centre(codebook)
    coarse_CD = codebook.coarse - centre_D
    norms_C = np.square(coarse_CD).sum(1)
    # A line of each cell at a time: all at once they would be long.
    lengths_EC = [np.square(coarse_CD[ends_C] - coarse_CD).sum(1) for ends_C in codebook.edges.T]
    lengths_CE = np.stack(lengths_EC, axis=1)
    lines = codebook.edges, codebook.feet, lengths_CE, codebook.levels
    return Tables(centre_D, coarse_CD, norms_C, *lines, codebook.books)


def make_lists(codebook: Codebook, ids_N: IdArray, regions_N: IdArray, codes: CodeArray) -> LineLists:
    """Order codes by their regions, and within a region by id.

    Shapes: ids_N, regions_N (N,) int64; codes (N, code_bytes) uint8, packed.
    Raises:
        DataError: two rows have the same id, an id is negative, or a region is out of range.
    """
    assert codes.shape == (len(ids_N), codebook.code_bytes), (codes.shape, codebook.code_bytes)
    wrong = regions_N[(regions_N < 0) | (regions_N >= codebook.lists)]
    if len(wrong):
        raise DataError("cell", int(wrong[0]), f"regions are 0 to {codebook.lists - 1}")
    refuse_bad_ids(ids_N)
    order_N = np.lexsort((ids_N, regions_N))
    regions_N, codes = regions_N[order_N], np.ascontiguousarray(codes[order_N])
    offsets_R = np.searchsorted(regions_N, np.arange(codebook.lists + 1))
    return LineLists(codebook, offsets_R, ids_N[order_N], codes, measure_squares(codebook, regions_N, codes))


def describe_arrays(codebook: Codebook, rows: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Give type and shape of the arrays in the file of so many rows."""
    shapes = {
        "offsets": (codebook.lists + 1,),
        "ids": (rows,),
        "codes": (rows, codebook.code_bytes),
        "squares": (rows,),
    }
    return {name: (dtype, shapes[name]) for name, dtype in _ARRAYS.items()}


def pick_rows(codebook: Codebook) -> int:
    """Give how many rows are measured at a time: few enough that they take little memory."""
    return max(1, _SQUARE_FLOATS // codebook.dim)


def measure_squares(codebook: Codebook, regions_N: IdArray, codes: CodeArray) -> FloatArray:
    """Give the squared length of what each code stands for, from the mean of the centroids, some rows at a time.

    Shapes: (N,), (N, code_bytes) -> (N,) float32.
    """
    squares_N = np.empty(len(regions_N), np.float32)
    centre_D, rows = _find_centre(codebook), pick_rows(codebook)
    for start in range(0, len(regions_N), rows):
        some = slice(start, start + rows)
        decoded_ND = codebook.rotate(codebook.decode(regions_N[some], codebook.unpack(codes[some])))
        squares_N[some] = np.square(decoded_ND - centre_D).sum(1)
    return squares_N


def join_lists(shards: Sequence[LineLists]) -> LineLists:
    """Join the lists of shards with one codebook; one shard alone stays mapped."""
    if len(shards) == 1:
        return shards[0]
    codebook = shards[0].codebook
    regions_N = np.concatenate([shard.read()[1] for shard in shards])
    ids_N, codes, squares_N = (
        np.concatenate([getattr(shard, name) for shard in shards]) for name in ("ids_N", "codes", "squares_N")
    )
    order_N = np.lexsort((ids_N, regions_N))
    offsets_R = np.sum([shard.offsets_R for shard in shards], axis=0)
    return LineLists(codebook, offsets_R, ids_N[order_N], codes[order_N], squares_N[order_N])


def open_lists(path: Path, codebook: Codebook) -> LineLists:
    """Map a file of lists whose checksum was verified, and check that they are whole and have this codebook.

    Raises:
        ArtefactError: it is no file of lists, is cut short, or was built with another codebook.
    """
    try:
        arrays, marks = map_arrays(path, _ARRAYS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(str(path), f"it is not a file of lists ({error or type(error).__name__})") from error
    if marks.get("fingerprint") != codebook.fingerprint:
        raise ArtefactError(str(path), f"it was built with another codebook than {codebook.fingerprint}")
    lists = LineLists(codebook, arrays["offsets"], arrays["ids"], arrays["codes"], arrays["squares"])
    rows, offsets_R = lists.rows, lists.offsets_R
    shapes = (offsets_R.shape, lists.codes.shape, lists.squares_N.shape)
    if shapes != ((codebook.lists + 1,), (rows, codebook.code_bytes), (rows,)):
        raise ArtefactError(str(path), f"its arrays have the shapes {shapes}, which do not belong together")
    if offsets_R[0] != 0 or offsets_R[-1] != rows or (np.diff(offsets_R) < 0).any():
        raise ArtefactError(str(path), f"its regions do not begin and end within its {rows} rows")
    return lists


def _find_centre(codebook: Codebook) -> FloatArray:
    return codebook.coarse.mean(0, dtype=np.float64).astype(np.float32)


def _pick_cells(reach_QC: FloatArray, cells: int) -> IdArray:
    from gsl_dist.index.scan import pick_cells

    return pick_cells(reach_QC, cells)


def _compile_search(sub_vectors: int, codewords: int) -> Callable[[Any, Any, Any, int, Any], None]:
    # Here, since a compiler takes more memory than the rest of the disk floor: who builds shards needs none.
    from gsl_dist.index.scan import compile_search

    return compile_search(sub_vectors, codewords)


def _search_plainly(queries: Any, lines: Any, rows: Any, probes: int, answers: Any) -> None:
    """Search query by query with numpy; distances lack |q|^2.

    Arguments are those of the search that `gsl_dist.index.scan` compiles.
    """
    dots_QC, reach_QC, near_Qw, looked_QMK = queries
    edges_CE, feet_CE, lengths_CE, levels_L = lines
    offsets_R, ids_N, words_NM, squares_N, mask_N = rows
    edges, parts = edges_CE.shape[1], np.arange(looked_QMK.shape[1])
    for place, near_w in enumerate(near_Qw):
        reach_C, dots_C = reach_QC[place], dots_QC[place]
        feet_wE, regions_wE = feet_CE[near_w], near_w[:, None] * edges + np.arange(edges)
        scores_wE = (1 - feet_wE) * reach_C[near_w][:, None] + feet_wE * reach_C[edges_CE[near_w]]
        scores_wE += (feet_wE * feet_wE - feet_wE) * lengths_CE[near_w]
        regions_r = regions_wE.ravel()[np.argsort(scores_wE.ravel(), kind="stable")[:probes]]
        counts_r = offsets_R[regions_r + 1] - offsets_R[regions_r]
        of_n = np.repeat(regions_r, counts_r)
        rows_n = np.arange(len(of_n)) + np.repeat(offsets_R[regions_r] - (np.cumsum(counts_r) - counts_r), counts_r)
        if len(mask_N):
            of_n, rows_n = of_n[mask_N[rows_n] == 1], rows_n[mask_N[rows_n] == 1]
        own_n, other_n = dots_C[of_n // edges], dots_C[edges_CE.ravel()[of_n]]
        words_nM = words_NM[rows_n]
        distances_n = squares_N[rows_n] - 2 * (own_n + levels_L[words_nM[:, -1]] * (other_n - own_n))
        distances_n = distances_n + looked_QMK[place][parts, words_nM[:, :-1]].sum(1)
        first = np.lexsort((ids_N[rows_n], distances_n))[: answers[0].shape[1]]
        answers[0][place, : len(first)], answers[1][place, : len(first)] = distances_n[first], ids_N[rows_n][first]
