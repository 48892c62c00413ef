"""What a corpus is made of: its config, its files, and the small interface behind which every format hides.

A `Source` gives `Raw` rows: vectors as they are stored, or encoded images. Checking, decoding and rejecting are the
same for every format and are done once, in `corpus.py`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from gsl_dist.config import Location, Strict
from gsl_dist.errors import ArtefactError, DataError
from gsl_dist.storage import Folder, find_store, split_location

Rows = NDArray[np.int64]
Format = Literal["parquet", "arrow", "npy", "fvecs", "bvecs", "images"]

SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".npy": "npy",
    ".fvecs": "fvecs",
    ".bvecs": "bvecs",
    ".png": "images",
    ".jpg": "images",
    ".jpeg": "images",
    ".webp": "images",
    ".bmp": "images",
}


class ImageConfig(Strict):
    """What every image is resized and converted to."""

    height: int = Field(default=32, ge=1, description="pixels")
    width: int = Field(default=32, ge=1, description="pixels")
    channels: Literal[1, 3] = Field(default=3, description="1: grey, 3: red, green and blue")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Give (H, W, Ch)."""
        return self.height, self.width, self.channels


class ModalityConfig(Strict):
    """One of the images that every item is made of."""

    column: str = Field(description="its column, and its name")
    channels: Literal[1, 3] = Field(default=3, description="1: grey, 3: red, green and blue")
    absent: bool = Field(default=False, description="this corpus has no such column: all items are without it")


class CorpusConfig(Strict):
    """Where the rows are and which columns mean what.

    A folder stands for its files of one format, sorted by name. A folder of images may have sub-folders, which are the
    labels; its payload columns are `path` and, with sub-folders, `label`. Labels that are strings become indexes of
    their sorted names, which mean the same only within one corpus: give integers where two corpora are compared.
    """

    path: Location = Field(description="a file or folder, local or a URI that pyarrow.fs understands")
    format: Literal["auto", "parquet", "arrow", "npy", "fvecs", "bvecs", "images"] = Field(
        default="auto", description="of the files; auto: as their names end"
    )
    id_column: str | None = Field(default=None, description="integers >= 0; None: the number of the row is its id")
    vector_column: str | None = Field(default=None, description="lists of floats; tables have this or image_column")
    image_column: str | None = Field(default=None, description="encoded bytes, or Hugging Face's struct of bytes, path")
    label_column: str | None = Field(default=None, description="integers or strings")
    payload_columns: list[str] = Field(default=[], description="columns to keep beside the id")
    image: ImageConfig = ImageConfig()
    modalities: tuple[ModalityConfig, ...] = Field(
        default=(), max_length=8, description="columns of images that make up an item, instead of image_column"
    )
    partial: bool = Field(default=False, description="keep items that lack some of their modalities")
    normalize: bool = Field(default=False, description="bring every vector to length 1 when it is read")

    @model_serializer(mode="wrap")
    def _leave_out(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is not asked for is not written: what was made before it could be asked for is found again.
        tree: dict[str, Any] = dump(self)
        return {key: value for key, value in tree.items() if key not in ("modalities", "partial") or value}

    @property
    def channels(self) -> dict[str, int]:
        """Give the channels of each modality by its name."""
        return {part.column: part.channels for part in self.modalities}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Give (H, W, Ch) of what an image becomes; of modalities, all their channels and a plane that says which."""
        if not self.modalities:
            return self.image.shape
        return self.image.height, self.image.width, sum(self.channels.values()) + 1

    @field_validator("modalities")
    @classmethod
    def _check_modalities(cls, parts: tuple[ModalityConfig, ...]) -> tuple[ModalityConfig, ...]:
        if len({part.column for part in parts}) < len(parts):
            raise ValueError("every modality may be named once")
        if parts and all(part.absent for part in parts):
            raise ValueError("one of them at least must not be absent")
        return parts

    @field_validator("payload_columns")
    @classmethod
    def _check_payload(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("every payload column may be named once")
        return names


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus, as the listing shows it; `mtime_ns` is None where the store is remote."""

    name: str
    bytes: int
    mtime_ns: int | None


@dataclass(frozen=True)
class Raw:
    """Rows as they are stored, before anything is checked or decoded.

    Args:
        rows: their numbers in the corpus.
        names: the file that each comes from.
        items: vectors as (N, D) float32, or N encoded images, or as many to each item as it has modalities; None stands
            for a null.
    """

    rows: Rows
    names: Sequence[str]
    items: NDArray[np.float32] | Sequence[bytes | None] | Sequence[tuple[bytes | None, ...]]
    ids: Rows
    labels: Rows | None = None
    payload: pa.Table | None = None


class Source(ABC):
    """Gives the rows of all files of one format.

    Attributes:
        rows: how many rows there are.
        dim: the length of a vector; None for images.
        counts: how many rows each file has, in the order of the files.
    """

    rows: int
    dim: int | None
    counts: list[int]
    has_labels: bool = False
    payload_schema: pa.Schema | None = None

    @property
    def label_names(self) -> list[str] | None:
        """Give the sorted names that labels index, None where labels are integers or absent."""
        return None

    @abstractmethod
    def take(self, rows: Rows, batch_rows: int) -> Iterator[Raw]:
        """Yield the rows with these numbers, which never fall, in pieces of at most `batch_rows`."""

    def read(self, start: int, stop: int, batch_rows: int) -> Iterator[Raw]:
        """Yield rows [start, stop) in order."""
        for first in range(start, stop, batch_rows):
            yield from self.take(np.arange(first, min(first + batch_rows, stop), dtype=np.int64), batch_rows)


def find_files(config: CorpusConfig) -> tuple[Folder, list[SourceFile], Format]:
    """List the files of a corpus, sorted by name, and tell their format.

    Raises:
        DataError: there is nothing there, nothing of the format, or files of several formats.
    """
    root, base, is_file = _look_up(config.path)
    if is_file:
        folder, name = split_location(config.path)
        only = SourceFile(name, root.get_file_info(base).size, _mtime(root, root.get_file_info(base)))
        return folder, [only], _format_of(name) if config.format == "auto" else config.format
    files = _list(root, base, recursive=config.format == "images")
    formats = {SUFFIXES[file_suffix(file.name)] for file in files}
    if config.format == "auto" and formats <= {"images"}:
        files = _list(root, base, recursive=True)
        formats = formats or ({"images"} if any(_is_image(file) for file in files) else set())
    if config.format == "auto" and len(formats) > 1:
        raise DataError("corpus.format", "auto", f"the folder holds {', '.join(sorted(formats))}: name one of them")
    chosen = config.format if config.format != "auto" else next(iter(formats), None)
    files = [file for file in files if SUFFIXES[file_suffix(file.name)] == chosen]
    if not files or chosen is None:
        wanted = [suffix for suffix, kind in SUFFIXES.items() if config.format in ("auto", kind)]
        raise DataError("corpus.path", config.path, f"the folder holds no file that ends in {', '.join(wanted)}")
    return Folder(config.path), files, chosen


def spread_rows(counts: Sequence[int], rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Yield, for each part that holds any of the sorted rows, its number and its rows counted from its start."""
    firsts = np.concatenate([[0], np.cumsum(counts)])
    cuts = np.searchsorted(rows, firsts)
    for part in np.flatnonzero(np.diff(cuts)):
        yield int(part), rows[cuts[part] : cuts[part + 1]] - firsts[part]


@contextlib.contextmanager
def readable(path: str, kind: str) -> Iterator[None]:
    """Turn what a broken file makes a library raise into one `ArtefactError` that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtefactError(path, f"it is not a whole, readable {kind} file ({lines[0]})") from error


def refuse_settings(config: CorpusConfig, kind: str, *allowed: str) -> None:
    """Refuse columns that the format does not have.

    Raises:
        DataError: a column is named.
    """
    for name in ("id_column", "vector_column", "image_column", "label_column", "payload_columns", "modalities"):
        value: Any = getattr(config, name)
        if value and name not in allowed:
            raise DataError(f"corpus.{name}", value, f"{kind} files have no columns: leave it out")


def file_suffix(name: str) -> str:
    """Give the ending of a name in lower case, its dot included."""
    return PurePosixPath(name).suffix.lower()


def _look_up(location: str) -> tuple[fs.FileSystem, str, bool]:
    try:
        root, base = find_store(location)
        kind = root.get_file_info(base).type
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError("corpus.path", location, f"it must be a place that can be read ({error})") from None
    if kind == fs.FileType.NotFound:
        raise DataError("corpus.path", location, "there is no such file or folder")
    if not base.strip("/"):
        raise DataError("corpus.path", location, "it must be a folder of its own, not the root of everything")
    return root, base, kind == fs.FileType.File


def _list(root: fs.FileSystem, base: str, *, recursive: bool) -> list[SourceFile]:
    base = base.rstrip("/")
    found = root.get_file_info(fs.FileSelector(base, recursive=recursive))
    files = [
        SourceFile(entry.path[len(base) + 1 :], entry.size, _mtime(root, entry))
        for entry in found
        if entry.type == fs.FileType.File and file_suffix(entry.path) in SUFFIXES
    ]
    # Names with a dot or an underscore are left by editors and engines (`_SUCCESS`, `.crc`) and hold no rows.
    shown = (file for file in files if not any(part[0] in "._" for part in file.name.split("/")))
    return sorted(shown, key=lambda file: file.name)


def _mtime(root: fs.FileSystem, entry: fs.FileInfo) -> int | None:
    return int(entry.mtime_ns) if isinstance(root, fs.LocalFileSystem) and entry.mtime_ns is not None else None


def _is_image(file: SourceFile) -> bool:
    return SUFFIXES[file_suffix(file.name)] == "images"


def _format_of(name: str) -> Format:
    suffix = file_suffix(name)
    if suffix not in SUFFIXES:
        raise DataError("corpus.path", name, f"its name must end in {', '.join(SUFFIXES)}, or corpus.format be set")
    return SUFFIXES[suffix]
