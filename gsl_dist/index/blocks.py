"""Product codes of 4 bits, or RaBitQ codes, in blocks of 32 rows, as faiss's fast-scan wants them.

Fast-scan keeps a query's tables in registers, as bytes, and looks 32 rows up at once: several times as fast as a plain
scan, to the precision of a byte. So the codes of 32 rows lie interleaved in a block. How they do is faiss's affair: its
packer is asked, and what rows and blocks there are is settled here.

Rows are never added through `BlockInvertedLists.add_entries`, nor by `merge_from`, which goes through it: where a list
already holds a multiple of so many rows as a block has bytes, faiss 1.15 takes it for empty, and writes past its end.
"""

# Shapes: n rows of a list

from __future__ import annotations

import faiss
import numpy as np

from gsl_dist.codebook import CodeArray, IdArray

BLOCK_ROWS = 32


def open_blocks(index: faiss.IndexIVF) -> faiss.BlockInvertedLists | None:
    """Give the lists of an index if they hold blocks."""
    lists = faiss.downcast_InvertedLists(index.invlists)
    return lists if isinstance(lists, faiss.BlockInvertedLists) else None


def has_our_blocks(index: faiss.IndexIVF) -> bool:
    """Tell whether lists hold blocks of as many rows as we read and write."""
    lists = open_blocks(index)
    return lists is not None and index.bbs == lists.n_per_block == BLOCK_ROWS


def append_rows(lists: faiss.BlockInvertedLists, cell: int, ids_n: IdArray, codes: CodeArray) -> None:
    """Put rows behind those that a list holds.

    Shapes: ids_n (n,) int64; codes (n, code_bytes) uint8, packed as the codebook does.
    """
    if not len(ids_n):
        return
    before = lists.list_size(cell)
    lists.resize(cell, before + len(ids_n))
    faiss.rev_swig_ptr(lists.get_ids(cell), lists.list_size(cell))[before:] = ids_n
    blocks, packer = _view_blocks(lists, cell), lists.packer
    # Rows of a block that is begun go in one by one; the others are new and zero, and so is what fills up the last.
    begun = min(len(ids_n), -before % BLOCK_ROWS)
    codes = np.ascontiguousarray(codes)
    for row in range(begun):
        packer.pack_1(codes[row], (before + row) % BLOCK_ROWS, blocks[before // BLOCK_ROWS :][:1])
    padded = np.zeros((-(-(len(codes) - begun) // BLOCK_ROWS), BLOCK_ROWS, codes.shape[1]), np.uint8)
    padded.reshape(-1, codes.shape[1])[: len(codes) - begun] = codes[begun:]
    first = -(-(before + begun) // BLOCK_ROWS)
    for block, rows in zip(blocks[first:], padded, strict=True):
        packer.pack_all(faiss.swig_ptr(rows), faiss.swig_ptr(block))


def read_rows(lists: faiss.BlockInvertedLists, cell: int) -> CodeArray:
    """Give the codes of a list, packed as the codebook does.

    Shapes: -> (n, code_bytes) uint8.
    """
    blocks, packer = _view_blocks(lists, cell), lists.packer
    codes = np.zeros((len(blocks), BLOCK_ROWS, packer.code_size), np.uint8)
    for block, rows in zip(blocks, codes, strict=True):
        packer.unpack_all(faiss.swig_ptr(block), faiss.swig_ptr(rows))
    return codes.reshape(-1, packer.code_size)[: lists.list_size(cell)]


def move_rows(whole: faiss.IndexIVF, other: faiss.IndexIVF) -> None:
    """Put the rows of an index behind those of another with the same codebook, list by list; it is then empty."""
    into, source = open_blocks(whole), open_blocks(other)
    assert into and source, "both hold blocks"
    for cell in range(whole.nlist):
        if source.list_size(cell):
            ids_n = faiss.rev_swig_ptr(source.get_ids(cell), source.list_size(cell))
            append_rows(into, cell, ids_n, read_rows(source, cell))
            source.resize(cell, 0)
    whole.ntotal, other.ntotal = whole.ntotal + other.ntotal, 0


def _view_blocks(lists: faiss.BlockInvertedLists, cell: int) -> CodeArray:
    """Give the blocks of a list where they lie: (blocks, bytes of one)."""
    count = -(-lists.list_size(cell) // BLOCK_ROWS)
    if not count:
        return np.empty((0, lists.block_size), np.uint8)
    view: CodeArray = faiss.rev_swig_ptr(lists.get_codes(cell), count * lists.block_size)
    return view.reshape(count, -1)
