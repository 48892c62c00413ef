"""Queries that are raw items, made vectors by the encoder of the version that they search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gsl_dist.artefact import name_card
from gsl_dist.cluster.model import check_modalities, load_encoder, read_modalities
from gsl_dist.codebook import FloatArray
from gsl_dist.data import CorpusConfig, ImageConfig, decode_image, join_modalities, modality_image
from gsl_dist.encoders import FusedEncoder
from gsl_dist.errors import DataError, QueryError
from gsl_dist.fit import embed
from gsl_dist.index.manifest import Manifest, version_folder
from gsl_dist.index.search import check_queries
from gsl_dist.storage import Folder

Item = bytes | NDArray[Any] | Mapping[str, Any]
"""A file, an array of numbers, or of each modality one of both."""

_IMAGE_AXES = 3  # height, width, channels


class QueryEncoder:
    """Makes vectors of raw items by the encoder of a version, as its corpus was encoded.

    Args:
        index: the index folder.
        manifest: the version; it has an encoder.

    Raises:
        ArtefactError: the encoder is damaged.
    """

    def __init__(self, index: str, manifest: Manifest) -> None:
        self._manifest, folder = manifest, version_folder(Folder(index), manifest.version)
        # The card of a model vouches for its files, and the version for the card.
        for entry in manifest.model:
            folder.check(entry)
        self._encoder, self._card = load_encoder(folder.child("model").location)
        self._shape, self._modalities = tuple(self._card.facts["item_shape"]), read_modalities(self._card)
        self._image = None
        if len(self._shape) == _IMAGE_AXES:
            height, width, channels = self._shape
            # Each modality has channels of its own.
            self._image = ImageConfig(height=height, width=width, channels=1 if self._modalities else channels)

    def check(self, corpus: CorpusConfig, field: str) -> None:
        """See to it that a corpus is of the modalities that the encoder takes.

        Raises:
            ConfigError: it is not.
        """
        check_modalities(self._card, self._encoder, corpus, field)

    def encode(self, items: Sequence[Item]) -> FloatArray:
        """Give the vectors of files and of arrays of numbers, or of objects with one of both for each modality.

        Shapes: Q items -> (Q, D) float32.
        Raises:
            QueryError: one cannot be read, or is of another shape; the error names its place.
        """
        read = [self._read_item(item, f"items[{place}]") for place, item in enumerate(items)]
        return self.embed(np.stack(read))

    def embed(self, items: NDArray[Any]) -> FloatArray:
        """Give the vectors of items of the shape that the encoder was trained on.

        Shapes: (Q, ...) -> (Q, D) float32.
        Raises:
            DataError: they are of another shape.
        """
        if items.shape[1:] != self._shape:
            found = f"items of shape {items.shape[1:]}"
            raise DataError("queries", found, f"the encoder was trained on {self._shape}")
        vectors = embed(self._encoder, torch.from_numpy(items)).numpy()
        return check_queries(vectors, self._manifest.dim, self._manifest.metric)

    def _read_item(self, item: Item, place: str) -> NDArray[Any]:
        if not self._modalities:
            if isinstance(item, Mapping):
                raise QueryError(
                    place, list(item), "this encoder takes a file or numbers, not modalities by their names"
                )
            return self._read(item, place, self._image, self._shape)
        names = [part.column for part in self._modalities]
        if not isinstance(item, Mapping) or not item or not item.keys() <= set(names):
            shown = list(item) if isinstance(item, Mapping) else "an item"
            raise QueryError(place, shown, f"it must be an object with a file, or numbers, for {' and '.join(names)}")
        self._check_whole(item, names, place)
        assert self._image is not None, "modalities are images"
        images = [modality_image(self._image, part) for part in self._modalities]
        parts = [
            self._read(item[name], f"{place}.{name}", image, image.shape) if name in item else None
            for name, image in zip(names, images, strict=True)
        ]
        return join_modalities(parts, self._image, self._modalities)

    def _check_whole(self, item: Mapping[str, Any], names: list[str], place: str) -> None:
        lacking = [name for name in names if name not in item]
        if lacking and isinstance(self._encoder, FusedEncoder) and not self._encoder.backbone.does_with_one:
            allowed = (
                f"the encoder fuses {' and '.join(names)} and needs both: give {lacking[0]} too, or train it with "
            )
            raise QueryError(f"{place}.{lacking[0]}", None, allowed + "encoder.modality_dropout above 0 to do with one")

    def _read(self, item: Any, place: str, image: ImageConfig | None, shape: tuple[int, ...]) -> NDArray[Any]:
        try:
            if isinstance(item, bytes) and image is None:
                raise ValueError("this encoder takes numbers, not files")
            read = decode_image(item, image) if image and isinstance(item, bytes) else np.asarray(item)
            if image and not ((read >= 0) & (read <= 255)).all():
                raise ValueError("pixels are 0 to 255")
            read = read.astype(np.uint8 if image else np.float32)
        except ValueError as error:
            raise QueryError(place, "an item", f"it must be one as in the corpus ({error})") from None
        if read.shape != shape:
            raise QueryError(place, f"shape {read.shape}", f"the encoder was trained on {shape}")
        return read


def has_model(manifest: Manifest) -> bool:
    """Tell whether queries pass through an encoder."""
    return any(entry.name == f"model/{name_card('model')}" for entry in manifest.model)
