"""Files of a store kept on a disk nearby, by what is in them.

A file lies here under its SHA-256, so that versions which share a shard share it here, and what was altered is found
before use and fetched anew. Each process that needs a file gets a name of its own for it: that of another may go
whenever room is needed, the least recently used first, and nobody who has the file open loses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import Field

from gsl_dist.config import Location, Strict
from gsl_dist.errors import ArtefactError

CHUNK_BYTES = 1 << 20
_TRIES = 2
_STALE_S = 24 * 3600.0


class FileEntry(Strict):
    """A file pinned by what it holds."""

    name: str
    bytes: int
    sha256: str


class Cache(Strict):
    """A folder on a local disk for files of stores, and how much it may hold."""

    folder: Location = Field(description="on a local disk; processes of one machine may share it")
    limit_gb: float = Field(default=100.0, gt=0, description="of what is kept the least recently used goes first")

    @contextlib.contextmanager
    def hold(self, entry: FileEntry, fetch: Callable[[Path], None]) -> Iterator[Path]:
        """Give a path of a pinned file as long as the block lasts; it is fetched only if it is not here.

        Args:
            entry: the file.
            fetch: writes it to a path.

        Raises:
            ArtefactError: what was fetched is not the file that was pinned.
        """
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        place, own = folder / entry.sha256, folder / f".{uuid.uuid4().hex}"
        try:
            # Of several processes that want the same file, one fetches it.
            with _lock(folder / f".lock-{entry.sha256[:2]}"):
                if not (_link(place, own) and is_entry(own, entry)):
                    own.unlink(missing_ok=True)
                    fetch_whole(entry, own, fetch)
                    self._keep(own, entry)
            yield own
        finally:
            own.unlink(missing_ok=True)

    def _keep(self, own: Path, entry: FileEntry) -> None:
        limit = int(self.limit_gb * 2**30)
        if entry.bytes > limit:
            return
        with _lock(own.parent / ".lock"):
            (own.parent / entry.sha256).unlink(missing_ok=True)
            self._make_room(limit - entry.bytes)
            os.link(own, own.parent / entry.sha256)

    def _make_room(self, limit: int) -> None:
        kept, now = [], time.time()
        for file in Path(self.folder).iterdir():
            with contextlib.suppress(FileNotFoundError):
                found = file.stat()
                if len(file.name) == 64:
                    kept.append((found.st_mtime_ns, found.st_size, file))
                elif not file.name.startswith(".lock") and found.st_mtime < now - _STALE_S:
                    file.unlink()  # left by a process that was killed
        held = sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if held <= limit:
                return
            file.unlink(missing_ok=True)
            held -= size


def fetch_whole(entry: FileEntry, path: Path, fetch: Callable[[Path], None]) -> None:
    """Write a pinned file to a path, once more if what came is not what was pinned.

    Raises:
        ArtefactError: it is not, twice.
    """
    for _ in range(_TRIES):
        fetch(path)
        if is_entry(path, entry):
            return
    raise ArtefactError(
        entry.name, f"what is stored has not the {entry.bytes} bytes and the checksum that were written"
    )


def is_entry(path: Path, entry: FileEntry) -> bool:
    """Tell whether a file is, byte for byte, the one that was pinned."""
    if path.stat().st_size != entry.bytes:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == entry.sha256


def _link(place: Path, own: Path) -> bool:
    try:
        os.utime(place)
        os.link(place, own)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
