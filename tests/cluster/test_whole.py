"""Finished shards are found by their notes, and no driver reads more the larger the corpus is."""

import pytest
from corpora import write_vectors
from worlds import make_codebook

from gsl_dist.artefact import CODEBOOK, Card, publish_card
from gsl_dist.cluster import whole
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.cluster.whole import Note, find_damaged, find_notes, refuse_damaged, refuse_lost
from gsl_dist.config import Resources, check_config
from gsl_dist.errors import ArtefactError
from gsl_dist.storage import FileEntry, Folder


class Finished(Note):
    """A shard of one file."""

    file: FileEntry

    @property
    def files(self):
        """List the file."""
        return [self.file]


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    for shard in range(4):
        folder.write_bytes(f"{shard}.bin", bytes([shard]) * 9)
        note = Finished(made_by="m1", file=folder.pin(f"{shard}.bin"))
        folder.write_sealed(f"shard-{shard:05d}.note.json", note.model_dump(mode="json"))
    return folder


def find(folder, made_by="m1"):
    return sorted(find_notes(folder, Finished, 4, made_by, Resources()))


def test_shards_with_a_note_are_found_and_those_of_other_runs_are_not(folder):
    assert find(folder) == [0, 1, 2, 3] and find(folder, "m2") == []
    assert sorted(find_notes(folder, Finished, 2, "m1", Resources())) == [0, 1]


@pytest.mark.parametrize("name", ["2.bin", "shard-00002.note.json"])
@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_shard_whose_note_or_file_is_not_as_it_was_counts_as_none(folder, name, content):
    folder.delete(name) if content is None else folder.write_bytes(name, content)
    assert find(folder) == [0, 1, 3]


def test_damage_is_found_by_workers_as_it_is_here(ray_session, folder, monkeypatch):
    entries = [folder.pin(f"{shard}.bin") for shard in range(4)]
    folder.write_bytes("1.bin", b"other")
    folder.delete("3.bin")
    here = [str(fault) for fault in find_damaged(folder, entries, Resources())]
    monkeypatch.setattr(whole, "HERE_BYTES", 0)
    monkeypatch.setattr(whole, "_TASK_BYTES", 20)
    assert [str(fault) for fault in find_damaged(folder, entries, Resources())] == here and len(here) == 2
    with pytest.raises(ArtefactError, match=r"1\.bin"):
        refuse_damaged(folder, entries, Resources())


def test_a_file_that_is_lost_is_named(folder):
    entries = [folder.pin(f"{shard}.bin") for shard in range(4)]
    refuse_lost(folder, entries)
    folder.delete("2.bin")
    with pytest.raises(ArtefactError, match=r"2\.bin: it was written, but is not there any more"):
        refuse_lost(folder, entries)


def test_the_driver_of_the_encode_stage_reads_as_much_of_ten_times_the_rows(ray_session, tmp_path, monkeypatch):
    read, opened = {}, Folder.open

    def count(self, name):
        read[self.location] = read.get(self.location, 0) + self.size(name)
        return opened(self, name)

    monkeypatch.setattr(Folder, "open", count)
    monkeypatch.setattr(whole, "HERE_BYTES", 0)
    codebook = Folder(tmp_path / "codebook")
    make_codebook().save(codebook, CODEBOOK)
    publish_card(codebook, Card(kind="codebook", made_by="m", files=[codebook.pin(CODEBOOK)], config={}, facts={}))
    seen = {}
    for rows in (400, 4000):
        corpus = write_vectors(tmp_path / f"{rows}.parquet", rows=rows)
        tree = {"corpus": {"path": str(corpus), "id_column": "id", "vector_column": "vector"}, "shards": 4}
        tree |= {"codebook": codebook.location, "output": str(tmp_path / f"codes-{rows}"), "keep_vectors": True}
        for turn in ("made", "whole already"):
            read.clear()
            card = run_encode(check_config(EncodeConfig, tree))
            assert card.facts["rows"] == rows
            seen[rows, turn] = read.get(tree["output"], 0)
    # A card has a digit more where there are more rows.
    assert seen[4000, "made"] <= seen[400, "made"] + 64
    assert seen[4000, "whole already"] <= seen[400, "whole already"] + 64 < 8192
