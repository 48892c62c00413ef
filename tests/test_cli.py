"""The `gsl` command: what it prints, and how it refuses."""

import json
import sys

import numpy as np
import pytest

pytest.importorskip("faiss")
from worlds import make_index, make_queries

from gsl_dist.cli import app, main
from gsl_dist.index.manifest import POINTER
from gsl_dist.index.search import open_searcher

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)
VERSION, BEFORE = "v-3f2a90b1c5d7", "v-000000000000"


@pytest.fixture
def gsl(capsys, monkeypatch, tmp_path):
    """Runs `gsl` in an empty folder: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["gsl", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def index(tmp_path):
    make_index(tmp_path / "index", seed=4, version=BEFORE)
    make_index(tmp_path / "index", version=VERSION)
    np.save(tmp_path / "queries.npy", make_queries(3))
    return tmp_path / "index"


def assert_refused(ran, *words):
    code, out, err = ran
    assert (code, out) == (2, "") and err.count("\n") == 1 and "Traceback" not in err
    assert all(word in err for word in words), err


def flip_byte(path, at=-40):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_fits_a_screen_and_shows_an_example(gsl, command):
    code, out, _ = gsl(command, "--help")
    lines = out.splitlines()
    assert code == 0 and f"Example: gsl {command}" in out
    assert len(lines) <= 30 and max(map(len, lines)) <= 80


def test_help_names_every_command(gsl):
    code, out, _ = gsl("--help")
    assert code == 0 and all(f" {command} " in out for command in COMMANDS) and len(out.splitlines()) <= 50


def test_versions_shows_names_whole_and_a_star_at_the_served_one(gsl, index):
    code, out, _ = gsl("versions", index)
    rows = {name: next(line for line in out.splitlines() if name in line) for name in (VERSION, BEFORE)}
    assert code == 0 and "*" in rows[VERSION] and "*" not in rows[BEFORE] and " 400 " in rows[VERSION]


def test_promote_moves_the_star(gsl, index):
    code, out, _ = gsl("promote", index, BEFORE)
    assert code == 0 and f"{BEFORE} is promoted: 400 rows in 3 shards" in out
    assert "*" in next(line for line in gsl("versions", index)[1].splitlines() if BEFORE in line)


def test_verify_counts_a_whole_version(gsl, index):
    assert gsl("verify", index) == (0, f"{VERSION} is whole: 5 files, 400 rows\n", "")
    assert gsl("verify", index, BEFORE)[0] == 0


def test_verify_names_each_damaged_file_in_a_line(gsl, index):
    folder = index / "versions" / VERSION
    flip_byte(folder / "shard-00001.faiss")
    (folder / "shard-00002.faiss").unlink()
    code, out, err = gsl("verify", index)
    assert (code, out, err.count("\n")) == (2, "", 2)
    assert "shard-00001.faiss: its checksum differs" in err and "shard-00002.faiss: no such file" in err
    assert gsl("verify", index, BEFORE)[0] == 0


@pytest.mark.parametrize("name", ["shard-00000.faiss", "codebook.safetensors", "manifest.json"])
def test_search_refuses_a_damaged_file_in_one_line(gsl, index, name):
    flip_byte(index / "versions" / VERSION / name)
    assert_refused(gsl("search", index, "queries.npy"), name)


@pytest.mark.parametrize("command", ["versions", "verify"])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}'])
def test_a_damaged_pointer_is_refused_in_one_line(gsl, index, command, content):
    (index / POINTER).write_text(content)
    assert_refused(gsl(command, index), POINTER)


def test_search_prints_what_the_searcher_finds(gsl, index):
    code, out, _ = gsl("search", index, "queries.npy", "-k", 4, "--probes", 3, "--json")
    wanted = open_searcher(str(index)).search(make_queries(3), 4, probes=3)
    found = json.loads(out)
    assert code == 0 and found["version"] == VERSION and found["ids"] == wanted.ids.tolist()
    assert np.allclose(found["distances"], wanted.distances)


def test_search_shows_a_row_for_each_hit(gsl, index):
    code, out, _ = gsl("search", index, "queries.npy", "-k", 4, "--version", BEFORE)
    ids = open_searcher(str(index), BEFORE).search(make_queries(3), 4).ids
    rows = [line.split("│")[1:4] for line in out.splitlines() if line.startswith("│")]
    wanted = [[q, rank, found] for q, row in enumerate(ids.tolist()) for rank, found in enumerate(row, 1)]
    assert code == 0 and [[int(cell) for cell in row] for row in rows] == wanted


@pytest.mark.parametrize("words", [("promote", "v9"), ("verify", "v9"), ("search", "queries.npy", "--version", "v9")])
def test_a_version_that_does_not_exist_is_refused_with_those_that_do(gsl, index, words):
    command, *rest = words
    assert_refused(gsl(command, index, *rest), "'v9'", VERSION, BEFORE)


@pytest.mark.parametrize("name", ["../x", "[/x]", "[bold]", ":smile:", ""])
def test_a_name_is_shown_as_it_was_given(gsl, index, name):
    assert_refused(gsl("promote", index, name), f"got {name!r}, but")


@pytest.mark.parametrize(
    "words, shown",
    [
        (("versions", "nowhere"), "nowhere"),
        (("verify", "nowhere"), "none is promoted"),
        (("search", "nowhere", "queries.npy"), "none is promoted"),
        (("search", "index", "none.npy"), "none.npy"),
        (("search", "index", "notes.txt"), "notes.txt"),
        (("search", "index", "broken.npy"), "broken.npy"),
        (("search", "index", "words.npy"), "words.npy"),
        (("search", "index", "narrow.npy"), "16 numbers"),
        (("search", "index", "nan.npy"), "nan.npy"),
        (("search", "index", "queries.npy", "-k", "0"), "k: got 0"),
        (("search", "index", "queries.npy", "--probes", "9"), "probes: got 9"),
        (("search", "http://127.0.0.1:1", "queries.npy"), "http://127.0.0.1:1 cannot be reached"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(gsl, index, tmp_path, words, shown):
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "broken.npy").write_bytes((tmp_path / "queries.npy").read_bytes()[:-3])
    np.save(tmp_path / "words.npy", np.array([["a"] * 16]))
    np.save(tmp_path / "narrow.npy", np.zeros((2, 15), np.float32))
    np.save(tmp_path / "nan.npy", np.full((2, 16), np.nan, np.float32))
    assert_refused(gsl(*words), shown)


@pytest.mark.parametrize(
    "override, words",
    [
        ("versoin=v1", ("versoin", "did you mean version?")),
        ("resources.worker=2", ("resources.worker", "did you mean workers?")),
        ("resources.workers=0", ("resources.workers",)),
        ("resources", ("key=value",)),
    ],
)
def test_a_setting_that_no_stage_takes_is_refused_before_anything_is_written(gsl, tmp_path, override, words):
    pytest.importorskip("ray")
    (tmp_path / "build.yaml").write_text("codes: codes\ncodebook: codebook\nindex: index\n")
    assert_refused(gsl("build", "build.yaml", override), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["build.yaml"]


def test_inputs_that_are_not_there_are_refused_before_anything_is_written(gsl, tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "build.yaml").write_text("codes: codes\ncodebook: codebook\nindex: index\n")
    assert_refused(gsl("build", "build.yaml"), "there is no finished codes here")
    assert_refused(gsl("build", "none.yaml"), "none.yaml", "readable YAML file")
    assert [path.name for path in tmp_path.iterdir()] == ["build.yaml"]


def test_a_deleted_item_is_in_no_answer_of_the_folder(gsl, index):
    code, out, _ = gsl("search", index, "queries.npy", "-k", 3, "--probes", 8, "--json")
    gone = json.loads(out)["ids"][0][:2]
    code, out, _ = gsl("delete", index, *gone)
    assert code == 0 and "commit 1: 2 items ended" in out
    after = json.loads(gsl("search", index, "queries.npy", "-k", 50, "--probes", 8, "--json")[1])
    assert not {item for row in after["ids"] for item in row} & set(gone)
    assert_refused(gsl("delete", index, "--", -4), "items[0].id", "-4")


def test_a_token_is_shown_once_and_never_twice_for_one_name(gsl, tmp_path):
    code, out, _ = gsl("token", "tokens.json", "dashboard")
    assert code == 0 and len(out.strip()) > 40
    kept = json.loads((tmp_path / "tokens.json").read_text())["tokens"]
    assert [(token["name"], token["scope"]) for token in kept] == [("dashboard", "read")]
    assert out.strip() not in (tmp_path / "tokens.json").read_text()
    assert_refused(gsl("token", "tokens.json", "dashboard"), "name", "another")
    assert gsl("token", "tokens.json", "keeper", "--admin")[0] == 0
