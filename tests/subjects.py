"""An artefact of every kind, as small as it can be, with what opens and uses it: what `damage` is done to."""

import functools
import hashlib
import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import yaml
from corpora import write_vectors
from damage import AGAIN, Subject, read_plain
from worlds import make_codebook, make_index, make_queries, make_rows, make_vectors, write_codes

from gsl_dist.artefact import CODEBOOK, Card, load_codebook, open_card, publish_card
from gsl_dist.cache import Cache
from gsl_dist.cluster import build, encode
from gsl_dist.cluster.checkpoint import read_state, write_state
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.evaluate import find_measured
from gsl_dist.cluster.model import load_encoder, load_trained_codebook, save_model
from gsl_dist.cluster.query import QueryEncoder
from gsl_dist.cluster.whole import find_notes
from gsl_dist.config import Resources, check_config, fingerprint_config, load_config
from gsl_dist.data import open_corpus
from gsl_dist.encoders import MlpConfig, Progression, make_encoder
from gsl_dist.encoders.lowbit import StochasticConfig
from gsl_dist.fit import FitConfig, Training
from gsl_dist.hits import Hits
from gsl_dist.index.log import Write, WriteLog
from gsl_dist.index.manifest import open_version, promote_version, publish_version, version_folder
from gsl_dist.index.overlay import read_overlay
from gsl_dist.index.portions import cut_by_id
from gsl_dist.index.sample import Sample, keep_sample, read_sample
from gsl_dist.index.search import open_searcher
from gsl_dist.index.stream import Piece, Portion, survey_codes
from gsl_dist.losses import ProxyConfig, make_loss
from gsl_dist.service.access import add_token, make_token, read_tokens
from gsl_dist.snap import SnapConfig, SnappingLayer
from gsl_dist.storage import Folder

DIM, ROWS = 16, 120
QUERIES = make_queries(4)
MADE_BY = "subject"
INDEXES = {
    "pq": {"codebook": {"bits": 8, "choices": 4}},
    "opq": {"codebook": {"rotated": True, "residual": False}},
    "pq in blocks": {"codebook": {"bits": 4, "choices": 16}, "code_layout": "fastscan"},
    "pq behind a graph": {"codebook": {}, "coarse_search": "hnsw"},
    "rq": {"codebook": {"kind": "rq"}},
    "lsq": {"codebook": {"kind": "lsq"}},
    "cq": {"codebook": {"kind": "cq", "residual": False}},
    "vlq": {"codebook": {"kind": "vlq"}},
    "rabitq": {"codebook": {"kind": "rabitq", "bits": 2}},
    "rabitq in blocks": {"codebook": {"kind": "rabitq", "bits": 1}, "code_layout": "fastscan"},
}


def make_subjects(place):
    """Make an artefact of every kind, and give them by their names."""
    subjects = {f"shard, {name}": make_shards(place / name, **settings) for name, settings in INDEXES.items()}
    makers = [make_codebooks, make_codes, make_notes, make_models, make_checkpoints, make_versions, make_query_models]
    makers += [make_logs, make_samples, make_tokens, make_measured, make_caches, make_configs]
    for maker in makers:
        subjects |= dict(maker(place))
    return subjects


def tell(*arrays):
    """Give arrays, or bytes, as a digest that two of them share only if they are equal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array if isinstance(array, bytes) else repr((array.dtype, array.shape)).encode())
        digest.update(b"" if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def tell_table(table):
    """Give a table as a digest."""
    return hashlib.sha256(repr((table.schema, table.to_pylist())).encode()).hexdigest()


def pick(one, other, pattern):
    """Give the files of a folder that match a pattern, and those of another by their names."""
    return sorted(one.glob(pattern)), {file.name: file.read_bytes() for file in other.glob(pattern)}


def make_shards(place, codebook, **layout):
    for name, seed in (("one", 0), ("other", 5)):
        made = make_codebook(**{"dim": DIM, "cells": 4} | codebook, seed=seed)
        make_index(place / name, rows=ROWS, shards=2, seed=seed, codebook=made, **layout)

    def use():
        hits = open_searcher(str(place / "one")).search(QUERIES, 10, probes=4)
        return tell(hits.ids, hits.distances)

    files, donors = pick(*(place / name / "versions" / "v1" for name in ("one", "other")), "shard-*")
    return Subject(files, donors, use)


def make_codebooks(place):
    for name, seed in (("one", 0), ("other", 5)):
        folder = Folder(place / "codebooks" / name)
        make_codebook("vlq", seed=seed).save(folder, CODEBOOK)
        made = {"made_by": name, "config": {"source": "fitted"}, "facts": {"relative_error": 0.25}}
        publish_card(folder, Card(kind="codebook", files=[folder.pin(CODEBOOK)], **made))

    def use():
        return tell(*load_codebook(str(place / "codebooks" / "one")).arrays().values())

    files, donors = pick(place / "codebooks" / "one", place / "codebooks" / "other", "codebook.*")
    yield "codebook", Subject(files, donors, use, read_plain)


def make_codes(place):
    codebook = make_codebook()
    rng = np.random.default_rng(0)
    for name, seed in (("one", 0), ("other", 5)):
        payload = pa.table({"label": rng.integers(5, size=ROWS), "title": [f"{name} {row}" for row in range(ROWS)]})
        rows, kept = make_rows(codebook, ROWS, seed=seed), make_vectors(ROWS, seed=seed)
        write_codes(place / "codes" / name, codebook, rows, files=2, vectors=kept, payload=payload)
    folder = Folder(place / "codes" / "one" / "codes")

    def build_from():
        """Read codes as the build stage does."""
        card, told = open_card(folder, "codes", verify=False), []
        for shard in card.facts["shards"]:
            found = survey_codes(folder.location, card.entry(f"{shard['name']}.parquet"), codebook.fingerprint)
            portion = Portion(found.name, folder.location, (Piece(found.name, 0, found.rows),), found.rows)
            columns = ["id", "cell", "code", "label", "title", "vector"]
            told += [tell_table(pa.Table.from_batches(portion.stream(columns, 64)))]
        return card.facts["codebook_fingerprint"], told

    def add():
        """Read codes as the compact and evaluate stages do."""
        card, told = open_card(folder, "codes"), []
        for shard in card.facts["shards"]:
            read = encode.read_codes(folder, shard["name"], codebook)
            told += [tell(read.ids, read.cells, read.codes, read.vectors), tell_table(read.payload)]
        return told

    for use, name in ((build_from, "codes, built from"), (add, "codes, added")):
        files, donors = pick(*(place / "codes" / one / "codes" for one in ("one", "other")), "*.*")
        yield name, Subject(files, donors, use, read_plain)


def make_notes(place):
    """Make shards that are finished in a stage that is not."""
    home, codebook = place / "notes", make_codebook()
    own = {"codebook": str(home / "one" / "codebook"), "codes": str(home / "one" / "codes")}
    for name, seed in (("one", 0), ("other", 5)):
        write_codes(home / name, codebook, make_rows(codebook, ROWS, seed=seed), vectors=make_vectors(ROWS, seed=seed))
        tree = {"codebook": own["codebook"], "output": str(home / name / "encoded")}
        corpus = write_vectors(home / name / "corpus.parquet", rows=ROWS, seed=seed)
        tree["corpus"] = {"path": str(corpus), "id_column": "id", "vector_column": "vector"}
        note = encode.ShardEncoder(check_config(encode.EncodeConfig, tree), MADE_BY).encode_shard(0, 0, ROWS)
        # Only rows of images are ever rejected.
        folder = Folder(home / name / "encoded")
        folder.write_json("rejects-00000.json", [{"row": seed, "source": "corpus", "reason": "the image is null"}])
        note = note.model_copy(update={"rejects": 1, "rejects_file": folder.pin("rejects-00000.json")})
        folder.write_sealed("shard-00000.note.json", note.model_dump(mode="json"))
        tree = own | {"codes": str(home / name / "codes"), "index": str(home / name / "index"), "vectors": "int8"}
        pieces = [Piece("shard-00000.parquet", 0, ROWS)]
        [portion] = cut_by_id(tree["codes"], pieces, 1)
        build.build_shard(check_config(build.BuildConfig, tree), Folder(home / name / "built"), portion, MADE_BY)

    def find_encoded():
        notes = find_notes(Folder(home / "one" / "encoded"), encode.ShardNote, 1, MADE_BY, Resources())
        return notes[0].model_dump_json() if notes else AGAIN

    def find_built():
        notes = find_notes(Folder(home / "one" / "built"), build.BuiltShard, 1, MADE_BY, Resources())
        return notes[0].model_dump_json() if notes else AGAIN

    for use, folder, name in ((find_encoded, "encoded", "notes, encode"), (find_built, "built", "notes, build")):
        files, donors = pick(home / "one" / folder, home / "other" / folder, "*.*")
        assert len(files) == 3, files
        yield name, Subject(files, donors, use, read_plain)


def make_training(seed, *, is_lowbit):
    torch.manual_seed(seed)
    encoder = make_encoder(MlpConfig(kind="mlp", dim=8, hidden=(12,)), (DIM,))
    progression = None
    if is_lowbit:
        settings = {"kind": "ternary", "ratios": [0.5, 1.0]}
        progression = Progression(encoder, check_config(StochasticConfig, settings), seed=seed)
        progression.enter(1.0)
    loss = make_loss(ProxyConfig(kind="proxy"), classes=3, dim=8)
    return Training(encoder, loss, SnappingLayer(SnapConfig()), FitConfig(), progression=progression)


def make_models(place):
    config = {"encoder": {"kind": "mlp", "dim": 8, "hidden": [12]}}
    for kind, name, seed in itertools.product(("float", "lowbit"), ("one", "other"), (0,)):
        training = make_training(seed + (name == "other"), is_lowbit=kind == "lowbit")
        codebook = make_codebook(dim=8, seed=training.config.seed + (name == "other"))
        facts = {"item_shape": [DIM], "classes": [0, 1, 2]}
        folder = Folder(place / "models" / kind / name)
        save_model(folder, training.encoder, codebook, made_by=name, config=config, facts=facts)
    for kind in ("float", "lowbit"):
        home = place / "models" / kind
        use = functools.partial(open_model, str(home / "one"))
        yield f"model, {kind}", Subject(*pick(home / "one", home / "other", "*.*"), use, read_plain)


def open_model(location):
    """Use a model as the codebook and encode stages do."""
    encoder, codebook = load_encoder(location)[0], load_trained_codebook(location)
    weights = [weight.numpy() for weight in encoder.state_dict().values()]
    return tell(*weights, *codebook.arrays().values())


def make_checkpoints(place):
    for name, seed in (("one", 0), ("other", 5)):
        home = place / "checkpoints" / name
        home.mkdir(parents=True)
        write_state(home, make_training(seed, is_lowbit=True).state())

    def use():
        state, sink = read_state(place / "checkpoints" / "one"), io.BytesIO()
        torch.save(state, sink)
        return tell(sink.getvalue())

    files, donors = pick(place / "checkpoints" / "one", place / "checkpoints" / "other", "*.*")
    yield "checkpoint", Subject(files, donors, use, read_plain)


def make_versions(place):
    """Make versions with a payload and vectors: what a replica opens besides its shards."""
    for name, seed in (("one", 0), ("other", 5)):
        columns = {"label": (np.arange(ROWS) + seed) % 7, "title": [f"{name} {row}" for row in range(ROWS)]}
        for version, precision in (("v1", "float16"), ("v2", "int8")):
            make = functools.partial(
                make_index, place / "versions" / name, rows=ROWS, shards=2, payload=pa.table(columns)
            )
            make(rows=ROWS, shards=2, version=version, seed=seed, vectors=precision)
    home = place / "versions" / "one"

    def use(version):
        searcher = open_searcher(str(home), version)
        near = searcher.search(QUERIES, 10, probes=4, where={"label": {"$gte": 2}})
        refined = searcher.search(QUERIES, 10, probes=4, refine=4)
        taken = searcher.payload.fetch(np.arange(0, ROWS, 3), ["title", "label"])
        vectors = searcher.recall_vectors(np.arange(ROWS))[1]
        return tell(near.ids, near.distances, refined.ids, refined.distances, vectors), tell_table(taken)

    folders = [place / "versions" / name / "versions" for name in ("one", "other")]
    patterns = {"codebook of a version": "v1/codebook.*", "payload": "v1/*.parquet"}
    patterns |= {"manifest": "v1/manifest.json", "vectors, float16": "v1/*.vectors", "vectors, int8": "v2/*.vectors"}
    for name, pattern in patterns.items():
        use_one = functools.partial(use, pattern[:2])
        yield name, Subject(*pick(*folders, pattern), use_one, read_plain if name == "manifest" else None)
    promote_version(Folder(home), "v1")
    yield "pointer", Subject([home / "CURRENT.json"], {}, functools.partial(use, None), read_plain)


def make_query_models(place):
    """Make versions whose queries pass through an encoder."""
    for name, seed in (("one", 0), ("other", 5)):
        index = Folder(place / "encoded" / name)
        manifest = make_index(index.location, rows=ROWS, codebook=make_codebook(dim=8, seed=seed), seed=seed)
        folder, source = version_folder(index, "v2"), version_folder(index, "v1")
        for entry in manifest.files:
            folder.take(source, entry)
        trained = place / "models" / "float" / name
        for file in trained.iterdir():
            folder.write_bytes(f"model/{file.name}", file.read_bytes())
        pins = [folder.pin(f"model/{file.name}") for file in sorted(trained.iterdir())]
        publish_version(index, manifest.model_copy(update={"version": "v2", "model": pins}))
    index = Folder(place / "encoded" / "one")

    def use():
        return tell(QueryEncoder(index.location, open_version(index, "v2")).embed(QUERIES))

    folders = [place / "encoded" / name / "versions" / "v2" / "model" for name in ("one", "other")]
    yield "model of a version", Subject(*pick(*folders, "*.*"), use)


def make_logs(place):
    for name, seed in (("one", 0), ("other", 5)):
        index = Folder(place / "logs" / name)
        manifest = make_index(index.location, rows=ROWS, seed=seed)
        log, vectors = WriteLog(index), make_vectors(6, seed=seed)
        for row, vector in enumerate(vectors):
            log.append([Write("upsert", 1000 + row, vector), Write("delete", row)], manifest.space)
    index = Folder(place / "logs" / "one")

    def use():
        overlay = read_overlay(index, open_version(index))
        ids, vectors, payload = overlay.dump()
        return overlay.seq, sorted(overlay.hidden), tell(ids, vectors), tell_table(payload)

    files, donors = pick(place / "logs" / "one" / "log", place / "logs" / "other" / "log", "*.arrow")
    # Names bear digests, so that no two logs share one: any of the other log may come in the place of any.
    yield "write log", Subject(files, dict(zip((file.name for file in files), donors.values(), strict=True)), use)


def make_samples(place):
    for name, seed in (("one", 0), ("other", 5)):
        rng = np.random.default_rng(seed)
        ids, distances = rng.integers(ROWS, size=(4, 5)), np.sort(rng.random((4, 5)).astype(np.float32))
        keep_sample(Folder(place / "samples" / name), "v1", Sample(QUERIES, Hits(ids, distances, 1, 1)))

    def use():
        sample = read_sample(Folder(place / "samples" / "one"), "v1")
        return tell(sample.queries_QD, sample.truth.ids, sample.truth.distances)

    files, donors = pick(place / "samples" / "one" / "sample", place / "samples" / "other" / "sample", "*.arrow")
    yield "sample of queries", Subject(files, {files[0].name: next(iter(donors.values()))}, use)


def make_tokens(place):
    path = place / "tokens" / "tokens.json"
    for scope in ("read", "admin"):
        add_token(str(path), make_token(scope, scope)[1])

    def use():
        return [token.model_dump() for token in read_tokens(str(path))]

    yield "tokens", Subject([path], {}, use, read_plain)


def make_measured(place):
    for name, made_by in (("one", MADE_BY), ("other", "other inputs")):
        Folder(place / "measured" / name).write_sealed("measured.json", {"map_coded": 0.75, "made_by": made_by})
    home = place / "measured"

    def use():
        return find_measured(Folder(home / "one"), "measured.json", MADE_BY) or AGAIN

    yield "measured", Subject(*pick(home / "one", home / "other", "*.json"), use, read_plain)


def make_caches(place):
    """Make a cache with the files of a version in it."""
    home = place / "versions" / "one" / "versions" / "v1"
    cache, source, kept = Cache(folder=str(place / "cache")), Folder(home), Folder(place / "cache")
    entries = open_version(Folder(place / "versions" / "one"), "v1").files

    def hold():
        told = []
        for entry in entries:
            with cache.hold(entry, functools.partial(shutil.copyfile, home / entry.name)) as path:
                told.append(path.read_bytes() == source.read_bytes(entry.name))
        return told

    hold()
    files = [Path(kept.path(entry.sha256)) for entry in entries]

    def use():
        """Give what was held, and that it was fetched again where it was damaged."""
        was_damaged = any(hashlib.sha256(file.read_bytes()).hexdigest() != file.name for file in files)
        told = hold()
        assert all(told), "what was damaged was handed out"
        return AGAIN if was_damaged else "held"

    yield "cache of a replica", Subject(files, {}, use)


def make_configs(place):
    """Make a config whose stage has ended: with an altered one it refuses, or has nothing else to do."""
    home = place / "configs"
    corpus = write_vectors(home / "corpus.parquet", rows=ROWS) if not home.mkdir() else None
    tree = {"source": "fitted", "output": str(home / "codebook"), "seed": 3, "resources": {"workers": 2}}
    tree["corpus"] = {"path": str(corpus), "id_column": "id", "vector_column": "vector"}
    tree["quantizer"] = {"kind": "pq", "sub_vectors": 4, "bits": 4, "cells": 4}
    (home / "one.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(CodebookConfig, home / "one.yaml")
    decided = config.model_dump(mode="json", exclude={"output", "resources", "metric"})
    made_by = fingerprint_config(decided, [open_corpus(config.corpus).fingerprint])
    folder = Folder(config.output)
    make_codebook().save(folder, CODEBOOK)
    made = {"made_by": made_by, "config": {}, "facts": {}, "files": [folder.pin(CODEBOOK)]}
    publish_card(folder, Card(kind="codebook", **made))

    def use():
        told = load_config(CodebookConfig, home / "one.yaml")
        # Where the output goes and how many work at it changes no content.
        return run_codebook(told.model_copy(update={"output": config.output})).model_dump_json()

    def mean(path, content):
        told = check_config(CodebookConfig, yaml.safe_load(content))
        return told.model_dump(exclude={"output", "resources"})

    other = yaml.safe_dump(tree | {"quantizer": tree["quantizer"] | {"cells": 8}}).encode()
    yield "config", Subject([home / "one.yaml"], {"one.yaml": other}, use, mean)
