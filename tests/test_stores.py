"""Files in an object store, and kept nearby: whole or absent, whatever the store does."""

import hashlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("moto")
pytest.importorskip("flask")
from stores import BUCKET, Faults, name_place, start_store

from gsl_dist import storage
from gsl_dist.cache import Cache, FileEntry
from gsl_dist.config import check_config
from gsl_dist.data import CorpusConfig, open_corpus
from gsl_dist.errors import ArtefactError, BadInput
from gsl_dist.storage import Folder, join_location, split_location

pytestmark = pytest.mark.timeout(120)
CONTENT = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture(scope="module")
def store():
    with start_store() as proxy:
        yield proxy


@pytest.fixture
def proxy(store, monkeypatch):
    store.faults, store.asked = Faults(), []
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.02)
    yield store
    store.faults = Faults()


@pytest.fixture
def folder(proxy, request):
    return Folder(name_place(proxy, request.node.name.replace("[", "-").rstrip("]")))


@pytest.fixture
def cache(tmp_path):
    return Cache(folder=str(tmp_path / "cache"), limit_gb=1)


def use(folder):
    """Everything that stages do with files, in the words of a local folder."""
    folder.write_bytes("deep/a.bin", CONTENT)
    folder.write_json("b.json", {"one": 1})
    folder.write_bytes("a.bin", b"old")
    folder.write_bytes("a.bin", CONTENT[:2000])
    entry = folder.child("deep").pin("a.bin")
    folder.child("deep").check(entry)
    with folder.local("deep/a.bin") as path, folder.child("deep").held(entry) as held:
        read = path.read_bytes(), held.read_bytes()
    with folder.open("deep/a.bin") as stream:
        parts = [stream.read(10)]
        stream.seek(1_000_000)
        parts += [stream.read(1_500_000), stream.tell(), stream.read(), stream.read(5), stream.size()]
    other = folder.child("other")
    other.take(folder.child("deep"), entry)
    folder.write_bytes("gone", b"")
    folder.delete("gone")
    folder.write_bytes("lost/x", b"1")
    folder.clear("lost")
    return {
        "names": (folder.names(), folder.names(folders=True), folder.names(suffix=".json"), other.names()),
        "sizes": (folder.size("a.bin"), folder.size("deep/a.bin"), folder.exists("gone"), folder.child("lost").names()),
        "read": (*read, parts, folder.read_json("b.json"), folder.read_bytes("a.bin"), other.read_bytes("a.bin")),
        "pinned": entry,
    }


def test_a_store_is_used_in_the_words_of_a_local_folder(folder, tmp_path):
    assert not folder.is_local and use(folder) == use(Folder(tmp_path / "local"))


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(refused=0.12), id="refusing"),
        pytest.param(Faults(dropped=0.15), id="dropping"),
        pytest.param(Faults(cut=0.3), id="cutting"),
        pytest.param(Faults(delay_s=0.05), id="slow"),
        pytest.param(Faults(unseen_s=0.2), id="late"),
        pytest.param(Faults(refused=0.1, dropped=0.1, cut=0.2, unseen_s=0.1), id="all", marks=pytest.mark.slow),
    ],
)
def test_what_a_store_does_costs_time_alone(proxy, folder, tmp_path, faults):
    proxy.faults = faults
    assert use(folder) == use(Folder(tmp_path / "local"))
    struck = [name for name in ("refused", "dropped", "cut") if getattr(faults, name)]
    assert all(faults.met[name] > 0 for name in struck) and (not faults.unseen_s or faults.met["unseen"] > 0)


def test_a_writer_goes_on_when_the_store_shows_what_was_written(proxy, folder):
    proxy.faults = Faults(unseen_s=0.5)
    start = time.monotonic()
    folder.write_bytes("a.bin", b"1")
    assert time.monotonic() - start >= 0.5
    # Others who ask then are not told that there is nothing.
    assert Folder(folder.location).read_bytes("a.bin") == b"1"


def test_a_store_that_is_gone_is_an_error_that_names_it_after_a_while(proxy, folder, monkeypatch):
    monkeypatch.setattr(storage, "_REMOTE_TRIES", 2)
    proxy.faults = Faults(refused=1.0)
    with pytest.raises(OSError, match=r"bucket|503|SLOW_DOWN|SlowDown"):
        folder.exists("a.bin")
    proxy.faults = Faults()
    assert not folder.exists("a.bin")


def test_a_file_that_is_not_there_is_told_at_once(folder):
    start = time.monotonic()
    for read in (Folder.read_bytes, Folder.pin, Folder.size):
        with pytest.raises(ArtefactError, match="no such file"):
            read(folder, "none")
    assert time.monotonic() - start < 5


def test_a_location_keeps_its_options_behind_its_path():
    location = "s3://key:secret@bucket/a?endpoint_override=127.0.0.1:1&scheme=http&region=x"
    folder = Folder(location)
    assert folder.child("b").location == "s3://key:secret@bucket/a/b?endpoint_override=127.0.0.1:1&scheme=http&region=x"
    assert folder.child("b").store[1] == "bucket/a/b"
    parent, name = split_location(location)
    assert (name, parent.store[1]) == ("a", "bucket") and parent.location.endswith("&region=x")


def write_corpora(place):
    """The same vectors in every format that is read in parts."""
    vectors = np.random.default_rng(1).normal(size=(5000, 16)).astype(np.float32)
    table = pa.table(
        {"id": np.arange(5000), "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 16)}
    )
    pq.write_table(table, place / "parquet.parquet", row_group_size=700)
    with pa.ipc.new_file(place / "arrow.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    np.save(place / "npy.npy", vectors)
    dims = np.full((5000, 1), 16, np.int32).view(np.float32)
    np.hstack([dims, vectors]).tofile(place / "fvecs.fvecs")


@pytest.mark.parametrize("name", ["parquet.parquet", "arrow.arrow", "npy.npy", "fvecs.fvecs"])
def test_a_corpus_in_a_store_that_fails_is_read_as_on_a_disk(proxy, folder, tmp_path, name):
    write_corpora(tmp_path)
    folder.write_bytes(name, (tmp_path / name).read_bytes())
    columns = {"id_column": "id", "vector_column": "vector"} if name[0] in "pa" else {}
    near, far = (
        open_corpus(check_config(CorpusConfig, {"path": join_location(place.location, name), **columns}))
        for place in (Folder(tmp_path), folder)
    )
    proxy.faults = Faults(refused=0.03, dropped=0.05, cut=0.1, seed=2)
    for (start, stop), rows in (((0, 5000), 900), ((1234, 1900), 100)):
        read = [np.concatenate([b.items for b in each.read(start, stop, batch_rows=rows)]) for each in (near, far)]
        assert np.array_equal(*read)
    chosen = np.array([3, 4, 700, 4999])
    assert np.array_equal(near.take(chosen).items, far.take(chosen).items)
    assert sum(proxy.faults.met.values()) > 0


@pytest.mark.parametrize("location", ["s3://bucket/a[1]", "ftp://host/a"])
def test_a_location_that_names_no_store_is_refused(location):
    with pytest.raises(BadInput, match=r"it must be a path, or a URI that pyarrow\.fs understands"):
        Folder(location)


def read_held(folder, entry):
    with folder.held(entry) as path:
        return path.read_bytes()


def count_reads(proxy, name):
    return sum(1 for command, path in proxy.asked if command == "GET" and path.endswith(name))


def test_a_file_is_fetched_once_for_all_who_share_a_cache(proxy, folder, cache):
    folder.write_bytes("a.bin", CONTENT)
    folder.write_bytes("again.bin", CONTENT)
    entry, same = folder.pin("a.bin"), folder.pin("again.bin")
    proxy.asked.clear()
    near = Folder(folder.location, cache)
    assert read_held(near, entry) == CONTENT
    fetched = count_reads(proxy, "a.bin")
    assert fetched >= 1
    # Another process, another version that has the same shard, and one of a child folder: nothing is fetched.
    for reader, wanted in ((Folder(folder.location, cache), entry), (near, same)):
        assert read_held(reader, wanted) == CONTENT
    assert count_reads(proxy, "a.bin") == fetched and count_reads(proxy, "again.bin") == 0
    assert [path.name for path in Path(cache.folder).iterdir() if len(path.name) == 64] == [entry.sha256]


def test_of_many_who_want_one_file_one_fetches_it(proxy, folder, cache):
    folder.write_bytes("a.bin", CONTENT)
    entry, found = folder.pin("a.bin"), []
    proxy.asked.clear()
    read_held(Folder(folder.location), entry)
    once = count_reads(proxy, "a.bin")
    proxy.asked.clear()
    proxy.faults = Faults(delay_s=0.05)
    near = Folder(folder.location, cache)
    threads = [threading.Thread(target=lambda: found.append(read_held(near, entry))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 6 and count_reads(proxy, "a.bin") == once


DAMAGES = {"cut": CONTENT[:-1], "empty": b"", "altered": CONTENT[:9] + b"!!" + CONTENT[11:], "longer": CONTENT + b"x"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_was_altered_nearby_is_found_and_fetched_anew(folder, cache, damage):
    folder.write_bytes("a.bin", CONTENT)
    entry, near = folder.pin("a.bin"), Folder(folder.location, cache)
    read_held(near, entry)
    kept = Path(cache.folder) / entry.sha256
    kept.write_bytes(DAMAGES[damage])
    assert read_held(near, entry) == CONTENT == kept.read_bytes()


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_file_that_was_altered_in_the_store_is_refused_and_not_kept(folder, cache, is_cached):
    folder.write_bytes("a.bin", CONTENT)
    entry = folder.pin("a.bin")
    folder.write_bytes("a.bin", CONTENT[:-1] + b"!")
    with pytest.raises(ArtefactError, match=r"a\.bin.*: what is stored has not the 3000000 bytes and the checksum"):
        read_held(Folder(folder.location, cache if is_cached else None), entry)
    assert not Path(cache.folder).exists() or not [p for p in Path(cache.folder).iterdir() if ".lock" not in p.name]


def make_entry(content):
    return FileEntry(name="x", bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def hold(cache, content):
    with cache.hold(make_entry(content), lambda path: path.write_bytes(content)) as path:
        return path.read_bytes()


def list_kept(cache):
    return {path.name for path in Path(cache.folder).iterdir() if len(path.name) == 64}


def test_what_was_used_least_lately_makes_room(tmp_path):
    cache = Cache(folder=str(tmp_path), limit_gb=2500 / 2**30)
    first, second, third = (bytes([value]) * 1000 for value in range(3))
    for age, content in ((300, first), (200, second)):
        hold(cache, content)
        os.utime(tmp_path / make_entry(content).sha256, (time.time() - age,) * 2)
    hold(cache, first)
    hold(cache, third)
    assert list_kept(cache) == {make_entry(first).sha256, make_entry(third).sha256}
    assert hold(cache, b"x" * 3000) == b"x" * 3000  # larger than the whole: used, not kept
    assert sum((tmp_path / name).stat().st_size for name in list_kept(cache)) <= 2500


def test_nobody_loses_a_file_that_makes_room(tmp_path):
    cache = Cache(folder=str(tmp_path), limit_gb=1500 / 2**30)
    with cache.hold(make_entry(b"a" * 1000), lambda path: path.write_bytes(b"a" * 1000)) as path:
        hold(cache, b"b" * 1000)
        assert list_kept(cache) == {make_entry(b"b" * 1000).sha256} and path.read_bytes() == b"a" * 1000


def test_what_a_killed_process_left_is_removed_in_time(tmp_path):
    (tmp_path / ".left").write_bytes(b"half of a file")
    (tmp_path / ".new").write_bytes(b"half of a file")
    os.utime(tmp_path / ".left", (time.time() - 2 * 86400,) * 2)
    hold(Cache(folder=str(tmp_path)), b"a")
    assert not (tmp_path / ".left").exists() and (tmp_path / ".new").exists()


def test_an_upload_that_a_store_cut_short_is_sent_again(proxy, folder):
    proxy.faults = Faults(cut_short=0.4, seed=3)
    for number in range(12):
        folder.write_bytes(f"{number}.bin", CONTENT[: 1000 * (number + 1)])
    assert proxy.faults.met["cut_short"] >= 3
    proxy.faults = Faults()
    assert [folder.size(f"{number}.bin") for number in range(12)] == [1000 * (number + 1) for number in range(12)]


def test_a_store_that_keeps_half_of_everything_is_an_error_and_not_a_file(proxy, folder):
    proxy.faults = Faults(cut_short=1.0)
    with pytest.raises(OSError, match="the store does not show it"):
        folder.write_bytes("a.bin", CONTENT[:2000])


def test_the_endpoint_of_the_environment_is_used_where_the_uri_names_none(proxy, monkeypatch):
    known = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (known | {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}).items():
        monkeypatch.setenv(name, value)
    folder = Folder(f"s3://{BUCKET}/by-environment")
    folder.write_bytes("a.bin", b"x")
    assert folder.read_bytes("a.bin") == b"x" and ("GET", f"/{BUCKET}/by-environment/a.bin") in proxy.asked
