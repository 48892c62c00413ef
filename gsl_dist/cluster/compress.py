"""Compression in the train stage: a trained model opened, its layers planned, and what the new one is held to."""

from __future__ import annotations

import copy

from gsl_dist.cluster.model import load_encoder
from gsl_dist.encoders import Encoder, EncoderConfig
from gsl_dist.encoders.crosslayer import CompressConfig, Plan, Preservation, factor_layers, plan_compression
from gsl_dist.errors import ConfigError


def compress_encoder(
    compress: CompressConfig, config: EncoderConfig, item_shape: tuple[int, ...]
) -> tuple[Encoder, Preservation]:
    """Give a network whose factors come from the trained one, ready to be trained on, and the terms that go with it.

    Raises:
        ConfigError: as `plan_model`.
    """
    teacher, plan = plan_model(compress, config, item_shape)
    encoder = copy.deepcopy(teacher).train()
    factor_layers(encoder, plan)
    return encoder, Preservation(encoder, teacher, plan, compress.preserve)


def plan_model(compress: CompressConfig, config: EncoderConfig, item_shape: tuple[int, ...]) -> tuple[Encoder, Plan]:
    """Give the trained network and what is to become of its layers.

    Raises:
        ConfigError: it is not of these settings, is compressed already, or cannot be made so small.
        ArtefactError: there is no model, or it is damaged.
    """
    teacher, card = load_encoder(compress.model)
    if "compressed" in card.facts:
        allowed = "it is compressed already: name the model that it was made of"
        raise ConfigError("compress.model", compress.model, allowed)
    asked, known = config.model_dump(mode="json"), card.config["encoder"]
    if (known, tuple(card.facts["item_shape"])) != (asked, item_shape):
        allowed = f"it must be the encoder of compress.model, {known}, for items of shape {card.facts['item_shape']}"
        raise ConfigError("encoder", asked, allowed)
    return teacher, plan_compression(teacher, compress)
