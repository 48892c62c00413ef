"""A folder somewhere, in which files are whole or absent.

`Folder` hides whether it is a local directory or an object store (`pyarrow.fs`). A file is always written beside its
place under a temporary name and moved there when it is complete, so a reader never sees half of one; an object store
gets the same from a single upload, after which one waits until the store shows it. `FileEntry` pins a file by size and
SHA-256, and `check` and `held` refuse it when either differs: nothing that a version names is read before that. What
pins others, cards, notes and manifests, is sealed: it carries a digest of its own content.

A store that is slow, fails or drops connections is asked again, for some seconds; a local disk is not. A writer that is
killed leaves its draft behind; whoever finishes the folder sweeps it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as fs

from gsl_dist.cache import CHUNK_BYTES, Cache, fetch_whole
from gsl_dist.cache import FileEntry as FileEntry
from gsl_dist.config import resolve_location
from gsl_dist.errors import ArtefactError, BadInput, Unwritable, hide_key

T = TypeVar("T")

_REMOTE_TRIES, _SEND_AGAIN = 6, (2, 4)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_DIGEST = "digest"
_DRAFT = re.compile(r"\..+\.[0-9a-f]{32}")
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_CONNECT_S, _REQUEST_S, _REQUEST_TRIES = 5.0, 30.0, 4


class Folder:
    """Names a folder and reads and writes whole files in it.

    Args:
        location: a local path or a URI (`s3://bucket/prefix`, `gs://...`, `file:///...`), with options of `pyarrow.fs`
            behind a question mark.
        cache: keeps pinned files of a store nearby; None: each use fetches them.
    """

    def __init__(self, location: str | os.PathLike[str], cache: Cache | None = None) -> None:
        self.location, self.cache = resolve_location(os.fspath(location)), cache
        try:
            self._fs, self._base = find_store(self.location)
        except ValueError as error:
            allowed = f"it must be a path, or a URI that pyarrow.fs understands ({str(error).splitlines()[0]})"
            raise BadInput("path", self.location, allowed) from None
        self.is_local = isinstance(self._fs, fs.LocalFileSystem)

    def __repr__(self) -> str:
        return f"Folder({self.path()!r})"

    def child(self, name: str) -> Folder:
        """Name a folder inside this one."""
        return Folder(join_location(self.location, name), self.cache)

    @property
    def store(self) -> tuple[fs.FileSystem, str]:
        """Give the file system that this folder is in, and its path there."""
        return self._fs, self._base

    def path(self, name: str = "") -> str:
        """Give the place of a file as messages should show it, without any key."""
        return hide_key(join_location(self.location, name) if name else self.location)

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
        size = self.size(name)

        def start() -> pa.NativeFile:
            return self._try(lambda: self._fs.open_input_file(self._full(name)))

        return start() if self.is_local else pa.PythonFile(_PatientReader(start, size, self._try), mode="r")

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""

        def read() -> bytes:
            with self.open(name) as stream:
                return bytes(stream.read())

        return self._try(read)

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            ArtefactError: absent, or not JSON.
        """
        try:
            return json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise ArtefactError(self.path(name), f"it is not JSON ({error})") from error

    def read_sealed(self, name: str, *, always: bool = True) -> Any:
        """Read a JSON file that was sealed, and check its content against the digest that it carries.

        Args:
            name: the file.
            always: whether there must be a digest; not where files were written before they got one.

        Raises:
            ArtefactError: absent, not JSON, or altered.
        """
        content = self.read_json(name)
        wanted = content.pop(_DIGEST, None) if isinstance(content, dict) else None
        if wanted is None and always:
            raise ArtefactError(self.path(name), "it does not have the digest that it was written with")
        if wanted is not None and wanted != _seal(content):
            raise ArtefactError(self.path(name), "its content differs from the digest recorded when it was written")
        return content

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """Give a local path to write to; the file appears under its name when the block ends without an error.

        The data is on the disk before the name is: a crash leaves the old file or the new one, never a part.

        Raises:
            Unwritable: the disk is full, or the place may not be written.
        """
        base = Path(self._base) if self.is_local else Path(tempfile.gettempdir())
        draft = base / name if self.is_local else base / Path(name).name
        draft = draft.with_name(f".{draft.name}.{uuid.uuid4().hex}")
        try:
            with naming_what_cannot_be_written(self.path(name)):
                draft.parent.mkdir(parents=True, exist_ok=True)
                yield draft
                if self.is_local:
                    _sync(draft)
                    os.replace(draft, Path(self._base) / name)
                    _sync(draft.parent)
                else:
                    self._send(draft, name)
        finally:
            draft.unlink(missing_ok=True)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a whole file."""
        with self.whole(name) as path:
            path.write_bytes(content)

    def write_json(self, name: str, content: Any) -> None:
        """Write a whole JSON file, keys sorted so that equal content is equal bytes."""
        self.write_bytes(name, json.dumps(content, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n")

    def write_sealed(self, name: str, content: dict[str, Any]) -> None:
        """Write a whole JSON file with a digest of its content."""
        self.write_json(name, content | {_DIGEST: _seal(content)})

    def take(self, other: Folder, entry: FileEntry) -> None:
        """Put a file of another folder here under its name: a link to the same bytes, or a copy where there are none.

        Raises:
            ArtefactError: it is not the file that was pinned.
        """
        with other.held(entry) as path, self.whole(entry.name) as written:
            try:
                os.link(path, written)
            except OSError:
                shutil.copyfile(path, written)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            self._try(lambda: self._fs.delete_file(self._full(name)))

    def clear(self, name: str) -> None:
        """Remove a folder inside this one and all it holds, if it is there."""
        if self.exists(name):
            self._try(lambda: self._fs.delete_dir(self._full(name)))

    def sweep(self) -> None:
        """Remove the drafts that writers left here which were killed; there may be no other that goes on.

        A process that was given up, and its work done by another, may turn out to live: it fails, and nobody waits.
        """
        for path in Path(self._base).rglob(".*") if self.is_local else ():
            if _DRAFT.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def pin(self, name: str) -> FileEntry:
        """Measure a file: its size and SHA-256."""

        def measure() -> FileEntry:
            digest, size = hashlib.sha256(), 0
            with self.open(name) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
            return FileEntry(name=name, bytes=size, sha256=digest.hexdigest())

        return self._try(measure)

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
            self._fetch(name, Path(target))
            yield Path(target)

    @contextlib.contextmanager
    def held(self, entry: FileEntry) -> Iterator[Path]:
        """Give a local path of a pinned file for as long as the block lasts, after it was found whole.

        Raises:
            ArtefactError: it is not the file that was pinned.
        """
        if self.is_local:
            self.check(entry)
            with self.local(entry.name) as path:
                yield path
            return
        named = entry.model_copy(update={"name": self.path(entry.name)})
        if self.cache is not None:
            with self.cache.hold(named, lambda path: self._fetch(entry.name, path)) as path:
                yield path
            return
        with tempfile.TemporaryDirectory(prefix="gsl-") as folder:
            target = Path(folder) / Path(entry.name).name
            fetch_whole(named, target, lambda path: self._fetch(entry.name, path))
            yield target

    def _fetch(self, name: str, target: Path) -> None:
        self.size(name)
        self._try(lambda: fs.copy_files(self._full(name), str(target), source_filesystem=self._fs))

    def _send(self, draft: Path, name: str) -> None:
        size, looks = draft.stat().st_size, itertools.count()

        def upload() -> None:
            self._try(lambda: fs.copy_files(str(draft), self._full(name), destination_filesystem=self._fs))

        # Some stores show what was written only after a while, and who writes a card next relies on it. And pyarrow
        # calls an upload done of which the store refused the last part: what is not shown, or shorter, is sent again.
        def look() -> None:
            found = self._fs.get_file_info(self._full(name))
            if found.type != fs.FileType.File or found.size != size:
                if next(looks) in _SEND_AGAIN:
                    upload()
                raise OSError(f"{self.path(name)} was written, but the store does not show it")

        upload()
        self._try(look)

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
                time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 4**attempt))
        raise AssertionError("the loop returns or raises")


class _PatientReader(io.RawIOBase):
    """Reads a file of a store and, where the connection is lost in the middle, goes on with another.

    Args:
        start: opens the file.
        size: its length in bytes.
        attempt: does something again and again until it does well.
    """

    def __init__(
        self, start: Callable[[], pa.NativeFile], size: int, attempt: Callable[[Callable[[], bytes]], bytes]
    ) -> None:
        self._stream: pa.NativeFile | None = None
        self._start, self._size, self._attempt, self._at = start, size, attempt, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        wanted = max(0, self._size - self._at)
        content = self._attempt(lambda: self._read_at(wanted if size < 0 else min(size, wanted)))
        self._at += len(content)
        return content

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        super().close()

    def _read_at(self, size: int) -> bytes:
        stream, self._stream = self._stream or self._start(), None
        content = bytes(stream.read_at(size, self._at))
        if len(content) < size:
            raise OSError(f"{len(content)} bytes came where {size} are stored")
        self._stream = stream  # kept only if it did well
        return content


@contextlib.contextmanager
def naming_what_cannot_be_written(path: str) -> Iterator[None]:
    """Raise Unwritable with a path where the system says that a disk is full, or may not be written."""
    try:
        yield
    except OSError as error:
        if error.errno in _UNWRITABLE:
            raise Unwritable(path, os.strerror(error.errno)) from error
        raise


def find_store(location: str) -> tuple[fs.FileSystem, str]:
    """Give the file system that an absolute path or a URI is in, and the path there; S3 with patience."""
    if "://" not in location:
        return fs.LocalFileSystem(), location
    found, base = fs.FileSystem.from_uri(location)
    if found.type_name != "s3":
        return found, base
    parts = urllib.parse.urlsplit(location)
    told = dict(urllib.parse.parse_qsl(parts.query))
    named = urllib.parse.urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
    endpoint, scheme = told.get("endpoint_override") or named.netloc or None, told.get("scheme") or named.scheme or None
    patient = fs.S3FileSystem(
        access_key=parts.username and urllib.parse.unquote(parts.username),
        secret_key=parts.password and urllib.parse.unquote(parts.password),
        region=found.region,
        scheme=scheme,
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_S,
        request_timeout=_REQUEST_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_TRIES),
    )
    return patient, base


def split_location(location: str) -> tuple[Folder, str]:
    """Cut the place of one file into its folder and its name."""
    base, options = _cut_options(resolve_location(location))
    parent, _, name = base.rpartition("/")
    return Folder((parent or "/") + options), name


def join_location(location: str, name: str) -> str:
    """Name a file or folder inside a folder."""
    base, options = _cut_options(location)
    return f"{base.rstrip('/')}/{name}{options}"


def _seal(content: Any) -> str:
    # As it will be read: keys that are numbers become text, which sorts otherwise.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _cut_options(location: str) -> tuple[str, str]:
    base, mark, options = location.partition("?") if "://" in location else (location, "", "")
    return base, mark + options


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
