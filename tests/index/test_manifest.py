import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("faiss")
from worlds import make_codebook, make_index

from gsl_dist.errors import ArtefactError, BadInput
from gsl_dist.index.manifest import (
    CODEBOOK,
    MANIFEST,
    POINTER,
    current_version,
    list_versions,
    open_codebook,
    open_version,
    promote_version,
    publish_version,
    verify_version,
    version_folder,
)
from gsl_dist.storage import Folder


@pytest.fixture
def index(tmp_path):
    make_index(tmp_path / "index", rows=60, shards=2)
    return Folder(tmp_path / "index")


def place(index, name, version="v1"):
    return Path(index.location) / "versions" / version / name


def flip_byte(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x04
    path.write_bytes(content)


def test_without_a_manifest_there_is_no_version(index):
    place(index, MANIFEST).unlink()
    assert list_versions(index) == []
    for version in (None, "v1"):
        with pytest.raises(BadInput, match="versions here: none") as caught:
            open_version(index, version)
        assert caught.value.status == 404


def test_a_version_that_does_not_exist_names_those_that_do(index):
    with pytest.raises(BadInput, match="no such version; versions here: v1"):
        open_version(index, "v2")


def test_an_index_that_promoted_nothing_says_so(index):
    index.delete(POINTER)
    assert current_version(index) is None and open_version(index, "v1").rows == 60
    with pytest.raises(BadInput, match="none is promoted"):
        open_version(index)


def test_a_folder_that_is_no_index_has_no_versions(tmp_path):
    assert list_versions(Folder(tmp_path)) == []
    with pytest.raises(BadInput, match="versions here: none"):
        open_version(Folder(tmp_path))


def test_publishing_refuses_to_overwrite(index):
    manifest, before = open_version(index), place(index, MANIFEST).read_bytes()
    with pytest.raises(BadInput, match="immutable"):
        publish_version(index, manifest.model_copy(update={"rows": 1}))
    assert place(index, MANIFEST).read_bytes() == before


def test_what_was_published_comes_back(index):
    manifest = open_version(index, "v1")
    copy = manifest.model_copy(update={"version": "v2"})
    publish_version(index, copy)
    assert open_version(index, "v2") == copy and list_versions(index) == ["v1", "v2"]


def test_a_manifest_tells_of_its_codebook(tmp_path):
    manifest = make_index(tmp_path, codebook=make_codebook("lsq", rotated=True, bits=5, choices=3))
    assert (manifest.kind, manifest.rotated, manifest.residual) == ("lsq", True, True)
    assert (manifest.dim, manifest.cells, manifest.sub_vectors, manifest.bits) == (16, 8, 3, 5)
    assert manifest.bytes_per_item == 2 and open_codebook(Folder(tmp_path), manifest).additive


def test_a_manifest_from_before_kinds_is_of_product_codes(index):
    content = json.loads(place(index, MANIFEST).read_text())
    older = {key: value for key, value in content.items() if key not in ("kind", "rotated", "digest")}
    digest = hashlib.sha256(json.dumps(older, sort_keys=True).encode()).hexdigest()
    place(index, MANIFEST).write_text(json.dumps(older | {"digest": digest}))
    manifest = open_version(index)
    assert (manifest.kind, manifest.rotated, manifest.rows) == ("pq", False, 60)


def test_promoting_the_version_before_rolls_back(index):
    make_index(index.location, rows=60, shards=2, seed=5, version="v2")
    assert current_version(index) == "v2" and open_version(index).version == "v2"
    assert promote_version(index, "v1").version == "v1"
    assert current_version(index) == "v1" and open_version(index).version == "v1"


def test_promoting_what_does_not_exist_leaves_the_pointer(index):
    with pytest.raises(BadInput, match="no such version"):
        promote_version(index, "v2")
    assert current_version(index) == "v1"


def test_promoting_a_damaged_manifest_leaves_the_pointer(index):
    make_index(index.location, rows=60, shards=2, seed=5, version="v2")
    promote_version(index, "v1")
    flip_byte(place(index, MANIFEST, "v2"), at=200)
    with pytest.raises(ArtefactError):
        promote_version(index, "v2")
    assert current_version(index) == "v1"


@pytest.mark.parametrize("name", ["../v1", "a/b", "..", ".", "", ".hidden", "v 1", "v1\n", "a" * 65, "/etc", "v1/"])
def test_a_name_that_could_leave_the_folder_is_refused(index, name):
    for use in (version_folder, open_version, promote_version, verify_version):
        with pytest.raises(BadInput, match="a version name must match"):
            use(index, name)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"v1"', "{}", '{"version": 3}', '{"version": null}'])
def test_a_damaged_pointer_is_named(index, content):
    Path(index.path(POINTER)).write_text(content)
    for use in (current_version, open_version, verify_version):
        with pytest.raises(ArtefactError) as caught:
            use(index)
        assert caught.value.path == index.path(POINTER)


def test_a_pointer_out_of_the_folder_is_refused(index):
    index.write_json(POINTER, {"version": "../../elsewhere"})
    with pytest.raises(ArtefactError, match=r"CURRENT\.json"):
        open_version(index)


def test_a_pointer_that_names_another_version_than_was_promoted_is_refused(index):
    make_index(index.location, rows=60, shards=2, seed=5, version="v2")
    path = Path(index.path(POINTER))
    path.write_text(path.read_text().replace('"v2"', '"v1"'))
    with pytest.raises(ArtefactError, match=r"CURRENT\.json: its content differs"):
        open_version(index)


def test_promoting_mends_a_damaged_pointer(index):
    Path(index.path(POINTER)).write_text("{")
    promote_version(index, "v1")
    assert open_version(index).version == "v1"


def test_a_pointer_to_a_version_that_is_gone_names_it(index):
    index.write_json(POINTER, {"version": "v9"})
    with pytest.raises(BadInput, match="'v9'"):
        open_version(index)


@pytest.mark.parametrize("key", ["rows", "fingerprint", "shards", "created", "digest", "cells"])
def test_an_altered_manifest_is_refused(index, key):
    content = json.loads(place(index, MANIFEST).read_text())
    changed = {"rows": 61, "fingerprint": "0" * 32, "shards": content["shards"][:1], "created": "", "digest": "0"}
    content[key] = changed.get(key, 9)
    place(index, MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=r"manifest\.json: its content differs"):
        open_version(index)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "{}", '{"digest": "0"}', '{"digest": "0", "x": 1}'])
def test_what_is_no_manifest_is_refused(index, content):
    place(index, MANIFEST).write_text(content)
    with pytest.raises(ArtefactError, match=r"manifest\.json") as caught:
        open_version(index)
    assert "\n" not in str(caught.value)


def test_every_altered_character_of_a_manifest_is_refused(index):
    content = place(index, MANIFEST).read_bytes()
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 0x01
        place(index, MANIFEST).write_bytes(changed)
        with pytest.raises(ArtefactError, match=r"manifest\.json"):
            open_version(index)


def test_a_manifest_in_the_folder_of_another_version_is_refused(index):
    place(index, MANIFEST, "v2").parent.mkdir()
    place(index, MANIFEST, "v2").write_bytes(place(index, MANIFEST).read_bytes())
    with pytest.raises(ArtefactError, match="differs"):
        open_version(index, "v2")


def test_an_altered_codebook_is_refused(index):
    manifest = open_version(index)
    assert open_codebook(index, manifest).fingerprint == manifest.fingerprint
    flip_byte(place(index, CODEBOOK))
    with pytest.raises(ArtefactError, match=r"codebook\.safetensors: its checksum differs"):
        open_codebook(index, manifest)


def test_the_codebook_of_another_version_is_refused(index):
    other = make_index(index.location, rows=60, shards=2, seed=5, version="v2")
    manifest = open_version(index, "v1").model_copy(update={"codebook": other.codebook})
    place(index, CODEBOOK).write_bytes(place(index, CODEBOOK, "v2").read_bytes())
    with pytest.raises(ArtefactError, match="does not fit a version built with"):
        open_codebook(index, manifest)


def test_a_whole_version_has_no_faults(index):
    assert verify_version(index) == [] and verify_version(index, "v1") == []


def test_verify_names_each_damaged_file(index):
    flip_byte(place(index, "shard-00000.faiss"))
    place(index, "shard-00001.faiss").unlink()
    flip_byte(place(index, CODEBOOK))
    faults = verify_version(index)
    names = {CODEBOOK: "checksum", "shard-00000.faiss": "checksum", "shard-00001.faiss": "no such file"}
    assert {Path(fault.path).name for fault in faults} == set(names) and len(faults) == 3
    assert all(names[Path(fault.path).name] in fault.reason for fault in faults)


def test_a_manifest_from_before_there_were_ways_of_sharding_opens_as_it_is(index):
    content = json.loads(place(index, MANIFEST).read_text())
    for name in ("digest", "sharding", "dropped"):
        del content[name]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    place(index, MANIFEST).write_text(json.dumps(content | {"digest": digest}))
    manifest = open_version(index)
    assert (manifest.sharding, manifest.dropped, manifest.rows) == ("id", 0, 60)
