"""The encode stage: a corpus becomes shards of Parquet with id, cell and code.

A shard is a range of source rows, fixed by the corpus and the number of shards, and a task of Ray: it streams through
the encoder batch by batch (reading ahead in a thread), so memory is bounded by a few batches whatever the corpus. A
finished shard leaves a note; a relaunch does only those without one, and equal input gives equal files. Rows that
cannot be read are listed in the shard's rejects file. By what the encoder is computed, `execution` says.
"""

from __future__ import annotations

import functools
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from gsl_dist.artefact import Card, find_finished, load_codebook, open_card, publish_card
from gsl_dist.cluster.codebook import check_lengths
from gsl_dist.cluster.execution import (
    NOTE,
    Asked,
    Decision,
    Execution,
    check_execution,
    open_encoder,
    settle_execution,
    tell_execution,
)
from gsl_dist.cluster.graph import GraphEncoder
from gsl_dist.cluster.model import check_modalities, load_encoder, pick_device
from gsl_dist.cluster.session import Progress, run_tasks, start_session, stay_quiet
from gsl_dist.cluster.whole import Note, find_notes, refuse_damaged, refuse_lost
from gsl_dist.codebook import Codebook
from gsl_dist.config import Location, Resources, Strict, fingerprint_config
from gsl_dist.data import Batch, Corpus, CorpusConfig, open_corpus, split_rows
from gsl_dist.encoders import Encoder
from gsl_dist.errors import ArtefactError, ConfigError, DataError
from gsl_dist.fit import embed
from gsl_dist.index.stream import FINGERPRINT_KEY, OWN_COLUMNS, read_bytes, read_halves
from gsl_dist.quantizers import open_quantizer
from gsl_dist.storage import FileEntry, Folder

_GROUP_ROWS = 65_536
_READ_AHEAD = 3


class EncodeConfig(Strict):
    """Encodes a corpus into shards of codes."""

    corpus: CorpusConfig
    codebook: Location = Field(description="the codebook folder")
    model: Location | None = Field(default=None, description="the model folder; None: the corpus holds vectors")
    output: Location = Field(description="the folder of codes to make")
    shards: int = Field(default=1, ge=1, le=100_000, description="slices of the corpus: tasks and files")
    batch_rows: int = Field(default=1024, ge=1, description="rows that pass through the encoder together")
    keep_vectors: bool = Field(default=False, description="keep representations too, as float16")
    execution: Execution = Field(
        default="torch",
        description="torch; or as a graph by ONNX Runtime: onnx in float32, int8; fastest: as measured, once",
    )
    resources: Resources = Resources()


class ShardNote(Note):
    """What is known of a finished shard of codes."""

    name: str
    rows: int
    rejects: int
    codes: FileEntry
    rejects_file: FileEntry | None = None

    @property
    def files(self) -> list[FileEntry]:
        """List what was written."""
        return [entry for entry in (self.codes, self.rejects_file) if entry]


def run_encode(config: EncodeConfig, progress: Progress = stay_quiet) -> Card:
    """Make the folder of codes that a config describes; a relaunch does only the shards that are missing.

    Raises:
        ConfigError, DataError: settings or corpus cannot be used, or rows hold NaN or infinity.
        ArtefactError: model or codebook are damaged or do not fit each other.
    """
    corpus, codebook = open_corpus(config.corpus), load_codebook(config.codebook)
    model = open_card(Folder(config.model), "model") if config.model else None
    _check_settings(config, corpus, codebook)
    left_out = {"output", "resources", "codebook", "model", "batch_rows"}
    if config.execution == "torch":
        left_out.add("execution")  # as it was before there was a choice: codes made then are found again
    settings = config.model_dump(mode="json", exclude=left_out)
    made_by = fingerprint_config(settings, corpus.fingerprint, codebook.fingerprint, model.made_by if model else None)
    folder = Folder(config.output)
    if done := find_finished(folder, "codes", made_by, verify=False):
        refuse_damaged(folder, done.files, config.resources)
        return done
    decided = settle_encoding(config, made_by, corpus, codebook)
    mark = decided.mark if decided else made_by
    ranges = split_rows(corpus.rows, config.shards)
    notes = find_notes(folder, ShardNote, len(ranges), mark, config.resources)
    missing = [(number, *ends) for number, ends in enumerate(ranges) if number not in notes]
    if missing:
        start_session(config.resources.workers * config.resources.cpus)
        notes |= _encode_shards(config, mark, missing, len(ranges), progress)
    return _publish(config, codebook, made_by, [notes[number] for number in range(len(ranges))], decided)


def settle_encoding(config: EncodeConfig, made_by: str, corpus: Corpus, codebook: Codebook) -> Decision | None:
    """Decide how the encoder is computed for all shards, unless that is by torch or there is none.

    Raises:
        ConfigError, DataError: as `settle_execution`.
    """
    if config.execution == "torch" or config.model is None:
        return None
    asked = Asked(config.execution, config.model, config.resources.threads, made_by)
    return settle_execution(Folder(config.output), asked, corpus, codebook)


class ShardEncoder:
    """Encodes one shard after another; knows no Ray."""

    def __init__(self, config: EncodeConfig, made_by: str) -> None:
        self.config, self.made_by = config, made_by
        torch.set_num_threads(config.resources.threads)
        self.corpus, self.codebook = open_corpus(config.corpus), load_codebook(config.codebook)
        self.device = pick_device(config.resources.gpus)
        self.encoder = self._load_encoder()
        self.quantizer = open_quantizer(self.codebook)

    def _load_encoder(self) -> Encoder | GraphEncoder | None:
        if self.config.model is None:
            return None
        if self.config.execution != "torch":
            folder = Folder(self.config.output)
            decided = Decision.model_validate(folder.read_sealed(NOTE))
            if decided.path != "torch":
                return open_encoder(folder, decided, self.config.resources.threads)
        return load_encoder(self.config.model)[0].to(self.device)

    def encode_shard(self, number: int, start: int, stop: int) -> ShardNote:
        """Write the codes of source rows [start, stop), then the note that says so."""
        folder, name = Folder(self.config.output), f"shard-{number:05d}"
        rejects: list[dict[str, Any]] = []
        rows = 0
        with folder.whole(f"{name}.parquet") as path, pq.ParquetWriter(path, self._schema()) as writer:
            for table in group_tables(self._encode_batches(start, stop, rejects), self._schema()):
                writer.write_table(table)
                rows += len(table)
        rejects_file = None
        if rejects:
            folder.write_json(f"rejects-{number:05d}.json", rejects)
            rejects_file = folder.pin(f"rejects-{number:05d}.json")
        note = ShardNote(
            name=name,
            made_by=self.made_by,
            rows=rows,
            rejects=len(rejects),
            codes=folder.pin(f"{name}.parquet"),
            rejects_file=rejects_file,
        )
        folder.write_sealed(f"{name}.note.json", note.model_dump(mode="json"))
        return note

    def encode_batch(self, batch: Batch) -> pa.Table:
        """Give a batch as a table of ids, cells, codes and payload."""
        items = torch.from_numpy(batch.items)
        y_ND = embed(self.encoder, items) if self.encoder else items.to(self.device)
        if not torch.isfinite(y_ND).all():
            row = int((~torch.isfinite(y_ND).all(dim=1)).nonzero()[0])
            raise DataError("representation", f"of id {batch.ids[row]}", "the encoder must give finite numbers")
        check_lengths(y_ND, self.codebook.metric)
        cells_N, codes_NM = self.quantizer.encode(y_ND, self.codebook)
        packed = self.codebook.pack(codes_NM.cpu().numpy())
        columns = {
            "id": pa.array(batch.ids),
            "cell": pa.array(cells_N.cpu().numpy().astype(np.int32)),
            "code": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(self.codebook.code_bytes), len(packed), [None, pa.py_buffer(np.ascontiguousarray(packed))]
            ),
        }
        if batch.payload is not None:
            columns |= dict(zip(batch.payload.column_names, batch.payload.columns, strict=True))
        if self.config.keep_vectors:
            halves = pa.array(y_ND.cpu().numpy().astype(np.float16).ravel())
            columns["vector"] = pa.FixedSizeListArray.from_arrays(halves, self.codebook.dim)
        return pa.table(columns, schema=self._schema())

    def _encode_batches(self, start: int, stop: int, rejects: list[dict[str, Any]]) -> Iterator[pa.Table]:
        for batch in read_ahead(self.corpus.read(start, stop, batch_rows=self.config.batch_rows)):
            rejects += [asdict(reject) for reject in batch.rejects]
            if len(batch):
                yield self.encode_batch(batch)

    def _schema(self) -> pa.Schema:
        fields = [pa.field("id", pa.int64()), pa.field("cell", pa.int32())]
        fields.append(pa.field("code", pa.binary(self.codebook.code_bytes)))
        fields += list(self.corpus.payload_schema or [])
        if self.config.keep_vectors:
            fields.append(pa.field("vector", pa.list_(pa.float16(), self.codebook.dim)))
        return pa.schema(fields, metadata={FINGERPRINT_KEY: self.codebook.fingerprint.encode()})


def encode_shard(config_json: str, made_by: str, number: int, start: int, stop: int) -> ShardNote:
    """Encode a shard, by the encoder that this process had for the shard before if it is the same."""
    return _hold_encoder(config_json, made_by).encode_shard(number, start, stop)


@functools.lru_cache(maxsize=1)
def _hold_encoder(config_json: str, made_by: str) -> ShardEncoder:
    return ShardEncoder(EncodeConfig.model_validate_json(config_json), made_by)


def read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Read the next few batches in a thread while the caller works on this one; errors come through."""
    ready: queue.Queue[Any] = queue.Queue(_READ_AHEAD)
    stopped = threading.Event()

    def put(value: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put(value, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for batch in batches:
                put((batch, None))
            put((None, None))
        except Exception as error:  # noqa: BLE001 - handed to the reader's thread and raised there
            put((None, error))

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        stopped.set()


def group_tables(tables: Iterator[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """Join small tables into ones large enough for a row group; no tables give one empty table."""
    group = _join_next(tables, schema)
    yield group
    while len(group) >= _GROUP_ROWS:
        group = _join_next(tables, schema)
        if len(group):
            yield group


def _join_next(tables: Iterator[pa.Table], schema: pa.Schema) -> pa.Table:
    # What waits for its group is copied into one buffer: held as they come, the small arrays of a batch would lie
    # between large ones that come and go, the allocator could not give those back, and memory would grow with the rows.
    rows, held = 0, pa.BufferOutputStream()
    with pa.ipc.new_stream(held, schema) as writer:
        for table in tables:
            writer.write_table(table)
            rows += len(table)
            if rows >= _GROUP_ROWS:
                break
    return pa.ipc.open_stream(held.getvalue()).read_all()


def _check_settings(config: EncodeConfig, corpus: Corpus, codebook: Codebook) -> None:
    if config.model is None and corpus.kind != "vectors":
        raise ConfigError("model", None, "a corpus of images needs a model that turns them into vectors")
    check_execution(config.execution, config.model, config.resources.gpus)
    dim = corpus.item_shape[0]
    if config.model:
        encoder, card = load_encoder(config.model)
        check_modalities(card, encoder, config.corpus)
        dim = encoder.dim
    if dim != codebook.dim:
        owner = "model" if config.model else "corpus"
        raise ConfigError(owner, f"vectors of {dim} numbers", f"the codebook {config.codebook} takes {codebook.dim}")
    if taken := sorted(set(config.corpus.payload_columns) & set(OWN_COLUMNS)):
        raise ConfigError("corpus.payload_columns", taken, f"{', '.join(OWN_COLUMNS)} are names of our own columns")


def _encode_shards(
    config: EncodeConfig, made_by: str, missing: list[tuple[int, int, int]], total: int, progress: Progress
) -> dict[int, ShardNote]:
    before = total - len(missing)
    progress("encode", before, total, "shards")

    def draw(count: int, note: ShardNote) -> None:
        progress("encode", before + count, total, f"{note.name}: {note.rows} rows, {note.rejects} rejected")

    # What was written was read again to be pinned, and is checked once more by whoever opens it.
    text = config.model_dump_json()
    calls = [(text, made_by, *shard) for shard in missing]
    written = run_tasks(encode_shard, calls, config.resources, at_once=config.resources.workers, ended=draw)
    return {number: note for (number, *_), note in zip(missing, written, strict=True)}


def _publish(
    config: EncodeConfig, codebook: Codebook, made_by: str, notes: list[ShardNote], decided: Decision | None
) -> Card:
    rows = sum(note.rows for note in notes)
    if rows == 0:
        raise DataError("corpus", config.corpus.path, "every row was rejected; see the rejects files in the output")
    facts = {
        "codebook_fingerprint": codebook.fingerprint,
        "rows": rows,
        "rejects": sum(note.rejects for note in notes),
        "shards": [{"name": note.name, "rows": note.rows} for note in notes],
        "payload_columns": list(config.corpus.payload_columns),
        "encoder_path": tell_execution(decided, config.model) if config.model else None,
    }
    folder, files = Folder(config.output), [entry for note in notes for entry in note.files]
    refuse_lost(folder, files)
    if decided:
        facts["execution"] = decided.model_dump(mode="json")
        files += [decided.graph] if decided.graph else []
    dumped = json.loads(config.model_dump_json())
    return publish_card(folder, Card(kind="codes", made_by=made_by, files=files, config=dumped, facts=facts))


@dataclass(frozen=True)
class CodeTable:
    """The rows of one shard of codes.

    Shapes: ids, cells (N,) int64; codes (N, code_bytes) uint8; vectors (N, D) float16 or None.
    """

    ids: np.ndarray[Any, np.dtype[np.int64]]
    cells: np.ndarray[Any, np.dtype[np.int64]]
    codes: np.ndarray[Any, np.dtype[np.uint8]]
    payload: pa.Table | None
    vectors: np.ndarray[Any, np.dtype[np.float16]] | None


def read_codes(folder: Folder, name: str, codebook: Codebook) -> CodeTable:
    """Read a shard of codes whose checksum was verified.

    Raises:
        ArtefactError: the codes were written with another codebook.
    """
    with folder.local(f"{name}.parquet") as path:
        table = pq.read_table(path)
    written_with = (table.schema.metadata or {}).get(FINGERPRINT_KEY, b"none").decode()
    if written_with != codebook.fingerprint:
        raise ArtefactError(
            folder.path(f"{name}.parquet"),
            f"its codes were written with codebook {written_with}, but this one is {codebook.fingerprint}",
        )
    payload = table.drop_columns([c for c in OWN_COLUMNS if c in table.column_names])
    ids, cells, content = (table[name].combine_chunks() for name in ("id", "cell", "code"))
    kept = table["vector"].combine_chunks() if "vector" in table.column_names else None
    return CodeTable(
        ids.to_numpy(),
        cells.to_numpy().astype(np.int64),
        read_bytes(content, codebook.code_bytes),
        payload if payload.num_columns else None,
        None if kept is None else read_halves(kept, codebook.dim),
    )
