"""Queries that are raw items, made vectors by the encoder of the version that they search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gsl_dist.artefact import name_card
from gsl_dist.cluster.model import load_encoder
from gsl_dist.codebook import FloatArray
from gsl_dist.data import ImageConfig, decode_image
from gsl_dist.errors import DataError, QueryError
from gsl_dist.fit import embed
from gsl_dist.index.manifest import Manifest, version_folder
from gsl_dist.index.search import check_queries
from gsl_dist.storage import Folder

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
        self._manifest = manifest
        self._encoder, card = load_encoder(version_folder(Folder(index), manifest.version).path("model"))
        self._shape = tuple(card.facts["item_shape"])
        self._image = None
        if len(self._shape) == _IMAGE_AXES:
            height, width, channels = self._shape
            self._image = ImageConfig(height=height, width=width, channels=channels)

    def encode(self, items: Sequence[bytes | NDArray[Any]]) -> FloatArray:
        """Give the vectors of files and of arrays of numbers.

        Shapes: Q items -> (Q, D) float32.
        Raises:
            QueryError: one cannot be read, or is of another shape; the error names its place.
        """
        read = [self._read(item, f"items[{place}]") for place, item in enumerate(items)]
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

    def _read(self, item: bytes | NDArray[Any], place: str) -> NDArray[Any]:
        try:
            if isinstance(item, bytes) and self._image is None:
                raise ValueError("this encoder takes numbers, not files")
            read = decode_image(item, self._image) if self._image and isinstance(item, bytes) else np.asarray(item)
            if self._image and not ((read >= 0) & (read <= 255)).all():
                raise ValueError("pixels are 0 to 255")
            read = read.astype(np.uint8 if self._image else np.float32)
        except ValueError as error:
            raise QueryError(place, "an item", f"it must be one as in the corpus ({error})") from None
        if read.shape != self._shape:
            raise QueryError(place, f"shape {read.shape}", f"the encoder was trained on {self._shape}")
        return read


def has_model(manifest: Manifest) -> bool:
    """Tell whether queries pass through an encoder."""
    return any(entry.name == f"model/{name_card('model')}" for entry in manifest.model)
