"""A trained quantizer as plain arrays with a fingerprint: what training, encoding, shards and service agree on.

A vector x belongs to a cell c of the coarse partition. Its code stands for x itself, or for the residual x - coarse[c],
cut into M sub-vectors, each replaced by one of K codewords. The fingerprint hashes every array and flag; codes, shards
and manifests carry it, so that a code is never read with another codebook than the one that wrote it.

This module knows nothing of how a codebook is trained.
"""

# Shapes: N vectors, D dims, C cells, M sub-vectors, K codewords, d = D // M

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from gsl_dist.errors import ArtefactError
from gsl_dist.storage import Folder

FloatArray = NDArray[np.float32]
CodeArray = NDArray[np.uint8]
IdArray = NDArray[np.int64]


@dataclass(frozen=True)
class Codebook:
    """The arrays of a product quantizer with coarse cells.

    Args:
        coarse: centroids of the cells; a single row of zeros where there is no partition.
        books: the codewords of each sub-vector.
        residual: whether codes stand for x - coarse[cell] instead of x.

    Shapes: coarse (C, D) float32; books (M, K, d) float32.
    """

    coarse: FloatArray
    books: FloatArray
    residual: bool
    kind: str = "pq"

    def __post_init__(self) -> None:
        for name, ndim in (("coarse", 2), ("books", 3)):
            array = np.ascontiguousarray(getattr(self, name), dtype=np.float32)
            assert array.ndim == ndim, (name, array.shape)
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        assert self.coarse.shape[1] == self.dim, (self.coarse.shape, self.books.shape)
        assert self.codewords == 1 << self.bits <= 256, self.books.shape

    @property
    def dim(self) -> int:
        """Give D, the length of a vector."""
        return int(self.books.shape[0] * self.books.shape[2])

    @property
    def cells(self) -> int:
        """Give C, the number of cells."""
        return int(self.coarse.shape[0])

    @property
    def sub_vectors(self) -> int:
        """Give M, the number of codewords that make up a vector."""
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
        return self.sub_vectors * self.bits

    @property
    def code_bytes(self) -> int:
        """Give the bytes that one packed code takes, the cell apart."""
        return (self.code_bits + 7) // 8

    @cached_property
    def fingerprint(self) -> str:
        """Give a hash of everything that decides what a code means."""
        digest = hashlib.sha256(json.dumps(self._flags(), sort_keys=True).encode())
        for array in (self.coarse, self.books):
            digest.update(json.dumps(array.shape).encode())
            digest.update(array.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()[:32]

    def pack(self, codes_NM: NDArray[np.integer]) -> CodeArray:
        """Write the choices of each row one after another, lowest bit first: the layout that faiss reads.

        Shapes: codes_NM (N, M) integers below K -> (N, code_bytes) uint8.
        """
        if self.bits == 8:
            return np.ascontiguousarray(codes_NM, dtype=np.uint8)
        shifts = np.arange(self.bits, dtype=np.uint8)
        bits = (codes_NM.astype(np.uint8)[:, :, None] >> shifts) & 1
        return np.packbits(bits.reshape(len(codes_NM), self.code_bits), axis=1, bitorder="little")

    def unpack(self, packed: CodeArray) -> CodeArray:
        """Undo `pack`.

        Shapes: packed (N, code_bytes) uint8 -> (N, M) uint8.
        """
        if self.bits == 8:
            return packed
        bits = np.unpackbits(packed, axis=1, bitorder="little", count=self.code_bits)
        weights = (1 << np.arange(self.bits)).astype(np.uint8)
        return (bits.reshape(len(packed), self.sub_vectors, self.bits) * weights).sum(axis=2, dtype=np.uint8)

    def decode(self, cells_N: NDArray[np.integer], codes_NM: NDArray[np.integer]) -> FloatArray:
        """Give the vectors that the codes stand for.

        Shapes: cells_N (N,), codes_NM (N, M) -> (N, D) float32.
        """
        parts = [book[codes] for book, codes in zip(self.books, codes_NM.T, strict=True)]
        decoded = np.concatenate(parts, axis=1)
        return decoded + self.coarse[cells_N] if self.residual else decoded

    def save(self, folder: Folder, name: str) -> None:
        """Write the codebook as one safetensors file with its flags and fingerprint in the header."""
        header = {"gsl_codebook": json.dumps(self._flags() | {"fingerprint": self.fingerprint})}
        folder.write_bytes(name, save_tensors({"coarse": self.coarse, "books": self.books}, metadata=header))

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
            wanted = flags.pop("fingerprint")
            codebook = cls(coarse=tensors["coarse"], books=tensors["books"], **flags)
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise ArtefactError(folder.path(name), f"it is not a codebook ({error or type(error).__name__})") from error
        if codebook.fingerprint != wanted:
            raise ArtefactError(folder.path(name), f"fingerprint {codebook.fingerprint}, but {wanted} was written")
        return codebook

    def _flags(self) -> dict[str, str | bool]:
        return {"kind": self.kind, "residual": self.residual}
