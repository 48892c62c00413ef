import numpy as np
import pytest

faiss = pytest.importorskip("faiss")

from gsl_dist.codebook import Codebook  # noqa: E402
from gsl_dist.errors import ArtefactError, DataError  # noqa: E402
from gsl_dist.index.ivfpq import create_shard, extract_codebook, fill_shard, read_lists, read_shard  # noqa: E402

KINDS = [(4, True), (4, False), (8, True), (6, True), (5, False)]


def make_codebook(bits=4, residual=True, *, dim=12, sub_vectors=3, cells=7, seed=0):
    rng = np.random.default_rng(seed)
    books = rng.normal(size=(sub_vectors, 1 << bits, dim // sub_vectors))
    return Codebook(coarse=rng.normal(size=(cells, dim)) * 3, books=books, residual=residual)


def make_rows(codebook, rows=300, seed=1):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(10 * rows)[:rows].astype(np.int64)
    codes = codebook.pack(rng.integers(codebook.codewords, size=(rows, codebook.sub_vectors)))
    return ids, rng.integers(codebook.cells, size=rows), codes


def make_shard(codebook, rows):
    shard = create_shard(codebook)
    fill_shard(shard, *rows)
    return shard


def by_id(rows):
    return sorted((int(i), int(cell), code.tobytes()) for i, cell, code in zip(*rows, strict=True))


@pytest.mark.parametrize("bits, residual", KINDS)
def test_a_shard_of_codes_equals_what_faiss_makes_of_the_vectors(bits, residual):
    codebook = make_codebook(bits, residual)
    vectors = np.random.default_rng(2).normal(size=(300, 12)).astype(np.float32) * 3
    ids = np.arange(1000, 1300, dtype=np.int64)
    plain = create_shard(codebook)
    plain.add_with_ids(vectors, ids)
    _, cells = plain.quantizer.search(vectors, 1)
    # The nearest codeword of each sub-vector, in the plainest way.
    rest = vectors - codebook.coarse[cells[:, 0]] if residual else vectors
    gaps = rest.reshape(300, 3, 1, 4) - codebook.books[None]
    codes = np.square(gaps).sum(axis=3).argmin(axis=2)
    ours = make_shard(codebook, (ids, cells[:, 0], codebook.pack(codes)))
    assert by_id(read_lists(ours)) == by_id(read_lists(plain)) and ours.ntotal == plain.ntotal == 300


@pytest.mark.parametrize("bits, residual", KINDS)
def test_what_was_put_in_is_read_back(bits, residual):
    codebook = make_codebook(bits, residual)
    rows = make_rows(codebook)
    ids, cells, codes = read_lists(make_shard(codebook, rows))
    assert by_id((ids, cells, codes)) == by_id(rows)
    assert np.array_equal(np.lexsort((ids, cells)), np.arange(len(ids))), "by cell, and by id within a cell"


@pytest.mark.parametrize("bits, residual", KINDS)
def test_plain_faiss_opens_the_file_and_gives_the_same_answers(tmp_path, bits, residual):
    codebook = make_codebook(bits, residual)
    shard = make_shard(codebook, make_rows(codebook))
    faiss.write_index(shard, str(tmp_path / "s.faiss"))
    plain = faiss.read_index(str(tmp_path / "s.faiss"))
    queries = np.random.default_rng(3).normal(size=(9, 12)).astype(np.float32)
    shard.nprobe = plain.nprobe = codebook.cells
    distances, ids = shard.search(queries, 10)
    plain_distances, plain_ids = plain.search(queries, 10)
    assert np.array_equal(ids, plain_ids) and np.allclose(distances, plain_distances, rtol=1e-4)


def test_the_order_of_the_rows_does_not_change_the_file(tmp_path):
    codebook = make_codebook()
    ids, cells, codes = make_rows(codebook)
    shuffle = np.random.default_rng(4).permutation(len(ids))
    for name, rows in (("a", (ids, cells, codes)), ("b", (ids[shuffle], cells[shuffle], codes[shuffle]))):
        faiss.write_index(make_shard(codebook, rows), str(tmp_path / name))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("bits, residual", KINDS)
def test_the_codebook_inside_is_bit_for_bit_the_one_given(tmp_path, bits, residual):
    codebook = make_codebook(bits, residual)
    faiss.write_index(make_shard(codebook, make_rows(codebook)), str(tmp_path / "s"))
    assert extract_codebook(read_shard(tmp_path / "s", codebook)).fingerprint == codebook.fingerprint


def test_an_empty_shard_is_written_read_and_searched(tmp_path):
    codebook = make_codebook()
    shard = make_shard(codebook, tuple(part[:0] for part in make_rows(codebook)))
    faiss.write_index(shard, str(tmp_path / "s"))
    opened = read_shard(tmp_path / "s", codebook)
    assert opened.ntotal == 0 and [len(part) for part in read_lists(opened)] == [0, 0, 0]
    assert (opened.search(np.zeros((2, 12), np.float32), 3)[1] == -1).all()


@pytest.mark.parametrize("double", [(0, 1), (0, 299)])
def test_a_repeated_id_is_refused_and_named(double):
    codebook = make_codebook()
    ids, cells, codes = make_rows(codebook)
    ids[double[1]] = ids[double[0]]
    with pytest.raises(DataError, match=f"{ids[double[0]]}, but each id may occur once"):
        fill_shard(create_shard(codebook), ids, cells, codes)


def test_a_negative_id_is_refused():
    codebook = make_codebook()
    ids, cells, codes = make_rows(codebook)
    ids[7] = -1
    shard = create_shard(codebook)
    with pytest.raises(DataError, match="id: got -1"):
        fill_shard(shard, ids, cells, codes)
    assert shard.ntotal == 0


@pytest.mark.parametrize("cell", [-1, 7, 2**40])
def test_a_cell_out_of_range_is_refused_and_named(cell):
    codebook = make_codebook()
    ids, cells, codes = make_rows(codebook)
    cells[3] = cell
    with pytest.raises(DataError, match=f"cell: got {cell}, but cells are 0 to 6"):
        fill_shard(create_shard(codebook), ids, cells, codes)


def test_a_file_with_another_codebook_is_refused(tmp_path):
    codebook = make_codebook()
    faiss.write_index(make_shard(codebook, make_rows(codebook)), str(tmp_path / "s"))
    for other in (make_codebook(seed=9), make_codebook(residual=False), make_codebook(bits=5)):
        with pytest.raises(ArtefactError, match="another codebook"):
            read_shard(tmp_path / "s", other)


def test_another_kind_of_index_is_refused(tmp_path):
    faiss.write_index(faiss.IndexFlatL2(12), str(tmp_path / "s"))
    with pytest.raises(ArtefactError, match="IndexFlat"):
        read_shard(tmp_path / "s", make_codebook())
