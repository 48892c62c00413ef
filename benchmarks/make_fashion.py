"""Makes the shipped demo set from the four idx files of Fashion-MNIST.

python benchmarks/make_fashion.py FOLDER_WITH_IDX_GZ [OUTPUT]
"""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PER_CLASS = {"train": 400, "database": 700, "queries": 100}


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def encode(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "WEBP", lossless=True, quality=100, method=6)
    assert (np.asarray(Image.open(io.BytesIO(stream.getvalue())).convert("L")) == image).all()
    return stream.getvalue()


def write_part(path: Path, images: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> None:
    contents = [encode(image) for image in images]
    columns = {"id": pa.array(ids, pa.int64()), "image": pa.array(contents, pa.binary())}
    table = pa.table(columns | {"label": pa.array(labels, pa.int8())})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, row_group_size=1024)
    print(path.name, len(ids), path.stat().st_size)


def main(source: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20170825)
    train_x, train_y = read_split(source, "train")
    test_x, test_y = read_split(source, "t10k")
    shuffled = np.stack([rng.permutation(np.flatnonzero(train_y == c))[:1100] for c in range(10)])
    held_out = np.stack([rng.permutation(np.flatnonzero(test_y == c))[:100] for c in range(10)])
    cut = PER_CLASS["train"]
    for name, rows in (("train", shuffled[:, :cut]), ("database", shuffled[:, cut : cut + PER_CLASS["database"]])):
        chosen = rng.permutation(rows.ravel())
        write_part(output / f"{name}.parquet", train_x[chosen], train_y[chosen], chosen)
    chosen = rng.permutation(held_out.ravel())
    write_part(output / "queries.parquet", test_x[chosen], test_y[chosen], chosen + len(train_x))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path("gsl_dist/data/fashion"))
