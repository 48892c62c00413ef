"""Vectors kept beside the codes, to measure the nearest few by exactly.

A search by codes gives more candidates than were asked for; their vectors are looked up here and ranked again. They
are kept as float16, or as a byte a dimension between the least and the largest number of that dimension in the shard.
The file is mapped: of a large store only the pages of candidates are ever read.

    ids (N,) int64, ascending; vectors (N, D) float16 or uint8; low, step (D,) float32, of bytes: x = low + step * byte
"""

# Shapes: N rows, D dims, Q queries, n candidates

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gsl_dist.codebook import FloatArray, IdArray
from gsl_dist.errors import ArtefactError
from gsl_dist.hits import FAR, NO_ID
from gsl_dist.index.mapped import map_arrays, write_arrays
from gsl_dist.index.selection import find_sorted

COMPILED = importlib.util.find_spec("numba") is not None

Precision = Literal["float16", "int8"]

_KEPT = {"float16": np.float16, "int8": np.uint8}
_CHUNK_FLOATS = 1 << 22


@dataclass(frozen=True)
class VectorStore:
    """The vectors of one shard.

    Shapes: ids (N,) int64, ascending; kept (N, D) float16 or uint8; low, step (D,) float32.
    """

    ids_N: IdArray
    kept_ND: NDArray[np.float16] | NDArray[np.uint8]
    low_D: FloatArray
    step_D: FloatArray

    def read(self, rows_n: NDArray[np.integer]) -> FloatArray:
        """Give vectors by their place.

        Shapes: (n,) -> (n, D) float32.
        """
        return self.kept_ND[rows_n].astype(np.float32) * self.step_D + self.low_D

    @cached_property
    def gapless(self) -> bool:
        """Tell whether ids follow on one another, so that a place need not be searched for."""
        return len(self.ids_N) > 0 and int(self.ids_N[-1]) - int(self.ids_N[0]) == len(self.ids_N) - 1

    def find(self, ids_n: IdArray) -> NDArray[np.int64]:
        """Give the place of each id, -1 where it is not here.

        Shapes: (n,) -> (n,).
        """
        if self.gapless:
            places_n = ids_n - self.ids_N[0]
            return np.where((places_n >= 0) & (places_n < len(self.ids_N)), places_n, -1)
        return find_sorted(self.ids_N, ids_n)

    def write(self, path: Path) -> None:
        """Write the store as one file."""
        arrays = {"ids": self.ids_N, "vectors": self.kept_ND, "low": self.low_D, "step": self.step_D}
        write_arrays(path, arrays, {})


def keep_vectors(ids_N: IdArray, x_ND: NDArray[np.floating], precision: Precision) -> VectorStore:
    """Make a store of vectors.

    Shapes: ids_N (N,), each once; x_ND (N, D).
    """
    order_N = np.argsort(ids_N)
    x_ND, dims = x_ND[order_N], x_ND.shape[1]
    low_D, high_D = (
        np.asarray(end(x_ND, axis=0) if len(x_ND) else np.zeros(dims), np.float32) for end in (np.min, np.max)
    )
    scale = make_scale(low_D, high_D, precision)
    return VectorStore(ids_N[order_N], scale.round(x_ND), scale.low_D, scale.step_D)


class Scale(NamedTuple):
    """How numbers are kept, dimension by dimension: x = low + step * kept.

    Shapes: low, step (D,) float32.
    """

    low_D: FloatArray
    step_D: FloatArray
    precision: Precision

    def round(self, x_ND: NDArray[np.floating]) -> NDArray[Any]:
        """Give vectors as they are kept.

        Shapes: (N, D) -> (N, D) float16 or uint8.
        """
        if self.precision == "float16":
            return x_ND.astype(np.float16)
        return np.rint((x_ND - self.low_D) / self.step_D).astype(np.uint8)


def make_scale(low_D: FloatArray, high_D: FloatArray, precision: Precision) -> Scale:
    """Give the scale of vectors between two ends; float16 needs none."""
    if precision == "float16":
        return Scale(np.zeros_like(low_D), np.ones_like(low_D), precision)
    return Scale(low_D, np.where(high_D > low_D, (high_D - low_D) / 255, 1).astype(np.float32), precision)


def describe_store(rows: int, dim: int, precision: Precision) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Give type and shape of the arrays in the file of so many vectors."""
    kept = (_KEPT[precision], (rows, dim))
    return {"ids": (np.int64, (rows,)), "vectors": kept, "low": (np.float32, (dim,)), "step": (np.float32, (dim,))}


def open_vectors(path: Path, rows: int, dim: int, precision: Precision) -> VectorStore:
    """Map a store whose checksum was verified.

    Raises:
        ArtefactError: it is no store of so many vectors.
    """
    wanted = {name: dtype for name, (dtype, _) in describe_store(rows, dim, precision).items()}
    try:
        arrays, _ = map_arrays(path, wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(str(path), f"it is not a store of vectors ({error or type(error).__name__})") from error
    store = VectorStore(arrays["ids"], arrays["vectors"], arrays["low"], arrays["step"])
    shapes = (store.ids_N.shape, store.kept_ND.shape, store.low_D.shape, store.step_D.shape)
    if shapes != ((rows,), (rows, dim), (dim,), (dim,)) or (np.diff(store.ids_N) <= 0).any():
        raise ArtefactError(str(path), f"it does not hold {rows} vectors of {dim} numbers by ascending id")
    return store


def measure_exactly(
    queries_QD: FloatArray, ids_Qn: IdArray, stores: Sequence[VectorStore], metric: str = "l2"
) -> FloatArray:
    """Give how far each query is from the vectors of its candidates; those that no store has are far.

    Squared distances, or negative inner products where these are the metric.

    Shapes: (Q, D), (Q, n) -> (Q, n) float32.
    """
    distances_Qn = np.full(ids_Qn.shape, FAR, np.float32)
    rows = max(1, _CHUNK_FLOATS // max(1, ids_Qn.shape[1] * queries_QD.shape[1]))
    for start in range(0, len(ids_Qn), rows):
        ids_c, found_c = ids_Qn[start : start + rows], distances_Qn[start : start + rows]
        for store in stores:
            places_c = np.where(ids_c == NO_ID, -1, store.find(ids_c.ravel()).reshape(ids_c.shape))
            if COMPILED:
                _measure_compiled(queries_QD[start : start + rows], places_c, store, metric, found_c)
                continue
            queries_n, candidates_n = np.nonzero(places_c >= 0)
            kept_nD, asked_nD = store.read(places_c[queries_n, candidates_n]), queries_QD[start + queries_n]
            measured_n = -(kept_nD * asked_nD).sum(1) if metric == "ip" else np.square(kept_nD - asked_nD).sum(1)
            found_c[queries_n, candidates_n] = measured_n
    return distances_Qn


def _measure_compiled(
    queries_QD: FloatArray, places_Qn: NDArray[np.int64], store: VectorStore, metric: str, found_Qn: FloatArray
) -> None:
    # Here, since a compiler takes more memory than the rest of the disk floor: who builds shards needs none.
    from gsl_dist.index.exact import measure_rows

    measure_rows(queries_QD, places_Qn, (store.kept_ND, store.low_D, store.step_D), found_Qn, metric == "ip")
