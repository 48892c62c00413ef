import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gsl_dist.errors import ArtefactError, BadInput, DataError, Unwritable
from gsl_dist.storage import FileEntry, Folder, split_location


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path / "artefact")


def everything_in(folder):
    return sorted(path.name for path in Path(folder.location).rglob("*") if path.is_file())


def crash_while_writing(folder, name):
    with pytest.raises(RuntimeError, match="crash"), folder.whole(name) as draft:
        draft.write_bytes(b"half of the n")
        raise RuntimeError("crash")


def test_a_crash_while_writing_leaves_nothing(folder):
    crash_while_writing(folder, "a.bin")
    assert not folder.exists("a.bin") and everything_in(folder) == []


def test_a_crash_while_overwriting_leaves_the_old_file(folder):
    folder.write_bytes("a.bin", b"old")
    crash_while_writing(folder, "a.bin")
    assert folder.read_bytes("a.bin") == b"old" and everything_in(folder) == ["a.bin"]


def test_a_file_is_not_there_before_it_is_whole(folder):
    with folder.whole("a.bin") as draft:
        draft.write_bytes(b"half")
        assert not folder.exists("a.bin") and folder.names() == []
    assert folder.read_bytes("a.bin") == b"half" and everything_in(folder) == ["a.bin"]


def test_a_draft_that_was_never_written_is_an_error_and_leaves_nothing(folder):
    with pytest.raises(FileNotFoundError), folder.whole("a.bin"):
        pass
    assert everything_in(folder) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("write", [Path.write_bytes, lambda path, content: pq.write_table(pa.table({"a": [1]}), path)])
def test_a_full_disk_is_named_with_what_could_not_be_written_and_nothing_is_left(folder, write):
    folder.write_bytes("a.bin", b"old")
    with (
        pytest.raises(Unwritable, match=r"a\.bin: it cannot be written \(No space left"),
        folder.whole("a.bin") as draft,
    ):
        draft.symlink_to("/dev/full")
        write(draft, b"new")
    assert folder.read_bytes("a.bin") == b"old" and everything_in(folder) == ["a.bin"]


def test_what_the_writer_itself_could_not_read_is_not_blamed_on_the_disk(folder):
    with pytest.raises(FileNotFoundError), folder.whole("a.bin"):
        Path("/nowhere").read_bytes()


def test_a_file_in_a_folder_below_is_written_whole(folder):
    folder.write_bytes("model/net/a.bin", b"x")
    assert folder.child("model").child("net").read_bytes("a.bin") == b"x"


def test_names_are_sorted_and_skip_drafts_and_folders(folder, tmp_path):
    for name in ("b.bin", "a.bin", "c.txt", "deep/d.bin"):
        folder.write_bytes(name, b"")
    (tmp_path / "artefact" / ".a.bin.1234").write_bytes(b"the draft of a killed process")
    assert folder.names() == ["a.bin", "b.bin", "c.txt"]
    assert folder.names(suffix=".bin") == ["a.bin", "b.bin"]
    assert folder.names(folders=True) == ["deep"]


def test_a_folder_that_is_not_there_has_no_names(folder):
    assert folder.names() == [] and not folder.exists() and not folder.is_folder()


def test_a_pinned_file_is_accepted(folder):
    folder.write_bytes("a.bin", bytes(range(256)) * 5000)
    entry = folder.pin("a.bin")
    assert entry.bytes == 1_280_000
    folder.check(entry)


@pytest.mark.parametrize(
    "content, reason",
    [(b"123", "3 bytes, but 4 were written"), (b"12345", "5 bytes"), (b"1235", "checksum"), (b"", "0 bytes")],
)
def test_a_truncated_or_altered_file_is_refused(folder, content, reason):
    folder.write_bytes("a.bin", b"1234")
    entry = folder.pin("a.bin")
    folder.write_bytes("a.bin", content)
    with pytest.raises(ArtefactError, match=reason) as caught:
        folder.check(entry)
    assert caught.value.path == folder.path("a.bin")


@pytest.mark.parametrize("read", [Folder.size, Folder.open, Folder.read_bytes, Folder.read_json, Folder.pin])
def test_a_file_that_is_not_there_is_named(folder, read):
    with pytest.raises(ArtefactError, match=r"none\.json: no such file"):
        read(folder, "none.json")


def test_checking_a_folder_in_place_of_a_file_is_refused(folder):
    folder.write_bytes("a.bin/inner", b"x")
    with pytest.raises(ArtefactError, match="no such file"):
        folder.check(FileEntry(name="a.bin", bytes=1, sha256="0" * 64))


def test_json_comes_back_and_equal_content_is_equal_bytes(folder):
    folder.write_json("a.json", {"b": 1, "a": [1.5, None, "é"]})
    folder.write_json("b.json", {"a": [1.5, None, "é"], "b": 1})
    assert folder.read_json("a.json") == {"a": [1.5, None, "é"], "b": 1}
    assert folder.read_bytes("a.json") == folder.read_bytes("b.json")


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe{}", b"nonsense"])
def test_what_is_no_json_is_refused(folder, content):
    folder.write_bytes("a.json", content)
    with pytest.raises(ArtefactError, match=r"a\.json: it is not JSON"):
        folder.read_json("a.json")


def test_json_nested_without_end_is_refused(folder):
    folder.write_bytes("a.json", b"[" * 100_000)
    with pytest.raises(ArtefactError, match=r"a\.json: it is not JSON"):
        folder.read_json("a.json")


def test_sealed_content_comes_back_without_its_digest(folder):
    folder.write_sealed("a.json", {"b": {10: 1, 9: 0.1}, "a": [None, "é"]})
    assert folder.read_sealed("a.json") == {"b": {"10": 1, "9": 0.1}, "a": [None, "é"]}
    assert len(folder.read_json("a.json")["digest"]) == 64


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_a_number_that_was_made_none_is_found_as_any_other(folder, number):
    folder.write_sealed("a.json", {"a": 0.5})
    folder.write_bytes("a.json", folder.read_bytes("a.json").replace(b"0.5", number.encode()))
    with pytest.raises(ArtefactError, match=r"a\.json: its content differs from the digest"):
        folder.read_sealed("a.json")


@pytest.mark.parametrize(
    "change", [lambda told: told | {"a": 2}, lambda told: told | {"c": 1}, lambda told: told | {"digest": "0" * 64}]
)
def test_sealed_content_that_was_altered_is_refused(folder, change):
    folder.write_sealed("a.json", {"a": 1, "b": 2})
    folder.write_json("a.json", change(folder.read_json("a.json")))
    with pytest.raises(ArtefactError, match=r"a\.json: its content differs from the digest"):
        folder.read_sealed("a.json", always=False)


def test_content_without_a_digest_passes_only_where_that_is_allowed(folder):
    folder.write_json("a.json", {"a": 1})
    assert folder.read_sealed("a.json", always=False) == {"a": 1}
    with pytest.raises(ArtefactError, match=r"a\.json: it does not have the digest"):
        folder.read_sealed("a.json")


def test_numbers_that_json_lacks_are_not_written(folder):
    with pytest.raises(ValueError, match="JSON"):
        folder.write_json("a.json", {"loss": float("nan")})
    assert not folder.exists("a.json")


def test_delete_and_clear_are_content_with_nothing(folder):
    folder.delete("none")
    folder.clear("none")
    folder.write_bytes("deep/a", b"1")
    folder.clear("deep")
    assert folder.names(folders=True) == []


def test_a_local_file_is_read_where_it_lies(folder):
    folder.write_bytes("a.bin", b"1")
    with folder.local("a.bin") as path:
        assert str(path) == folder.path("a.bin")
    with pytest.raises(ArtefactError), folder.local("none"):
        pass


def test_a_uri_and_a_path_name_the_same_folder(folder):
    folder.write_bytes("a.bin", b"1")
    uri = Folder(f"file://{folder.location}")
    assert uri.read_bytes("a.bin") == b"1" and uri.is_local
    uri.write_bytes("b.bin", b"2")
    assert folder.names() == ["a.bin", "b.bin"]


def test_a_folder_survives_pickling(folder):
    folder.write_bytes("a.bin", b"1")
    assert pickle.loads(pickle.dumps(folder)).read_bytes("a.bin") == b"1"  # noqa: S301 - as Ray does


def test_a_location_splits_into_folder_and_name(tmp_path):
    folder, name = split_location(str(tmp_path / "a" / "b.npy"))
    assert (folder.location, name) == (str(tmp_path / "a"), "b.npy")


def test_no_message_shows_the_key_in_a_uri():
    folder = Folder("s3://user:hush@bucket/index?endpoint_override=127.0.0.1:1&scheme=http")
    assert folder.path("x.json").startswith("s3://***@bucket/index/x.json?")
    assert "hush" not in repr(folder) and "hush" in folder.child("below").location
    with pytest.raises(BadInput) as caught:
        Folder("ftp://user:hush@host/index")
    assert "hush" not in str(caught.value) and "***@host" in str(caught.value)
    for error in (DataError("corpus", "s3://user:hush@b/rows", "no"), ArtefactError("s3://user:hush@b/x", "cut")):
        assert "hush" not in str(error) and "s3://***@b/" in str(error)


def test_drafts_of_killed_writers_are_swept_and_nothing_else(folder):
    kept = ["a.bin", "deep/b.bin", ".hidden", ".a.bin.1234"]
    drafts = [f".a.bin.{'0f' * 16}", f"deep/.b.bin.{'a1' * 16}"]
    for name in kept + drafts:
        path = Path(folder.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    folder.sweep()
    assert everything_in(folder) == sorted(Path(name).name for name in kept)
