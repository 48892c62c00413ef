"""Encoders: networks that turn items (images, vectors) into representations."""

from gsl_dist.encoders.backbones import (
    CnnConfig,
    Encoder,
    EncoderConfig,
    FusedEncoder,
    Head,
    HeadConfig,
    MlpConfig,
    ModuleConfig,
    TableConfig,
    make_encoder,
)
from gsl_dist.encoders.lowbit import LowbitConfig, Progression, Stage
from gsl_dist.encoders.multimodal import FusionConfig, Views

__all__ = [
    "CnnConfig",
    "Encoder",
    "EncoderConfig",
    "FusedEncoder",
    "FusionConfig",
    "Head",
    "HeadConfig",
    "LowbitConfig",
    "MlpConfig",
    "ModuleConfig",
    "Progression",
    "Stage",
    "TableConfig",
    "Views",
    "make_encoder",
]
