"""The encode stage against the least that must be done: a torch loop and faiss's encoder, in one process.

Both read the same Parquet of encoded images, decode them, run the same CNN and code the result on the same cores. The
bare loop keeps nothing and writes nothing; the stage writes codes, ids and checksums and could be resumed. Then one
worker, alone in a process, encodes a quarter of the corpus and all of it as one shard: its peak resident memory.

python benchmarks/encoding.py [--rows 400000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from record import spread, write_result

from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, ShardEncoder, run_encode
from gsl_dist.cluster.model import load_encoder, load_trained_codebook
from gsl_dist.cluster.session import start_session, stay_quiet
from gsl_dist.cluster.train import TrainConfig, run_train
from gsl_dist.config import check_config
from gsl_dist.data import ImageConfig, decode_image, fashion_folder
from gsl_dist.demo import SNAPPED, Demo, images, train_settings
from gsl_dist.fit import embed
from gsl_dist.index.shards import create_shard
from gsl_dist.storage import Folder

CORES = 2
PLACE = Path("build/bench/encoding")
IMAGE = ImageConfig(height=28, width=28, channels=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    corpus = write_corpus(wanted.rows)
    make_model()
    start_session(CORES)
    stage, bare = [], []
    for turn in range(wanted.rounds):
        stage.append(wanted.rows / time_stage(corpus, turn))
        bare.append(wanted.rows / time_bare(corpus))
        print(f"round {turn}: stage {stage[-1]:.0f}, bare loop {bare[-1]:.0f} rows/s", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(stage, bare, strict=True)]
    figures = {"stage_rows_per_s": spread(stage), "bare_rows_per_s": spread(bare), "ratio": spread(ratios)}
    peaks = {rows: measure_peak(corpus, rows) for rows in (wanted.rows // 4, wanted.rows)}
    print(f"peak resident MB of one worker by rows: {peaks}")
    write_result("encoding", figures | {"worker_peak_mb_by_rows": peaks, "rows": wanted.rows, "cores": CORES})


def write_corpus(rows: int) -> Path:
    path = PLACE / f"corpus-{rows}.parquet"
    if path.exists():
        return path
    shipped = pa.concat_tables(pq.read_table(fashion_folder() / f"{part}.parquet") for part in ("train", "database"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with Folder(PLACE).whole(path.name) as draft, pq.ParquetWriter(draft, shipped.schema) as writer:
        for start in range(0, rows, len(shipped)):
            part = shipped.slice(0, min(len(shipped), rows - start))
            writer.write_table(part.set_column(0, "id", pa.array(np.arange(start, start + len(part)))))
    return path


def make_model() -> None:
    demo = Demo(PLACE.resolve(), 0, stay_quiet)
    tree = train_settings(demo, 16, SNAPPED, "model")
    run_train(check_config(TrainConfig, tree | {"fit": tree["fit"] | {"epochs": 2, "warmup_epochs": 1}}))
    own = {"source": "trained", "model": demo.place("model"), "output": demo.place("codebook")}
    run_codebook(check_config(CodebookConfig, own))


def time_stage(corpus: Path, turn: int) -> float:
    config = make_settings(corpus, f"codes-{turn}", shards=8, resources={"workers": CORES, "cpus": 1})
    start = time.perf_counter()
    run_encode(config)
    return time.perf_counter() - start


def make_settings(corpus: Path, name: str, **more: Any) -> EncodeConfig:
    shutil.rmtree(PLACE / name, ignore_errors=True)
    tree: dict[str, Any] = images("train").model_dump() | {"path": str(corpus), "label_column": None}
    settings = {"corpus": tree, "model": str(PLACE / "model"), "codebook": str(PLACE / "codebook")}
    return check_config(EncodeConfig, settings | {"output": str(PLACE / name)} | more)


def measure_peak(corpus: Path, rows: int) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(encode_alone, (corpus, rows))


def encode_alone(corpus: Path, rows: int) -> float:
    config = make_settings(corpus, "codes-alone", keep_vectors=True, resources={"workers": 1, "cpus": 1})
    ShardEncoder(config, "memory").encode_shard(0, 0, rows)
    # Not getrusage: what it calls the peak of a process includes that of the parent it was forked from.
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def time_bare(corpus: Path) -> float:
    torch.set_num_threads(CORES)
    faiss.omp_set_num_threads(CORES)
    encoder, _ = load_encoder(str(PLACE / "model"))
    index = create_shard(load_trained_codebook(str(PLACE / "model")))
    start = time.perf_counter()
    with ThreadPoolExecutor(CORES) as decoders:
        for batch in pq.ParquetFile(corpus).iter_batches(1024, columns=["id", "image"]):
            contents = batch["image"].to_pylist()
            items = np.stack(list(decoders.map(lambda content: decode_image(content, IMAGE), contents)))
            index.sa_encode(embed(encoder, torch.from_numpy(items)).numpy())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
