"""What a stage left behind: its bytes, its rows, and the units of work that were begun and finished for it.

`Ledger` has it from the file system, whichever process was at work: every shard is written under a temporary name
first, and a note is moved into place when it is done.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import load_file

_CREATED, _MOVED = 0x100, 0x80
_EVENT = struct.Struct("iIII")
_DRAFT = re.compile(r"^\.(shard-\d+)\.(?:parquet|faiss)\.[0-9a-f]{32}$")
_NOTE = re.compile(r"^(shard-\d+)\.note\.json$")
# Only the time at which a version was made differs from run to run, and the digest over it.
_PER_RUN = ("created", "digest")
# Beside the pointer other versions are at work, perhaps, whose drafts nobody may sweep: one of 30 bytes can stay.
_POINTER = ".CURRENT.json."


class Ledger:
    """The shards that are begun and finished in a folder from now on; Linux tells (inotify)."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None, use_errno=True)
        self._file = libc.inotify_init1(os.O_NONBLOCK)
        if libc.inotify_add_watch(self._file, os.fsencode(folder), _CREATED | _MOVED) < 0:
            raise OSError(ctypes.get_errno(), f"{folder} cannot be watched")
        self.begun, self.finished = Counter[str](), Counter[str]()

    def read(self) -> None:
        """Take in what happened since it was read last."""
        while True:
            try:
                events = os.read(self._file, 1 << 16)
            except BlockingIOError:
                return
            at = 0
            while at < len(events):
                _, kind, _, length = _EVENT.unpack_from(events, at)
                at += _EVENT.size
                name = events[at : at + length].rstrip(b"\0").decode()
                at += length
                if kind & _CREATED and (draft := _DRAFT.match(name)):
                    self.begun[draft[1]] += 1
                if kind & _MOVED and (note := _NOTE.match(name)):
                    self.finished[note[1]] += 1

    def close(self) -> None:
        """Watch no longer."""
        self.read()
        os.close(self._file)


def digest_files(folder: Path) -> dict[str, str]:
    """Give a hash of each file below a folder by its name; what differs from run to run is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(_POINTER):
            continue
        content = path.read_bytes()
        if path.name == "manifest.json":
            told = json.loads(content)
            content = json.dumps({key: told[key] for key in told if key not in _PER_RUN}).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def name_differences(found: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Name the files that only one of both has, or that differ; drafts of killed writers among them."""
    return sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))


def read_ids(folder: Path) -> NDArray[np.int64]:
    """Give the ids of all rows below a folder, ascending: of codes, or of lists."""
    ids = [pq.read_table(path, columns=["id"])["id"].to_numpy() for path in sorted(folder.rglob("shard-*.parquet"))]
    for path in sorted(folder.rglob("shard-*.faiss")):
        index = faiss.read_index(str(path))  # held, or its lists would be gone
        lists = faiss.extract_index_ivf(index).invlists
        for number in range(lists.nlist):
            if size := lists.list_size(number):
                ids.append(faiss.rev_swig_ptr(lists.get_ids(number), size).copy())
    return np.sort(np.concatenate([np.empty(0, np.int64), *ids]))


def measure_difference(found: Path, wanted: Path) -> float:
    """Give the largest difference between numbers of two models; infinite where they are not of one shape."""
    largest = 0.0
    for name in ("encoder.safetensors", "codebook.safetensors"):
        one, other = load_file(found / name), load_file(wanted / name)
        if {key: array.shape for key, array in one.items()} != {key: array.shape for key, array in other.items()}:
            return float("inf")
        for key, array in one.items():
            largest = max(largest, float(np.abs(array.astype(np.float64) - other[key]).max(initial=0.0)))
    return largest
