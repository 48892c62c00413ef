"""The compact stage: what was written over a version becomes part of the next, and rows of a corpus are added to it.

New rows are encoded by the codebook that the version has and become shards of their own; rows that are gone leave
theirs; columns that changed are written down. Nothing else is encoded, and shards in which nothing changed are taken
over as they are. The version that comes of it holds the write log up to a number; whoever serves it lays later writes
over it, so that compacting goes on beside queries and writes.

With `codes`, a folder that the encode stage wrote with the codebook of the version, all their rows are added as well.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field

from gsl_dist.artefact import Card, open_card
from gsl_dist.cluster.encode import read_codes
from gsl_dist.cluster.session import Progress, run_tasks, start_session, stay_quiet
from gsl_dist.codebook import IdArray
from gsl_dist.config import Location, Resources, Strict, fingerprint_config
from gsl_dist.errors import ArtefactError, ConfigError, DataError
from gsl_dist.index.log import WriteLog
from gsl_dist.index.manifest import (
    VERSION_NAME,
    Manifest,
    ShardEntry,
    list_versions,
    open_codebook,
    open_version,
    promote_version,
    publish_version,
    version_folder,
)
from gsl_dist.index.overlay import Overlay, read_overlay
from gsl_dist.index.portions import name_shard
from gsl_dist.index.revise import Changes, NewRows, find_present, revise_shard, write_rows
from gsl_dist.quantizers import open_quantizer
from gsl_dist.storage import Folder

_CHUNK_ROWS = 65_536


class CompactConfig(Strict):
    """Makes the next version of an index from one that is there, what was written over it, and codes to add."""

    index: Location = Field(description="the index folder")
    version: str | None = Field(default=None, description="the version to start from; None: the promoted one")
    name: str | None = Field(default=None, pattern=f"^{VERSION_NAME}$", description="None: named after its content")
    codes: Location | None = Field(default=None, description="codes whose rows are added; None: what was written alone")
    duplicates: Literal["refuse", "replace"] = Field(
        default="refuse", description="codes of an id that the version has: an error, or they take its place"
    )
    promote: bool = Field(default=True, description="let it be the version that is served next")
    forget: bool = Field(default=False, description="remove commits of the write log that no version needs any more")
    resources: Resources = Resources()


@dataclass(frozen=True)
class Plan:
    """What the next version is made of.

    Args:
        config: what was asked for.
        manifest: the version to start from.
        seq: the last commit that becomes part of it.
        added: the ids of codes that are added, ascending.
        target: its name.
        made_by: the fingerprint of all that decides its content.
    """

    config: CompactConfig
    manifest: Manifest
    seq: int
    added: IdArray
    target: str
    made_by: str

    @property
    def index(self) -> Folder:
        """Give the index folder."""
        return Folder(self.config.index)


def run_compact(config: CompactConfig, progress: Progress = stay_quiet) -> Manifest:
    """Make the next version and, unless told otherwise, promote it; where there is nothing to do, it is the same.

    Raises:
        ConfigError: the name is taken by another content, or codes lack what the version keeps.
        DataError: an id of the codes is in the version already.
        ArtefactError: the version, the log or the codes are damaged, or of another codebook.
    """
    index = Folder(config.index)
    manifest, log = open_version(index, config.version), WriteLog(index)
    overlay, codes = read_overlay(index, manifest, log), _open_codes(config, manifest)
    made = manifest
    if overlay.seq != manifest.log_seq or codes is not None:
        made_by = fingerprint_config(manifest.made_by, manifest.version, overlay.seq, codes and codes.made_by)
        target = config.name or f"v-{made_by[:12]}"
        plan = Plan(config, manifest, overlay.seq, _read_added_ids(config, codes), target, made_by)
        made = _find_made(plan) or _make_version(plan, overlay, codes, progress)
    if config.promote:
        promote_version(index, made.version)
    if config.forget:
        log.forget(min(open_version(index, name).log_seq for name in list_versions(index)))
    return made


def revise(plan: Plan, entry: ShardEntry, changes: Changes) -> ShardEntry:
    """Write one shard as it is after changes; knows no Ray."""
    return revise_shard(plan.index, plan.manifest, entry, changes, plan.target)


def present(plan: Plan, entry: ShardEntry) -> IdArray:
    """Give those ids of codes that a shard holds; knows no Ray."""
    return find_present(plan.index, plan.manifest, entry, plan.added)


def add_log(plan: Plan, name: str) -> ShardEntry:
    """Write the new rows of the log as a shard; knows no Ray."""
    torch.set_num_threads(plan.config.resources.threads)
    codebook, overlay = (
        open_codebook(plan.index, plan.manifest),
        read_overlay(plan.index, plan.manifest, until=plan.seq),
    )
    ids_n, vectors_nD, payload = overlay.dump()
    stays_n = ~np.isin(ids_n, plan.added)
    ids_n, vectors_nD, payload = ids_n[stays_n], vectors_nD[stays_n], payload.filter(stays_n)
    quantizer, lists, codes = open_quantizer(codebook), [], []
    for start in range(0, len(ids_n), _CHUNK_ROWS):
        lists_c, words_cM = quantizer.encode(torch.from_numpy(vectors_nD[start : start + _CHUNK_ROWS]), codebook)
        lists.append(lists_c.cpu().numpy().astype(np.int64))
        codes.append(codebook.pack(words_cM.cpu().numpy()))
    kept = payload if payload.num_columns > 1 else None
    rows = NewRows(ids_n, np.concatenate(lists), np.concatenate(codes), vectors_nD, kept)
    return write_rows(plan.index, plan.manifest, name, rows, plan.target)


def add_codes(plan: Plan, name: str, source: str) -> ShardEntry:
    """Write a file of codes as a shard; knows no Ray."""
    found = read_codes(Folder(str(plan.config.codes)), source, open_codebook(plan.index, plan.manifest))
    order_n = np.argsort(found.ids)
    payload = found.payload.add_column(0, "id", [found.ids]).take(order_n) if found.payload is not None else None
    vectors = None if found.vectors is None else found.vectors[order_n]
    rows = NewRows(found.ids[order_n], found.cells[order_n], found.codes[order_n], vectors, payload)
    return write_rows(plan.index, plan.manifest, name, rows, plan.target)


def _open_codes(config: CompactConfig, manifest: Manifest) -> Card | None:
    if config.codes is None:
        return None
    card = open_card(Folder(config.codes), "codes")
    if card.facts["codebook_fingerprint"] != manifest.fingerprint:
        found = f"its codes were written with codebook {card.facts['codebook_fingerprint']}"
        raise ArtefactError(config.codes, f"{found}, but version {manifest.version} has {manifest.fingerprint}")
    if manifest.vectors and not card.config.get("keep_vectors"):
        allowed = f"version {manifest.version} keeps vectors: encode with keep_vectors=true"
        raise ConfigError("codes", config.codes, allowed)
    return card


def _read_added_ids(config: CompactConfig, codes: Card | None) -> IdArray:
    """Give the ids of all codes, ascending: 8 bytes a row that is added."""
    if codes is None:
        return np.empty(0, np.int64)
    folder = Folder(str(config.codes))
    parts = [pq.read_table(folder.open(f"{shard['name']}.parquet"), columns=["id"]) for shard in codes.facts["shards"]]
    ids_n = np.sort(np.concatenate([part["id"].to_numpy() for part in parts]))
    twice = ids_n[1:][ids_n[1:] == ids_n[:-1]]
    if len(twice):
        raise DataError("id", int(twice[0]), f"each id may occur once in {config.codes}; {len(twice)} rows repeat one")
    return ids_n


def _find_made(plan: Plan) -> Manifest | None:
    """Give the version of that name, if it is there and holds what is asked for."""
    if plan.target not in list_versions(plan.index):
        return None
    made = open_version(plan.index, plan.target)
    if made.made_by != plan.made_by:
        raise ConfigError("name", plan.target, "a version is immutable and this one holds other rows; choose another")
    return made


def _make_version(plan: Plan, overlay: Overlay, codes: Card | None, progress: Progress) -> Manifest:
    start_session(plan.config.resources.cpus)
    hidden = np.array(sorted(overlay.hidden), np.int64)
    changes = Changes(np.union1d(hidden, _find_replaced(plan, overlay, hidden)), tuple(overlay.patches()))
    entries = _run(plan, revise, [(plan, entry, changes) for entry in plan.manifest.shards], "shards", progress)
    # Where codes have the id of a row that was written, they are what was decided last.
    is_new = len(np.setdiff1d(overlay.dump()[0], plan.added)) > 0
    first = max(int(entry.name.rpartition("-")[2]) for entry in plan.manifest.shards) + 1
    entries += _run(plan, add_log, [(plan, name_shard(first))] if is_new else [], "new rows", progress)
    named = enumerate((shard["name"] for shard in codes.facts["shards"]) if codes else (), first + is_new)
    calls = [(plan, name_shard(number), source) for number, source in named]
    entries += _run(plan, add_codes, calls, "new shards", progress)
    return _publish(plan, [entry for entry in entries if entry.rows])


def _find_replaced(plan: Plan, overlay: Overlay, hidden: IdArray) -> IdArray:
    """Give the ids of codes that the version's shards have already, if codes may take their place."""
    if len(plan.added) == 0:
        return plan.added
    calls = [(plan, entry) for entry in plan.manifest.shards]
    found = np.concatenate(run_tasks(present, calls, plan.config.resources))
    visible = np.union1d(np.setdiff1d(found, hidden), np.intersect1d(plan.added, overlay.dump()[0]))
    if len(visible) and plan.config.duplicates == "refuse":
        taken = f"version {plan.manifest.version} has {len(visible)} of these ids"
        raise DataError("id", int(visible[0]), f"{taken}; duplicates=replace lets codes take their place")
    return found


def _run(
    plan: Plan, work: Callable[..., ShardEntry], calls: Sequence[tuple[Any, ...]], what: str, progress: Progress
) -> list[ShardEntry]:
    def draw(done: int, _: ShardEntry) -> None:
        progress("compact", done, len(calls), what)

    return run_tasks(work, calls, plan.config.resources, ended=draw)


def _publish(plan: Plan, entries: list[ShardEntry]) -> Manifest:
    if not entries:
        raise DataError("index", plan.config.index, "every row was deleted, and a version without rows answers nothing")
    manifest = plan.manifest
    source, folder = version_folder(plan.index, manifest.version), version_folder(plan.index, plan.target)
    for file in (manifest.codebook, *manifest.model):
        folder.take(source, file)
    made = manifest.model_copy(
        update={
            "version": plan.target,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "made_by": plan.made_by,
            "rows": sum(entry.rows for entry in entries),
            "shards": entries,
            # A shard of new rows has rows of every cell.
            "sharding": "id",
            "log_seq": plan.seq,
            "configs": manifest.configs | {"compact": json.loads(plan.config.model_dump_json())},
        }
    )
    publish_version(plan.index, made)
    return made
