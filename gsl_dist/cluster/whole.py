"""What is finished of a stage, by its notes; and whether files are what was pinned.

To check a file is to read it, and what a driver reads must not grow with the corpus: it looks into a few megabytes
itself and deals everything else out to the workers. Of a shard it sees the note alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import ValidationError

from gsl_dist.cluster.session import run_tasks, start_session
from gsl_dist.config import Resources, Strict
from gsl_dist.errors import ArtefactError
from gsl_dist.storage import FileEntry, Folder

HERE_BYTES = 64 << 20
_TASK_BYTES = 1 << 30
_READERS = 16

N = TypeVar("N", bound="Note")


class Note(Strict):
    """What is known of a finished part of a stage's work."""

    made_by: str

    @property
    def files(self) -> list[FileEntry]:
        """List what was written."""
        raise NotImplementedError


def find_notes(folder: Folder, kind: type[N], shards: int, made_by: str, resources: Resources) -> dict[int, N]:
    """Give the notes of those of so many shards that are finished, by their numbers.

    A note that cannot be read, is of another run, or whose files are not as noted counts as none.
    """
    wanted = {f"shard-{shard:05d}.note.json": shard for shard in range(shards)}
    names = [name for name in folder.names(suffix=".note.json") if name in wanted]
    with ThreadPoolExecutor(_READERS) as readers:
        read = readers.map(lambda name: _read_note(folder, name, kind), names)
        notes = {wanted[name]: note for name, note in zip(names, read, strict=True) if note and note.made_by == made_by}
    entries = [entry for note in notes.values() for entry in note.files]
    damaged = {fault.path for fault in find_damaged(folder, entries, resources)}
    return {shard: note for shard, note in notes.items() if not damaged & {folder.path(e.name) for e in note.files}}


def _read_note(folder: Folder, name: str, kind: type[N]) -> N | None:
    try:
        return kind.model_validate(folder.read_sealed(name))
    except (ValidationError, ArtefactError):
        return None


def find_damaged(folder: Folder, entries: Sequence[FileEntry], resources: Resources) -> list[ArtefactError]:
    """Give what is wrong with files of a folder, a fault for each that is not what was pinned."""
    if sum(entry.bytes for entry in entries) <= HERE_BYTES:
        return check_files(folder.location, entries)
    start_session(resources.workers * resources.cpus)
    calls = [(folder.location, group) for group in _deal_out(entries)]
    return [fault for faults in run_tasks(check_files, calls, resources) for fault in faults]


def refuse_damaged(folder: Folder, entries: Sequence[FileEntry], resources: Resources) -> None:
    """Let files pass that are what was pinned.

    Raises:
        ArtefactError: one is not.
    """
    if faults := find_damaged(folder, entries, resources):
        raise faults[0]


def refuse_lost(folder: Folder, entries: Sequence[FileEntry]) -> None:
    """Let files pass that are there; one look at the folder.

    Raises:
        ArtefactError: one is not, and what is made of it would be whole without it.
    """
    if lost := {entry.name for entry in entries} - set(folder.names()):
        raise ArtefactError(folder.path(min(lost)), "it was written, but is not there any more")


def check_files(location: str, entries: Sequence[FileEntry]) -> list[ArtefactError]:
    """Read files, and give what is wrong with them; knows no Ray."""
    folder, faults = Folder(location), list[ArtefactError]()
    for entry in entries:
        try:
            folder.check(entry)
        except ArtefactError as fault:
            faults.append(fault)
    return faults


def _deal_out(entries: Sequence[FileEntry]) -> list[list[FileEntry]]:
    """Put files together, so that a task has a gigabyte to read, or one file."""
    groups, room = list[list[FileEntry]](), 0
    for entry in entries:
        if entry.bytes > room:
            groups, room = [*groups, []], _TASK_BYTES
        groups[-1].append(entry)
        room -= entry.bytes
    return groups
