"""Codes and cells become the faiss file of their codebook's kind, without encoding anything again.

A faiss index is given our centroids and codewords and our codes go straight into its inverted lists, so building costs
a sort and a copy. The file opens in plain faiss and answers the same: `pq` as IndexIVFPQ, `rq` and `lsq` as faiss's
additive indexes, which decode every item they look at: exact, no byte more an item, and about a hundred times slower.
Product codes of 4 bits and RaBitQ codes (`rabitq`, IndexIVFRaBitQ) may also lie in blocks for fast-scan
(`gsl_dist.index.blocks`), as IndexIVFPQFastScan and IndexIVFRaBitQFastScan: distances to the precision of tables of
bytes, so that candidates should be ranked again by vectors that the version keeps.

A composite codebook (`cq`) is an IndexIVFPQ of inner products over M (D + 1) dims: the query (q, 1) stands there M
times, part m is compared with the codewords (w_m, b_m), and what faiss adds up is the score of
`gsl_dist.quantizers.composite`. Codes are as long as ever and look-ups as fast as those of product codes. Such a file
searches; vectors cannot be added to it by faiss.

What a query must become, the rotation or the repetition, stands before the lists in the file only. In memory a shard is
its lists: who searches them turns each query once, with `turn_queries`.
"""

# Shapes: N vectors, D dims, C cells, M choices, K codewords, Q queries, k neighbours

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import faiss
import numpy as np

from gsl_dist.codebook import CodeArray, Codebook, FloatArray, IdArray, space_evenly
from gsl_dist.errors import ArtefactError, DataError
from gsl_dist.hits import FAR
from gsl_dist.index.blocks import BLOCK_ROWS, append_rows, has_our_blocks, move_rows, open_blocks, read_rows

CoarseSearch = Literal["flat", "hnsw"]
CodeLayout = Literal["plain", "fastscan"]

HNSW_LINKS, HNSW_WIDTH = 32, 200
"""Links of a centroid to others, and how many candidates are looked at to make them."""
_BUFFER_BYTES = 1 << 20


class Layout(NamedTuple):
    """How faiss calls what a kind of codebook consists of.

    Args:
        index: the class of the index.
        quantizer: the attribute of the index that holds the codewords, and in that:
        words: the attribute of the codewords, all in a row; empty where they are given.
        width: that of the length of one.
        settings: what training would have set, and what is not as faiss has it.
        metric: of the index.
    """

    index: Any
    quantizer: str
    words: str
    width: str
    settings: dict[str, Any]
    metric: int = faiss.METRIC_L2


# Without the flag whoever opens a file makes M^2 K^2 / 2 floats for a way of encoding that is off unless asked for.
_LEAN = faiss.ResidualQuantizer.Train_progressive_dim | faiss.ResidualQuantizer.Skip_codebook_tables
_LAYOUTS = {
    "pq": Layout(faiss.IndexIVFPQ, "pq", "centroids", "dsub", {}),
    "rq": Layout(faiss.IndexIVFResidualQuantizer, "rq", "codebooks", "d", {"is_trained": True, "train_type": _LEAN}),
    "lsq": Layout(faiss.IndexIVFLocalSearchQuantizer, "lsq", "codebooks", "d", {"is_trained": True}),
    "cq": Layout(faiss.IndexIVFPQ, "pq", "centroids", "dsub", {}, faiss.METRIC_INNER_PRODUCT),
    "rabitq": Layout(faiss.IndexIVFRaBitQ, "rabitq", "", "", {}),
}
QUERY_BITS = 8
"""How finely faiss cuts the numbers of a query that is compared with RaBitQ codes; it stands in the file."""
_FAST = {
    "pq": Layout(faiss.IndexIVFPQFastScan, "pq", "centroids", "dsub", {}),
    "rabitq": Layout(faiss.IndexIVFRaBitQFastScan, "rabitq", "", "", {}),
}


def suits_fastscan(codebook: Codebook) -> bool:
    """Tell whether codes can lie in blocks for fast-scan: product codes of 4 bits, and RaBitQ codes."""
    return codebook.kind == "rabitq" or (codebook.kind == "pq" and codebook.bits == 4)


def create_shard(
    codebook: Codebook, coarse_search: CoarseSearch = "flat", code_layout: CodeLayout = "plain"
) -> faiss.IndexIVF:
    """Make empty, trained faiss lists that have this codebook, its rotation apart.

    Args:
        codebook: not of lines.
        coarse_search: whether a query is compared with all centroids, or finds the nearest through an HNSW graph of
            them: the same graph for the same codebook.
        code_layout: whether codes lie row after row, or in blocks for fast-scan, if they are such that can.
    """
    assert code_layout == "plain" or suits_fastscan(codebook), (codebook.kind, codebook.bits)
    layout = (_LAYOUTS if code_layout == "plain" else _FAST)[codebook.kind]
    centroids, words = _lay_out(codebook)
    metric = faiss.METRIC_INNER_PRODUCT if codebook.metric == "ip" else layout.metric
    coarse = _make_coarse(centroids, metric, coarse_search)
    shape = (centroids.shape[1], codebook.cells)
    if codebook.kind == "rabitq":
        block = () if code_layout == "plain" else (BLOCK_ROWS,)
        index = layout.index(coarse, *shape, metric, *block, True, codebook.bits)
        index.qb = QUERY_BITS
    else:
        index = layout.index(coarse, *shape, codebook.sub_vectors, codebook.bits, metric)
        # The tables speed up only long lists and cost cells x M x K floats in every shard of a process.
        index.use_precomputed_table = -1
    coarse.this.disown()
    index.own_fields = True
    quantizer = getattr(index, layout.quantizer)
    if layout.words:
        faiss.copy_array_to_vector(words.ravel(), getattr(quantizer, layout.words))
    for name, value in layout.settings.items():
        setattr(quantizer, name, value)
    index.by_residual = codebook.residual
    index.is_trained = True
    return index


def _make_coarse(centroids: FloatArray, metric: int, coarse_search: CoarseSearch) -> faiss.Index:
    if coarse_search == "flat":
        coarse = faiss.IndexFlat(centroids.shape[1], metric)
    else:
        coarse = faiss.IndexHNSWFlat(centroids.shape[1], HNSW_LINKS, metric)
        coarse.hnsw.efConstruction = HNSW_WIDTH
    threads = faiss.omp_get_max_threads()
    # Several threads would link centroids in whatever order they come to them.
    faiss.omp_set_num_threads(1)
    coarse.add(centroids)
    faiss.omp_set_num_threads(threads)
    return coarse


def fill_shard(index: faiss.IndexIVF, ids_N: IdArray, cells_N: IdArray, codes: CodeArray) -> None:
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
    refuse_bad_ids(ids_N)
    starts, blocks = np.flatnonzero(np.r_[True, cells_N[1:] != cells_N[:-1]]), open_blocks(index)
    for start, stop in zip(starts, np.r_[starts[1:], len(cells_N)], strict=True):
        cell, ids_n, own = int(cells_N[start]), ids_N[start:stop], codes[start:stop]
        if blocks:
            append_rows(blocks, cell, ids_n, own)
        else:
            index.invlists.add_entries(cell, len(ids_n), faiss.swig_ptr(ids_n), faiss.swig_ptr(own))
    index.ntotal += len(ids_N)


def join_shards(whole: faiss.IndexIVF, other: faiss.IndexIVF) -> None:
    """Move the rows of one index to another with the same codebook and layout; it is then empty."""
    if open_blocks(whole):
        move_rows(whole, other)
    else:
        whole.merge_from(other, 0)


def turn_queries(queries_QD: FloatArray, codebook: Codebook) -> FloatArray:
    """Give queries as the lists of a codebook take them: rotated, or repeated.

    Shapes: (Q, D) -> (Q, D), or (Q, M (D + 1)) for composite codes.
    """
    if codebook.bias is None:
        return codebook.rotate(queries_QD)
    return np.tile(np.pad(queries_QD, ((0, 0), (0, 1)), constant_values=1), codebook.sub_vectors)


def read_distances(found_Qk: FloatArray, ids_Qk: IdArray, queries_QD: FloatArray, codebook: Codebook) -> FloatArray:
    """Give what is smaller where a row is nearer for what lists answered.

    They answer squared distances, which stay; inner products, which become negative; or scores of composite codes,
    which become squared distances.

    Shapes: (Q, k), (Q, k), (Q, D) -> (Q, k).
    """
    distances_Qk = -found_Qk if codebook.metric == "ip" else found_Qk
    if codebook.bias is not None:
        with np.errstate(over="ignore"):  # where nothing was found
            distances_Qk = np.square(queries_QD).sum(1, keepdims=True) - 2 * found_Qk
    if ids_Qk.size and ids_Qk.min() >= 0:
        return distances_Qk
    # Where nothing was found, fast-scan answers anything.
    return np.where(ids_Qk < 0, FAR, distances_Qk)


def write_shard(index: faiss.IndexIVF, codebook: Codebook, path: Path) -> None:
    """Write lists, behind what turns queries if need be, as a file that plain faiss searches with any query as it is.

    Plain faiss gives the scores of composite codes, the largest first; all others are squared distances.

    Raises:
        OSError: the disk is full, say. Writing by itself, faiss says nothing where that befalls the last bytes.
    """
    turn = _make_turn(codebook)
    whole = index if turn is None else faiss.IndexPreTransform(turn, index)
    failed: list[OSError] = []
    with path.open("wb", buffering=_BUFFER_BYTES) as stream:

        def put(content: bytes) -> None:
            try:
                stream.write(content)
            except OSError as error:
                failed.append(error)
                raise

        try:
            faiss.write_index(whole, faiss.PyCallbackIOWriter(put, _BUFFER_BYTES))
        except RuntimeError:
            if failed:
                raise failed[0] from None
            raise


def read_shard(path: Path, codebook: Codebook) -> faiss.IndexIVF:
    """Open the lists of a shard file whose checksum was verified, and check that they have this codebook.

    Raises:
        ArtefactError: it is no index, another kind of index, or was built with another codebook.
    """
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
        found = extract_codebook(index)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ArtefactError(str(path), f"it is not a shard ({error})") from error
    # A file knows no cosine: it holds the distances of vectors of length 1.
    filed = replace(codebook, metric="l2") if codebook.metric == "cosine" else codebook
    if found.fingerprint != filed.fingerprint:
        raise ArtefactError(str(path), f"it was built with another codebook than {codebook.fingerprint}")
    lists = _split_index(index)[1]
    if isinstance(lists, faiss.IndexIVFPQFastScan):
        # For these faiss makes tables whatever the flag says; who joins lists makes them once.
        lists.use_precomputed_table = 0
        lists.precomputed_table.resize(0)
    if lists is not index:
        # The index of the file owns the lists and must live as long as they do. SWIG can hand over what it owns, but
        # then miscounts: after some such objects were freed, it forgets every class of faiss.
        lists.referenced_objects = [index]
    return lists


def extract_codebook(index: faiss.Index) -> Codebook:
    """Take the codebook out of a faiss index, array for array, with the rotation if one stands before the lists.

    Raises:
        ValueError: a codebook does not tell all that this index would do with a query.
    """
    turn, lists = _split_index(index)
    kind, layout, metric = _find_layout(turn, lists)
    quantizer = getattr(lists, layout.quantizer)
    if kind == "rabitq":
        words_MKd = space_evenly(lists.d, quantizer.nb_bits)
    else:
        words = faiss.vector_to_array(getattr(quantizer, layout.words))
        words_MKd = words.reshape(quantizer.M, -1, getattr(quantizer, layout.width))
    coarse, matrix = lists.quantizer.reconstruct_n(0, lists.nlist), _read_turn(turn)
    if kind == "cq":
        width = words_MKd.shape[2] - 1
        bias_MK = words_MKd[..., width]
        codebook = Codebook(coarse[:, :width], words_MKd[..., :width], bool(lists.by_residual), kind, bias=bias_MK)
    else:
        codebook = Codebook(coarse, words_MKd, bool(lists.by_residual), kind, rotation=matrix, metric=metric)
    if (turn is not None and turn.have_bias) != (kind == "cq") or _differ(matrix, _read_turn(_make_turn(codebook))):
        raise ValueError("something else than a rotation stands before its lists")
    return codebook


def read_lists(index: faiss.IndexIVF) -> tuple[IdArray, IdArray, CodeArray]:
    """Give all rows of an index as ids, cells and packed codes, in list order.

    Shapes: -> (N,) int64, (N,) int64, (N, code_bytes) uint8.
    """
    lists = index.invlists
    sizes = np.array([lists.list_size(cell) for cell in range(index.nlist)])
    full = [cell for cell in range(index.nlist) if sizes[cell]]
    if not full:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, index.code_size), np.uint8)
    codes = [read_codes(index, cell) for cell in full]
    cells = np.repeat(np.arange(index.nlist), sizes)
    return read_ids(index), cells, np.concatenate(codes)


def read_codes(index: faiss.IndexIVF, cell: int) -> CodeArray:
    """Give the packed codes of a list, where they lie if that is row after row.

    Shapes: -> (n, code_bytes) uint8.
    """
    if blocks := open_blocks(index):
        return read_rows(blocks, cell)
    size = index.invlists.list_size(cell)
    if not size:
        return np.empty((0, index.code_size), np.uint8)
    view: CodeArray = faiss.rev_swig_ptr(index.invlists.get_codes(cell), size * index.code_size)
    return view.reshape(size, -1)


def read_ids(index: faiss.IndexIVF) -> IdArray:
    """Give the ids of all rows of an index, in list order (N,)."""
    lists = index.invlists
    sizes = [lists.list_size(cell) for cell in range(index.nlist)]
    ids = [faiss.rev_swig_ptr(lists.get_ids(cell), size).copy() for cell, size in enumerate(sizes) if size]
    return np.concatenate([np.empty(0, np.int64), *ids])


def _split_index(index: faiss.Index) -> tuple[faiss.LinearTransform | None, faiss.Index]:
    """Give the rotation, if there is one, and what stands behind it; both still belong to the index."""
    if not isinstance(index, faiss.IndexPreTransform):
        return None, index
    turns = [faiss.downcast_VectorTransform(index.chain.at(place)) for place in range(index.chain.size())]
    if len(turns) != 1 or not isinstance(turns[0], faiss.LinearTransform):
        raise ValueError("something else than a rotation stands before its lists")
    return turns[0], faiss.downcast_index(index.index)


def _lay_out(codebook: Codebook) -> tuple[FloatArray, FloatArray]:
    """Give the centroids and the codewords as lists hold them."""
    if codebook.bias is None:
        return codebook.coarse, codebook.books
    centroids = np.zeros((codebook.cells, codebook.sub_vectors * (codebook.dim + 1)), np.float32)
    # As one part of the query is compared with them, their inner product orders as their distance does.
    centroids[:, : codebook.dim] = codebook.coarse
    centroids[:, codebook.dim] = -np.square(codebook.coarse).sum(1) / 2
    return centroids, np.concatenate([codebook.books, codebook.bias[..., None]], axis=2)


def _make_turn(codebook: Codebook) -> faiss.LinearTransform | None:
    """Give what does to queries in a file what `turn_queries` does in memory; None if that is nothing."""
    if codebook.rotation is None and codebook.bias is None:
        return None
    probe = np.eye(codebook.dim, dtype=np.float32)
    constant = turn_queries(np.zeros((1, codebook.dim), np.float32), codebook)
    matrix = turn_queries(probe, codebook) - constant
    turn = faiss.LinearTransform(codebook.dim, matrix.shape[1], codebook.bias is not None)
    faiss.copy_array_to_vector(np.ascontiguousarray(matrix.T).ravel(), turn.A)
    if turn.have_bias:
        faiss.copy_array_to_vector(constant.ravel(), turn.b)
    turn.is_trained = True
    return turn


def _read_turn(turn: faiss.LinearTransform | None) -> FloatArray | None:
    """Give the matrix that queries are multiplied with."""
    return None if turn is None else faiss.vector_to_array(turn.A).reshape(turn.d_out, turn.d_in)


def _differ(one: FloatArray | None, other: FloatArray | None) -> bool:
    return not np.array_equal(one if one is not None else np.empty(0), other if other is not None else np.empty(0))


def _find_layout(turn: faiss.LinearTransform | None, lists: faiss.Index) -> tuple[str, Layout, str]:
    """Give the kind of the codebook of an index, how faiss calls its parts, and the metric."""
    is_repeated = turn is not None and turn.have_bias
    known = [pair for pair in (*_LAYOUTS.items(), *_FAST.items()) if (pair[0] == "cq") == is_repeated]
    kind, layout = next(((kind, layout) for kind, layout in known if layout.index is type(lists)), (None, None))
    metrics = {faiss.METRIC_L2: "l2", faiss.METRIC_INNER_PRODUCT: "ip"}
    metric = metrics.get(lists.metric_type)
    if kind is None or layout is None or metric is None or (is_repeated and metric != "ip"):
        raise ValueError(f"a {type(lists).__name__} of metric {lists.metric_type} has no codebook")
    # The other ways in which faiss searches sums need norms in the codes, or are not exact.
    if kind in ("rq", "lsq") and lists.aq.search_type != faiss.AdditiveQuantizer.ST_decompress:
        raise ValueError(f"search type {lists.aq.search_type} does not compare queries with decoded vectors")
    if layout in _FAST.values() and not has_our_blocks(lists):
        raise ValueError(f"blocks of {lists.bbs} rows are none of ours")
    return kind, layout, "l2" if is_repeated else metric


def refuse_bad_ids(ids_N: IdArray) -> None:
    """Let no id pass that is negative or occurs twice.

    Raises:
        DataError: one does.
    """
    if len(ids_N) == 0:
        return
    if ids_N.min() < 0:
        raise DataError("id", int(ids_N.min()), "ids are 0 or more: faiss marks an empty place with -1")
    ordered = np.sort(ids_N)
    double = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(double):
        raise DataError("id", int(ordered[double[0]]), f"each id may occur once; {len(double)} rows repeat one")
