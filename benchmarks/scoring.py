"""How the codes of an experiment are scored: by labels (mAP) or by true neighbours (recall).

Search is exhaustive and asymmetric: a query is compared with what every code stands for. Items with the same code are
compared once, so that they tie to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prepare import Split
from torch import Tensor

from gsl_dist.codebook import Codebook
from gsl_dist.evaluate import quantization_error, recall_at
from gsl_dist.quantizers import Quantizer
from gsl_dist.ranked import find_coded, find_neighbours

RANKS = (1, 10, 100)


def score_labels(
    split: Split,
    items_ND: Tensor,
    queries_QD: Tensor,
    *,
    codebook: Codebook | None = None,
    quantizer: Quantizer | None = None,
    classes: Tensor | None = None,
) -> dict[str, Any]:
    """Give mAP by codes and by representations; an item's code is the codebook's, or the class it is taken for."""
    figures: dict[str, Any] = {"map_float": rank_float(split, queries_QD, items_ND)}
    if classes is not None:
        items_C, queries_C = (
            torch.nn.functional.normalize(y) @ torch.nn.functional.normalize(classes, dim=0)
            for y in (items_ND, queries_QD)
        )
        return figures | {"map_coded": rank_map(split, -queries_C.numpy(), items_C.argmax(1).numpy())}
    assert codebook is not None and quantizer is not None
    words_UD, which_N, decoded_ND = decode_once(items_ND, codebook, quantizer)
    figures["error"] = quantization_error(items_ND.numpy(), decoded_ND)
    figures["usage"] = measure_usage(codebook, which_N, len(words_UD))
    return figures | {"map_coded": rank_map(split, measure(queries_QD, torch.from_numpy(words_UD)), which_N)}


def score_neighbours(split: Split, items_ND: Tensor, queries_QD: Tensor, *, codebook: Codebook) -> dict[str, Any]:
    """Give recall of the true neighbours of the original space, by codes and by representations."""
    assert split.neighbours is not None
    figures: dict[str, Any] = {}
    for name, found_Qk in (
        ("coded", find_coded(items_ND, queries_QD, codebook, max(RANKS))),
        ("float", find_neighbours(items_ND, max(RANKS), queries_QD=queries_QD)),
    ):
        figures |= {f"recall{k}_{name}": recall_at(found_Qk.numpy(), split.neighbours[:, :k], k) for k in RANKS}
    return figures


def decode_once(items_ND: Tensor, codebook: Codebook, quantizer: Quantizer) -> tuple[Any, NDArray[np.int64], Any]:
    """Give what the different codes stand for, which of them each item has, and what each item's stands for."""
    cells_N, codes_NM = (part.numpy() for part in quantizer.encode(items_ND, codebook))
    whole = np.column_stack([cells_N, codes_NM.astype(np.int64)])
    unique, which_N = np.unique(whole, axis=0, return_inverse=True)
    words_UD = codebook.decode(unique[:, 0], unique[:, 1:])
    return words_UD, which_N.ravel(), words_UD[which_N.ravel()]


def measure(queries_QD: Tensor, items_ND: Tensor) -> NDArray[np.float32]:
    distances: NDArray[np.float32] = torch.cdist(queries_QD, items_ND).square().numpy()
    return distances


def measure_usage(codebook: Codebook, which_N: NDArray[np.int64], words: int) -> float:
    """Give how evenly codes are used: the entropy of whole codes over the most that there could be."""
    share = np.bincount(which_N, minlength=words) / len(which_N)
    most = min(codebook.code_bits, np.log2(len(which_N)))
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum() / most)


def rank_float(split: Split, queries_QD: Tensor, items_ND: Tensor) -> float:
    """Give mAP over the whole database by distances of which hardly any two are equal.

    The bits of a float above 0 order as an integer: with the last bit telling whether an item is relevant, one fast
    sort of integers gives the ranks of the relevant. Distances that differ in that bit alone tie in their favour.
    """
    scores = []
    for query_D, label in zip(queries_QD, split.query_labels, strict=True):
        distances_N = (items_ND - query_D).square().sum(1).numpy()
        relevant_N = split.database_labels == label
        ordered_N = np.sort((distances_N.view(np.int32) & ~1) | ~relevant_N)
        ranks_R = np.flatnonzero(ordered_N & 1 == 0) + 1
        scores.append((np.arange(1, len(ranks_R) + 1) / ranks_R).mean())
    return float(np.mean(scores))


def rank_map(split: Split, distances_QU: NDArray[np.float32], which_N: NDArray[np.int64]) -> float:
    """Give mAP over the whole database from the distances to the different codes.

    Items of one code tie, so a group of t items, m of them relevant, that follows s items, b of them relevant, adds its
    expected share in closed form, with H the harmonic numbers and D = H(s+t) - H(s):
    (m/t) ((b+1) D + (m-1)/(t-1) (t - (s+1) D)). It is `gsl_dist.evaluate.average_precision` for all queries at once.
    """
    classes, labels_N = np.unique(split.database_labels, return_inverse=True)
    size_U = torch.from_numpy(np.bincount(which_N, minlength=distances_QU.shape[1])).double()
    relevant_CU = torch.from_numpy(
        np.stack([np.bincount(which_N[labels_N == c], minlength=len(size_U)) for c in range(len(classes))])
    ).double()
    harmonic = torch.cat([torch.zeros(1), torch.arange(1, len(which_N) + 1).double().reciprocal().cumsum(0)])
    scores = []
    for distances_U, label in zip(torch.from_numpy(distances_QU), split.query_labels, strict=True):
        order_U = distances_U.argsort()
        t_U, m_U = size_U[order_U], relevant_CU[np.searchsorted(classes, label)][order_U]
        s_U, b_U = t_U.cumsum(0) - t_U, m_U.cumsum(0) - m_U
        spread_U = harmonic[(s_U + t_U).long()] - harmonic[s_U.long()]
        even_U = (m_U - 1) / (t_U - 1).clamp_min(1) * (t_U - (s_U + 1) * spread_U)
        scores.append(float((m_U / t_U * ((b_U + 1) * spread_U + even_U)).sum() / m_U.sum()))
    return float(np.mean(scores))
