"""Quantizers: each trains and applies one family of codebooks."""

from gsl_dist.quantizers.base import Quantizer
from gsl_dist.quantizers.coordinate import Ask, LloydConfig, Rows, Trained, answer, coordinate, train_codebook
from gsl_dist.quantizers.kmeans import Stats
from gsl_dist.quantizers.product import ProductConfig, ProductQuantizer

QuantizerConfig = ProductConfig
"""Every quantizer config; a union by `kind` when there are more."""


def make_quantizer(config: QuantizerConfig, dim: int) -> Quantizer:
    """Give the quantizer that a config describes, for vectors of `dim` numbers."""
    return {"pq": ProductQuantizer}[config.kind](config, dim)


__all__ = [
    "Ask",
    "LloydConfig",
    "ProductConfig",
    "ProductQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "Rows",
    "Stats",
    "Trained",
    "answer",
    "coordinate",
    "make_quantizer",
    "train_codebook",
]
