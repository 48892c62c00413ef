import dataclasses
import json

import numpy as np
import pytest
from reference import decode_in_loops, pack_bit_by_bit
from safetensors.numpy import save

from gsl_dist.codebook import Codebook
from gsl_dist.errors import ArtefactError
from gsl_dist.storage import Folder


def make_codebook(bits=4, sub_vectors=3, cells=5, residual=True, seed=0):
    rng = np.random.default_rng(seed)
    books = rng.normal(size=(sub_vectors, 1 << bits, 2)).astype(np.float32)
    return Codebook(coarse=rng.normal(size=(cells, sub_vectors * 2)), books=books, residual=residual)


def make_additive(kind="rq", *, bits=3, choices=4, dim=6, rotated=False, seed=0):
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(dim, dim)))[0] if rotated else None
    books = rng.normal(size=(choices, 1 << bits, dim))
    return Codebook(coarse=rng.normal(size=(5, dim)), books=books, residual=True, kind=kind, rotation=rotation)


def make_codes(codebook, rows=13, seed=1):
    return np.random.default_rng(seed).integers(codebook.codewords, size=(rows, codebook.sub_vectors))


SHAPES = [(bits, sub_vectors) for bits in range(1, 9) for sub_vectors in (1, 2, 3, 5, 8, 16)]


@pytest.mark.parametrize("bits, sub_vectors", SHAPES)
def test_packing_equals_writing_bit_by_bit(bits, sub_vectors):
    codebook = make_codebook(bits, sub_vectors)
    codes = make_codes(codebook)
    packed = codebook.pack(codes)
    assert packed.dtype == np.uint8 and packed.shape == (len(codes), codebook.code_bytes)
    assert packed.tolist() == pack_bit_by_bit(codes, bits)


@pytest.mark.parametrize("bits, sub_vectors", SHAPES)
@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_unpacking_undoes_packing(bits, sub_vectors, kind):
    codebook = make_codebook(bits, sub_vectors)
    codes = make_codes(codebook).astype(kind)
    unpacked = codebook.unpack(codebook.pack(codes))
    assert unpacked.dtype == np.uint8 and np.array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_rows_pack_to_no_rows(bits):
    codebook = make_codebook(bits)
    packed = codebook.pack(np.empty((0, 3), np.int64))
    assert packed.shape == (0, codebook.code_bytes) and codebook.unpack(packed).shape == (0, 3)


@pytest.mark.parametrize("residual", [True, False])
def test_decoding_equals_the_loop(residual):
    codebook = make_codebook(residual=residual)
    codes, cells = make_codes(codebook), np.arange(13) % 5
    decoded = codebook.decode(cells, codes)
    assert decoded.dtype == np.float32
    assert np.allclose(decoded, decode_in_loops(cells, codes, codebook.coarse, codebook.books, residual), atol=1e-6)


def test_sizes_are_read_from_the_arrays():
    codebook = make_codebook(bits=5, sub_vectors=3, cells=7)
    assert (codebook.dim, codebook.cells, codebook.sub_vectors, codebook.codewords) == (6, 7, 3, 32)
    assert (codebook.bits, codebook.code_bits, codebook.code_bytes) == (5, 15, 2)


@pytest.mark.parametrize("kind", ["rq", "lsq"])
def test_sizes_of_codewords_that_add_up_are_read_from_the_arrays(kind):
    codebook = make_additive(kind)
    assert (codebook.dim, codebook.cells, codebook.sub_vectors, codebook.codewords) == (6, 5, 4, 8)
    assert (codebook.bits, codebook.code_bits, codebook.code_bytes, codebook.additive) == (3, 12, 2, True)
    assert not make_codebook().additive


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("kind", ["pq", "rq", "lsq"])
def test_decoding_every_kind_equals_the_loop(kind, rotated, residual):
    rotation = np.linalg.qr(np.random.default_rng(7).normal(size=(6, 6)))[0] if rotated else None
    codebook = make_codebook() if kind == "pq" else make_additive(kind)
    codebook = dataclasses.replace(codebook, residual=residual, rotation=rotation)
    codes, cells = make_codes(codebook), np.arange(13) % 5
    slow = decode_in_loops(
        cells, codes, codebook.coarse, codebook.books, residual, additive=kind != "pq", rotation=rotation
    )
    np.testing.assert_allclose(codebook.decode(cells, codes), slow, atol=1e-5)
    assert codebook.decode(cells[:0], codes[:0]).shape == (0, 6)


def test_turning_there_and_back_changes_nothing():
    codebook, x = make_additive(rotated=True), np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32)
    turned = codebook.rotate(x)
    np.testing.assert_allclose(turned @ codebook.rotation, x, atol=1e-5)
    np.testing.assert_allclose(turned[2], codebook.rotation @ x[2], atol=1e-5)
    assert make_additive().rotate(x) is x


def test_a_codebook_cannot_be_changed():
    codebook = make_codebook()
    with pytest.raises(ValueError, match="read-only"):
        codebook.books[0, 0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        codebook.residual = True
    with pytest.raises(ValueError, match="read-only"):
        make_additive(rotated=True).rotation[0, 0] = 1


def test_the_fingerprint_depends_on_every_array_and_flag():
    plain = make_codebook()
    moved = plain.books.copy()
    moved[1, 2, 1] = np.nextafter(moved[1, 2, 1], np.float32(9))
    cells = plain.coarse.copy()
    cells[4, 5] = np.nextafter(cells[4, 5], np.float32(9))
    others = [
        dataclasses.replace(plain, books=moved),
        dataclasses.replace(plain, coarse=cells),
        dataclasses.replace(plain, residual=False),
        dataclasses.replace(plain, rotation=np.eye(6)),
        dataclasses.replace(plain, coarse=plain.coarse[:4]),
    ]
    assert len({codebook.fingerprint for codebook in [plain, *others]}) == 6
    assert make_codebook().fingerprint == plain.fingerprint


@pytest.mark.parametrize("residual", [True, False])
def test_a_saved_codebook_comes_back_bit_for_bit(tmp_path, residual):
    codebook, folder = make_codebook(residual=residual), Folder(tmp_path)
    codebook.save(folder, "c.safetensors")
    loaded = Codebook.load(folder, "c.safetensors")
    assert loaded.fingerprint == codebook.fingerprint and loaded.residual == residual
    assert loaded.coarse.tobytes() == codebook.coarse.tobytes() and loaded.books.tobytes() == codebook.books.tobytes()


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("kind", ["rq", "lsq"])
def test_a_saved_codebook_of_any_kind_comes_back_with_its_rotation(tmp_path, kind, rotated):
    codebook, folder = make_additive(kind, rotated=rotated), Folder(tmp_path)
    codebook.save(folder, "c.safetensors")
    loaded = Codebook.load(folder, "c.safetensors")
    assert (loaded.fingerprint, loaded.kind) == (codebook.fingerprint, kind)
    assert list(loaded.arrays()) == ["coarse", "books"] + ["rotation"] * rotated
    for name, array in codebook.arrays().items():
        assert loaded.arrays()[name].tobytes() == array.tobytes()


def test_the_fingerprint_depends_on_the_kind_and_every_number_of_the_rotation():
    plain = make_additive(rotated=True)
    moved = plain.rotation.copy()
    moved[3, 4] = np.nextafter(moved[3, 4], np.float32(9))
    others = [
        dataclasses.replace(plain, kind="lsq"),
        dataclasses.replace(plain, rotation=moved),
        dataclasses.replace(plain, rotation=plain.rotation.T),
        dataclasses.replace(plain, rotation=None),
        dataclasses.replace(plain, rotation=np.eye(6)),
    ]
    assert len({codebook.fingerprint for codebook in [plain, *others]}) == 6
    assert make_additive(rotated=True).fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    "wrong",
    [
        {"rotation": np.eye(5)},
        {"rotation": np.eye(6)[:5]},
        {"rotation": np.eye(6)[None]},
        {"coarse": np.zeros((5, 7))},
        {"coarse": np.zeros(6)},
        {"books": np.zeros((4, 8, 5))},
        {"books": np.zeros((4, 7, 6))},
        {"books": np.zeros((4, 6))},
        {"kind": "opq"},
        {"kind": "pq"},
        {"kind": ""},
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(AssertionError):
        dataclasses.replace(make_additive(rotated=True), **wrong)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    folder = Folder(tmp_path)
    for name in ("a", "b"):
        make_codebook().save(folder, name)
    assert folder.read_bytes("a") == folder.read_bytes("b")


@pytest.fixture(params=["pq", "rq"])
def saved(tmp_path, request):
    folder = Folder(tmp_path)
    plain = make_codebook(bits=2, sub_vectors=2, cells=2)
    turned = make_additive(bits=1, choices=2, dim=2, rotated=True)
    (plain if request.param == "pq" else turned).save(folder, "c")
    return folder, (tmp_path / "c").read_bytes()


def load_changed(folder, content):
    # Written straight, without the sync that makes a write safe and a thousand of them slow.
    with open(folder.path("c"), "wb") as stream:
        stream.write(content)
    return Codebook.load(folder, "c")


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_every_altered_byte_is_refused(saved, flip):
    folder, content = saved
    fingerprint, padding = Codebook.load(folder, "c").fingerprint, 0
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= flip
        try:
            loaded = load_changed(folder, bytes(changed))
        except ArtefactError as error:
            assert error.path == folder.path("c")
        else:
            # Nothing but the white space that fills up the header may differ unnoticed.
            assert loaded.fingerprint == fingerprint and content[at : at + 1].isspace()
            padding += 1
    assert padding < 8


def test_every_shortened_file_is_refused(saved):
    folder, content = saved
    for length in range(len(content)):
        with pytest.raises(ArtefactError):
            load_changed(folder, content[:length])


def test_a_lengthened_file_is_refused(saved):
    folder, content = saved
    with pytest.raises(ArtefactError):
        load_changed(folder, content + b"\0")


def test_a_codebook_that_is_absent_is_named(tmp_path):
    with pytest.raises(ArtefactError, match="no such file"):
        Codebook.load(Folder(tmp_path), "none")


ARRAYS = {"coarse": np.zeros((1, 4), np.float32), "books": np.zeros((2, 4, 2), np.float32)}
FLAGS = {"kind": "pq", "residual": True, "fingerprint": "0" * 32}


@pytest.mark.parametrize(
    "arrays, header",
    [
        (ARRAYS, None),
        (ARRAYS, {"other": "x"}),
        (ARRAYS, {"gsl_codebook": "not json"}),
        (ARRAYS, {"gsl_codebook": "1"}),
        (ARRAYS, {"gsl_codebook": "[]"}),
        (ARRAYS, {"gsl_codebook": "{}"}),
        (ARRAYS, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS, {"gsl_codebook": json.dumps(FLAGS | {"extra": 1})}),
        ({"coarse": ARRAYS["coarse"]}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS | {"coarse": np.zeros((1, 5), np.float32)}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS | {"coarse": np.zeros(4, np.float32)}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS | {"books": np.zeros((2, 3, 2), np.float32)}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS | {"books": np.zeros((2, 0, 2), np.float32)}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS | {"books": np.zeros((2, 512, 2), np.float32)}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS | {"rotation": np.eye(3, dtype=np.float32)}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS | {"turn": np.eye(4, dtype=np.float32)}, {"gsl_codebook": json.dumps(FLAGS)}),
        (ARRAYS, {"gsl_codebook": json.dumps(FLAGS | {"kind": "rq"})}),
        (ARRAYS, {"gsl_codebook": json.dumps(FLAGS | {"kind": "opq"})}),
        (ARRAYS, {"gsl_codebook": json.dumps(FLAGS | {"kind": 3})}),
    ],
)
def test_tensors_that_are_no_codebook_are_refused(tmp_path, arrays, header):
    (tmp_path / "c").write_bytes(save(arrays, metadata=header))
    with pytest.raises(ArtefactError):
        Codebook.load(Folder(tmp_path), "c")


def make_landing(codebook):
    """Give the codebook with a landing: its codewords, moved."""
    bias = None if codebook.bias is None else codebook.bias + 1
    return dataclasses.replace(codebook, landing=codebook.books + 1, landing_bias=bias)


def make_composite(seed=0):
    rng = np.random.default_rng(seed)
    books, bias = rng.normal(size=(4, 8, 6)), rng.normal(size=(4, 8))
    return Codebook(rng.normal(size=(5, 6)), books, residual=False, kind="cq", bias=bias)


@pytest.mark.parametrize("codebook", [make_codebook(), make_additive(rotated=True), make_composite()])
def test_a_landing_is_saved_and_loaded_and_does_not_change_what_codes_stand_for(tmp_path, codebook):
    landing = make_landing(codebook)
    assert landing.fingerprint == codebook.fingerprint and codebook.landed is codebook
    landing.save(Folder(tmp_path), "c")
    loaded = Codebook.load(Folder(tmp_path), "c")
    assert loaded.arrays().keys() == landing.arrays().keys()
    assert all(np.array_equal(array, landing.arrays()[name]) for name, array in loaded.arrays().items())
    assert np.array_equal(loaded.landed.books, codebook.books + 1) and loaded.landed.landing is None


@pytest.mark.parametrize("name", ["landing", "landing_bias", "bias"])
def test_a_landing_that_was_altered_is_refused(tmp_path, name):
    landing = make_landing(make_composite())
    landing.save(Folder(tmp_path), "c")
    content = (tmp_path / "c").read_bytes()
    altered = {key: array + (key == name) for key, array in landing.arrays().items()}
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    (tmp_path / "c").write_bytes(save({key: array.astype(np.float32) for key, array in altered.items()}, header))
    with pytest.raises(ArtefactError, match="fingerprint"):
        Codebook.load(Folder(tmp_path), "c")


@pytest.mark.parametrize("change", [{"bias": None}, {"kind": "rq"}, {"residual": True}, {"bias": np.zeros((4, 7))}])
def test_a_bias_that_does_not_fit_is_refused(change):
    with pytest.raises(AssertionError):
        dataclasses.replace(make_composite(), **change)


@pytest.mark.parametrize("change", [{"landing": np.zeros((4, 8, 5))}, {"landing_bias": np.zeros((4, 8))}])
def test_a_landing_that_does_not_fit_is_refused(change):
    with pytest.raises(AssertionError):
        dataclasses.replace(make_additive(), **change)
