"""Images in, arrays out: decoded, converted and resized to what the encoder takes; the shipped demo set."""

# Shapes: H, W, channels of an image

from __future__ import annotations

import importlib.resources
import io
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from gsl_dist.config import Strict

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class ImageConfig(Strict):
    """The size and the channels that every image is brought to."""

    height: int = Field(default=32, ge=1, le=4096)
    width: int = Field(default=32, ge=1, le=4096)
    channels: Literal[1, 3] = 3


def decode_image(content: bytes, image: ImageConfig) -> NDArray[np.uint8]:
    """Decode an image file and bring it to the wanted size and channels.

    Shapes: -> (H, W, channels) uint8.

    Raises:
        ValueError: it cannot be read as an image; the message says why.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = opened.convert("L" if image.channels == 1 else "RGB")
    except UnidentifiedImageError:
        raise ValueError("not an image in a known format") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if picture.size != (image.width, image.height):
        picture = picture.resize((image.width, image.height), Image.Resampling.BILINEAR)
    return np.asarray(picture, np.uint8).reshape(image.height, image.width, image.channels)


def fashion_folder() -> Path:
    """Give the folder of the shipped images: train.parquet, database.parquet and queries.parquet."""
    return Path(str(importlib.resources.files("gsl_dist.data"))) / "fashion"
