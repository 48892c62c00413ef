"""Additive quantization with coarse cells: a vector is the sum of M codewords, each over the whole length.

`rq` is residual quantization with beam search: the m-th book is trained on what the best few sums of the books before
it leave over, and a code keeps the best few sums at every stage. Then all books are refitted at once by least squares
to the codes that the search finds, some times over, so that books and search suit each other.

`lsq` begins with the same books and searches further: choices are revisited one by one with all others fixed (iterated
conditional modes), a few are changed at random, and again, keeping the best; between refits the books are shaken, less
and less. It fits the rows closer than `rq`, and takes longer to train and to find a code.

Everything that least squares needs adds up over workers: how often each two codewords met, and the sum of the rows of
each codeword.

Source: Chen, Guan, Wang, Approximate Nearest Neighbor Search by Residual Vector Quantization, Sensors 2010; Babenko and
Lempitsky, Additive Quantization for Extreme Vector Compression, CVPR 2014; Martinez, Clement, Hoos, Little, Revisiting
Additive Quantization, ECCV 2016, and LSQ++, ECCV 2018.
"""

# Shapes: N vectors, D dims, C cells, M books to choose from, K codewords, L sums kept by the beam, Q queries

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict
from gsl_dist.quantizers.base import LloydConfig, Plan, as_tensor, decode, leave_over, rotate
from gsl_dist.quantizers.cells import AUTOMATIC, CellSearch, measure_cells
from gsl_dist.quantizers.kmeans import Stats, Touched, measure_stats, seed_centroids, update_centroids

_CHUNK_FLOATS, _CHUNK_ROWS = 1 << 23, 1 << 12
_RIDGE = 1e-4
_HOLD = {"anneal": 10, "settle": 100, "joint": 0}
_WIDEST = 64
SWEEPS = 4

Sweep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rows and codes in; better codes (N, M), and what each costs (N,)."""


class AdditiveConfig(Strict):
    """An additive quantizer: `books` x `bits` bits an item, and the cell."""

    kind: Literal["rq", "lsq"]
    books: int = Field(default=8, ge=1, description="M, codewords that are added up")
    bits: int = Field(default=8, ge=1, le=8, description="log2 K, bits for each of them")
    cells: int = Field(default=1, ge=1, description="C, lists of the coarse partition")
    residual: bool = Field(default=True, description="code what the cell's centroid leaves over")
    train_beam: int = Field(default=5, ge=1, le=256, description="L, sums kept while the books are trained")
    joint_iterations: int | None = Field(
        default=None, ge=1, description="refits of all books at once, for a new codebook; None: 8 of rq, 25 of lsq"
    )
    train_restarts: int = Field(
        default=8, ge=0, description="random changes that lsq tries on an item in every iteration of its training"
    )


class AdditiveQuantizer:
    """Trains and applies additive codebooks of one shape.

    Args:
        config: the numbers of cells, books and bits, and how codes are searched for in training.
        dim: D, the length of the vectors.
        beam: sums kept while an item is encoded.
        restarts: random changes that `lsq` tries on it.
    """

    def __init__(self, config: AdditiveConfig, dim: int, *, beam: int = 16, restarts: int = 16) -> None:
        self.config, self.dim, self.beam, self.restarts = config, dim, beam, restarts

    @property
    def min_rows(self) -> int:
        """Give the fewest training rows that can fill a codebook."""
        return max(1 << self.config.bits, self.config.cells)

    def plan(self, lloyd: LloydConfig, *, refine: bool) -> Plan:
        """Give the phases of training: cells, one book after another, then all of them together."""
        iterations = lloyd.refresh_iterations if refine else lloyd.iterations
        cells = (("cells", iterations),) if self.config.cells > 1 else ()
        if refine:
            return (*cells, ("joint", iterations))
        stages = tuple((f"book {book}", iterations) for book in range(self.config.books))
        joint = self.config.joint_iterations
        if self.config.kind == "lsq":
            return (*cells, *stages, ("anneal", joint or 25), ("settle", 3))
        return (*cells, *stages, ("settle", joint or 8))

    def blank(self) -> Codebook:
        """Give a codebook of the right shape, all zero."""
        config = self.config
        return Codebook(
            coarse=np.zeros((config.cells, self.dim), np.float32),
            books=np.zeros((config.books, 1 << config.bits, self.dim), np.float32),
            residual=config.residual and config.cells > 1,
            kind=config.kind,
        )

    def prepare(self, x_ND: Tensor, codebook: Codebook, phase: str) -> Tensor:
        """Give rows (1, N, D) as the phase sees them: for a book, all that the best sums of the books before it leave.

        Where all books are trained at once, give what cells leave over.
        """
        if phase == "cells":
            return rotate(x_ND, codebook)[None]
        rest_ND = leave_over(x_ND, codebook)[1]
        if phase in _HOLD:
            return rest_ND[None]
        before_MKD = as_tensor(codebook.books[: _stage(phase)], x_ND)
        return search_beam(rest_ND, before_MKD, self.config.train_beam).rests_NLD.flatten(0, 1)[None]

    def seed(self, codebook: Codebook, phase: str, sample: Tensor, rng: np.random.Generator) -> Codebook:
        """Give the codebook with starting values for one phase, chosen from a prepared sample."""
        if phase in _HOLD:
            return codebook
        if phase == "cells":
            return replace(codebook, coarse=seed_centroids(sample.numpy(), codebook.cells, rng)[0])
        # What the best sum of each row leaves; a beam is as wide as there are sums to keep.
        kept = min(self.config.train_beam, codebook.codewords ** _stage(phase))
        nearest = sample[:, ::kept].numpy()
        return _replace_book(codebook, phase, _seed_inside(nearest[0], codebook.codewords, rng))

    def assign(
        self, prepared: Tensor, codebook: Codebook, phase: str, search: CellSearch = AUTOMATIC
    ) -> Stats | Touched:
        """Measure what `update` needs of these rows."""
        if phase in _HOLD:
            # From nothing every time, as the corpus will be searched: going on from the codes of the turn before, books
            # come to suit codes that only training finds.
            books_MKD, rest_ND = as_tensor(codebook.books, prepared), prepared[0]
            codes_NM = self._search(rest_ND, books_MKD, self.config.train_beam, self.config.train_restarts)
            return sum_by_choice(rest_ND, codes_NM, books_MKD)
        if phase == "cells":
            return measure_cells(prepared[0], codebook, search)
        return measure_stats(prepared, as_tensor(codebook.books[_stage(phase)], prepared)[None])

    def update(self, codebook: Codebook, phase: str, stats: Stats, stride: float = 1.0) -> Codebook:
        """Give the codebook that the statistics of all rows call for."""
        if phase in _HOLD:
            solved = solve_books(codebook.books, stats, _HOLD[phase])
            return replace(codebook, books=_gather_unused(solved, stats) if phase == "anneal" else solved)
        if phase == "cells":
            return replace(codebook, coarse=update_centroids(codebook.coarse[None], stats, stride)[0])
        book = codebook.books[_stage(phase)]
        return _replace_book(codebook, phase, update_centroids(book[None], stats, stride)[0])

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its cell and the codewords whose sum is nearest, as far as the search finds.

        A row's code depends on that row alone, whatever rows it is encoded with.

        Shapes: x_ND (N, D) float32 -> cells (N,) int64, codes (N, M) uint8.
        """
        cells_N, rest_ND = leave_over(x_ND, codebook)
        codes_NM = self._search(rest_ND, as_tensor(codebook.landed.books, x_ND), self.beam, self.restarts)
        return cells_N, codes_NM.to(torch.uint8)

    def neighbours(self, rest_ND: Tensor, codebook: Codebook, k: int) -> Tensor:
        """Give the k best sums that a beam of at least the training width holds, nearest first.

        The search of `lsq` goes on from the first of them, as in training, and what it finds leads.

        Shapes: rest_ND (N, D) -> (N, 1, k, D).
        """
        width, books_MKD = min(max(k, self.config.train_beam), _WIDEST), as_tensor(codebook.books, rest_ND)
        beam = search_beam(rest_ND, books_MKD, width)
        rests_NLD = beam.rests_NLD
        if self.config.kind == "lsq":
            restarts = self.config.train_restarts
            codes_NM = search_local(rest_ND, beam.codes_NLM[:, 0], books_MKD, restarts=restarts)
            rests_NLD = _lead(rest_ND - add_up(codes_NM, books_MKD), codes_NM, beam)
        return (rest_ND[:, None] - rests_NLD[:, :k])[:, None]

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give the squared distance of each query to each decoded item, a look-up for every book.

        With the decoded item x: |q - x|^2 = |q|^2 + |x|^2 - 2 (q.a + sum_m q.c_m), a the cell's centroid where codes
        are of residuals. |x|^2 does not depend on the query; it is worked out once an item.

        Shapes: queries_QD (Q, D), cells_N (N,), codes_NM (N, M) -> (Q, N) float32.
        """
        norms_N = decode(cells_N, codes_NM, codebook).square().sum(1)
        turned_QD = rotate(queries_QD, codebook)
        dots_QMK = torch.einsum("qd,mkd->qmk", turned_QD, as_tensor(codebook.books, turned_QD))
        dots_QC = turned_QD @ (as_tensor(codebook.coarse, turned_QD) * float(codebook.residual)).T
        found_QN = dots_QC[:, cells_N]
        for book, code_N in enumerate(codes_NM.T.long()):
            found_QN += dots_QMK[:, book, code_N]
        return queries_QD.square().sum(1, keepdim=True) + norms_N - 2 * found_QN

    def _search(self, rest_ND: Tensor, books_MKD: Tensor, beam: int, restarts: int) -> Tensor:
        codes_NM = search_sums(rest_ND, books_MKD, beam)
        if self.config.kind == "rq":
            return codes_NM
        return search_local(rest_ND, codes_NM, books_MKD, restarts=restarts)


@dataclass(frozen=True)
class Beam:
    """The best sums of codewords for each row, nearest first.

    Shapes: codes_NLM (N, L, M) int64; rests_NLD (N, L, D), what each sum leaves over.
    """

    codes_NLM: Tensor
    rests_NLD: Tensor


def search_beam(z_ND: Tensor, books_MKD: Tensor, width: int) -> Beam:
    """Choose a codeword of one book after another, going on from the `width` best sums so far.

    Shapes: z_ND (N, D), books_MKD (M, K, D).
    """
    floats = width * max(books_MKD.shape[1], books_MKD.shape[2], 1) if len(books_MKD) else 1
    parts = [_search_chunk(part, books_MKD, width) for part in z_ND.split(max(1, _CHUNK_FLOATS // floats))]
    return Beam(torch.cat([part.codes_NLM for part in parts]), torch.cat([part.rests_NLD for part in parts]))


def search_sums(z_ND: Tensor, books_MKD: Tensor, width: int) -> Tensor:
    """Give the code of the best sum that a beam finds; what sums leave over is not kept, it is long for many rows.

    Shapes: z_ND (N, D), books_MKD (M, K, D) -> (N, M) int64.
    """
    return torch.cat([search_beam(part, books_MKD, width).codes_NLM[:, 0] for part in z_ND.split(_CHUNK_ROWS)])


def search_local(z_ND: Tensor, codes_NM: Tensor, books_MKD: Tensor, *, restarts: int, sweeps: int = SWEEPS) -> Tensor:
    """Bring sums of codewords nearer: every choice again with the others fixed, random changes, and again.

    Shapes: z_ND (N, D), codes_NM (N, M), books_MKD (M, K, D) -> (N, M) int64.
    """

    def sweep(part_ND: Tensor, part_NM: Tensor) -> tuple[Tensor, Tensor]:
        return _sweep(part_ND, part_NM, books_MKD, sweeps)

    books, words, _ = books_MKD.shape
    return revisit_choices(z_ND, codes_NM, (books, words), sweep, restarts=restarts)


def revisit_choices(
    z_ND: Tensor,
    codes_NM: Tensor,
    shape: tuple[int, int],
    sweep: Sweep,
    *,
    restarts: int,
) -> Tensor:
    """Improve codes: `sweep` over all choices, then random changes and the same, keeping the best.

    The changes are the same for all rows, so that a row's code does not depend on the rows beside it.

    Args:
        z_ND: the rows.
        codes_NM: their codes so far.
        shape: the numbers of books and of codewords.
        sweep: chooses again; gives codes and what they cost.
        restarts: random changes tried.

    Shapes: z_ND (N, D), codes_NM (N, M) -> (N, M) int64.
    """
    books, words = shape
    draw = torch.Generator().manual_seed(0)
    changed = max(1, books // 2)
    changes = [
        (torch.randperm(books, generator=draw)[:changed], torch.randint(0, words, (changed,), generator=draw))
        for _ in range(restarts)
    ]
    rows = max(1, _CHUNK_FLOATS // words)
    parts = zip(z_ND.split(rows), codes_NM.split(rows), strict=True)
    return torch.cat([_revisit_chunk(z, codes, words, changes, sweep) for z, codes in parts])


def sum_by_choice(z_ND: Tensor, codes_NM: Tensor, books_MKD: Tensor) -> Stats:
    """Sum up what `solve_books` needs: rows by codeword, and how often each two codewords met.

    Shapes: -> counts (M K, M K), sums (M, K, D).
    """
    books, words, dims = books_MKD.shape
    places_NM = codes_NM + words * torch.arange(books, device=codes_NM.device)
    size = books * words
    met = torch.zeros(size * size, dtype=torch.float32, device=z_ND.device)
    for first in range(books):
        for second in range(books):
            pair_N = places_NM[:, first] * size + places_NM[:, second]
            met.index_add_(0, pair_N, torch.ones_like(pair_N, dtype=torch.float32))
    sums = torch.zeros(size, dims, dtype=torch.float64, device=z_ND.device)
    for book in range(books):
        sums.index_add_(0, places_NM[:, book], z_ND.double())
    rest_ND = z_ND - add_up(codes_NM, books_MKD)
    error = float(rest_ND.square().sum(dtype=torch.float64))
    counts = met.view(size, size).cpu().numpy()
    return Stats(counts, sums.view(books, words, dims).cpu().numpy(), error, len(z_ND))


def solve_books(books_MKD: NDArray[np.float32], stats: Stats, hold: float = 0) -> NDArray[np.float32]:
    """Give the books that leave the least squared error with the codes that were counted.

    Codewords that nothing chose stay where they are. A little ridge holds what least squares leaves open: a constant
    may move from one book to another. With `hold`, a ridge of so many times the square of M K / N keeps the books near
    those they were: where rows are few for so many codewords, least squares fits the rows and not what is to come.

    Shapes: books_MKD (M, K, D) -> (M, K, D) float32.
    """
    books, words, dims = books_MKD.shape
    # Copies: what came over a wire may be read-only, and `met` is changed below.
    met = torch.tensor(stats.counts_GK, dtype=torch.float64)
    old = torch.tensor(books_MKD.reshape(-1, dims), dtype=torch.float64)
    wanted = torch.tensor(stats.sums_GKd.reshape(-1, dims)) - met @ old
    ridge = _RIDGE + hold * (books * words / stats.rows) ** 2
    met.diagonal().add_(ridge * stats.rows / words + 1e-9)
    change = torch.cholesky_solve(wanted, torch.linalg.cholesky(met))
    solved: NDArray[np.float32] = (old + change).view(books, words, dims).float().numpy()
    return solved


def _search_chunk(z_ND: Tensor, books_MKD: Tensor, width: int) -> Beam:
    rests_NLD = z_ND[:, None]
    codes_NLM = torch.empty(len(z_ND), 1, 0, dtype=torch.int64, device=z_ND.device)
    for book_KD in books_MKD:
        # |rest - c|^2 = |rest|^2 + |c|^2 - 2 rest.c
        scores_NLK = book_KD.square().sum(1) - 2 * (rests_NLD @ book_KD.T)
        scores_NLK += rests_NLD.square().sum(-1, keepdim=True)
        kept = min(width, scores_NLK[0].numel()) if len(z_ND) else 1
        best_NL = scores_NLK.flatten(1).topk(kept, dim=1, largest=False).indices
        from_NL, word_NL = best_NL // len(book_KD), best_NL % len(book_KD)
        rests_NLD = _pick(rests_NLD, from_NL) - book_KD[word_NL]
        codes_NLM = torch.cat([_pick(codes_NLM, from_NL), word_NL[..., None]], dim=2)
    return Beam(codes_NLM, rests_NLD)


def _revisit_chunk(
    z_ND: Tensor,
    codes_NM: Tensor,
    words: int,
    changes: list[tuple[Tensor, Tensor]],
    sweep: Sweep,
) -> Tensor:
    best_NM, error_N = sweep(z_ND, codes_NM)
    for where, shift in changes:
        tried_NM = best_NM.clone()
        tried_NM[:, where] = (tried_NM[:, where] + shift.to(best_NM.device)) % words
        tried_NM, tried_N = sweep(z_ND, tried_NM)
        better_N = tried_N < error_N
        best_NM = torch.where(better_N[:, None], tried_NM, best_NM)
        error_N = torch.where(better_N, tried_N, error_N)
    return best_NM


def _sweep(z_ND: Tensor, codes_NM: Tensor, books_MKD: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Choose again in every book with the others fixed, some times over; give codes and squared errors."""
    codes_NM = codes_NM.clone()
    rest_ND = z_ND - add_up(codes_NM, books_MKD)
    norms_MK = books_MKD.square().sum(2)
    moving = torch.arange(len(z_ND), device=z_ND.device)
    for _ in range(sweeps):
        before_NM, part_NM, part_ND = codes_NM[moving], codes_NM[moving], rest_ND[moving]
        for book, book_KD in enumerate(books_MKD):
            part_ND += book_KD[part_NM[:, book]]
            part_NM[:, book] = torch.addmm(norms_MK[book], part_ND, book_KD.T, alpha=-2).argmin(1)
            part_ND -= book_KD[part_NM[:, book]]
        codes_NM[moving], rest_ND[moving] = part_NM, part_ND
        # A row that a whole sweep left alone stays as it is.
        moving = moving[(part_NM != before_NM).any(1)]
        if not len(moving):
            break
    return codes_NM, rest_ND.square().sum(1)


def add_up(codes_NM: Tensor, books_MKD: Tensor) -> Tensor:
    """Give the sum of the chosen codewords: (N, M), (M, K, D) -> (N, D)."""
    total_ND = torch.zeros(len(codes_NM), books_MKD.shape[2], dtype=books_MKD.dtype, device=books_MKD.device)
    for book, book_KD in enumerate(books_MKD):
        total_ND += book_KD[codes_NM[:, book]]
    return total_ND


def _gather_unused(books_MKD: NDArray[np.float32], stats: Stats) -> NDArray[np.float32]:
    """Put codewords that nothing chose where the most chosen of their book is: shaken each time, they would stray.

    Shapes: books_MKD (M, K, D) -> (M, K, D).
    """
    chosen_MK = np.diagonal(stats.counts_GK).reshape(books_MKD.shape[:2])
    fullest_M1D = books_MKD[np.arange(len(books_MKD)), chosen_MK.argmax(1)][:, None]
    return np.where(chosen_MK[..., None] > 0, books_MKD, fullest_M1D)


def _seed_inside(rest_ND: NDArray[np.float32], words: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Give starting codewords half way from the mean to rows drawn apart from each other.

    What some books leave over has no clusters. A codeword that begins on a row far out keeps that row to itself,
    whatever Lloyd's iterations do: 16 books that began on rows left a quarter more squared error on SIFT descriptors.

    Shapes: rest_ND (N, D) -> (words, D).
    """
    drawn_KD = seed_centroids(rest_ND[None], words, rng)[0]
    return (rest_ND.mean(0) + drawn_KD) / 2


def _lead(nearest_ND: Tensor, codes_NM: Tensor, beam: Beam) -> Tensor:
    """Put what a further search leaves before what the beam does, where it found another code and leaves less.

    Shapes: nearest (N, D), codes (N, M) -> (N, L, D).
    """
    less_N = nearest_ND.square().sum(1) < beam.rests_NLD[:, 0].square().sum(1)
    other_N = (codes_NM != beam.codes_NLM[:, 0]).any(1)
    led_NLD = torch.cat([nearest_ND[:, None], beam.rests_NLD[:, :-1]], dim=1)
    return torch.where((less_N & other_N)[:, None, None], led_NLD, beam.rests_NLD)


def _pick(values_NLx: Tensor, from_NL: Tensor) -> Tensor:
    return values_NLx.gather(1, from_NL[..., None].expand(-1, -1, values_NLx.shape[2]))


def _stage(phase: str) -> int:
    return int(phase.removeprefix("book "))


def _replace_book(codebook: Codebook, phase: str, book: Any) -> Codebook:
    books = codebook.books.copy()
    books[_stage(phase)] = book
    return replace(codebook, books=books)
