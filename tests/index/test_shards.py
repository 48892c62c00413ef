import contextlib
import gc
import itertools
import resource
from dataclasses import replace

import numpy as np
import pytest

faiss = pytest.importorskip("faiss")
from worlds import make_codebook, make_queries, make_rows  # noqa: E402

from gsl_dist.errors import ArtefactError, DataError  # noqa: E402
from gsl_dist.index.shards import (  # noqa: E402
    create_shard,
    extract_codebook,
    fill_shard,
    read_distances,
    read_lists,
    read_shard,
    turn_queries,
    write_shard,
)

KINDS = [("pq", False), ("pq", True), ("rq", False), ("lsq", False), ("rq", True)]
PARTITIONS = [(1, False), (7, True), (7, False)]
WORLDS = [
    {"kind": kind, "rotated": rotated, "cells": cells, "residual": residual, "bits": bits, "choices": 4}
    for (kind, rotated), (cells, residual), bits in itertools.product(KINDS, PARTITIONS, (1, 5, 8))
]


def name_world(world):
    turned = "-rotated" * world["rotated"]
    return f"{world['kind']}{turned}-{world['cells']}cells-{'residual' * world['residual']}-{world['bits']}bits"


worlds = pytest.mark.parametrize("world", WORLDS, ids=name_world)
kinds = pytest.mark.parametrize("kind, rotated", KINDS)


def make_shard(codebook, rows):
    shard = create_shard(codebook)
    fill_shard(shard, *rows)
    return shard


def make_file(folder, codebook, rows, name="s"):
    write_shard(make_shard(codebook, rows), codebook, folder / name)
    return folder / name


def open_plainly(path):
    """What plain faiss makes of a file: the index to ask, and its lists."""
    index = faiss.read_index(str(path))
    return index, faiss.extract_index_ivf(index)


def reconstruct(index, lists, ids):
    lists.set_direct_map_type(faiss.DirectMap.Hashtable)
    return np.stack([index.reconstruct(int(item)) for item in ids])


def decode_rows(codebook, rows):
    ids, cells, codes = rows
    return ids, codebook.decode(cells, codebook.unpack(codes))


def by_id(rows):
    return sorted((int(i), int(cell), code.tobytes()) for i, cell, code in zip(*rows, strict=True))


def assert_nearest(distances, found, queries, ids, vectors):
    """The hits are the nearest of all vectors, items at one distance in any order."""
    far = np.square(queries[:, None].astype(np.float64) - vectors[None]).sum(axis=2)
    np.testing.assert_allclose(distances, np.sort(far, axis=1)[:, : distances.shape[1]], rtol=1e-4, atol=1e-4)
    place = {int(item): at for at, item in enumerate(ids)}
    for row, hits, lengths in zip(far, found, distances, strict=True):
        np.testing.assert_allclose([row[place[int(hit)]] for hit in hits], lengths, rtol=1e-4, atol=1e-4)
        assert len(set(hits)) == len(hits)


@worlds
def test_plain_faiss_finds_in_the_file_what_is_nearest_among_decoded_vectors(tmp_path, world):
    codebook, queries = make_codebook(**world), make_queries(7)
    rows = make_rows(codebook)
    index, lists = open_plainly(make_file(tmp_path, codebook, rows))
    everywhere = faiss.SearchParametersIVF(nprobe=codebook.cells)
    assert_nearest(*index.search(queries, 10, params=everywhere), queries, *decode_rows(codebook, rows))
    assert index.ntotal == lists.ntotal == 300 and lists.code_size == codebook.code_bytes


@worlds
def test_plain_faiss_decodes_the_file_as_the_codebook_does(tmp_path, world):
    codebook = make_codebook(**world)
    ids, vectors = decode_rows(codebook, make_rows(codebook))
    index, lists = open_plainly(make_file(tmp_path, codebook, make_rows(codebook)))
    np.testing.assert_allclose(reconstruct(index, lists, ids), vectors, atol=1e-4)


@kinds
@pytest.mark.parametrize("bits", range(1, 9))
def test_what_plain_faiss_adds_to_a_file_is_what_the_codebook_reads(tmp_path, kind, rotated, bits):
    codebook = make_codebook(kind, rotated=rotated, bits=bits, choices=4)
    nothing = tuple(part[:0] for part in make_rows(codebook))
    index, lists = open_plainly(make_file(tmp_path, codebook, nothing))
    x_ND, ids = make_queries(60, seed=3) * 3, np.arange(1000, 1060, dtype=np.int64)
    index.add_with_ids(x_ND, ids)
    rows = read_lists(lists)
    order, (_, vectors) = np.argsort(rows[0]), decode_rows(codebook, rows)
    np.testing.assert_allclose(reconstruct(index, lists, ids), vectors[order], atol=1e-4)
    cells = np.square(codebook.rotate(x_ND)[:, None] - codebook.coarse).sum(axis=2).argmin(axis=1)
    assert rows[1][order].tolist() == cells.tolist()
    assert np.array_equal(codebook.pack(codebook.unpack(rows[2])), rows[2]), "no bit but those of the choices is set"


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_shard_of_codes_equals_what_faiss_makes_of_the_vectors(tmp_path, bits, residual, rotated):
    codebook = make_codebook(bits=bits, residual=residual, rotated=rotated, choices=4)
    x_ND, ids = make_queries(300, seed=2) * 3, np.arange(1000, 1300, dtype=np.int64)
    plain, lists = open_plainly(make_file(tmp_path, codebook, tuple(part[:0] for part in make_rows(codebook))))
    plain.add_with_ids(x_ND, ids)
    # The nearest cell, and the nearest codeword of each sub-vector, in the plainest way.
    z_ND = codebook.rotate(x_ND)
    cells = np.square(z_ND[:, None] - codebook.coarse).sum(axis=2).argmin(axis=1)
    rest = z_ND - codebook.coarse[cells] if residual else z_ND
    codes = np.square(rest.reshape(300, 4, 1, 4) - codebook.books).sum(axis=3).argmin(axis=2)
    ours = make_shard(codebook, (ids, cells, codebook.pack(codes)))
    assert by_id(read_lists(ours)) == by_id(read_lists(lists)) and ours.ntotal == plain.ntotal == 300


@worlds
def test_the_codebook_inside_is_bit_for_bit_the_one_given(tmp_path, world):
    codebook = make_codebook(**world)
    path = make_file(tmp_path, codebook, make_rows(codebook))
    assert extract_codebook(faiss.read_index(str(path))).fingerprint == codebook.fingerprint


@worlds
def test_what_was_put_in_is_read_back(tmp_path, world):
    codebook = make_codebook(**world)
    rows = make_rows(codebook)
    ids, cells, codes = read_lists(read_shard(make_file(tmp_path, codebook, rows), codebook))
    assert by_id((ids, cells, codes)) == by_id(rows)
    assert np.array_equal(np.lexsort((ids, cells)), np.arange(len(ids))), "by cell, and by id within a cell"


@kinds
def test_lists_outlive_the_file_that_they_were_taken_from(tmp_path, kind, rotated):
    codebook = make_codebook(kind, rotated=rotated)
    rows, queries = make_rows(codebook), make_queries(3)
    shards = [read_shard(make_file(tmp_path, codebook, rows), codebook) for _ in range(20)]
    gc.collect()
    for shard in shards:
        found = shard.search(codebook.rotate(queries), 5, params=faiss.SearchParametersIVF(nprobe=codebook.cells))
        assert_nearest(*found, queries, *decode_rows(codebook, rows))


@pytest.mark.parametrize("cells", [1, 7])
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_plain_faiss_ranks_composite_codes_by_their_score(tmp_path, bits, cells):
    codebook, queries = make_codebook("cq", bits=bits, cells=cells, residual=False, choices=4), make_queries(7)
    rows = make_rows(codebook)
    path = make_file(tmp_path, codebook, rows)
    codes = codebook.unpack(rows[2])
    vectors = codebook.decode(rows[1], codes)
    scores = queries @ vectors.T + codebook.bias[np.arange(4), codes].sum(1)
    everywhere = faiss.SearchParametersIVF(nprobe=codebook.cells)
    found, ids = faiss.read_index(str(path)).search(queries, 10, params=everywhere)
    np.testing.assert_allclose(found, -np.sort(-scores, axis=1)[:, :10], rtol=1e-4, atol=1e-4)
    lists = read_shard(path, codebook)
    answered, again = lists.search(turn_queries(queries, codebook), 10, params=everywhere)
    assert np.array_equal(again, ids)
    far = np.square(queries).sum(1, keepdims=True) - 2 * found
    np.testing.assert_allclose(read_distances(answered, ids, queries, codebook), far, rtol=1e-4, atol=1e-3)
    assert extract_codebook(faiss.read_index(str(path))).fingerprint == codebook.fingerprint
    assert by_id(read_lists(lists)) == by_id(rows)


def test_composite_lists_are_chosen_by_distance(tmp_path):
    codebook, queries = make_codebook("cq", residual=False), make_queries(40)
    lists = read_shard(make_file(tmp_path, codebook, make_rows(codebook)), codebook)
    cells = lists.quantizer.search(turn_queries(queries, codebook), 3)[1]
    wanted = np.square(queries[:, None] - codebook.coarse).sum(axis=2).argsort(axis=1)[:, :3]
    assert np.array_equal(cells, wanted)


def test_the_landing_is_not_in_the_file_and_does_not_matter_to_it(tmp_path):
    codebook = make_codebook("rq")
    landing = replace(codebook, landing=codebook.books + 1)
    path = make_file(tmp_path, codebook, make_rows(codebook))
    assert read_shard(path, landing).ntotal == 300 and landing.fingerprint == codebook.fingerprint


def test_opening_residual_codes_makes_no_tables(tmp_path):
    codebook = make_codebook("rq")
    plain = faiss.read_index(str(make_file(tmp_path, codebook, make_rows(codebook))))
    assert plain.rq.codebook_cross_products.size() == 0


@kinds
def test_the_order_of_the_rows_does_not_change_the_file(tmp_path, kind, rotated):
    codebook = make_codebook(kind, rotated=rotated)
    rows = make_rows(codebook)
    shuffle = np.random.default_rng(4).permutation(len(rows[0]))
    one = make_file(tmp_path, codebook, rows, "one")
    other = make_file(tmp_path, codebook, tuple(part[shuffle] for part in rows), "other")
    assert one.read_bytes() == other.read_bytes()


@worlds
def test_an_empty_shard_is_written_read_and_searched(tmp_path, world):
    codebook = make_codebook(**world)
    path = make_file(tmp_path, codebook, tuple(part[:0] for part in make_rows(codebook)))
    opened = read_shard(path, codebook)
    assert opened.ntotal == 0 and [len(part) for part in read_lists(opened)] == [0, 0, 0]
    for index in (opened, faiss.read_index(str(path))):
        assert (index.search(np.zeros((2, 16), np.float32), 3)[1] == -1).all()


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


@pytest.mark.parametrize("cell", [-1, 8, 2**40])
def test_a_cell_out_of_range_is_refused_and_named(cell):
    codebook = make_codebook()
    ids, cells, codes = make_rows(codebook)
    cells[3] = cell
    with pytest.raises(DataError, match=f"cell: got {cell}, but cells are 0 to 7"):
        fill_shard(create_shard(codebook), ids, cells, codes)


@kinds
def test_a_file_with_another_codebook_is_refused(tmp_path, kind, rotated):
    codebook = make_codebook(kind, rotated=rotated)
    path = make_file(tmp_path, codebook, make_rows(codebook))
    others = [make_codebook(kind, rotated=rotated, **change) for change in ({"seed": 9}, {"bits": 5}, {"cells": 9})]
    others += [replace(codebook, residual=False), replace(codebook, rotation=None if rotated else np.eye(16))]
    others += [replace(codebook, kind={"rq": "lsq", "lsq": "rq"}[kind])] if codebook.additive else []
    for other in others:
        with pytest.raises(ArtefactError, match="another codebook"):
            read_shard(path, other)


def make_foreign(name):
    """Give an index of faiss that is none of ours, by a hair."""
    codebook, shape = make_codebook("rq"), (16, 8, 8, 4)
    coarse = faiss.IndexFlatL2(16)
    coarse.add(codebook.coarse)
    if name == "another metric":
        index = create_shard(codebook)
        index.metric_type = faiss.METRIC_L1
        return index
    if name == "refined":
        return faiss.IndexIVFPQR(coarse, *shape, 8, 4)
    if name == "norms left out":
        index = faiss.IndexIVFResidualQuantizer(coarse, *shape, faiss.METRIC_L2, faiss.AdditiveQuantizer.ST_LUT_nonorm)
        faiss.copy_array_to_vector(codebook.books.ravel(), index.rq.codebooks)
        return index
    if name == "normalised":
        return faiss.IndexPreTransform(faiss.NormalizationTransform(16), create_shard(codebook))
    width, shifted = (20, False) if name == "shortened" else (16, True)
    turn = faiss.LinearTransform(width, 16, shifted)
    faiss.copy_array_to_vector(np.eye(16, width, dtype=np.float32).ravel(), turn.A)
    faiss.copy_array_to_vector(np.ones(16, np.float32), turn.b)
    return faiss.IndexPreTransform(turn, create_shard(codebook))


@pytest.mark.parametrize(
    "name, match",
    [
        ("another metric", "IndexIVFResidualQuantizer of metric 2 has no codebook"),
        ("refined", "IndexIVFPQR"),
        ("norms left out", "search type 1"),
        ("normalised", "else than a rotation"),
        ("shifted", "IndexIVFResidualQuantizer of metric 1 has no codebook"),
        ("shortened", "(16, 20)"),
    ],
)
def test_an_index_that_is_not_quite_ours_is_refused(tmp_path, name, match):
    faiss.write_index(make_foreign(name), str(tmp_path / "s"))
    with pytest.raises(ArtefactError, match=f"it is not a shard .*{match}"):
        read_shard(tmp_path / "s", make_codebook("rq"))


def test_another_kind_of_index_is_refused(tmp_path):
    faiss.write_index(faiss.IndexFlatL2(16), str(tmp_path / "s"))
    with pytest.raises(ArtefactError, match="IndexFlat"):
        read_shard(tmp_path / "s", make_codebook())


@kinds
def test_what_is_left_of_a_file_is_refused(tmp_path, kind, rotated):
    codebook = make_codebook(kind, rotated=rotated)
    path = make_file(tmp_path, codebook, make_rows(codebook))
    content = path.read_bytes()
    for length in (0, 3, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ArtefactError, match="not a shard"):
            read_shard(path, codebook)


@contextlib.contextmanager
def limit_files(size):
    """Let no file of this process grow larger: what a disk without room answers, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("lacking", [1, 300, 4000])
def test_a_shard_that_finds_no_room_is_an_error_also_where_only_its_end_does_not(tmp_path, lacking):
    codebook = make_codebook()
    shard, path = make_shard(codebook, make_rows(codebook, 2000)), tmp_path / "s"
    write_shard(shard, codebook, path)
    size = path.stat().st_size
    with limit_files(size - lacking), pytest.raises(OSError, match="File too large"):
        write_shard(shard, codebook, path)
    with limit_files(size):
        write_shard(shard, codebook, path)
    assert path.stat().st_size == size
