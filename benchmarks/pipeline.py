"""Encoders of other kinds through the whole pipeline on the demo's corpus, beside the float one: bytes, rows a second.

Each arm is a change to the demo's train config; the stages are those of any index, on Ray. What is finished under
build/bench/pipeline is not done again, but times are taken anew: one worker, in this process, encodes the database of
7,000 images in turn with each arm. With no rounds nothing is timed.

python benchmarks/pipeline.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result

from gsl_dist.artefact import Card, open_card
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, ShardEncoder, run_encode
from gsl_dist.cluster.evaluate import EvaluateConfig, run_evaluate
from gsl_dist.cluster.model import WEIGHTS
from gsl_dist.cluster.session import stay_quiet
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.config import check_config
from gsl_dist.demo import MAIN_BITS, SNAPPED, Demo, images, train_settings
from gsl_dist.storage import Folder

PLACE = Path("build/bench/pipeline")
POWERS = {"kind": "power", "ratios": [0.5, 0.75, 0.875, 1.0], "epochs": 5}
ARMS: dict[str, dict[str, Any]] = {
    "float": {},
    "binary, stochastic": {"lowbit": {"kind": "binary"}, "fit": {"epochs": 10}},
    "ternary, stochastic": {"lowbit": {"kind": "ternary"}, "fit": {"epochs": 10}},
    "powers of two, 5 bits": {"lowbit": POWERS | {"bits": 5}},
    "powers of two, 7 bits": {"lowbit": POWERS | {"bits": 7}},
}
"""What each arm changes in the demo's settings; a section is laid over the demo's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    found = {arm: go_through(arm, changes) for arm, changes in ARMS.items()}
    for figures in found.values():
        figures["of_float"] = figures["file_bytes"] / found["float"]["file_bytes"]
    rates = time_arms(rounds) if rounds else {}
    for arm, rate in rates.items():
        found[arm] |= {"rows_per_s": rate, "over_float": rate / rates["float"]}
    write_result("pipeline", {"arms": found, "rounds": rounds})


def go_through(arm: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Make and measure a version with this encoder."""
    demo = Demo(PLACE.resolve() / arm.replace(", ", "-").replace(" ", "-"), 0, stay_quiet)
    tree = train_settings(demo, MAIN_BITS, SNAPPED, "model")
    tree |= {name: tree.get(name, {}) | part for name, part in changes.items()}
    run_train(check_config(TrainConfig, tree))
    own = {"source": "trained", "model": demo.place("model"), "output": demo.place("codebook")}
    run_codebook(check_config(CodebookConfig, own))
    codes = run_encode(encode_settings(arm, "codes", keep_vectors=True, shards=2))
    shared = {"model": demo.place("model"), "codebook": demo.place("codebook")}
    run_build(check_config(BuildConfig, shared | {"codes": demo.place("codes"), "index": demo.place("index")}))
    card = open_card(Folder(demo.place("model")), "model")
    figures = {"map_coded": measure_map(demo, card), "path": codes.facts["encoder_path"]}
    return describe_files(card) | figures


def measure_map(demo: Demo, card: Card) -> float:
    """Give the mAP of the version, measured now or earlier."""
    folder = Folder(demo.output)
    if folder.exists("measured.json"):
        measured = folder.read_json("measured.json")
        if measured["fingerprint"] == card.facts["codebook_fingerprint"]:
            return float(measured["map_coded"])
    asked = {"queries": images("queries").model_dump(), "label_column": "label", "output": demo.place("measured.json")}
    return float(run_evaluate(check_config(EvaluateConfig, asked | {"index": demo.place("index")}))["map_coded"])


def describe_files(card: Card) -> dict[str, Any]:
    """Give the bytes of the weights, those of the ideal, and what a worker has to fetch to encode with them."""
    file_bytes = card.entry(WEIGHTS).bytes
    described = len(card.model_dump_json())
    ideal = card.facts.get("encoder_bytes_ideal", file_bytes)
    return {"file_bytes": file_bytes, "ideal_bytes": ideal, "shipped_bytes": file_bytes + described}


def encode_settings(arm: str, output: str, **more: Any) -> EncodeConfig:
    place = PLACE.resolve() / arm.replace(", ", "-").replace(" ", "-")
    tree = {"corpus": images("database").model_dump(), "resources": {"workers": 1, "cpus": 1}}
    tree |= {name: str(place / name) for name in ("model", "codebook")} | {"output": str(place / output)}
    return check_config(EncodeConfig, tree | more)


def time_arms(rounds: int) -> dict[str, float]:
    """Encode the database with each arm, turn by turn; give the median rows a second."""
    encoders = {arm: ShardEncoder(encode_settings(arm, "timed"), "timed") for arm in ARMS}
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds + 1):
        for arm, encoder in encoders.items():
            start = time.perf_counter()
            note = encoder.encode_shard(0, 0, encoder.corpus.rows)
            taken[arm].append(note.rows / (time.perf_counter() - start))
    for encoder in encoders.values():
        shutil.rmtree(encoder.config.output)
    # The first round warms up.
    return {arm: float(np.median(rates[1:])) for arm, rates in taken.items()}


if __name__ == "__main__":
    main()
