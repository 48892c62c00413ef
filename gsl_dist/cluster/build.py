"""The build stage: a task a shard turns codes into a file of lists; the manifest comes last, then the pointer.

Codes and cells go straight into the inverted lists, nothing is encoded again. Files of codes are checked first, and
that no id occurs twice among them; then each task streams the codes of its shard, in as many passes as its memory asks
for (`gsl_dist.index.bounded`). Each finished shard leaves a note, so that a relaunch builds only what is missing. No
other process sees the version before its manifest is there.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import Field

from gsl_dist.artefact import Card, load_codebook, name_card, open_card
from gsl_dist.cluster.session import Progress, run_tasks, start_session, stay_quiet
from gsl_dist.cluster.whole import Note, find_notes
from gsl_dist.codebook import Codebook
from gsl_dist.config import Location, Resources, Strict, fingerprint_config, hide_keys
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.index.bounded import hold_ids, name_payload, write_lists, write_payload, write_vectors
from gsl_dist.index.lists import name_file
from gsl_dist.index.manifest import (
    CODEBOOK,
    MANIFEST,
    VERSION_NAME,
    Manifest,
    ShardEntry,
    describe_codebook,
    open_version,
    promote_version,
    publish_version,
    version_folder,
)
from gsl_dist.index.portions import Sharding, cut_by_cell, cut_by_id, name_shard
from gsl_dist.index.refine import Precision
from gsl_dist.index.repeats import Duplicates, find_repeats, group_files
from gsl_dist.index.shards import CoarseSearch, CodeLayout, suits_fastscan
from gsl_dist.index.stream import ID_BYTES, READ_BYTES, Piece, Portion, count_lists, survey_codes
from gsl_dist.storage import FileEntry, Folder

_SOFTWARE = ("faiss-cpu", "faiss-gpu", "torch", "ray", "numpy", "pyarrow", "gsl_dist")
_LEAST_ROOM = 4 << 20


class BuildConfig(Strict):
    """Builds a version of an index from a folder of codes."""

    codes: Location = Field(description="the folder of codes to build from")
    codebook: Location = Field(description="the codebook folder that the codes were made with")
    model: Location | None = Field(default=None, description="the encoder that queries pass through; it is copied")
    index: Location = Field(description="the index folder; it may hold other versions")
    version: str | None = Field(default=None, pattern=f"^{VERSION_NAME}$", description="None: named after its content")
    vectors: Precision | None = Field(
        default=None, description="keep vectors to rank candidates by: float16, or int8, a byte a dimension; None: none"
    )
    coarse_search: CoarseSearch = Field(
        default="flat", description="how a query finds its cells: flat compares all, hnsw follows a graph (many cells)"
    )
    code_layout: CodeLayout = Field(
        default="plain",
        description="how lists hold codes: plain, or fastscan (pq of 4 bits, rabitq; keep vectors to refine by)",
    )
    sharding: Sharding = Field(
        default="id", description="id: each shard a run of the corpus; cell: each cell in one shard with all its rows"
    )
    shards: int | None = Field(default=None, ge=1, le=100_000, description="None: as many as the codes have files")
    duplicates: Duplicates = Field(
        default="refuse", description="rows with one id: an error, or all but the first or the last are left out"
    )
    memory_mb: int = Field(
        default=512,
        ge=64,
        description="what the rows of one task may take, libraries and codebook apart; reading alone takes 48",
    )
    promote: bool = Field(default=True, description="let it be the version that is served next")
    resources: Resources = Resources()

    @property
    def room_bytes(self) -> int:
        """Give what is left of a task's memory while it reads."""
        return (self.memory_mb << 20) - READ_BYTES


class BuiltShard(Note):
    """What is known of a finished shard."""

    entry: ShardEntry

    @property
    def files(self) -> list[FileEntry]:
        """List what was written."""
        return [file for file in (self.entry.index, self.entry.payload, self.entry.vectors) if file]


def run_build(config: BuildConfig, progress: Progress = stay_quiet) -> Manifest:
    """Make a version and, unless told otherwise, promote it; a relaunch builds only the shards that are missing.

    Raises:
        ArtefactError: codes are damaged, or were written with another codebook.
        ConfigError: the version's name is taken by another content, or a setting does not go with the codes.
        DataError: ids occur twice, and `duplicates` says that they may not.
    """
    codes, codebook = open_card(Folder(config.codes), "codes", verify=False), load_codebook(config.codebook)
    _check_fit(config, codes, codebook)
    parts = [codes.made_by, codebook.fingerprint, config.model and _model_card(config).made_by]
    made_by = fingerprint_config(*parts, *_name_choices(config))
    version, index = config.version or f"v-{made_by[:12]}", Folder(config.index)
    if version_folder(index, version).exists(MANIFEST):
        manifest = open_version(index, version)
        if manifest.made_by != made_by:
            raise ConfigError("version", version, "a version is immutable and this one holds other codes; name another")
    else:
        folder = version_folder(index, version)
        built = _build_shards(config, folder, codes, codebook, made_by, progress)
        manifest = _describe(config, folder, version, codes, codebook, built)
        publish_version(index, manifest)
    return promote_version(index, version) if config.promote else manifest


def build_shard(config: BuildConfig, folder: Folder, portion: Portion, made_by: str) -> BuiltShard:
    """Build the files of one shard from its rows, whose files were checked and whose ids occur once; knows no Ray."""
    codebook, name, room_bytes = load_codebook(config.codebook), portion.name, config.room_bytes
    index = name_file(name, codebook)
    with folder.whole(index) as path:
        write_lists(portion, codebook, path, room_bytes, config.coarse_search, config.code_layout)
    entry = ShardEntry(name=name, rows=portion.rows, index=folder.pin(index))
    if config.vectors or name_payload(portion.schema):
        ids_N = hold_ids(portion)
        room_bytes -= ids_N.nbytes
        if name_payload(portion.schema):
            payload = f"{name.replace('shard', 'payload')}.parquet"
            with folder.whole(payload) as path:
                write_payload(portion, ids_N, path, room_bytes)
            entry = entry.model_copy(update={"payload": folder.pin(payload)})
        if config.vectors:
            vectors = f"{name.replace('shard', 'vectors')}.{config.vectors}"
            with folder.whole(vectors) as path:
                write_vectors(portion, ids_N, codebook.dim, path, room_bytes, config.vectors)
            entry = entry.model_copy(update={"vectors": folder.pin(vectors)})
    built = BuiltShard(made_by=made_by, entry=entry)
    folder.write_sealed(f"{name}.note.json", built.model_dump(mode="json"))
    return built


def _name_choices(config: BuildConfig) -> list[str]:
    # Only what is not as it always was, so that versions keep the names that they had before there was a choice.
    names = [config.vectors] if config.vectors else []
    usual: dict[str, Any] = {
        "coarse_search": "flat",
        "code_layout": "plain",
        "sharding": "id",
        "shards": None,
        "duplicates": "refuse",
    }
    chosen = {name: getattr(config, name) for name, value in usual.items() if getattr(config, name) != value}
    # These were the first, and stand alone.
    names += [chosen.pop(name) for name in ("coarse_search", "code_layout") if name in chosen]
    return [*names, *(f"{name}={value}" for name, value in chosen.items())]


def _check_fit(config: BuildConfig, codes: Card, codebook: Codebook) -> None:
    if config.coarse_search == "hnsw" and codebook.kind in ("vlq", "cq"):
        raise ConfigError("coarse_search", "hnsw", f"codes of kind {codebook.kind} are searched with flat alone")
    if config.code_layout == "fastscan" and not suits_fastscan(codebook):
        found = f"these are {codebook.kind} codes of {codebook.bits} bits"
        raise ConfigError("code_layout", "fastscan", f"it takes rabitq, or pq and opq of 4 bits; {found}")
    if config.vectors and not codes.config.get("keep_vectors"):
        raise ConfigError("vectors", config.vectors, f"{config.codes} holds codes alone: encode with keep_vectors=true")
    if config.sharding == "cell" and (config.shards or 1) > codebook.cells:
        raise ConfigError("shards", config.shards, f"by cell there are {codebook.cells} at most, one a cell")
    written_with = codes.facts["codebook_fingerprint"]
    if written_with != codebook.fingerprint:
        raise ArtefactError(
            config.codes, f"its codes were written with codebook {written_with}, but this one is {codebook.fingerprint}"
        )


def _model_card(config: BuildConfig) -> Card:
    return open_card(Folder(str(config.model)), "model")


def _build_shards(
    config: BuildConfig, folder: Folder, codes: Card, codebook: Codebook, made_by: str, progress: Progress
) -> list[BuiltShard]:
    count = _count_shards(config, codes, codebook)
    built = {
        note.entry.name: note for note in find_notes(folder, BuiltShard, count, made_by, config.resources).values()
    }
    if (before := len(built)) < count:
        start_session(config.resources.cpus)
        portions = [part for part in _cut_corpus(config, codes, codebook, progress) if part.name not in built]
        calls = [(config, folder, portion, made_by) for portion in portions]
        draw = functools.partial(_draw, progress, "build", before, count)
        built |= {shard.entry.name: shard for shard in _run_tasks(config, build_shard, calls, draw)}
    shards = [built[name_shard(shard)] for shard in range(count)]
    dropped = codes.facts["rows"] - sum(shard.entry.rows for shard in shards)
    progress("build", count, count, f"{dropped} rows of repeated ids left out" if dropped else "shards")
    return shards


def _count_shards(config: BuildConfig, codes: Card, codebook: Codebook) -> int:
    if config.sharding == "cell":
        return min(config.shards or len(codes.facts["shards"]), codebook.cells)
    return len(codes.facts["shards"]) if config.shards is None else min(config.shards, codes.facts["rows"])


def _cut_corpus(config: BuildConfig, codes: Card, codebook: Codebook, progress: Progress) -> list[Portion]:
    """Check the files of codes, leave out what repeats an id, and share the rows among the shards."""
    entries = [codes.entry(f"{shard['name']}.parquet") for shard in codes.facts["shards"]]
    calls: list[tuple[Any, ...]] = [(config.codes, entry, codebook.fingerprint) for entry in entries]
    surveys = _run_tasks(config, survey_codes, calls, functools.partial(_draw, progress, "check", 0, len(entries)))
    pieces = [Piece(survey.name, 0, survey.rows) for survey in surveys]
    groups = group_files(surveys)
    calls = [(config.codes, [pieces[n] for n in group], config.duplicates, config.room_bytes) for group in groups]
    found = _run_tasks(config, find_repeats, calls, functools.partial(_draw, progress, "ids", 0, len(calls)))
    for group, rows in zip(groups, found, strict=True):
        for number, dropped in zip(group, rows, strict=True):
            pieces[number] = replace(pieces[number], dropped=dropped)
    if config.sharding == "id":
        portions = cut_by_id(config.codes, pieces, config.shards)
    else:
        calls = [(Portion("", config.codes, (piece,), piece.rows), codebook) for piece in pieces]
        sizes = _run_tasks(config, count_lists, calls, functools.partial(_draw, progress, "cells", 0, len(calls)))
        portions = cut_by_cell(config.codes, pieces, _count_shards(config, codes, codebook), sum(sizes), codebook)
    _check_room(config, codes, portions)
    return portions


def _check_room(config: BuildConfig, codes: Card, portions: list[Portion]) -> None:
    longest = max(portions, key=lambda portion: portion.rows)
    least = (longest.rows * ID_BYTES + READ_BYTES + _LEAST_ROOM) >> 20
    if (config.vectors or codes.facts["payload_columns"]) and config.memory_mb <= least:
        held = f"{longest.name} holds the ids of {longest.rows} rows to keep vectors or payload in their order"
        raise ConfigError("memory_mb", config.memory_mb, f"{held}: give {least + 1}, or more shards")


def _run_tasks(
    config: BuildConfig, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], draw: Callable[[int], None]
) -> list[Any]:
    draw(0)
    return run_tasks(work, calls, config.resources, ended=lambda count, result: draw(count))


def _draw(progress: Progress, what: str, before: int, total: int, done: int) -> None:
    progress(what, before + done, total, "shards" if what == "build" else "files")


def _describe(
    config: BuildConfig, folder: Folder, version: str, codes: Card, codebook: Codebook, built: list[BuiltShard]
) -> Manifest:
    codebook.save(folder, CODEBOOK)
    model = _copy_model(config, folder) if config.model else []
    configs = {"encode": codes.config, "build": hide_keys(config.model_dump(mode="json"))}
    configs["codebook"] = open_card(Folder(config.codebook), "codebook").config
    if config.model:
        configs["train"] = _model_card(config).config
    return Manifest(
        version=version,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        made_by=built[0].made_by,
        **describe_codebook(codebook),
        rows=sum(shard.entry.rows for shard in built),
        shards=[shard.entry for shard in built],
        codebook=folder.pin(CODEBOOK),
        vectors=config.vectors,
        coarse_search=config.coarse_search,
        code_layout=config.code_layout,
        sharding=config.sharding,
        dropped=codes.facts["rows"] - sum(shard.entry.rows for shard in built),
        model=model,
        configs=configs,
        software=list_software(),
    )


def _copy_model(config: BuildConfig, folder: Folder) -> list[FileEntry]:
    source = Folder(str(config.model))
    names = [*(entry.name for entry in _model_card(config).files), name_card("model")]
    for name in names:
        folder.write_bytes(f"model/{name}", source.read_bytes(name))
    return [folder.pin(f"model/{name}") for name in names]


def list_software() -> dict[str, str]:
    """Give the versions of the packages that decide what is built."""
    found: dict[str, Any] = {}
    for name in _SOFTWARE:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
