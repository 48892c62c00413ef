import pytest

from gsl_dist.artefact import Card, find_finished, open_card, publish_card
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.storage import Folder


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path)
    folder.write_bytes("a.bin", b"1234")
    folder.write_bytes("deep/b.bin", b"5678")
    return folder


def make_card(folder, **changed):
    files = [folder.pin("a.bin"), folder.pin("deep/b.bin")]
    return Card(**({"kind": "codes", "made_by": "m1", "files": files, "config": {}, "facts": {"rows": 2}} | changed))


def test_a_published_card_comes_back(folder):
    card = publish_card(folder, make_card(folder))
    assert open_card(folder, "codes") == card
    assert card.entry("deep/b.bin").bytes == 4


def test_files_without_a_card_are_no_artefact(folder):
    assert find_finished(folder, "codes", "m1") is None
    with pytest.raises(ArtefactError, match="no finished codes here"):
        open_card(folder, "codes")


def test_a_card_of_another_kind_is_not_taken(folder):
    publish_card(folder, make_card(folder))
    with pytest.raises(ArtefactError, match="no finished model here"):
        open_card(folder, "model")


@pytest.mark.parametrize("name", ["a.bin", "deep/b.bin"])
@pytest.mark.parametrize("content", [b"123", b"1235", None])
def test_a_damaged_file_is_named(folder, name, content):
    publish_card(folder, make_card(folder))
    folder.delete(name) if content is None else folder.write_bytes(name, content)
    for read in (lambda: open_card(folder, "codes"), lambda: find_finished(folder, "codes", "m1")):
        with pytest.raises(ArtefactError) as caught:
            read()
        assert caught.value.path == folder.path(name)
    assert open_card(folder, "codes", verify=False).made_by == "m1"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b'{"kind": "codes"}', b'{"kind": 1, "x": 2}'])
def test_a_damaged_card_is_refused(folder, content):
    folder.write_bytes("codes.json", content)
    with pytest.raises(ArtefactError) as caught:
        open_card(folder, "codes")
    assert caught.value.path == folder.path("codes.json") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "field, value", [("made_by", "m2"), ("facts", {"rows": 3}), ("config", {"seed": 1}), ("files", [])]
)
def test_an_altered_card_is_refused(folder, field, value):
    publish_card(folder, make_card(folder))
    folder.write_json("codes.json", folder.read_json("codes.json") | {field: value})
    with pytest.raises(ArtefactError, match=r"codes\.json: its content differs"):
        find_finished(folder, "codes", "m1")


def test_a_card_from_before_there_were_digests_opens(folder):
    card = make_card(folder)
    folder.write_json("codes.json", card.model_dump(mode="json"))
    assert open_card(folder, "codes") == card


def test_the_same_work_is_found_done(folder):
    card = publish_card(folder, make_card(folder))
    assert find_finished(folder, "codes", "m1") == card


def test_work_of_other_settings_is_never_overwritten(folder):
    publish_card(folder, make_card(folder))
    with pytest.raises(ConfigError, match="choose another folder") as caught:
        find_finished(folder, "codes", "m2")
    assert caught.value.field == "output"


def test_a_card_holds_no_key_of_a_uri(tmp_path):
    config = {"corpus": {"path": "s3://user:hush@bucket/rows"}, "parts": ["gs://a:hush@b", "plain@name"], "seed": 3}
    publish_card(Folder(tmp_path), Card(kind="codes", made_by="x", files=[], config=config, facts={}))
    card = open_card(Folder(tmp_path), "codes")
    assert card.config == {"corpus": {"path": "s3://***@bucket/rows"}, "parts": ["gs://***@b", "plain@name"], "seed": 3}
