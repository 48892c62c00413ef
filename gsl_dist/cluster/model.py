"""A trained encoder on disk: weights in safetensors, and a card that says how to build the network again.

Low-bit weights lie there as codes and are decoded when they are read, to the same numbers that the network was trained
to; from then on it computes in float32. No kernel for weights of so few bits comes with torch: what they save is bytes
to keep and to ship, not time.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from gsl_dist.artefact import CODEBOOK, Card, open_card, publish_card
from gsl_dist.codebook import Codebook
from gsl_dist.data import CorpusConfig, ModalityConfig
from gsl_dist.encoders import Encoder, EncoderConfig, FusedEncoder, make_encoder
from gsl_dist.encoders.crosslayer import Plan, factor_layers
from gsl_dist.encoders.lowbit import export_weights
from gsl_dist.encoders.packed import count_bytes, read_packed, unpack_weights
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.storage import Folder

WEIGHTS = "encoder.safetensors"
_ENCODER = TypeAdapter(EncoderConfig)


def save_model(
    folder: Folder,
    encoder: Encoder,
    codebook: Codebook | None,
    *,
    made_by: str,
    config: dict[str, Any],
    facts: dict[str, Any],
) -> Card:
    """Write an encoder and the codebook it landed on; the model exists once its card does.

    Args:
        folder: where to.
        encoder: the network.
        codebook: the codebook of its last epoch; None for a network trained without one.
        made_by: the hash of settings and inputs.
        config: the train config; its `encoder` rebuilds the network.
        facts: at least `item_shape`.

    Raises:
        ConfigError: a layer of the encoder is quantized in part.
    """
    tensors, header = export_weights(encoder)
    folder.write_bytes(WEIGHTS, save_tensors(tensors, metadata=header or None))
    if header:
        facts = facts | {"encoder_bytes": folder.size(WEIGHTS)} | count_bytes(tensors, header)
    names = [WEIGHTS]
    if codebook is not None:
        codebook.save(folder, CODEBOOK)
        names.append(CODEBOOK)
        facts = facts | {"codebook_fingerprint": codebook.fingerprint}
    files = [folder.pin(name) for name in names]
    return publish_card(folder, Card(kind="model", made_by=made_by, files=files, config=config, facts=facts))


def load_encoder(location: str) -> tuple[Encoder, Card]:
    """Build a trained encoder again, in evaluation mode.

    Raises:
        ArtefactError: there is no model, a file is damaged, or the weights do not fit the network.
    """
    folder = Folder(location)
    card = open_card(folder, "model")
    shape, channels = tuple(card.facts["item_shape"]), {part.column: part.channels for part in read_modalities(card)}
    encoder = make_encoder(_ENCODER.validate_python(card.config["encoder"]), shape, channels)
    if "compressed" in card.facts:
        factor_layers(encoder, Plan.model_validate(card.facts["compressed"]), start=False)
    try:
        content = folder.read_bytes(WEIGHTS)
        encoder.load_state_dict(unpack_weights(load_tensors(content), _read_header(content)))
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ArtefactError(folder.path(WEIGHTS), f"the weights do not fit the network ({error})") from error
    return encoder.eval(), card


def read_modalities(card: Card) -> list[ModalityConfig]:
    """Give the images that an item of this model is made of; none where it is one, or a vector."""
    return [ModalityConfig.model_validate(part) for part in card.config.get("corpus", {}).get("modalities", [])]


def check_modalities(card: Card, encoder: Encoder, corpus: CorpusConfig, field: str = "corpus") -> None:
    """See to it that a corpus has the images that a model was trained on, and all of them where it needs them.

    Raises:
        ConfigError: it has others, or others before them, or may lack some.
    """
    wanted = {part.column: part.channels for part in read_modalities(card)}
    if [*corpus.channels.items()] != [*wanted.items()]:
        shown = ", ".join(f"{name} of {channels} channel(s)" for name, channels in wanted.items()) or "none"
        allowed = f"the encoder was trained on {shown}: name these in this order, with absent: true what is not there"
        raise ConfigError(f"{field}.modalities", list(corpus.channels), allowed)
    if not isinstance(encoder, FusedEncoder) or encoder.backbone.does_with_one:
        return
    ways = "train it with encoder.modality_dropout above 0 to do with one"
    for part in corpus.modalities:
        if part.absent:
            allowed = f"the encoder fuses {' and '.join(wanted)} and needs both: {ways}"
            raise ConfigError(f"{field}.modalities", f"{part.column} absent", allowed)
    if corpus.partial:
        raise ConfigError(f"{field}.partial", True, f"the encoder needs {' and '.join(wanted)} of every item: {ways}")


def load_trained_codebook(location: str) -> Codebook:
    """Give the codebook that a network landed on.

    Raises:
        ArtefactError: there is no model, or it was trained without a codebook.
    """
    folder = Folder(location)
    card = open_card(folder, "model")
    if "codebook_fingerprint" not in card.facts:
        raise ArtefactError(folder.path(), "this network was trained without snapping and has no codebook of its own")
    return Codebook.load(folder, CODEBOOK)


def tell_path(location: str) -> str:
    """Tell how the weights of a trained encoder get from its file to where they are computed with."""
    kinds = {entry["kind"] for entry in read_packed(_read_header(Folder(location).read_bytes(WEIGHTS))).values()}
    return f"{' and '.join(sorted(kinds))} weights, decoded to float32 when read" if kinds else "float32"


def _read_header(content: bytes) -> dict[str, str]:
    """Give what a safetensors file says of itself."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return header


def pick_device(gpus: float) -> torch.device:
    """Give the GPU that Ray set aside for this worker, or the CPU."""
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")
