"""A trained quantizer as plain arrays with a fingerprint: what training, encoding, shards and service agree on.

A vector x is turned by the rotation R, if there is one: z = R x. It belongs to the cell c of the coarse partition whose
centroid is nearest to z. Its code stands for z itself, or for the residual z - coarse[c], as M choices among K
codewords each. In a product codebook (`pq`) choice m stands for the m-th of M equal parts of the vector; in an additive
one (`rq`, `lsq`, `cq`) the vector is the sum of the M codewords. In a composite one (`cq`) each codeword also has a
bias, its share of -|x|^2 / 2, so that scores of queries need nothing but look-ups. In one of lines (`vlq`) product
codewords stand for what is left over by a point on the line to a neighbouring centroid; the list that a code lies in is
then a region, the cell and the line, and the last number of a code is the level along the line. RaBitQ codes (`rabitq`)
have a choice for every dimension among the same evenly spaced numbers, and end in factors of the row's own, among them
the scale that these numbers are multiplied with. The fingerprint hashes every array and flag that decides what a code
stands for; codes, shards and manifests carry it, so that a code is never read with another codebook than the one that
wrote it.

What nearest means is the codebook's to say, so that it is the same wherever codes go. Cells and codes are by distance
whatever it is; where it is the cosine, all vectors have length 1, and the nearest is the same.

Codewords that learned to rank may lie elsewhere than those by which codes were found when they learned. The latter are
kept as `landing`: codes of further vectors are found by them too. What a code stands for does not depend on them.

This module knows nothing of how a codebook is trained.
"""

# Shapes: N vectors, D dims, C cells, M choices, K codewords; d = D // M in product codebooks, D in additive ones;
# E lines of each cell, L levels along them

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from gsl_dist.errors import ArtefactError
from gsl_dist.storage import Folder

KINDS = ("pq", "rq", "lsq", "cq", "vlq", "rabitq")
METRICS = ("l2", "ip", "cosine")
"""What nearest means: least squared distance, largest inner product, or largest cosine."""
WITHOUT_PRODUCTS = ("cq", "vlq", "rabitq")
"""Kinds whose codes tell distances alone."""

LEVELS = 256
"""Levels along a line: what one byte tells apart."""

_ADDITIVE = ("rq", "lsq", "cq")
_AXES = {
    "coarse": 2,
    "books": 3,
    "rotation": 2,
    "bias": 2,
    "edges": 2,
    "levels": 1,
    "feet": 2,
    "landing": 3,
    "landing_bias": 2,
}
_MEANING = ("coarse", "books", "rotation", "bias", "edges", "levels", "feet")

FloatArray = NDArray[np.float32]
CodeArray = NDArray[np.uint8]
IdArray = NDArray[np.int64]


def space_evenly(dim: int, bits: int) -> FloatArray:
    """Give the codewords of RaBitQ, the same in every dimension: 2^bits numbers one apart, as many above 0 as below.

    Shapes: -> (D, K, 1) float32.
    """
    words_K = np.arange(1 << bits, dtype=np.float32) + 0.5 - (1 << bits) / 2
    return np.tile(words_K[:, None], (dim, 1, 1))


def read_scales(factors_NF: Any, dim: int) -> Any:
    """Give what the numbers of RaBitQ codes are multiplied with, of their factors as arrays or tensors.

    The factors are those that faiss looks for (`gsl_dist.quantizers.rabitq`).

    Shapes: (N, 2) or (N, 5) float32 -> (N,).
    """
    return factors_NF[:, 1] * (2 / math.sqrt(dim)) if factors_NF.shape[1] == 2 else factors_NF[:, 4] / -2


class Standing(NamedTuple):
    """What codes stand for, and what is known of it in advance: squared lengths, or what is learned in their place.

    Shapes: vectors_nD (n, D) float32; squares_n (n,) float32.
    """

    vectors_nD: FloatArray
    squares_n: FloatArray


@dataclass(frozen=True)
class Codebook:
    """The arrays of a quantizer with coarse cells.

    Args:
        coarse: centroids of the cells, rotated; a single row of zeros where there is no partition.
        books: the codewords of each choice.
        residual: whether codes stand for what the cell's centroid leaves over.
        kind: `pq`, product codes; `rq`, `lsq` and `cq`, codewords that add up, which differ in how codes are searched
            for and in what a query looks up; `vlq`, lines; `rabitq`, whose codewords are given, not trained.
        rotation: R, orthogonal; None where vectors are coded as they are.
        bias: of each codeword, of a composite codebook and no other.
        edges: the cells that each cell's lines go to, of a codebook of lines and no other.
        levels: how far along a line each level lies, from 0 to 1 and ascending; with `edges`.
        feet: how far along each line its rows lie on average, which tells queries where to look; with `edges`.
        landing: the codewords by which codes are found, where these are others than `books`.
        landing_bias: their biases, in a composite codebook.
        metric: what nearest means; no inner product goes with the kinds in `WITHOUT_PRODUCTS`.

    Shapes: coarse (C, D), books and landing (M, K, d), rotation (D, D), bias and landing_bias (M, K), levels (L,), all
        float32; edges (C, E) int32, feet (C, E) float32.
    """

    coarse: FloatArray
    books: FloatArray
    residual: bool
    kind: str = "pq"
    rotation: FloatArray | None = None
    bias: FloatArray | None = None
    edges: NDArray[np.int32] | None = None
    levels: FloatArray | None = None
    feet: FloatArray | None = None
    landing: FloatArray | None = None
    landing_bias: FloatArray | None = None
    metric: str = "l2"

    def __post_init__(self) -> None:
        for name, array in self.arrays().items():
            array = np.array(array, dtype=np.int32 if name == "edges" else np.float32, order="C")
            assert array.ndim == _AXES[name], (name, array.shape)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        assert self.kind in KINDS, self.kind
        assert self.metric in METRICS and (self.metric != "ip" or self.kind not in WITHOUT_PRODUCTS), self.metric
        assert self.coarse.shape[1] == self.dim, (self.coarse.shape, self.books.shape)
        assert self.codewords == 1 << self.bits <= 256, self.books.shape
        assert (self.bias is not None) == (self.kind == "cq"), self.kind
        assert self.bias is None or (self.bias.shape == self.books.shape[:2] and not self.residual), self.bias.shape
        assert self.landing is None or self.landing.shape == self.books.shape, self.landing.shape
        assert (self.landing_bias is not None) == (self.landing is not None and self.bias is not None), self.kind
        assert self.landing_bias is None or self.landing_bias.shape == self.books.shape[:2], self.landing_bias.shape
        assert self.rotation is None or self.rotation.shape == (self.dim, self.dim), self.rotation.shape
        lines = [self.edges, self.levels, self.feet]
        assert [array is not None for array in lines] == [self.kind == "vlq"] * 3, self.kind
        assert self.edges is None or (len(self.edges) == self.cells and self.residual), self.edges.shape
        assert self.edges is None or 0 <= self.edges.min() <= self.edges.max() < self.cells, self.edges
        assert self.levels is None or len(self.levels) == LEVELS, self.levels.shape
        assert self.feet is None or self.edges is None or self.feet.shape == self.edges.shape, self.feet.shape
        if self.kind == "rabitq":
            assert self.residual and self.landing is None, "codes of what cells leave over, without a landing"
            assert np.array_equal(self.books, space_evenly(self.dim, self.bits)), "codewords are evenly spaced"

    @property
    def additive(self) -> bool:
        """Tell whether a vector is the sum of its codewords, not their concatenation."""
        return self.kind in _ADDITIVE

    @property
    def dim(self) -> int:
        """Give D, the length of a vector."""
        return int(self.books.shape[2] * (1 if self.additive else self.books.shape[0]))

    @property
    def cells(self) -> int:
        """Give C, the number of cells."""
        return int(self.coarse.shape[0])

    @property
    def edge_count(self) -> int:
        """Give E, the lines of each cell; 1 where cells are not cut by lines."""
        return 1 if self.edges is None else int(self.edges.shape[1])

    @property
    def lists(self) -> int:
        """Give the number of lists that codes lie in: cells, or regions where lines cut them."""
        return self.cells * self.edge_count

    @property
    def choices(self) -> int:
        """Give the numbers that make up a code: a choice for each codeword; the level on a line, or the factors."""
        return self.sub_vectors + self.tail

    @property
    def tail(self) -> int:
        """Give the bytes behind the choices of a code: the level on a line, or factors of 4 bytes each."""
        if self.kind == "rabitq":
            return 8 if self.bits == 1 else 20
        return int(self.edges is not None)

    @property
    def sub_vectors(self) -> int:
        """Give M, the number of codewords that make up a vector: one for each of its parts, or so many to add."""
        return int(self.books.shape[0])

    @property
    def codewords(self) -> int:
        """Give K, the number of codewords to choose from for each sub-vector."""
        return int(self.books.shape[1])

    @property
    def bits(self) -> int:
        """Give log2 K, the bits that one choice takes."""
        return int(self.codewords).bit_length() - 1

    @property
    def code_bits(self) -> int:
        """Give the bits of one code, the cell apart."""
        return self.sub_vectors * self.bits + 8 * self.tail

    @property
    def code_bytes(self) -> int:
        """Give the bytes that one packed code takes, the cell apart."""
        return self.tail + sum((self.sub_vectors * bits + 7) // 8 for bits in self._widths)

    @property
    def _widths(self) -> tuple[int, ...]:
        # Of RaBitQ codes the highest bits come first, which say the sign and are all that a query looks at at first.
        return (1, self.bits - 1) if self.kind == "rabitq" and self.bits > 1 else (self.bits,)

    @cached_property
    def landed(self) -> Codebook:
        """Give the codebook by which codes are found."""
        if self.landing is None:
            return self
        return replace(self, books=self.landing, bias=self.landing_bias, landing=None, landing_bias=None)

    @cached_property
    def fingerprint(self) -> str:
        """Give a hash of everything that decides what a code stands for."""
        digest = hashlib.sha256(json.dumps(self._flags(), sort_keys=True).encode())
        for name, array in self.arrays().items():
            if name in _MEANING:
                digest.update(json.dumps(array.shape).encode())
                digest.update(array.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()[:32]

    def pack(self, codes_NM: NDArray[np.integer]) -> CodeArray:
        """Write the choices of each row one after another, lowest bit first, as faiss reads them; then the tail.

        Of RaBitQ codes of several bits come the highest bits, 3 factors, the other bits and 2 factors.

        Shapes: codes_NM (N, choices) integers -> (N, code_bytes) uint8.
        """
        if self.bits == 8 and self.kind != "rabitq":
            return np.ascontiguousarray(codes_NM, dtype=np.uint8)
        words, tail = np.split(codes_NM.astype(np.uint8), [self.sub_vectors], axis=1)
        if len(self._widths) == 1:
            return np.hstack([_pack_bits(words, self.bits), tail])
        low = self.bits - 1
        return np.hstack([_pack_bits(words >> np.uint8(low), 1), tail[:, :12], _pack_bits(words, low), tail[:, 12:]])

    def unpack(self, packed: CodeArray) -> CodeArray:
        """Undo `pack`.

        Shapes: packed (N, code_bytes) uint8 -> (N, choices) uint8.
        """
        if self.bits == 8 and self.kind != "rabitq":
            return packed
        first = (self.sub_vectors * self._widths[0] + 7) // 8
        if len(self._widths) == 1:
            return np.hstack([_unpack_bits(packed[:, :first], self.sub_vectors, self.bits), packed[:, first:]])
        high, front, low, back = np.split(packed, [first, first + 12, self.code_bytes - 8], axis=1)
        words = _unpack_bits(high, self.sub_vectors, 1) << (self.bits - 1)
        return np.hstack([words | _unpack_bits(low, self.sub_vectors, self.bits - 1), front, back])

    def decode(self, cells_N: NDArray[np.integer], codes_NM: NDArray[np.integer]) -> FloatArray:
        """Give the vectors that the codes stand for.

        Shapes: cells_N (N,) lists, codes_NM (N, choices) -> (N, D) float32.
        """
        words_NM = codes_NM[:, : self.sub_vectors]
        decoded = self._add_words(words_NM) if self.additive else self._join_words(words_NM)
        if self.kind == "rabitq":
            factors_NF = np.ascontiguousarray(codes_NM[:, self.sub_vectors :], np.uint8).view("<f4")
            decoded = decoded * read_scales(factors_NF, self.dim)[:, None]
        decoded = decoded + self._anchor(cells_N, codes_NM) if self.residual else decoded
        return decoded if self.rotation is None else decoded @ self.rotation

    def stand_for(self, lists_n: NDArray[np.integer], codes_nM: NDArray[np.integer]) -> Standing:
        """Give what codes stand for, ready to be measured.

        Shapes: (n,), (n, choices) -> (n, D), (n,).
        """
        decoded_nD = self.decode(lists_n, codes_nM)
        if self.bias is None:
            return Standing(decoded_nD, np.square(decoded_nD).sum(1))
        biases_nM = [bias[codes] for bias, codes in zip(self.bias, codes_nM.T, strict=True)]
        return Standing(decoded_nD, -2 * np.sum(biases_nM, axis=0))

    def measure(self, queries_QD: FloatArray, standing: Standing) -> FloatArray:
        """Give how far each query is from what each code stands for: what lists answer, without lists.

        Squared distances, or negative inner products where these are the metric.

        Shapes: (Q, D), n codes -> (Q, n) float32.
        """
        dots_Qn = queries_QD @ standing.vectors_nD.T
        if self.metric == "ip":
            return -dots_Qn
        distances_Qn = np.square(queries_QD).sum(1, keepdims=True) + standing.squares_n - 2 * dots_Qn
        return np.maximum(distances_Qn, 0) if self.bias is None else distances_Qn

    def _add_words(self, words_NM: NDArray[np.integer]) -> FloatArray:
        return np.sum([book[words] for book, words in zip(self.books, words_NM.T, strict=True)], axis=0)

    def _join_words(self, words_NM: NDArray[np.integer]) -> FloatArray:
        # All choices are looked up at once: part by part, and joined, the short rows would take ten times as long.
        words_Wd = self.books.reshape(-1, self.books.shape[2])
        return words_Wd.take(words_NM + np.arange(self.sub_vectors) * self.codewords, axis=0).reshape(-1, self.dim)

    def _anchor(self, lists_N: NDArray[np.integer], codes_NM: NDArray[np.integer]) -> FloatArray:
        """Give what residuals are residuals of: the centroid, or the point on the line."""
        if self.edges is None or self.levels is None:
            return self.coarse[lists_N]
        own, other = self.coarse[lists_N // self.edge_count], self.coarse[self.edges.ravel()[lists_N]]
        return own + self.levels[codes_NM[:, -1]][:, None] * (other - own)

    def rotate(self, x_ND: FloatArray) -> FloatArray:
        """Give vectors as the cells and codewords see them.

        Shapes: x_ND (N, D) float32 -> (N, D) float32.
        """
        return x_ND if self.rotation is None else x_ND @ self.rotation.T

    def arrays(self) -> dict[str, FloatArray]:
        """Give the arrays by their names, those that there are."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name in _AXES}
        return {name: array for name, array in given.items() if array is not None}

    def save(self, folder: Folder, name: str) -> None:
        """Write the codebook as one safetensors file with its flags and fingerprint in the header."""
        marks = {"fingerprint": self.fingerprint, "landed_fingerprint": self.landed.fingerprint}
        header = {"gsl_codebook": json.dumps(self._flags() | marks)}
        folder.write_bytes(name, save_tensors(self.arrays(), metadata=header))

    @classmethod
    def load(cls, folder: Folder, name: str) -> Codebook:
        """Read a codebook and check that it is the one that was saved.

        Raises:
            ArtefactError: absent, not a codebook, or its arrays do not match its fingerprint.
        """
        content = folder.read_bytes(name)
        try:
            tensors = load_tensors(content)
            length = int.from_bytes(content[:8], "little")
            flags = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["gsl_codebook"])
            wanted = flags.pop("fingerprint"), flags.pop("landed_fingerprint", None)
            codebook = cls(**tensors, **flags)
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise ArtefactError(folder.path(name), f"it is not a codebook ({error or type(error).__name__})") from error
        found = codebook.fingerprint, codebook.landed.fingerprint
        if found != (wanted[0], wanted[1] or wanted[0]):
            raise ArtefactError(folder.path(name), f"fingerprint {found[0]}, but {wanted[0]} was written")
        return codebook

    def _flags(self) -> dict[str, str | bool]:
        # Codebooks of distances keep the fingerprints that they had before there was anything else.
        metric: dict[str, str | bool] = {} if self.metric == "l2" else {"metric": self.metric}
        return metric | {"kind": self.kind, "residual": self.residual}


def _pack_bits(words_NM: CodeArray, bits: int) -> CodeArray:
    """Write the lowest bits of numbers one after another, lowest first: (N, M) -> (N, bytes)."""
    single = (words_NM[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(single.reshape(len(words_NM), words_NM.shape[1] * bits), axis=1, bitorder="little")


def _unpack_bits(packed: CodeArray, choices: int, bits: int) -> CodeArray:
    """Undo `_pack_bits`: (N, bytes) -> (N, choices)."""
    if bits == 4:  # no bit need be looked at by itself
        halves_NM = np.stack([packed & 15, packed >> 4], axis=2)
        return halves_NM.reshape(len(packed), packed.shape[1] * 2)[:, :choices]
    single = np.unpackbits(packed, axis=1, bitorder="little", count=choices * bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (single.reshape(len(packed), choices, bits) * weights).sum(axis=2, dtype=np.uint8)
