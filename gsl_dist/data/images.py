"""Images: encoded bytes become pixels of one size, and a folder of image files becomes a source.

What cannot be decoded is a `ValueError` with the reason here; the corpus lists it as a reject. Pillow is imported only
where there is an image to decode, so a place that reads vectors needs none.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gsl_dist.data.source import (
    CorpusConfig,
    Format,
    ImageConfig,
    ModalityConfig,
    Raw,
    Rows,
    Source,
    SourceFile,
    refuse_settings,
)
from gsl_dist.errors import DataError
from gsl_dist.storage import Folder

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""The names of the labels 0 to 9 of the demo set."""

# Only these are tried: Pillow knows 40 more, some of which start other programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error)


def fashion_folder() -> Path:
    """Give the folder of the demo set: train, database and queries of Fashion-MNIST as Parquet."""
    return Path(str(files("gsl_dist.data").joinpath("fashion")))


def decode_image(content: bytes, image: ImageConfig) -> NDArray[np.uint8]:
    """Turn an encoded image into pixels of the wanted size.

    Shapes: (H, W, Ch) uint8.

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as opened:
            opened.load()
            pixels = _convert(opened, "L" if image.channels == 1 else "RGB")
    except UnidentifiedImageError:
        # Pillow's own message shows an address in memory, which would differ from run to run.
        raise ValueError(f"it is not a {', '.join(_FORMATS)} image ({len(content)} bytes)") from None
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if pixels.size != (image.width, image.height):
        pixels = pixels.resize((image.width, image.height), Image.Resampling.BILINEAR)
    return np.array(pixels, dtype=np.uint8).reshape(image.shape)


def decode_modalities(contents: Sequence[bytes | None], config: CorpusConfig) -> NDArray[np.uint8]:
    """Turn the encoded images of one item into one array; those that it lacks become zeros.

    Shapes: (H, W, Ch + 1) uint8: the channels of all modalities, and a plane whose bits say which are there.

    Raises:
        ValueError: one cannot be read, or is missing where it must not; the message names it and says why.
    """
    parts: list[NDArray[np.uint8] | None] = []
    for content, modality in zip(contents, config.modalities, strict=True):
        if content is None and not modality.absent and not config.partial:
            raise ValueError(f"{modality.column} is null (corpus.partial keeps items that lack a modality)")
        try:
            parts.append(None if content is None else decode_image(content, modality_image(config.image, modality)))
        except ValueError as error:
            raise ValueError(f"{modality.column}: {error}") from error
    if all(part is None for part in parts):
        raise ValueError("all of its modalities are null")
    return join_modalities(parts, config.image, config.modalities)


def join_modalities(
    parts: Sequence[NDArray[np.uint8] | None], image: ImageConfig, modalities: Sequence[ModalityConfig]
) -> NDArray[np.uint8]:
    """Put the images of one item behind one another, zeros for None, and behind them which are there.

    Shapes: M x (H, W, Ch of each) -> (H, W, Ch + 1) uint8.
    """
    shapes = [modality_image(image, modality).shape for modality in modalities]
    planes = [np.zeros(shape, np.uint8) if part is None else part for part, shape in zip(parts, shapes, strict=True)]
    bits = sum(1 << place for place, part in enumerate(parts) if part is not None)
    return np.concatenate([*planes, np.full((image.height, image.width, 1), bits, np.uint8)], axis=2)


def modality_image(image: ImageConfig, modality: ModalityConfig) -> ImageConfig:
    """Give what the images of a modality are resized and converted to."""
    return image.model_copy(update={"channels": modality.channels})


class FolderSource(Source):
    """The images of a folder; sub-folders, where there are any, are the labels."""

    dim = None

    def __init__(self, config: CorpusConfig, folder: Folder, files: list[SourceFile], kind: Format) -> None:
        refuse_settings(config, kind, "payload_columns")
        self._folder, self._names = folder, [file.name for file in files]
        self.rows, self.counts = len(files), [1] * len(files)
        tops = [name.partition("/")[0] if "/" in name else None for name in self._names]
        named = [top for top in tops if top is not None]
        if 0 < len(named) < len(tops):
            loose = self._names[tops.index(None)]
            raise DataError("corpus.path", loose, "images must lie all in sub-folders (their labels), or none of them")
        self.has_labels = bool(named)
        self._classes = sorted(set(named))
        index = {name: number for number, name in enumerate(self._classes)}
        self._labels = np.array([index[top] for top in named], dtype=np.int64)
        self._payload = config.payload_columns
        self.payload_schema = self._make_schema()

    @property
    def label_names(self) -> list[str] | None:
        """Give the names of the sub-folders."""
        return self._classes or None

    def take(self, rows: Rows, batch_rows: int) -> Iterator[Raw]:
        """Yield the rows with these numbers; the files are read when their image is decoded."""
        for at in range(0, len(rows), batch_rows):
            some = rows[at : at + batch_rows]
            names = [self._names[row] for row in some]
            labels = self._labels[some] if self.has_labels else None
            columns: dict[str, Any] = {"path": names, "label": labels}
            payload = None
            if self.payload_schema is not None:
                payload = pa.table({name: columns[name] for name in self._payload}, schema=self.payload_schema)
            yield Raw(some, names, _Contents(self._folder, names), some, labels, payload)

    def _make_schema(self) -> pa.Schema | None:
        known = {"path": pa.string()} | ({"label": pa.int64()} if self.has_labels else {})
        for name in self._payload:
            if name not in known:
                raise DataError("corpus.payload_columns", name, f"a folder of images has {', '.join(known)}")
        return pa.schema([(name, known[name]) for name in self._payload]) if self._payload else None


class _Contents(Sequence[bytes | None]):
    """The bytes of files, each read when it is asked for, so that many are read side by side."""

    def __init__(self, folder: Folder, names: list[str]) -> None:
        self._folder, self._names = folder, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, at: Any) -> Any:
        return self._folder.read_bytes(self._names[at])


def _convert(opened: Any, mode: str) -> Any:
    from PIL import Image

    if opened.mode.startswith("I"):
        # Pillow would clip 16 bits to 255 instead of scaling them.
        opened = Image.fromarray((np.asarray(opened).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in opened.info:
        opened = opened.convert("RGBA")
    return opened.convert(mode)
