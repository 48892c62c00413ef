"""The build stage: a task a shard turns codes into a file of lists; the manifest comes last, then the pointer.

Codes and cells go straight into the inverted lists, nothing is encoded again. Each finished shard leaves a note, so
that a relaunch builds only what is missing. No other process sees the version before its manifest is there.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
from pydantic import Field, ValidationError

from gsl_dist.artefact import Card, open_card
from gsl_dist.cluster.codebook import load_codebook
from gsl_dist.cluster.encode import CodeTable, read_codes
from gsl_dist.cluster.model import CARD
from gsl_dist.cluster.session import Progress, own_errors, start_session, stay_quiet
from gsl_dist.codebook import Codebook
from gsl_dist.config import Location, Resources, Strict, fingerprint_config
from gsl_dist.errors import ArtefactError, ConfigError, DataError
from gsl_dist.index.lists import make_lists, name_file
from gsl_dist.index.manifest import (
    CODEBOOK,
    VERSION_NAME,
    Manifest,
    ShardEntry,
    describe_codebook,
    list_versions,
    open_version,
    promote_version,
    publish_version,
    version_folder,
)
from gsl_dist.index.refine import Precision, keep_vectors
from gsl_dist.index.shards import CoarseSearch, CodeLayout, suits_fastscan
from gsl_dist.storage import FileEntry, Folder

_SOFTWARE = ("faiss-cpu", "faiss-gpu", "torch", "ray", "numpy", "pyarrow", "gsl_dist")


class BuildConfig(Strict):
    """Builds a version of an index from a folder of codes."""

    codes: Location
    codebook: Location
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
    promote: bool = True
    resources: Resources = Resources()


class BuiltShard(Strict):
    """What is known of a finished shard; the ids tell whether two shards may share one."""

    made_by: str
    entry: ShardEntry
    first_id: int
    last_id: int


def run_build(config: BuildConfig, progress: Progress = stay_quiet) -> Manifest:
    """Make a version and, unless told otherwise, promote it; a relaunch builds only the shards that are missing.

    Raises:
        ArtefactError: codes are damaged, or were written with another codebook.
        ConfigError: the version's name is taken by another content.
        DataError: ids occur twice.
    """
    codes, codebook = open_card(Folder(config.codes), "codes", verify=False), load_codebook(config.codebook)
    _check_fit(config, codes, codebook)
    parts = [codes.made_by, codebook.fingerprint, config.model and _model_card(config).made_by]
    made_by = fingerprint_config(*parts, *([config.vectors] if config.vectors else []), *_name_search(config))
    version, index = config.version or f"v-{made_by[:12]}", Folder(config.index)
    if version in list_versions(index):
        manifest = open_version(index, version)
        if manifest.made_by != made_by:
            raise ConfigError("version", version, "a version is immutable and this one holds other codes; name another")
    else:
        folder = version_folder(index, version)
        built = _build_shards(config, folder, codes, made_by, progress)
        manifest = _describe(config, folder, version, codes, codebook, built)
        publish_version(index, manifest)
    return promote_version(index, version) if config.promote else manifest


def build_shard(config: BuildConfig, folder: Folder, name: str, entry: FileEntry, made_by: str) -> BuiltShard:
    """Build one shard file and its payload from its codes; knows no Ray.

    Raises:
        ArtefactError, DataError: the codes are damaged, of another codebook, or repeat an id.
    """
    source, codebook = Folder(config.codes), load_codebook(config.codebook)
    source.check(entry)
    table = read_codes(source, name, codebook)
    file = name_file(name, codebook)
    with folder.whole(file) as path:
        make_lists(codebook, table.ids, table.cells, table.codes, config.coarse_search, config.code_layout).write(path)
    payload = None
    if table.payload is not None:
        payload_name = f"{name.replace('shard', 'payload')}.parquet"
        order = np.argsort(table.ids)
        rows = table.payload.add_column(0, "id", [table.ids]).take(order)
        with folder.whole(payload_name) as path:
            pq.write_table(rows, path)
        payload = folder.pin(payload_name)
    vectors = _keep_vectors(config.vectors, folder, name, table) if config.vectors else None
    index = folder.pin(file)
    shard_entry = ShardEntry(name=name, rows=len(table.ids), index=index, payload=payload, vectors=vectors)
    first, last = (int(table.ids.min()), int(table.ids.max())) if len(table.ids) else (0, -1)
    built = BuiltShard(made_by=made_by, entry=shard_entry, first_id=first, last_id=last)
    folder.write_json(f"{name}.note.json", built.model_dump(mode="json"))
    return built


def _name_search(config: BuildConfig) -> list[str]:
    # Versions without a graph or blocks keep the names that they had before there were any.
    return [choice for choice in (config.coarse_search, config.code_layout) if choice not in ("flat", "plain")]


def _keep_vectors(precision: Precision, folder: Folder, name: str, table: CodeTable) -> FileEntry:
    file = f"{name.replace('shard', 'vectors')}.{precision}"
    assert table.vectors is not None, "codes without vectors were refused"
    with folder.whole(file) as path:
        keep_vectors(table.ids, table.vectors, precision).write(path)
    return folder.pin(file)


def _check_fit(config: BuildConfig, codes: Card, codebook: Codebook) -> None:
    if config.coarse_search == "hnsw" and codebook.kind in ("vlq", "cq"):
        raise ConfigError("coarse_search", "hnsw", f"codes of kind {codebook.kind} are searched with flat alone")
    if config.code_layout == "fastscan" and not suits_fastscan(codebook):
        found = f"these are {codebook.kind} codes of {codebook.bits} bits"
        raise ConfigError("code_layout", "fastscan", f"it takes rabitq, or pq and opq of 4 bits; {found}")
    if config.vectors and not codes.config.get("keep_vectors"):
        raise ConfigError("vectors", config.vectors, f"{config.codes} holds codes alone: encode with keep_vectors=true")
    written_with = codes.facts["codebook_fingerprint"]
    if written_with != codebook.fingerprint:
        raise ArtefactError(
            config.codes, f"its codes were written with codebook {written_with}, but this one is {codebook.fingerprint}"
        )


def _model_card(config: BuildConfig) -> Card:
    return open_card(Folder(str(config.model)), "model")


def _build_shards(
    config: BuildConfig, folder: Folder, codes: Card, made_by: str, progress: Progress
) -> list[BuiltShard]:
    names = [shard["name"] for shard in codes.facts["shards"]]
    done = {name: note for name in names if (note := _note(folder, name, made_by))}
    missing = [name for name in names if name not in done]
    if missing:
        start_session(config.resources.cpus)
        work = ray.remote(num_cpus=config.resources.cpus)(build_shard)
        with own_errors():
            waiting = {
                work.remote(config, folder, name, codes.entry(f"{name}.parquet"), made_by): name for name in missing
            }
            while waiting:
                progress("build", len(done), len(names), "shards")
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                done[waiting.pop(ready)] = ray.get(ready)
    progress("build", len(names), len(names), "shards")
    built = [done[name] for name in names]
    _refuse_shared_ids(config, built)
    return built


def _refuse_shared_ids(config: BuildConfig, built: list[BuiltShard]) -> None:
    # Shards whose ids lie apart cannot share one; only those that overlap are read and compared.
    ordered = sorted((shard for shard in built if shard.entry.rows), key=lambda shard: shard.first_id)
    reach, held = -1, np.empty(0, np.int64)
    for shard in ordered:
        overlaps = shard.first_id <= reach
        follower = ordered[ordered.index(shard) + 1 :][:1]
        if not overlaps and not (follower and follower[0].first_id <= shard.last_id):
            reach, held = shard.last_id, np.empty(0, np.int64)
            continue
        with Folder(config.codes).local(f"{shard.entry.name}.parquet") as path:
            ids = pq.read_table(path, columns=["id"])["id"].to_numpy()
        shared = np.intersect1d(held, ids)
        if len(shared):
            raise DataError("id", int(shared[0]), f"each id may occur once; shards share {len(shared)} of them")
        held, reach = np.concatenate([held, ids]) if overlaps else ids, max(reach, shard.last_id)


def _note(folder: Folder, name: str, made_by: str) -> BuiltShard | None:
    if not folder.exists(f"{name}.note.json"):
        return None
    try:
        built = BuiltShard.model_validate(folder.read_json(f"{name}.note.json"))
        for entry in (built.entry.index, built.entry.payload, built.entry.vectors):
            if entry:
                folder.check(entry)
    except (ValidationError, ArtefactError):
        return None
    return built if built.made_by == made_by else None


def _describe(
    config: BuildConfig, folder: Folder, version: str, codes: Card, codebook: Codebook, built: list[BuiltShard]
) -> Manifest:
    codebook.save(folder, CODEBOOK)
    model = _copy_model(config, folder) if config.model else []
    configs = {"encode": codes.config, "build": json.loads(config.model_dump_json())}
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
        model=model,
        configs=configs,
        software=list_software(),
    )


def _copy_model(config: BuildConfig, folder: Folder) -> list[FileEntry]:
    source = Folder(str(config.model))
    names = [*(entry.name for entry in _model_card(config).files), CARD]
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
