"""An index is a folder of immutable versions and one small pointer to the version that is served.

    <index>/CURRENT.json                       {"version": "...", "digest": "..."}
    <index>/versions/<version>/manifest.json   written last: no manifest, no version
    <index>/versions/<version>/codebook.safetensors
    <index>/versions/<version>/shard-00000.faiss, payload-00000.parquet, ...
    <index>/versions/<version>/model/...       the encoder that queries pass through, if there is one

The manifest pins every file by size and SHA-256, and itself by a digest, and names the codebook's fingerprint: the
same in every shard. Rolling back is promoting the version before.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from pydantic import Field, ValidationError

from gsl_dist.artefact import CODEBOOK as CODEBOOK
from gsl_dist.codebook import Codebook
from gsl_dist.config import Strict
from gsl_dist.errors import ArtefactError, BadInput
from gsl_dist.index.refine import Precision
from gsl_dist.index.shards import CoarseSearch, CodeLayout
from gsl_dist.storage import FileEntry, Folder

MANIFEST, POINTER = "manifest.json", "CURRENT.json"
VERSION_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class ShardEntry(Strict):
    """One shard of a version: its index file, and its payload and vectors where the version has them."""

    name: str
    rows: int = Field(ge=0)
    index: FileEntry
    payload: FileEntry | None = None
    vectors: FileEntry | None = None


class Point(Strict):
    """What it took to find a share of the true neighbours, as `gsl tune` measured it.

    `latency_ms` is that of one query at a time in one process, without a service around it.
    """

    k: int = Field(ge=1)
    recall: float = Field(ge=0, le=1)
    probes: int = Field(ge=1)
    refine: int = Field(ge=1)
    latency_ms: float = Field(ge=0)


class Manifest(Strict):
    """Everything that a version holds; `vectors` is how exactly it keeps these beside the codes, if it does.

    `sharding` tells whether a shard is a run of the corpus (`id`) or all rows of its own cells (`cell`), and `dropped`
    how many rows were left out because another has their id.

    `bytes_per_item` counts the code alone; the cell is implied by the list a code lies in, and faiss keeps eight more
    bytes for the id. `log_seq` is the last write that the version holds: later ones lie over it (`gsl_dist.index.log`).
    """

    version: str
    created: str
    made_by: str = ""
    fingerprint: str
    metric: str = "l2"
    kind: str = "pq"
    rotated: bool = False
    dim: int
    cells: int
    edge_count: int = 1
    sub_vectors: int
    bits: int
    residual: bool
    bytes_per_item: int
    vectors: Precision | None = None
    coarse_search: CoarseSearch = "flat"
    code_layout: CodeLayout = "plain"
    sharding: str = "id"
    dropped: int = 0
    rows: int
    log_seq: int = 0
    points: list[Point] = []
    shards: list[ShardEntry]
    codebook: FileEntry
    model: list[FileEntry] = []
    configs: dict[str, Any] = {}
    software: dict[str, str] = {}

    @property
    def lists(self) -> int:
        """Give the number of lists that codes lie in: cells, or regions where lines cut them."""
        return self.cells * self.edge_count

    @property
    def space(self) -> str:
        """Name the space that vectors are in: the encoder they come from and their dimension and metric."""
        encoder = hashlib.sha256(json.dumps([entry.sha256 for entry in self.model]).encode()).hexdigest()[:16]
        return f"{encoder if self.model else 'given'}-{self.dim}-{self.metric}"

    @property
    def files(self) -> list[FileEntry]:
        """List every file of the version but the manifest."""
        shards = [entry for shard in self.shards for entry in (shard.index, shard.payload, shard.vectors) if entry]
        return [self.codebook, *self.model, *shards]


def describe_codebook(codebook: Codebook) -> dict[str, Any]:
    """Give what the manifest of a version tells of its codebook."""
    return {
        "fingerprint": codebook.fingerprint,
        "metric": codebook.metric,
        "kind": codebook.kind,
        "rotated": codebook.rotation is not None,
        "dim": codebook.dim,
        "cells": codebook.cells,
        "edge_count": codebook.edge_count,
        "sub_vectors": codebook.sub_vectors,
        "bits": codebook.bits,
        "residual": codebook.residual,
        "bytes_per_item": codebook.code_bytes,
    }


def version_folder(index: Folder, version: str) -> Folder:
    """Name the folder of a version.

    Raises:
        BadInput: the name is no version name.
    """
    if not re.fullmatch(VERSION_NAME, version):
        raise BadInput("version", version, f"a version name must match {VERSION_NAME}", status=404)
    return index.child(f"versions/{version}")


def publish_version(index: Folder, manifest: Manifest) -> None:
    """Make a version exist: write its manifest, after everything it names is in place.

    Raises:
        BadInput: a version of that name exists; versions are immutable.
    """
    folder = version_folder(index, manifest.version)
    if folder.exists(MANIFEST):
        raise BadInput("version", manifest.version, "a version is immutable and this one exists; choose another name")
    content = manifest.model_dump(mode="json")
    folder.sweep()
    folder.write_sealed(MANIFEST, content)


def note_points(index: Folder, manifest: Manifest, points: list[Point]) -> Manifest:
    """Keep operating points in the manifest of a version; nothing else of a version ever changes.

    Raises:
        BadInput: there is no such version.
    """
    noted = open_version(index, manifest.version).model_copy(update={"points": points})
    content = noted.model_dump(mode="json")
    version_folder(index, manifest.version).write_sealed(MANIFEST, content)
    return noted


def list_versions(index: Folder) -> list[str]:
    """List the versions that have a manifest, by name."""
    versions = index.child("versions")
    return [name for name in versions.names(folders=True) if versions.child(name).exists(MANIFEST)]


def current_version(index: Folder) -> str | None:
    """Give the name of the version that is served, if one was promoted.

    Raises:
        ArtefactError: the pointer is damaged.
    """
    if not index.exists(POINTER):
        return None
    content = index.read_sealed(POINTER, always=False)
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, str) or len(content) > 1 or not re.fullmatch(VERSION_NAME, version):
        raise ArtefactError(index.path(POINTER), "it does not name a version; promoting one mends it")
    return version


def open_version(index: Folder, version: str | None = None) -> Manifest:
    """Read a version's manifest and check it against its own digest.

    Args:
        index: the index folder.
        version: its name; the promoted one if not given.

    Raises:
        BadInput: there is no such version, or none was promoted.
        ArtefactError: the manifest is cut short or altered.
    """
    name = version if version is not None else current_version(index)
    known = ", ".join(list_versions(index)) or "none"
    if name is None:
        raise BadInput("version", None, f"none is promoted in {index.path()}; versions here: {known}", status=404)
    folder = version_folder(index, name)
    if not folder.exists(MANIFEST):
        raise BadInput("version", name, f"{index.path()} has no such version; versions here: {known}", status=404)
    try:
        manifest = Manifest.model_validate(folder.read_sealed(MANIFEST))
    except ValidationError as error:
        raise ArtefactError(folder.path(MANIFEST), f"it is not a manifest ({type(error).__name__})") from error
    if manifest.version != name:
        raise ArtefactError(folder.path(MANIFEST), f"its name differs: it is that of version {manifest.version}")
    return manifest


def open_codebook(index: Folder, manifest: Manifest) -> Codebook:
    """Read the codebook of a version.

    Raises:
        ArtefactError: it is altered, or is not the one the version was built with.
    """
    folder = version_folder(index, manifest.version)
    folder.check(manifest.codebook)
    codebook = Codebook.load(folder, manifest.codebook.name)
    if codebook.fingerprint != manifest.fingerprint:
        raise ArtefactError(
            folder.path(manifest.codebook.name),
            f"codebook {codebook.fingerprint} does not fit a version built with {manifest.fingerprint}",
        )
    return codebook


def promote_version(index: Folder, version: str) -> Manifest:
    """Let a version be the one that is served, and give its manifest.

    Raises:
        BadInput: there is no such version.
    """
    manifest = open_version(index, version)
    index.write_sealed(POINTER, {"version": version})
    return manifest


def verify_version(index: Folder, version: str | None = None) -> list[ArtefactError]:
    """Check every file of a version against the manifest and give what is wrong; empty if all is well.

    Raises:
        BadInput, ArtefactError: the version does not exist, or the manifest itself is damaged.
    """
    manifest = open_version(index, version)
    folder, faults = version_folder(index, manifest.version), []
    for entry in manifest.files:
        try:
            folder.check(entry)
        except ArtefactError as fault:
            faults.append(fault)
    try:
        open_codebook(index, manifest)
    except ArtefactError as fault:
        if fault.path not in {known.path for known in faults}:
            faults.append(fault)
    return faults
