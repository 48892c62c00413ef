"""Encoders: networks that turn items (images, vectors) into representations."""

from gsl_dist.encoders.backbones import (
    CnnConfig,
    Encoder,
    EncoderConfig,
    Head,
    HeadConfig,
    MlpConfig,
    ModuleConfig,
    TableConfig,
    make_encoder,
)

__all__ = [
    "CnnConfig",
    "Encoder",
    "EncoderConfig",
    "Head",
    "HeadConfig",
    "MlpConfig",
    "ModuleConfig",
    "TableConfig",
    "make_encoder",
]
