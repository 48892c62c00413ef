"""Small corpora with structure, written as users have them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from gsl_dist.data import fashion_folder


def make_clusters(rows: int, dim: int, classes: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    centres = np.random.default_rng(99).normal(size=(classes, dim)) * 2
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=rows)
    return (centres[labels] + rng.normal(size=(rows, dim))).astype(np.float32), labels


def write_vectors(
    path: Path, *, rows: int = 600, dim: int = 16, classes: int = 5, seed: int = 0, first: int = 0
) -> Path:
    vectors, labels = make_clusters(rows, dim, classes, seed)
    items = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
    ids = pa.array(np.arange(first, first + rows))
    pq.write_table(pa.table({"id": ids, "vector": items, "label": labels}), path, row_group_size=128)
    return path


def write_images(path: Path, *, rows: int = 40, broken: tuple[int, ...] = ()) -> Path:
    rng = np.random.default_rng(0)
    contents = []
    for row in range(rows):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(stream, "PNG")
        contents.append(b"not an image" if row in broken else stream.getvalue())
    pq.write_table(pa.table({"id": np.arange(rows), "image": contents, "label": np.arange(rows) % 4}), path)
    return path


def read_pictures(rows: int, axes: int) -> NDArray[np.float64]:
    """Give shipped images as so many of their principal axes."""
    contents = pq.read_table(fashion_folder() / "database.parquet", columns=["image"])["image"].to_pylist()[:rows]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content))).ravel() for content in contents]) / 255
    pixels -= pixels.mean(0)
    return pixels @ np.linalg.eigh(pixels.T @ pixels)[1][:, -axes:]


def write_pairs(
    path: Path, *, rows: int = 120, lacking: dict[int, str] | None = None, seed: int = 0, first: int = 0
) -> Path:
    """Write items of two modalities in four classes: where a bright bar lies in the image, how wide it is in the edges.

    `lacking` names the modality that is null in a row.
    """
    rng, lacking = np.random.default_rng(seed), lacking or {}
    labels = rng.integers(4, size=rows)
    columns: dict[str, list[bytes | None]] = {"image": [], "edges": []}
    for row, label in enumerate(labels):
        shown = {name: rng.integers(0, 60, (10, 10)) for name in columns}
        shown["image"][:, 5 * (label % 2) : 5 * (label % 2) + 4] += 150
        shown["edges"][1 : 4 + 4 * (label // 2)] += 150
        for name, pixels in shown.items():
            stream = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
            columns[name].append(None if lacking.get(row) == name else stream.getvalue())
    pq.write_table(pa.table({"id": np.arange(first, first + rows), "label": labels, **columns}), path)
    return path
