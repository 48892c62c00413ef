"""Artefacts whose bytes are not what was written, and what becomes of them.

An artefact of every kind is made, small, and another of the same kind. A file of it is then damaged: bits are flipped,
it is cut short or made longer, runs of it are zeroed or replaced by words that JSON and YAML have a meaning for, it is
emptied, or swapped for one of the other artefact or of its own neighbours. Then the artefact is opened and used as a
stage or a replica would, in a process of its own, so that one that crashes or hangs is seen. All of it is drawn from a
seed.

`found`: refused by an error of ours that names the file, or the setting. `again`: it counts as not there, and is made
or fetched again. `harmless`: the bytes are others, but mean the same. Everything else is a fault.
"""

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from mutants import WORDS

from gsl_dist.errors import BadInput, GslError

GOOD = ("found", "again", "harmless")
FAULTS = ("unnamed", "unnoticed", "silent", "unverified", "failed", "crashed", "hung")
"""Refused without a name; other bytes that nobody saw; another answer; bytes that a library saw before their digest was
checked; an error that is none of ours; the process died; it did not end."""
WAYS = ("flip", "cut", "longer", "zeros", "words", "empty", "swap")
AGAIN = "made again"
TEXTS = (".json", ".yaml")


class Subject(NamedTuple):
    """An artefact that is to be damaged.

    Args:
        files: those that are damaged.
        donors: files of another artefact of the kind, by name.
        use: opens and uses it, and gives all that it found out, as plain values.
        meaning: what the bytes of a file mean, where other bytes may mean the same.
    """

    files: list
    donors: dict
    use: object
    meaning: object = None


def hurt(content, donors, rng, *, is_text):
    """Give the way in which bytes were damaged, and what is left of them."""
    way = WAYS[rng.integers(len(WAYS))]
    changed, at, length = bytearray(content), int(rng.integers(len(content))), int(rng.geometric(0.02))
    if way == "flip":
        for place in rng.integers(len(content), size=rng.integers(1, 5)):
            changed[place] ^= 1 << int(rng.integers(8))
    elif way == "cut":
        del changed[at:]
    elif way == "longer":
        changed += content[:length] if rng.random() < 0.5 else rng.bytes(length)
    elif way == "zeros":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif way == "words":
        word = WORDS[rng.integers(len(WORDS))] if is_text or rng.random() < 0.5 else rng.bytes(length)
        changed[at : at + (0 if is_text else len(word))] = word
    elif way == "empty":
        changed.clear()
    elif donors:
        changed = bytearray(donors[rng.integers(len(donors))])
    return way, bytes(changed)


def damage(subject, rng):
    """Give a file of a subject, the way in which it is damaged, its bytes and those that it has from then on."""
    while True:
        path = subject.files[rng.integers(len(subject.files))]
        before = path.read_bytes()
        kin = [file.read_bytes() for file in subject.files if file != path and file.suffix == path.suffix]
        donors = [*kin, *([subject.donors[path.name]] if path.name in subject.donors else [])]
        way, after = hurt(before, donors, rng, is_text=path.suffix in TEXTS)
        if after != before:
            return path, way, before, after


def put(path, content):
    """Let a file hold other bytes; whoever has it mapped keeps those that he had."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content)
    os.replace(draft, path)


class Watch:
    """Sees to it that no library is given the bytes of a damaged file."""

    def __init__(self):
        self.damaged, self.seen = None, ""

    def look(self, name, given):
        """Note that a library is given a path, bytes or a stream."""
        if self.damaged and _content(given) == self.damaged:
            self.seen = name

    def watch(self, module, name):
        """Look at what a function is given, from now on."""
        inner = getattr(module, name)

        @functools.wraps(inner, updated=())
        def watched(given, *args, **more):
            self.look(name, given)
            return inner(given, *args, **more)

        setattr(module, name, watched)


def _content(given):
    if isinstance(given, str | Path):
        return Path(given).read_bytes()
    if isinstance(given, pa.Buffer | bytes):
        return bytes(given)
    if hasattr(given, "seek"):
        given.seek(0)
        content = bytes(given.read())
        given.seek(0)
        return content
    return None


LIBRARIES = {
    "faiss": ["read_index"],
    "torch": ["load"],
    "pyarrow.ipc": ["open_file"],
    "pyarrow.parquet": ["read_table", "read_schema", "ParquetFile"],
    "gsl_dist.codebook": ["load_tensors"],
    "gsl_dist.cluster.model": ["load_tensors"],
    "gsl_dist.index.refine": ["map_arrays"],
    "gsl_dist.index.vlq": ["map_arrays"],
}
"""What reads artefacts."""


def watch_libraries():
    """Watch all libraries that are there."""
    watch = Watch()
    for module, names in LIBRARIES.items():
        for name in names if module in sys.modules else ():
            watch.watch(sys.modules[module], name)
    return watch


def try_damaged(subject, expected, watch, rng):
    """Damage a file, use the artefact, put the file as it was, and give what came of it, how, which file, and why."""
    path, way, before, after = damage(subject, rng)
    put(path, after)
    # The bytes of a neighbour are seen where they belong.
    whole = [file.read_bytes() for file in subject.files if file != path]
    watch.damaged, watch.seen = None if after in whole else after, ""
    try:
        outcome, reason = _judge(subject, expected, path, (before, after))
        # Of two files that do not fit each other nobody knows which is in the wrong place.
        if outcome == "unnamed" and way == "swap" and str(path.parent) in reason:
            outcome = "found"
    finally:
        put(path, before)
        watch.damaged = None
    if watch.seen:
        outcome, reason = "unverified", f"{watch.seen} was given the damaged file"
    return outcome, way, path.name, reason


def _judge(subject, expected, path, contents):
    try:
        found = subject.use()
    except GslError as error:
        is_named = isinstance(error, BadInput) or path.name in str(error)
        return ("found" if is_named else "unnamed"), str(error)
    except Exception as error:  # noqa: BLE001 - whatever else there is, is a fault
        return "failed", f"{type(error).__name__}: {error}"
    if found == AGAIN:
        return "again", ""
    if found != expected:
        return "silent", f"{found!r:.200}"
    before, after = ((subject.meaning or _refuse)(path, content) for content in contents)
    return ("harmless", "") if before == after else ("unnoticed", "")


def _refuse(path, content):
    return content


def read_plain(path, content):
    """Give what JSON means."""
    return json.loads(content)


def _attack(place, module, seed, way):
    subjects, watch = importlib.import_module(module).make_subjects(Path(place)), watch_libraries()
    expected = {}
    way.send(sorted(subjects))
    while (told := way.recv()) is not None:
        name, numbers = told
        subject = subjects[name]
        if name not in expected:
            expected[name] = subject.use()
            assert subject.use() == expected[name] != AGAIN, name
        for number in numbers:
            way.send(try_damaged(subject, expected[name], watch, draw_seed(seed, name, number)))


def draw_seed(seed, name, number):
    """Give the generator of one mutant."""
    return np.random.default_rng((seed, zlib.crc32(name.encode()), number))


class Victim:
    """A process that uses damaged artefacts; one that died or hangs is replaced.

    Args:
        seed: of all damage.
        timeout_s: how long one use may take.
        module: where artefacts are made.
    """

    def __init__(self, seed=0, timeout_s=60.0, module="subjects"):
        self._seed, self._timeout_s, self._module, self._process = seed, timeout_s, module, None
        self._rest = contextlib.ExitStack()
        self.names = self._start()

    def _start(self):
        place = self._rest.enter_context(tempfile.TemporaryDirectory(prefix="gsl-damage-"))
        context = multiprocessing.get_context("spawn")
        self._way, other = context.Pipe()
        self._process = context.Process(target=_attack, args=(place, self._module, self._seed, other), daemon=True)
        self._process.start()
        other.close()
        assert self._way.poll(300), "the world was not made"
        return self._way.recv()

    def strike(self, name, numbers):
        """Give what came of the mutants with these numbers, one after another: outcome, way, file, reason."""
        left, outcomes = list(numbers), []
        while left:
            self._way.send((name, left))
            while left:
                try:
                    came = self._way.recv() if self._way.poll(self._timeout_s) else ("hung", "", "", "")
                except EOFError:
                    came = ("crashed", "", "", "")
                outcomes.append(came)
                number = left.pop(0)
                if came[0] in ("hung", "crashed"):
                    outcomes[-1] = (came[0], "", "", f"mutant {number}")
                    self._end()
                    self._start()
                    break
        return outcomes

    def close(self):
        """End the process."""
        self._end()
        self._rest.close()

    def _end(self):
        self._process.kill()
        self._process.join()
        self._way.close()


def count_outcomes(outcomes):
    """Give how often which outcome came, and the reasons of what is a fault."""
    return Counter(outcome for outcome, *_ in outcomes), [told for told in outcomes if told[0] in FAULTS]
