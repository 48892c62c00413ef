"""A folder somewhere, in which files are whole or absent.

`Folder` hides whether it is a local directory or an object store (`pyarrow.fs`). A file is always written beside its
place under a temporary name and moved there when it is complete, so a reader never sees half of one; an object store
gets the same from a single upload. `FileEntry` pins a file by size and SHA-256, and `check` refuses it when either
differs: nothing that a version names is read before that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as fs

from gsl_dist.config import Strict, resolve_location
from gsl_dist.errors import ArtefactError

T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
_REMOTE_TRIES = 4


class FileEntry(Strict):
    """A file pinned by what it holds."""

    name: str
    bytes: int
    sha256: str


class Folder:
    """Names a folder and reads and writes whole files in it.

    Args:
        location: a local path or a URI (`s3://bucket/prefix`, `gs://...`, `file:///...`).
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = resolve_location(os.fspath(location))
        if "://" in self.location:
            self._fs, self._base = fs.FileSystem.from_uri(self.location)
        else:
            self._fs, self._base = fs.LocalFileSystem(), self.location
        self.is_local = isinstance(self._fs, fs.LocalFileSystem)

    def __repr__(self) -> str:
        return f"Folder({self.location!r})"

    def child(self, name: str) -> Folder:
        """Name a folder inside this one."""
        return Folder(f"{self.location}/{name}")

    def path(self, name: str = "") -> str:
        """Give the place of a file as messages should show it."""
        return f"{self.location}/{name}" if name else self.location

    def exists(self, name: str = "") -> bool:
        """Tell whether the file or folder is there."""
        return bool(self._stat(name).type != fs.FileType.NotFound)

    def is_folder(self) -> bool:
        """Tell whether this is a folder that exists; a file is not."""
        return bool(self._stat("").type == fs.FileType.Directory)

    def names(self, *, suffix: str = "", folders: bool = False) -> list[str]:
        """List the files (or folders) directly inside, sorted; temporary ones are left out."""
        wanted = fs.FileType.Directory if folders else fs.FileType.File
        selector = fs.FileSelector(self._base, recursive=False, allow_not_found=True)
        found = (
            entry.base_name for entry in self._try(lambda: self._fs.get_file_info(selector)) if entry.type == wanted
        )
        return sorted(name for name in found if name.endswith(suffix) and not name.startswith("."))

    def size(self, name: str) -> int:
        """Give the length of a file in bytes.

        Raises:
            ArtefactError: there is no such file.
        """
        entry = self._stat(name)
        if entry.type != fs.FileType.File:
            raise ArtefactError(self.path(name), "no such file")
        return int(entry.size)

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for reading at any place in it.

        Raises:
            ArtefactError: there is no such file.
        """
        self.size(name)
        return self._try(lambda: self._fs.open_input_file(self._full(name)))

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""
        with self.open(name) as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            ArtefactError: absent, or not JSON.
        """
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise ArtefactError(self.path(name), f"it is not JSON ({error})") from error

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """Give a local path to write to; the file appears under its name when the block ends without an error.

        The data is on the disk before the name is: a crash leaves the old file or the new one, never a part.
        """
        base = Path(self._base) if self.is_local else Path(tempfile.gettempdir())
        draft = base / name if self.is_local else base / Path(name).name
        draft = draft.with_name(f".{draft.name}.{uuid.uuid4().hex}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            if self.is_local:
                _sync(draft)
                os.replace(draft, Path(self._base) / name)
                _sync(draft.parent)
            else:
                self._try(lambda: fs.copy_files(str(draft), self._full(name), destination_filesystem=self._fs))
        finally:
            draft.unlink(missing_ok=True)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a whole file."""
        with self.whole(name) as path:
            path.write_bytes(content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a whole JSON file, keys sorted so that equal content is equal bytes."""
        self.write_bytes(name, json.dumps(content, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n")

    def take(self, other: Folder, entry: FileEntry) -> None:
        """Put a file of another folder here under its name: a link to the same bytes, or a copy where there are none.

        Raises:
            ArtefactError: it is not the file that was pinned.
        """
        other.check(entry)
        with other.local(entry.name) as path, self.whole(entry.name) as written:
            try:
                os.link(path, written)
            except OSError:
                shutil.copyfile(path, written)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            self._fs.delete_file(self._full(name))

    def clear(self, name: str) -> None:
        """Remove a folder inside this one and all it holds, if it is there."""
        if self.exists(name):
            self._fs.delete_dir(self._full(name))

    def pin(self, name: str) -> FileEntry:
        """Measure a file: its size and SHA-256."""
        digest, size = hashlib.sha256(), 0
        with self.open(name) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return FileEntry(name=name, bytes=size, sha256=digest.hexdigest())

    def check(self, entry: FileEntry) -> None:
        """Accept a file only if it is, byte for byte, the one that was pinned.

        Raises:
            ArtefactError: absent, of another length, or of another content.
        """
        size = self.size(entry.name)
        if size != entry.bytes:
            raise ArtefactError(self.path(entry.name), f"it has {size} bytes, but {entry.bytes} were written")
        if self.pin(entry.name).sha256 != entry.sha256:
            raise ArtefactError(self.path(entry.name), "its checksum differs from the one recorded when it was written")

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Give a local path from which a file can be read for as long as the block lasts."""
        if self.is_local:
            self.size(name)
            yield Path(self._base) / name
            return
        with tempfile.TemporaryDirectory(prefix="gsl-") as cache:
            target = os.path.join(cache, Path(name).name)
            self._try(lambda: fs.copy_files(self._full(name), target, source_filesystem=self._fs))
            yield Path(target)

    def _full(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    def _stat(self, name: str) -> fs.FileInfo:
        return self._try(lambda: self._fs.get_file_info(self._full(name)))

    def _try(self, action: Callable[[], T]) -> T:
        # A local disk does not get better by asking again; an object store often does.
        for attempt in range(_REMOTE_TRIES):
            try:
                return action()
            except OSError:
                if self.is_local or attempt == _REMOTE_TRIES - 1:
                    raise
                time.sleep(0.2 * 4**attempt)
        raise AssertionError("the loop returns or raises")


def split_location(location: str) -> tuple[Folder, str]:
    """Cut the place of one file into its folder and its name."""
    parent, _, name = resolve_location(location).rpartition("/")
    return Folder(parent or "/"), name


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
