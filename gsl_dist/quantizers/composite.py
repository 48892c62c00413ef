"""Composite codes with coarse cells: codewords that add up, searched as fast as product codes.

The exact distance to a sum of codewords needs the length of the sum, which no table by single codewords holds. Here
every codeword w carries a bias b, its share of -|x|^2 / 2, learned with it, so that the score of an item is M look-ups
and nothing else, and stands for its distance:

    score(q, code) = sum_m ( <q, w_m> + b_m )  ~  <q, x> - |x|^2 / 2,     |q - x|^2  ~  |q|^2 - 2 score

Codes are searched for by what they cost a query at x itself, where neighbours ask:

    J(x, code) = |x - x^|^2 + (<x, x^> + b - |x|^2 / 2)^2 / |x|^2,     x^ = sum_m w_m,  b = sum_m b_m

A composite codebook is not fitted from nothing: `compose` makes it of a fitted codebook of any kind, and
`gsl_dist.ranked` teaches it. Cells only choose which lists a query looks at; codes stand for whole vectors.

Source: that cross terms must not depend on the item is Zhang, Du, Wang, Composite Quantization for Approximate Nearest
Neighbor Search, ICML 2014, which asks for it by a penalty; that errors along x cost more is Guo et al., Accelerating
Large-Scale Inference with Anisotropic Vector Quantization, ICML 2020; biases learned with the codewords are our own.
"""

# Shapes: N vectors, D dims, M books to choose from, K codewords, Q queries, k neighbours

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers.additive import SWEEPS, add_up, revisit_choices, search_beam, search_sums
from gsl_dist.quantizers.base import as_tensor, leave_over

_BEAM = 5
_BIAS_SWEEPS = 10
_LEAST = 0.01


class CompositeQuantizer:
    """Applies composite codebooks.

    Args:
        dim: D, the length of the vectors.
        restarts: random changes tried on an item that is encoded.
    """

    def __init__(self, dim: int, *, restarts: int = 8) -> None:
        self.dim, self.restarts = dim, restarts

    def encode(self, x_ND: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
        """Give each vector its cell and the code of least J, as far as the search finds.

        Shapes: x_ND (N, D) float32 -> cells (N,) int64, codes (N, M) uint8.
        """
        words = open_words(codebook.landed, x_ND)
        codes_NM = search_sums(x_ND, words.vectors_MKD, _BEAM)
        return leave_over(x_ND, codebook)[0], search_scored(x_ND, codes_NM, words, restarts=self.restarts).to(
            torch.uint8
        )

    def neighbours(self, rest_ND: Tensor, codebook: Codebook, k: int) -> Tensor:
        """Give the k best sums that a beam of at least the usual width holds, nearest first.

        Shapes: rest_ND (N, D) -> (N, 1, k, D).
        """
        words = open_words(codebook, rest_ND)
        rests_NLD = search_beam(rest_ND, words.vectors_MKD, max(k, _BEAM)).rests_NLD[:, :k]
        return (rest_ND[:, None] - rests_NLD)[:, None]

    def measure_distances(self, queries_QD: Tensor, cells_N: Tensor, codes_NM: Tensor, codebook: Codebook) -> Tensor:
        """Give what scores say of squared distances, |q|^2 - 2 score: a look-up for every book.

        Shapes: queries_QD (Q, D), cells_N (N,), codes_NM (N, M) -> (Q, N) float32.
        """
        words = open_words(codebook, queries_QD)
        tables_QMK = torch.einsum("qd,mkd->qmk", queries_QD, words.vectors_MKD) + words.bias_MK
        scores_QN = queries_QD.new_zeros(len(queries_QD), len(codes_NM))
        for book, code_N in enumerate(codes_NM.T.long()):
            scores_QN += tables_QMK[:, book, code_N]
        return queries_QD.square().sum(1, keepdim=True) - 2 * scores_QN


class Words(NamedTuple):
    """Codewords and their biases.

    Shapes: vectors (M, K, D), bias (M, K).
    """

    vectors_MKD: Tensor
    bias_MK: Tensor


def open_words(codebook: Codebook, like: Tensor) -> Words:
    """Give the codewords and biases of a composite codebook where, and with the numbers, another tensor has."""
    assert codebook.bias is not None, codebook.kind
    return Words(as_tensor(codebook.books, like), as_tensor(codebook.bias, like))


def compose(codebook: Codebook, x_ND: Tensor, codes_NM: Tensor) -> Codebook:
    """Make a composite codebook of one that was fitted to rows and coded them.

    Args:
        codebook: of any kind; codes must be of whole vectors, not of what cells leave over.
        x_ND: the rows.
        codes_NM: their codes.

    Shapes: x_ND (N, D), codes_NM (N, M) integers.
    """
    assert not codebook.residual, "a bias cannot hold what a residual and its cell have to do with each other"
    words_MKD = spread_books(codebook)
    bias_MK = fit_biases(codes_NM.long(), x_ND, codebook.codewords)
    coarse = codebook.coarse if codebook.rotation is None else codebook.coarse @ codebook.rotation
    return Codebook(coarse, words_MKD.numpy(), residual=False, kind="cq", bias=bias_MK.numpy())


def spread_books(codebook: Codebook) -> Tensor:
    """Give the codewords of any codebook over the whole length, in the frame of the vectors, so that they add up.

    Shapes: -> (M, K, D) float32.
    """
    words_MKd = torch.tensor(codebook.books)
    if not codebook.additive:
        books, words, width = words_MKd.shape
        whole_MKMd = torch.zeros(books, words, books, width)
        own = torch.arange(books)
        whole_MKMd[own, :, own] = words_MKd
        words_MKd = whole_MKMd.flatten(2)
    return words_MKd if codebook.rotation is None else words_MKd @ torch.tensor(codebook.rotation)


def fit_biases(codes_NM: Tensor, x_ND: Tensor, words: int) -> Tensor:
    """Give biases that add up to -|x|^2 / 2 as well as least squares can, one book after another, some times over.

    Shapes: codes (N, M) int64, x (N, D) -> (M, K) float32.
    """
    rest_N = -x_ND.square().sum(1).double() / 2
    bias_MK = torch.zeros(codes_NM.shape[1], words, dtype=torch.float64)
    for _ in range(_BIAS_SWEEPS):
        for bias_K, code_N in zip(bias_MK, codes_NM.T, strict=True):
            rest_N += bias_K[code_N]
            total_K = torch.zeros_like(bias_K).index_add_(0, code_N, rest_N)
            bias_K.copy_(total_K / torch.bincount(code_N, minlength=words).clamp_min(1))
            rest_N -= bias_K[code_N]
    return bias_MK.float()


def measure_misfit(x_ND: Tensor, found_ND: Tensor, bias_N: Tensor, words_MKD: Tensor) -> Tensor:
    """Give J of each row, x^ and b found.

    Shapes: (N, D), (N, D), (N,), (M, K, D) -> (N,).
    """
    squared_N = x_ND.square().sum(1)
    wrong_N = (x_ND * found_ND).sum(1) + bias_N - squared_N / 2
    return (x_ND - found_ND).square().sum(1) + wrong_N.square() / _bound_length(squared_N, words_MKD)


def _bound_length(squared_N: Tensor, words_MKD: Tensor) -> Tensor:
    """Give |x|^2, or a hundredth of a codeword's for rows next to nothing, whose score would be all that counts.

    Shapes: (N,), (M, K, D) -> (N,).
    """
    return squared_N.clamp_min(max(1e-12, _LEAST * float(words_MKD.detach().square().sum(2).mean())))


def search_scored(x_ND: Tensor, codes_NM: Tensor, words: Words, *, restarts: int) -> Tensor:
    """Lower J: every choice again with the others fixed, then random changes and the same, keeping the best.

    Shapes: x_ND (N, D), codes_NM (N, M) -> (N, M) int64.
    """

    def sweep(part_ND: Tensor, part_NM: Tensor) -> tuple[Tensor, Tensor]:
        return _sweep(part_ND, part_NM, words)

    books, size, _ = words.vectors_MKD.shape
    return revisit_choices(x_ND, codes_NM, (books, size), sweep, restarts=restarts)


def _sweep(x_ND: Tensor, codes_NM: Tensor, words: Words) -> tuple[Tensor, Tensor]:
    """Choose again in every book with the others fixed, some times over; give codes and J."""
    codes_NM, squared_N = codes_NM.clone(), x_ND.square().sum(1)
    divisor_N = _bound_length(squared_N, words.vectors_MKD)
    found_ND, bias_N = add_up(codes_NM, words.vectors_MKD), add_up(codes_NM, words.bias_MK[..., None])[:, 0]
    moving = torch.arange(len(x_ND), device=x_ND.device)
    for _ in range(SWEEPS):
        part_NM = codes_NM[moving]
        before_NM, rest_ND = part_NM.clone(), x_ND[moving] - found_ND[moving]
        # What the score at x still lacks; each word takes its part of it.
        along_ND, share_N = x_ND[moving], 1 / divisor_N[moving]
        lack_N = squared_N[moving] / 2 - (along_ND * found_ND[moving]).sum(1) - bias_N[moving]
        for book, (word_KD, bias_K) in enumerate(zip(words.vectors_MKD, words.bias_MK, strict=True)):
            scores_NK = torch.addmm(bias_K, along_ND, word_KD.T)
            old_N = part_NM[:, book]
            rest_ND += word_KD[old_N]
            lack_N += scores_NK.gather(1, old_N[:, None])[:, 0]
            costs_NK = torch.addmm(word_KD.square().sum(1), rest_ND, word_KD.T, alpha=-2)
            costs_NK += share_N[:, None] * (lack_N[:, None] - scores_NK).square()
            new_N = costs_NK.argmin(1)
            rest_ND -= word_KD[new_N]
            lack_N -= scores_NK.gather(1, new_N[:, None])[:, 0]
            part_NM[:, book] = new_N
        codes_NM[moving] = part_NM
        found_ND[moving] = x_ND[moving] - rest_ND
        bias_N[moving] = add_up(part_NM, words.bias_MK[..., None])[:, 0]
        # A row that a whole sweep left alone stays as it is.
        moving = moving[(part_NM != before_NM).any(1)]
        if not len(moving):
            break
    return codes_NM, measure_misfit(x_ND, found_ND, bias_N, words.vectors_MKD)
