"""Codes and cells become a faiss IVF-PQ file, without encoding anything again.

`IndexIVFPQ` is given our centroids and codewords and our codes go straight into its inverted lists, so building costs
a sort and a copy. The file opens in plain faiss and answers the same.
"""

# Shapes: N vectors, D dims, C cells, M sub-vectors, K codewords, d = D // M

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from gsl_dist.codebook import CodeArray, Codebook, IdArray
from gsl_dist.errors import ArtefactError, DataError


def create_shard(codebook: Codebook) -> faiss.IndexIVFPQ:
    """Make an empty, trained faiss index that has this codebook."""
    quantizer = faiss.IndexFlatL2(codebook.dim)
    quantizer.add(codebook.coarse)
    index = faiss.IndexIVFPQ(quantizer, codebook.dim, codebook.cells, codebook.sub_vectors, codebook.bits)
    quantizer.this.disown()
    index.own_fields = True
    faiss.copy_array_to_vector(codebook.books.ravel(), index.pq.centroids)
    index.by_residual = codebook.residual
    # The tables speed up only long lists and cost cells x M x K floats in every shard of a process.
    index.use_precomputed_table = -1
    index.is_trained = True
    return index


def fill_shard(index: faiss.IndexIVFPQ, ids_N: IdArray, cells_N: IdArray, codes: CodeArray) -> None:
    """Put codes into the lists of their cells; within a list they are ordered by id.

    Shapes: ids_N, cells_N (N,) int64; codes (N, code_bytes) uint8.
    Raises:
        DataError: two rows have the same id, an id is negative, or a cell is out of range.
    """
    assert codes.shape == (len(ids_N), index.code_size), (codes.shape, index.code_size)
    if len(ids_N) == 0:
        return
    wrong = cells_N[(cells_N < 0) | (cells_N >= index.nlist)]
    if len(wrong):
        raise DataError("cell", int(wrong[0]), f"cells are 0 to {index.nlist - 1}")
    order = np.lexsort((ids_N, cells_N))
    cells_N, ids_N, codes = cells_N[order], ids_N[order], np.ascontiguousarray(codes[order])
    _refuse_bad_ids(ids_N)
    starts = np.flatnonzero(np.r_[True, cells_N[1:] != cells_N[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(cells_N)], strict=True):
        index.invlists.add_entries(
            int(cells_N[start]), int(stop - start), faiss.swig_ptr(ids_N[start:stop]), faiss.swig_ptr(codes[start:stop])
        )
    index.ntotal += len(ids_N)


def read_shard(path: Path, codebook: Codebook) -> faiss.IndexIVFPQ:
    """Open a shard file whose checksum was verified, and check that it holds this codebook.

    Raises:
        ArtefactError: it is another kind of index, or was built with another codebook.
    """
    index = faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    if not isinstance(index, faiss.IndexIVFPQ):
        raise ArtefactError(str(path), f"it is a {type(index).__name__}, not an IndexIVFPQ")
    if extract_codebook(index).fingerprint != codebook.fingerprint:
        raise ArtefactError(str(path), f"it was built with another codebook than {codebook.fingerprint}")
    return index


def extract_codebook(index: faiss.IndexIVFPQ) -> Codebook:
    """Take the codebook out of a faiss index, array for array."""
    coarse = index.quantizer.reconstruct_n(0, index.nlist)
    books = faiss.vector_to_array(index.pq.centroids).reshape(index.pq.M, index.pq.ksub, index.pq.dsub)
    return Codebook(coarse=coarse, books=books, residual=bool(index.by_residual))


def read_lists(index: Any) -> tuple[IdArray, IdArray, CodeArray]:
    """Give all rows of an index as ids, cells and packed codes, in list order.

    Shapes: -> (N,) int64, (N,) int64, (N, code_bytes) uint8.
    """
    lists = index.invlists
    sizes = np.array([lists.list_size(cell) for cell in range(index.nlist)])
    full = [cell for cell in range(index.nlist) if sizes[cell]]
    if not full:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, index.code_size), np.uint8)
    ids = [faiss.rev_swig_ptr(lists.get_ids(cell), int(sizes[cell])).copy() for cell in full]
    codes = [faiss.rev_swig_ptr(lists.get_codes(cell), int(sizes[cell]) * index.code_size).copy() for cell in full]
    cells = np.repeat(np.arange(index.nlist), sizes)
    return np.concatenate(ids), cells, np.concatenate(codes).reshape(-1, index.code_size)


def _refuse_bad_ids(ids_N: IdArray) -> None:
    if ids_N.min() < 0:
        raise DataError("id", int(ids_N.min()), "ids are 0 or more: faiss marks an empty place with -1")
    ordered = np.sort(ids_N)
    double = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(double):
        raise DataError("id", int(ordered[double[0]]), f"each id may occur once; {len(double)} rows repeat one")
