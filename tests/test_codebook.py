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


def test_a_codebook_cannot_be_changed():
    codebook = make_codebook()
    with pytest.raises(ValueError, match="read-only"):
        codebook.books[0, 0, 0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        codebook.residual = True


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


def test_saving_twice_gives_the_same_bytes(tmp_path):
    folder = Folder(tmp_path)
    for name in ("a", "b"):
        make_codebook().save(folder, name)
    assert folder.read_bytes("a") == folder.read_bytes("b")


@pytest.fixture
def saved(tmp_path):
    folder = Folder(tmp_path)
    make_codebook(bits=2, sub_vectors=2, cells=2).save(folder, "c")
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
    ],
)
def test_tensors_that_are_no_codebook_are_refused(tmp_path, arrays, header):
    (tmp_path / "c").write_bytes(save(arrays, metadata=header))
    with pytest.raises(ArtefactError):
        Codebook.load(Folder(tmp_path), "c")
