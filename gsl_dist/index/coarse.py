"""The coarse step alone: which lists a query looks into, found once by the router for all its replicas.

It is the coarse search that every shard has in its file, over the same centroids, so that lists looked into are the
same whoever finds them. Codebooks of lines rank regions by more than centroids, in each process for itself.
"""

# Shapes: Q queries, D dims, P lists probed

from __future__ import annotations

from typing import NamedTuple

import faiss
import numpy as np

from gsl_dist.codebook import Codebook, FloatArray, IdArray
from gsl_dist.errors import QueryError
from gsl_dist.index.manifest import Manifest, open_codebook
from gsl_dist.index.shards import CoarseSearch, create_shard, turn_queries
from gsl_dist.storage import Folder

# Candidates that the search of a graph keeps: the nearest cells are among them for 99 of 100 queries and more.
_WIDTHS_PER_PROBE, _LEAST_WIDTH = 2, 64


class Probed(NamedTuple):
    """The lists that each query looks into, and how far off their centroids are, as faiss measures it.

    Shapes: lists (Q, P) int64, -1 where there is none; distances (Q, P) float32.
    """

    lists: IdArray
    distances: FloatArray

    def take_row(self, row: int) -> Probed:
        """Give those of one query."""
        return Probed(self.lists[row : row + 1], self.distances[row : row + 1])


def open_coarse(index: Folder, manifest: Manifest) -> CoarseStep | None:
    """Open the coarse step of a version; None where replicas must find their lists for themselves.

    Raises:
        ArtefactError: the codebook is altered.
    """
    if manifest.kind == "vlq":
        return None
    return CoarseStep(open_codebook(index, manifest), manifest.coarse_search)


class CoarseStep:
    """Finds the lists of queries.

    Args:
        codebook: of the version; not one of lines.
        coarse_search: as the version was built.
    """

    def __init__(self, codebook: Codebook, coarse_search: CoarseSearch) -> None:
        # Its lists stay empty; they only keep the centroids alive.
        self._codebook, self._empty = codebook, create_shard(codebook, coarse_search)
        self._centroids = faiss.downcast_index(self._empty.quantizer)

    def probe(self, queries_QD: FloatArray, probes: int) -> Probed:
        """Give the nearest `probes` lists of each query.

        Shapes: (Q, D) -> (Q, P), (Q, P).
        """
        turned, params = turn_queries(queries_QD, self._codebook), follow_graph(self._centroids, probes)
        distances, lists = self._centroids.search(turned, probes, params=params)
        return Probed(lists, distances)


def follow_graph(centroids: faiss.Index, probes: int) -> faiss.SearchParameters | None:
    """Give how widely a graph of centroids is searched for so many; None where there is no graph."""
    if not isinstance(centroids, faiss.IndexHNSW):
        return None
    return faiss.SearchParametersHNSW(efSearch=_WIDTHS_PER_PROBE * probes + _LEAST_WIDTH)


def search_probed(
    index: faiss.IndexIVF, turned: FloatArray, k: int, probed: Probed, params: faiss.SearchParametersIVF
) -> tuple[FloatArray, IdArray]:
    """Search lists that were found before, with parameters of the call: faiss's Python takes those of the index.

    Shapes: (Q, any), (Q, P) -> what faiss answers (Q, k) float32, ids (Q, k) int64.
    """
    queries = np.ascontiguousarray(turned, np.float32)
    lists, distances = np.ascontiguousarray(probed.lists, np.int64), np.ascontiguousarray(probed.distances, np.float32)
    answered, ids = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    arrays = [faiss.swig_ptr(array) for array in (lists, distances, answered, ids)]
    index.search_preassigned_c(len(queries), faiss.swig_ptr(queries), k, *arrays, False, params)
    return answered, ids


def check_lists(probed: Probed, codebook: Codebook) -> Probed:
    """Let lists pass that are there: faiss does not look.

    Raises:
        QueryError: one is not, or the codebook is one of lines.
    """
    lists = probed.lists
    if codebook.edges is not None or (lists.size and not -1 <= lists.min() <= lists.max() < codebook.lists):
        raise QueryError("lists", lists, f"they are -1 to {codebook.lists - 1}, of a codebook without lines")
    return probed
