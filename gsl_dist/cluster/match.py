"""The match stage: for every row of a corpus its nearest items of a version, as Parquet, a file a shard of queries.

A shard of queries is a range of rows and a task of Ray; it is searched batch by batch, in the order of the version's
lists where that is faster (`gsl_dist.index.sweep`), within a given memory (`gsl_dist.index.bulk`). A finished shard
leaves a note; a relaunch does only those without one and ends with the same bytes; the card comes last.

Where the queries are the version's own items, each finds others but not itself: a join of the nearest. The pairs nearer
than `within` are the near duplicates, and what they connect are groups, which the driver finds from the files. It holds
a note a shard, and for groups at most 50 bytes for every item that has company (`gsl_dist.index.groups`).

A version is searched as it was made: what was written over it since is seen once it is compacted.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any, Literal

import faiss
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from gsl_dist.artefact import Card, find_finished, publish_card
from gsl_dist.cluster.asked import Asked, CorpusQueries, OwnQueries, Queries, gather_rows, measure_queries
from gsl_dist.cluster.session import Progress, run_tasks, start_session, stay_quiet
from gsl_dist.cluster.whole import Note, find_notes, refuse_damaged, refuse_lost
from gsl_dist.codebook import IdArray
from gsl_dist.config import Location, Resources, Strict, fingerprint_config
from gsl_dist.data import CorpusConfig, split_rows
from gsl_dist.errors import ConfigError, QueryError
from gsl_dist.filters import list_columns, parse_where
from gsl_dist.hits import NO_ID, Effort, Hits, cut_within, show_distances
from gsl_dist.index.answers import Form, drop_own, make_schema, make_table, read_pairs
from gsl_dist.index.bulk import CodedSearch, ExactSearch, measure_batch, measure_shard, plan_passes
from gsl_dist.index.groups import find_groups
from gsl_dist.index.manifest import Manifest, open_version, version_folder
from gsl_dist.index.overlay import read_schema
from gsl_dist.index.search import MAX_K, check_effort
from gsl_dist.index.sweep import UNSWEPT, suits_sweep
from gsl_dist.storage import FileEntry, Folder

GROUPS = "groups.parquet"


class MatchConfig(Strict):
    """Finds the nearest items of a version for every row of a corpus, or for its own items."""

    index: Location = Field(description="the index folder")
    version: str | None = Field(default=None, description="None: the promoted one")
    queries: CorpusConfig | None = Field(description="what to look for; null: the version's own items, each but itself")
    output: Location = Field(description="the folder of answers to make")
    k: int = Field(default=10, description="neighbours wanted")
    probes: int | None = Field(default=None, description="lists to look into; None: what is usual for the version")
    refine: int | None = Field(default=None, description="candidates for each hit, ranked by the vectors kept")
    recall: float | None = Field(default=None, description="instead of probes and refine, as gsl tune measured")
    where: dict[str, Any] | None = Field(default=None, description="which items may be hits")
    exact: bool = Field(default=False, description="compare with every vector that the version keeps")
    within: float | None = Field(
        default=None, description="hits have this squared distance at most, or this inner product or cosine at least"
    )
    groups: bool = Field(default=False, description="of own items: what pairs within `within` connect, too")
    form: Form = Field(default="lists", description="lists: a row for each query; rows: a row for each hit")
    order: Literal["auto", "lists", "queries"] = Field(
        default="auto", description="lists: each is read once for all queries of a batch; auto: where that is faster"
    )
    shards: int = Field(default=1, ge=1, le=100_000, description="of queries: tasks and files")
    batch_rows: int = Field(default=16_384, ge=1, description="queries that are searched together")
    memory_mb: int = Field(
        default=2048, ge=64, description="what a task may hold, libraries and encoder apart; kept vectors are mapped"
    )
    resources: Resources = Resources()


class MatchTask(Strict):
    """What all shards of a match share, settled once.

    Args:
        config: as it was given.
        version: the version that is searched.
        made_by: a hash of all that decides the answers.
        k: neighbours to look for, one more than are wanted where a query finds itself.
        probes: None where the search is exact.
        refine: candidates for each hit.
        is_swept: whether lists are searched in their own order.
        passes: the shards of the version that are open in each pass.
    """

    config: MatchConfig
    version: str
    made_by: str
    k: int
    probes: int | None
    refine: int
    is_swept: bool
    passes: list[list[str]]

    @property
    def effort(self) -> Effort:
        """Give it as searchers take it."""
        return Effort(self.k, self.probes, self.refine, None, self.config.where)


class ShardNote(Note):
    """What is known of a finished shard of answers; `full`: queries with as many hits as were wanted."""

    name: str
    rows: int
    hits: int
    full: int
    rejects: int
    file: FileEntry
    rejects_file: FileEntry | None = None

    @property
    def files(self) -> list[FileEntry]:
        """List what was written."""
        return [entry for entry in (self.file, self.rejects_file) if entry]


def run_match(config: MatchConfig, progress: Progress = stay_quiet) -> Card:
    """Make the folder of answers that a config describes; a relaunch does only the shards that are missing.

    Raises:
        ConfigError, DataError, QueryError: settings, queries or filter cannot be used.
        ArtefactError: a file of the version is damaged.
    """
    index = Folder(config.index)
    manifest = open_version(index, config.version)
    _check_settings(config, manifest)
    queries = open_queries(config, manifest)
    task = settle_task(config, manifest, queries)
    folder = Folder(config.output)
    if done := find_finished(folder, "match", task.made_by, verify=False):
        refuse_damaged(folder, done.files, config.resources)
        return done
    ranges = split_rows(queries.rows, config.shards)
    notes = find_notes(folder, ShardNote, len(ranges), task.made_by, config.resources)
    missing = [(number, *ends) for number, ends in enumerate(ranges) if number not in notes]
    if missing:
        start_session(config.resources.workers * config.resources.cpus)
        notes |= _match_shards(task, missing, len(ranges), progress)
    return _publish(task, manifest, [notes[number] for number in range(len(ranges))], progress)


def open_queries(config: MatchConfig, manifest: Manifest) -> Queries:
    """Open what is asked for by its metadata alone.

    Raises:
        DataError: it is no corpus, or of another shape than the version takes.
    """
    index = Folder(config.index)
    if config.queries is None:
        return OwnQueries(index, manifest)
    return CorpusQueries(config.queries, index, manifest, config.resources.gpus)


def settle_task(config: MatchConfig, manifest: Manifest, queries: Queries) -> MatchTask:
    """Decide what was left open: how hard to look, in which order, and what is held at a time.

    Raises:
        QueryError: k, probes, refine, recall or where cannot be answered.
        ConfigError: memory_mb does not hold what is needed at a time.
    """
    effort = check_effort(Effort(config.k, config.probes, config.refine, config.recall), manifest)
    assert effort.refine is not None and effort.probes is not None, "both were settled"
    # Where a query is an item, it is the first that it finds.
    k = config.k + (config.queries is None)
    effort = Effort(k, effort.probes, min(effort.refine, MAX_K // k), None, config.where)
    effort = effort._replace(probes=None, refine=1) if config.exact else effort
    passes, is_swept = _plan_passes(config, manifest, effort), _suits_sweep(config, manifest, effort)
    decided = config.model_dump(mode="json", exclude={"index", "version", "queries", "output", "resources"})
    settled = [effort.k, effort.probes, effort.refine, passes, is_swept]
    return MatchTask(
        config=config,
        version=manifest.version,
        made_by=fingerprint_config(decided, queries.fingerprint, [file.sha256 for file in manifest.files], settled),
        k=k,
        probes=effort.probes,
        refine=effort.refine or 1,
        is_swept=is_swept,
        passes=passes,
    )


class Matcher:
    """Answers one shard of queries after another; knows no Ray."""

    def __init__(self, task: MatchTask) -> None:
        faiss.omp_set_num_threads(task.config.resources.threads)
        index = Folder(task.config.index)
        self.task, self.manifest = task, open_version(index, task.version)
        self.queries = open_queries(task.config, self.manifest)
        self.search: CodedSearch | ExactSearch
        if task.config.exact:
            self.search = ExactSearch(index, self.manifest, task.k, task.config.where)
        else:
            self.search = CodedSearch(index, self.manifest, task.effort, task.passes, is_swept=task.is_swept)

    def match_shard(self, number: int, start: int, stop: int) -> ShardNote:
        """Write the answers to queries [start, stop), then the note that says so."""
        config = self.task.config
        folder, name = Folder(config.output), f"shard-{number:05d}"
        rejects: list[dict[str, Any]] = []
        rows, hits, full = 0, 0, 0
        with folder.whole(f"{name}.parquet") as path, pq.ParquetWriter(path, self._schema) as writer:
            for asked in gather_rows(self.queries.read(start, stop), config.batch_rows):
                found = self.find(asked)
                writer.write_table(make_table(asked.ids, found, config.form))
                is_hit = found.ids != NO_ID
                rows, hits, full = rows + len(found), hits + int(is_hit.sum()), full + int(is_hit[:, -1].sum())
                rejects += asked.rejects
        rejects_file = None
        if rejects:
            folder.write_json(f"rejects-{number:05d}.json", rejects)
            rejects_file = folder.pin(f"rejects-{number:05d}.json")
        note = ShardNote(
            name=name,
            made_by=self.task.made_by,
            rows=rows,
            hits=hits,
            full=full,
            rejects=len(rejects),
            file=folder.pin(f"{name}.parquet"),
            rejects_file=rejects_file,
        )
        folder.write_sealed(f"{name}.note.json", note.model_dump(mode="json"))
        return note

    def find(self, asked: Asked) -> Hits:
        """Give the hits of queries as users see them."""
        config, hits = self.task.config, self.search.find(asked.vectors)
        if config.queries is None:
            hits = drop_own(asked.ids, hits, config.k)
        return cut_within(show_distances(hits, self.manifest.metric), config.within, self.manifest.metric)

    @property
    def _schema(self) -> pa.Schema:
        return make_schema(self.task.config.form, self.task.config.k)


def match_shard(task_json: str, number: int, start: int, stop: int) -> ShardNote:
    """Answer a shard of queries, by the searcher that this process had for the shard before if it is the same."""
    return _hold_matcher(task_json).match_shard(number, start, stop)


@functools.lru_cache(maxsize=1)
def _hold_matcher(task_json: str) -> Matcher:
    return Matcher(MatchTask.model_validate_json(task_json))


def _check_settings(config: MatchConfig, manifest: Manifest) -> None:
    if config.exact:
        _check_exact(config, manifest)
    if config.order == "lists" and manifest.kind in UNSWEPT:
        raise ConfigError("order", "lists", f"codes of kind {manifest.kind} are searched query by query alone")
    if config.queries is None and config.k >= MAX_K:
        raise ConfigError("k", config.k, f"of own items {MAX_K - 1} at most, as each finds itself")
    if config.within is not None:
        _check_within(config.within, manifest.metric)
    if config.groups and (config.queries is not None or config.within is None or config.where is not None):
        raise ConfigError("groups", True, "they are of all own items: leave queries and where null, and give within")
    if config.where is not None:
        _check_columns(config, manifest)


def _check_exact(config: MatchConfig, manifest: Manifest) -> None:
    if not manifest.vectors:
        allowed = f"version {manifest.version} keeps no vectors: it was built without `vectors`"
        raise ConfigError("exact", True, allowed)
    for name, usual in {"probes": None, "refine": None, "recall": None, "order": "auto"}.items():
        if getattr(config, name) != usual:
            raise ConfigError(name, getattr(config, name), "exact search looks at all vectors: leave it out")


def _check_within(within: float, metric: str) -> None:
    if metric == "l2" and within < 0:
        raise ConfigError("within", within, "a squared distance is 0 or more")
    if metric == "cosine" and not -1 <= within <= 1:
        raise ConfigError("within", within, "a cosine is -1 to 1")


def _check_columns(config: MatchConfig, manifest: Manifest) -> None:
    """Let a filter pass whose columns are there; their types are checked by who reads them."""
    known = read_schema(version_folder(Folder(config.index), manifest.version), manifest).names
    for name in sorted(list_columns(parse_where(config.where)) - set(known)):
        raise QueryError(f"where.{name}", name, f"the columns of this version are {', '.join(known)}")


def _plan_passes(config: MatchConfig, manifest: Manifest, effort: Effort) -> list[list[str]]:
    batch = measure_batch(manifest, effort, config.batch_rows) + measure_queries(manifest, config.queries is None)
    sizes = [measure_shard(shard, effort) for shard in manifest.shards]
    least = batch + (sum(sizes) if config.exact else max(sizes))
    if least > config.memory_mb << 20:
        held = f"a batch takes {batch >> 20}, and what is searched at a time {(least - batch) >> 20}"
        raise ConfigError("memory_mb", config.memory_mb, f"{held}: give {-(-least >> 20)}, or fewer batch_rows")
    return plan_passes(manifest, effort, (config.memory_mb << 20) - batch)


def _suits_sweep(config: MatchConfig, manifest: Manifest, effort: Effort) -> bool:
    if config.exact or config.order != "auto":
        return config.order == "lists"
    return suits_sweep(manifest, config.batch_rows * (effort.probes or 0) / manifest.lists)


def _match_shards(
    task: MatchTask, missing: list[tuple[int, int, int]], total: int, progress: Progress
) -> dict[int, ShardNote]:
    before, resources = total - len(missing), task.config.resources
    progress("match", before, total, "shards")

    def draw(count: int, note: ShardNote) -> None:
        progress("match", before + count, total, f"{note.name}: {note.rows} queries, {note.hits} hits")

    text = task.model_dump_json()
    calls = [(text, *shard) for shard in missing]
    written = run_tasks(match_shard, calls, resources, at_once=resources.workers, ended=draw)
    return {number: note for (number, *_), note in zip(missing, written, strict=True)}


def _publish(task: MatchTask, manifest: Manifest, notes: list[ShardNote], progress: Progress) -> Card:
    config, folder = task.config, Folder(task.config.output)
    counted = ("rows", "hits", "full", "rejects")
    facts: dict[str, Any] = {name: sum(getattr(note, name) for note in notes) for name in counted}
    facts |= {"version": manifest.version, "metric": manifest.metric, "codebook_fingerprint": manifest.fingerprint}
    facts |= {"k": config.k, "probes": task.probes, "refine": task.refine, "is_swept": task.is_swept}
    facts["shards"] = [{"name": note.name, "rows": note.rows} for note in notes]
    files = [entry for note in notes for entry in note.files]
    refuse_lost(folder, files)
    if config.groups:
        progress("groups", 0, 1, f"{facts['hits']} pairs")
        facts |= write_groups(folder, [note.file.name for note in notes], config.form)
        progress("groups", 1, 1, f"{facts['groups']} of {facts['grouped']} items")
        files.append(folder.pin(GROUPS))
    dumped = json.loads(config.model_dump_json())
    return publish_card(folder, Card(kind="match", made_by=task.made_by, files=files, config=dumped, facts=facts))


def write_groups(folder: Folder, names: list[str], form: Form) -> dict[str, int]:
    """Write the groups that pairs connect, and tell how many groups there are and of how many items."""

    def stream() -> Iterator[tuple[IdArray, IdArray]]:
        for name in names:
            yield from read_pairs(folder, name, form)

    ids, groups = find_groups(stream)
    with folder.whole(GROUPS) as path:
        pq.write_table(pa.table({"id": ids, "group": groups}), path)
    return {"groups": int((ids == groups).sum()), "grouped": len(ids)}
