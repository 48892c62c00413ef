"""Encoders of other kinds through the whole pipeline on the demo's corpus, beside the float one: bytes, rows a second.

Each arm is a change to the demo's train config, or another way of computing the encoder of an arm before it; the stages
are those of any index, on Ray. What is finished under build/bench/pipeline is not done again, but times are taken anew:
one worker, in this process, encodes the 7,000 images of the database in turn with each arm; with no rounds, none does.

python benchmarks/pipeline.py [--rounds 7] [--arm NAME ...]
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from record import write_result

from gsl_dist.artefact import Card, load_codebook, open_card
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, ShardEncoder, run_encode, settle_encoding
from gsl_dist.cluster.evaluate import EvaluateConfig, run_evaluate
from gsl_dist.cluster.model import WEIGHTS
from gsl_dist.cluster.session import stay_quiet
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.config import check_config
from gsl_dist.data import open_corpus
from gsl_dist.demo import MAIN_BITS, SNAPPED, Demo, images, train_settings
from gsl_dist.storage import Folder

PLACE = Path("build/bench/pipeline")
POWERS = {"kind": "power", "ratios": [0.5, 0.75, 0.875, 1.0], "epochs": 5}
# Nine convolutions, eight of which have one shape and can share: the demo's three have one each.
NINE = {"encoder": {"channels": [32, 32, 32], "depths": [1, 1, 7], "grid": 1}, "fit": {"epochs": 12}}
ARMS: dict[str, dict[str, Any]] = {
    "float": {},
    "binary, stochastic": {"lowbit": {"kind": "binary"}, "fit": {"epochs": 10}},
    "ternary, stochastic": {"lowbit": {"kind": "ternary"}, "fit": {"epochs": 10}},
    "powers of two, 5 bits": {"lowbit": POWERS | {"bits": 5}},
    "powers of two, 7 bits": {"lowbit": POWERS | {"bits": 7}},
    "nine layers": NINE,
    "nine layers, 4x fewer": NINE | {"compress": {"ratio": 4}, "fit": {"epochs": 6}},
}
"""What each arm changes in the demo's settings; a section is laid over the demo's."""
WAYS: dict[str, tuple[str, str]] = {
    f"{arm}: {way}": (arm, way)
    for arm in ("float", "nine layers", "nine layers, 4x fewer")
    for way in ("onnx", "int8", "fastest")
}
"""Arms that differ in how an encoder is computed alone: whose it is, and `execution`."""
COMPRESSED_FROM = "nine layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arm", nargs="*", default=[*ARMS, *WAYS])
    wanted = parser.parse_args()
    found = {arm: go_through(arm) for arm in wanted.arm}
    for figures in found.values():
        figures["of_float"] = figures["file_bytes"] / found["float"]["file_bytes"]
    rates = time_arms(wanted.arm, wanted.rounds) if wanted.rounds else {}
    for arm, rate in rates.items():
        found[arm] |= {"rows_per_s": rate, "over_float": rate / rates["float"]}
    write_result("pipeline", {"arms": found, "rounds": wanted.rounds})


def go_through(arm: str) -> dict[str, Any]:
    """Make and measure a version with this encoder, computed in this way."""
    owner, way = WAYS.get(arm, (arm, "torch"))
    demo, own = (Demo(find_place(name), 0, stay_quiet) for name in (owner, arm))
    tree = train_settings(demo, MAIN_BITS, SNAPPED, "model")
    tree |= {name: tree.get(name, {}) | part for name, part in ARMS[owner].items()}
    if "compress" in tree:
        tree["compress"] = tree["compress"] | {"model": str(find_place(COMPRESSED_FROM) / "model")}
    run_train(check_config(TrainConfig, tree))
    trained = {"source": "trained", "model": demo.place("model"), "output": demo.place("codebook")}
    run_codebook(check_config(CodebookConfig, trained))
    codes = run_encode(encode_settings(arm, "codes", keep_vectors=True, shards=2))
    shared = {"model": demo.place("model"), "codebook": demo.place("codebook")}
    run_build(check_config(BuildConfig, shared | {"codes": own.place("codes"), "index": own.place("index")}))
    card = open_card(Folder(demo.place("model")), "model")
    figures = {"map_coded": measure_map(own, codes), "path": codes.facts["encoder_path"], "execution": way}
    if decided := codes.facts.get("execution"):
        figures |= {"decided": decided["path"], "agreement": decided["ways"][decided["path"]]}
    return describe_files(card) | figures | compare_codes(owner, arm)


def compare_codes(owner: str, arm: str) -> dict[str, float]:
    """Tell which share of all bytes of codes is that of torch."""
    if arm == owner:
        return {}
    codes = [
        np.frombuffer(b"".join(pq.read_table(path)["code"].to_pylist()), np.uint8)
        for name in (owner, arm)
        for path in sorted((find_place(name) / "codes").glob("shard-*.parquet"))
    ]
    half = len(codes) // 2
    return {"equal_codes": float((np.concatenate(codes[:half]) == np.concatenate(codes[half:])).mean())}


def measure_map(demo: Demo, codes: Card) -> float:
    """Give the mAP of the version, measured now or earlier."""
    folder = Folder(demo.output)
    if folder.exists("measured.json"):
        measured = folder.read_json("measured.json")
        if measured["fingerprint"] == codes.facts["codebook_fingerprint"]:
            return float(measured["map_coded"])
    asked = {"queries": images("queries").model_dump(), "label_column": "label", "output": demo.place("measured.json")}
    return float(run_evaluate(check_config(EvaluateConfig, asked | {"index": demo.place("index")}))["map_coded"])


def describe_files(card: Card) -> dict[str, Any]:
    """Give the bytes of the weights, those of the ideal, and what a worker has to fetch to encode with them."""
    file_bytes = card.entry(WEIGHTS).bytes
    described = len(card.model_dump_json())
    ideal = card.facts.get("encoder_bytes_ideal", file_bytes)
    return {"file_bytes": file_bytes, "ideal_bytes": ideal, "shipped_bytes": file_bytes + described}


def find_place(arm: str) -> Path:
    return PLACE.resolve() / arm.replace(", ", "-").replace(": ", "-").replace(" ", "-")


def encode_settings(arm: str, output: str, **more: Any) -> EncodeConfig:
    owner, way = WAYS.get(arm, (arm, "torch"))
    tree = {"corpus": images("database").model_dump(), "resources": {"workers": 1, "cpus": 1}, "execution": way}
    tree |= {name: str(find_place(owner) / name) for name in ("model", "codebook")}
    return check_config(EncodeConfig, tree | {"output": str(find_place(arm) / output)} | more)


def time_arms(arms: list[str], rounds: int) -> dict[str, float]:
    """Encode the database with each arm, turn by turn; give the most rows a second, since chance only slows."""
    encoders = {arm: start_encoder(encode_settings(arm, "timed")) for arm in arms if not arm.endswith(": fastest")}
    taken: dict[str, list[float]] = {arm: [] for arm in encoders}
    for _ in range(rounds + 1):
        for arm, encoder in encoders.items():
            start = time.perf_counter()
            note = encoder.encode_shard(0, 0, encoder.corpus.rows)
            taken[arm].append(note.rows / (time.perf_counter() - start))
    for encoder in encoders.values():
        shutil.rmtree(encoder.config.output)
    # The first round warms up.
    return {arm: max(rates[1:]) for arm, rates in taken.items()}


def start_encoder(config: EncodeConfig) -> ShardEncoder:
    """Give a worker's encoder, with the way decided that it goes."""
    settle_encoding(config, "timed", open_corpus(config.corpus), load_codebook(config.codebook))
    return ShardEncoder(config, "timed")


if __name__ == "__main__":
    main()
