"""The examples, run as they are shipped."""

import ast
import runpy
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")
from gsl_dist.data import fashion_folder

pytestmark = pytest.mark.ray
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(ray_session, capsys, monkeypatch):
    """Runs an example with words on its command line, and gives the lines that it prints."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        # Ray's processes report on standard output, too, each line under their names.
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith(("(", "\x1b"))]

    return run


@pytest.mark.slow
def test_a_picture_is_the_nearest_to_itself_and_its_embeddings_are_found_again(example, tmp_path):
    hits = [ast.literal_eval(line) for line in example("image_search", tmp_path / "images")]
    first = pq.read_table(fashion_folder() / "database.parquet", columns=["id", "label"]).slice(0, 1).to_pylist()[0]
    assert len(hits) == 5 and {name: hits[0][name] for name in ("id", "label")} == first
    assert sum(hit["label"] == first["label"] for hit in hits) >= 3
    lines = example("own_embeddings", tmp_path / "images" / "embeddings.parquet", tmp_path / "own")
    recall = [float(line.split()[-1]) for line in lines]
    codes, refined = recall[:3], recall[3:]
    assert codes == sorted(codes) and refined == sorted(refined)
    assert codes[-1] > 0.8 and refined[-1] > 0.95


def test_functions_are_found_by_what_they_say_of_themselves(example, tmp_path):
    found = {line.split()[1] for line in example("text_search", "compress a file", tmp_path)}
    assert len(found) == 5 and {"bz2.compress", "lzma.compress"} <= found
