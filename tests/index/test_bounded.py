"""Shards filled in passes: the same bytes as from memory, whatever the room, and no more memory than that."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("faiss")
from worlds import join_pieces, make_codebook, make_rows, make_vectors, write_codes

from gsl_dist.errors import DataError
from gsl_dist.index import bounded
from gsl_dist.index.bounded import hold_ids, plan_spans, write_lists, write_payload, write_vectors
from gsl_dist.index.lists import make_lists, open_lists
from gsl_dist.index.refine import keep_vectors
from gsl_dist.index.stream import count_lists

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (500, 3_000, 1 << 24)  # 16 rows at a time and fewer, some lists, everything
KINDS = [
    {"kind": "pq"},
    {"kind": "pq", "rotated": True},
    {"kind": "rq"},
    {"kind": "lsq"},
    {"kind": "cq", "residual": False},
    {"kind": "pq", "metric": "ip"},
    {"kind": "rabitq", "rotated": True, "bits": 1},
    {"kind": "vlq"},
    {"kind": "vlq", "rotated": True},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["kind"] + "-rotated" * kind.get("rotated", 0))
every_room = pytest.mark.parametrize("room", ROOMS)


def write_both(place, codebook, rows, room, *, files=3, coarse_search="flat", code_layout="plain"):
    """Give what streaming writes and what memory writes."""
    portion = join_pieces(place, write_codes(place, codebook, rows, files=files))
    write_lists(portion, codebook, place / "streamed", room, coarse_search, code_layout)
    make_lists(codebook, *rows, coarse_search, code_layout).write(place / "whole")
    return (place / "streamed").read_bytes(), (place / "whole").read_bytes()


@every_kind
@every_room
def test_a_streamed_file_is_byte_for_byte_the_one_written_from_memory(tmp_path, kind, room):
    codebook = make_codebook(**kind)
    streamed, whole = write_both(tmp_path, codebook, make_rows(codebook), room)
    assert streamed == whole


@every_room
@pytest.mark.parametrize("kind", [{"kind": "pq", "bits": 4}, {"kind": "rabitq", "rotated": True, "bits": 1}])
def test_a_streamed_file_of_blocks_is_the_one_written_from_memory(tmp_path, kind, room):
    codebook = make_codebook(**kind)
    streamed, whole = write_both(tmp_path, codebook, make_rows(codebook), room, code_layout="fastscan")
    assert streamed == whole


@every_room
@pytest.mark.parametrize("rows", [0, 1, 100, 299, 300, 301, 600])
def test_lists_may_be_empty_for_the_most_part(tmp_path, rows, room):
    codebook = make_codebook(cells=600)
    ids, _, codes = make_rows(codebook, rows)
    # As many lists as rows: faiss writes another form where half of them or more are empty.
    lists = np.random.default_rng(0).permutation(600)[:rows]
    streamed, whole = write_both(tmp_path, codebook, (ids, lists, codes), room)
    assert streamed == whole and open_lists(tmp_path / "streamed", codebook).rows == rows


@every_room
@pytest.mark.parametrize(("kind", "cells", "long"), [("pq", 8, 2), ("pq", 8, 0), ("pq", 1, 0), ("vlq", 8, 2)])
def test_a_list_that_does_not_fit_is_cut(tmp_path, kind, cells, long, room):
    codebook = make_codebook(kind, cells=cells)
    ids, lists, codes = make_rows(codebook)
    ids[0], lists[lists > long] = 0, long
    streamed, whole = write_both(tmp_path, codebook, (ids, lists, codes), room)
    assert streamed == whole


@every_room
def test_a_graph_of_cells_is_in_the_streamed_file(tmp_path, room):
    codebook = make_codebook(cells=40)
    streamed, whole = write_both(tmp_path, codebook, make_rows(codebook), room, coarse_search="hnsw")
    assert streamed == whole


@pytest.mark.parametrize("dim", [16, 96])
def test_squares_are_measured_in_the_same_groups_of_rows(tmp_path, dim, monkeypatch):
    monkeypatch.setattr("gsl_dist.index.vlq._SQUARE_FLOATS", 64 * dim)
    codebook = make_codebook("vlq", rotated=True, dim=dim)
    for room in ROOMS:
        streamed, whole = write_both(tmp_path, codebook, make_rows(codebook, 1000), room)
        assert streamed == whole


def test_spans_follow_each_other_and_hold_no_more_than_they_may(tmp_path):
    codebook = make_codebook(cells=50)
    ids, lists, codes = make_rows(codebook, 500)
    lists[lists > 40] = 7
    portion = join_pieces(tmp_path, write_codes(tmp_path, codebook, (ids, lists, codes)))
    sizes = count_lists(portion, codebook)
    assert sizes.tolist() == np.bincount(lists, minlength=50).tolist()
    spans = list(plan_spans(portion, codebook, sizes, 30))
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]] and spans[-1].stop == 500
    assert max(span.stop - span.start for span in spans) == 30
    for span in spans:
        inside = (lists >= span.first) & (lists < span.last) & (ids >= span.low) & (ids <= span.high)
        assert inside.sum() == span.stop - span.start


@every_room
@pytest.mark.parametrize("cell", [-1, 8])
def test_a_cell_out_of_range_is_refused_and_named(tmp_path, cell, room):
    codebook = make_codebook()
    ids, lists, codes = make_rows(codebook)
    lists[200] = cell
    portion = join_pieces(tmp_path, write_codes(tmp_path, codebook, (ids, lists, codes)))
    with pytest.raises(DataError, match=f"cell: got {cell}, but cells are 0 to 7"):
        write_lists(portion, codebook, tmp_path / "streamed", room)


@every_room
@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("rows", [0, 300])
def test_streamed_vectors_are_byte_for_byte_those_kept_from_memory(tmp_path, precision, room, rows):
    codebook, vectors = make_codebook(), make_vectors(rows).astype(np.float16)
    content = make_rows(codebook, rows)
    portion = join_pieces(tmp_path, write_codes(tmp_path, codebook, content, files=3, vectors=vectors))
    write_vectors(portion, hold_ids(portion), codebook.dim, tmp_path / "streamed", room, precision)
    keep_vectors(content[0], vectors, precision).write(tmp_path / "whole")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("rows", [0, 300])
def test_payload_is_in_the_order_of_ids_and_the_room_changes_no_byte(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(bounded, "_PAYLOAD_ROWS", 32)
    codebook, rng = make_codebook(), np.random.default_rng(0)
    content = make_rows(codebook, rows)
    words = ["word" * length if length else None for length in rng.integers(0, 50, rows).tolist()]
    payload = pa.table({"text": pa.array(words, pa.string()), "number": rng.normal(size=rows)})
    portion = join_pieces(tmp_path, write_codes(tmp_path, codebook, content, files=3, payload=payload))
    written = []
    for room in ROOMS:
        write_payload(portion, hold_ids(portion), tmp_path / "payload", room)
        written.append((tmp_path / "payload").read_bytes())
    assert written[0] == written[1] == written[2]
    wanted = payload.add_column(0, "id", [content[0]]).take(np.argsort(content[0]))
    assert pq.read_table(tmp_path / "payload").to_pydict() == wanted.to_pydict()


MEASURE = """
import sys
from pathlib import Path
from gsl_dist.artefact import load_codebook
from gsl_dist.index.bounded import hold_ids, write_lists, write_payload, write_vectors
from gsl_dist.index.stream import Piece, Portion

place, rows, room = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
codebook = load_codebook(str(place / "codebook"))

def read_status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

def build(rows):
    portion = Portion("shard", str(place / "codes"), (Piece("shard-00000.parquet", 0, rows),), rows)
    write_lists(portion, codebook, place / "lists", room)
    ids = hold_ids(portion)
    write_vectors(portion, ids, codebook.dim, place / "vectors", room - ids.nbytes, "int8")
    write_payload(portion, ids, place / "payload", room - ids.nbytes)

build(20_000)  # what libraries take at their first use is not of the rows
Path("/proc/self/clear_refs").write_text("5")
before = read_status("VmRSS")
build(rows)
print(read_status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_a_build_takes_no_more_memory_than_it_may(tmp_path):
    codebook, rows, room = make_codebook(dim=64, choices=32, bits=8), 400_000, 16 << 20
    rng = np.random.default_rng(0)
    content = np.arange(rows), rng.integers(8, size=rows), rng.integers(256, size=(rows, 32)).astype(np.uint8)
    payload = pa.table({"text": pa.array([f"{number:060d}" for number in range(rows)])})
    vectors = rng.normal(size=(rows, 64)).astype(np.float16)
    write_codes(tmp_path, codebook, content, group=65_536, vectors=vectors, payload=payload)
    # Held at once the shard would take 12 MB of codes, 51 MB of vectors and 24 MB of payload, each about twice.
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(rows), str(room)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    from gsl_dist.index.stream import READ_BYTES

    assert 0 < int(ran.stdout) < room + READ_BYTES
