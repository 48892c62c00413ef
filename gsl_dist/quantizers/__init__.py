"""Quantizers: each trains and applies one family of codebooks."""

from typing import Annotated, Any

from pydantic import Field

from gsl_dist.codebook import Codebook
from gsl_dist.quantizers.additive import AdditiveConfig, AdditiveQuantizer
from gsl_dist.quantizers.base import Coder, LloydConfig, Quantizer, decode, find_anchors, leave_over, rotate
from gsl_dist.quantizers.composite import CompositeQuantizer
from gsl_dist.quantizers.coordinate import Ask, Rows, Trained, answer, coordinate, train_codebook
from gsl_dist.quantizers.kmeans import Stats
from gsl_dist.quantizers.line import LineConfig, LineQuantizer
from gsl_dist.quantizers.product import OptimizedConfig, OptimizedProductQuantizer, ProductConfig, ProductQuantizer
from gsl_dist.quantizers.rabitq import RabitConfig, RabitQuantizer

QuantizerConfig = Annotated[
    ProductConfig | OptimizedConfig | AdditiveConfig | LineConfig | RabitConfig, Field(discriminator="kind")
]


def make_quantizer(config: QuantizerConfig, dim: int) -> Quantizer:
    """Give the quantizer that a config describes, for vectors of `dim` numbers."""
    if isinstance(config, AdditiveConfig):
        return AdditiveQuantizer(config, dim)
    if isinstance(config, LineConfig):
        return LineQuantizer(config, dim)
    if isinstance(config, RabitConfig):
        return RabitQuantizer(config, dim)
    return (
        OptimizedProductQuantizer(config, dim) if isinstance(config, OptimizedConfig) else ProductQuantizer(config, dim)
    )


def open_quantizer(codebook: Codebook, *, hasty: bool = False) -> Coder:
    """Give what encodes with a trained codebook.

    Args:
        codebook: any.
        hasty: search for codes no further than training does; the corpus is encoded with more care.
    """
    if codebook.kind == "cq":
        return CompositeQuantizer(codebook.dim, restarts=2) if hasty else CompositeQuantizer(codebook.dim)
    if codebook.kind == "rabitq":
        return RabitQuantizer(RabitConfig(kind="rabitq", bits=codebook.bits, cells=codebook.cells), codebook.dim)
    shape: dict[str, Any] = {"bits": codebook.bits, "cells": codebook.cells, "residual": codebook.residual}
    if codebook.additive:
        config = AdditiveConfig.model_validate(shape | {"kind": codebook.kind, "books": codebook.sub_vectors})
        if hasty:
            return AdditiveQuantizer(config, codebook.dim, beam=config.train_beam, restarts=config.train_restarts)
        return AdditiveQuantizer(config, codebook.dim)
    shape["sub_vectors"] = codebook.sub_vectors
    if codebook.kind == "vlq":
        return LineQuantizer(LineConfig(kind="vlq", edges=codebook.edge_count, **shape), codebook.dim)
    return ProductQuantizer(ProductConfig(kind="pq", **shape), codebook.dim)


__all__ = [
    "AdditiveConfig",
    "AdditiveQuantizer",
    "Ask",
    "Coder",
    "CompositeQuantizer",
    "LineConfig",
    "LineQuantizer",
    "LloydConfig",
    "OptimizedConfig",
    "OptimizedProductQuantizer",
    "ProductConfig",
    "ProductQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "RabitConfig",
    "RabitQuantizer",
    "Rows",
    "Stats",
    "Trained",
    "answer",
    "coordinate",
    "decode",
    "find_anchors",
    "leave_over",
    "make_quantizer",
    "open_quantizer",
    "rotate",
    "train_codebook",
]
