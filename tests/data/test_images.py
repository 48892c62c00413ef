"""Images are decoded to one size; one that cannot be is listed with its row and reason."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gsl_dist.data import CorpusConfig, ImageConfig, decode_image, open_corpus

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encode(pixels=PIXELS, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def read_images(tmp_path, contents, **columns):
    pq.write_table(pa.table({"image": pa.array(contents), **columns}), tmp_path / "a.parquet")
    config = CorpusConfig(path=str(tmp_path / "a.parquet"), image_column="image", payload_columns=list(columns))
    return open_corpus(config).read_all()


@pytest.mark.parametrize("kind,options", [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})])
def test_lossless_images_come_back_bit_for_bit(kind, options):
    np.testing.assert_array_equal(decode_image(encode(PIXELS, kind, **options), ImageConfig()), PIXELS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_every_mode_becomes_the_wanted_shape(mode, channels):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(stream, "PNG")
    image = ImageConfig(height=8, width=16, channels=channels)
    assert decode_image(stream.getvalue(), image).shape == (8, 16, channels)


def test_sixteen_bits_are_scaled_not_clipped():
    content = encode(np.full((32, 32), 0x8000, np.uint16))
    np.testing.assert_array_equal(decode_image(content, ImageConfig(channels=1)), 128)


@pytest.mark.parametrize("content", [b"", b"no image", encode()[:100], encode()[:-40], encode(kind="JPEG")[:300]])
def test_unreadable_image_raises_value_error_without_an_address(content):
    with pytest.raises(ValueError) as caught:
        decode_image(content, ImageConfig())
    assert str(caught.value) and " at 0x" not in str(caught.value)


def test_unreadable_image_is_listed_not_dropped(tmp_path):
    batch = read_images(tmp_path, [encode(), b"broken", None, encode()], note=["a", "b", "c", "d"])
    assert batch.ids.tolist() == [0, 3]
    assert batch.payload["note"].to_pylist() == ["a", "d"]
    assert [reject.row for reject in batch.rejects] == [1, 2]
    assert all(reject.reason and "a.parquet" in reject.source for reject in batch.rejects)


def test_corpus_of_broken_images_is_empty_but_not_fatal(tmp_path):
    batch = read_images(tmp_path, [b"x", b"y"])
    assert len(batch) == 0 and len(batch.rejects) == 2 and batch.items.shape == (0, 32, 32, 3)


def test_decompression_bomb_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    batch = read_images(tmp_path, [encode()])
    assert "bomb" in batch.rejects[0].reason


def test_hugging_face_images_are_read(tmp_path):
    batch = read_images(tmp_path, [{"bytes": encode(), "path": None}, {"bytes": None, "path": "b.png"}])
    np.testing.assert_array_equal(batch.items[0], PIXELS)
    assert [reject.row for reject in batch.rejects] == [1]


def test_sub_folders_are_labels(tmp_path):
    for label in ("dog", "cat"):
        (tmp_path / label).mkdir()
        for number in range(2):
            (tmp_path / label / f"{number}.png").write_bytes(encode())
    (tmp_path / "dog" / "1.png").write_bytes(b"broken")
    corpus = open_corpus(CorpusConfig(path=str(tmp_path)))
    assert (corpus.kind, corpus.rows, corpus.has_labels, corpus.label_names) == ("images", 4, True, ["cat", "dog"])
    batch = corpus.read_all()
    assert batch.labels.tolist() == [0, 0, 1]
    assert (batch.rejects[0].row, batch.rejects[0].source.endswith("dog/1.png")) == (3, True)
    np.testing.assert_array_equal(corpus.take(np.array([1, 2])).labels, [0, 1])


def test_flat_folder_of_images_has_no_labels(tmp_path):
    (tmp_path / "a.PNG").write_bytes(encode())
    (tmp_path / "README.md").write_text("not an image")
    corpus = open_corpus(CorpusConfig(path=str(tmp_path), image=ImageConfig(channels=1)))
    assert (corpus.rows, corpus.has_labels, corpus.item_shape) == (1, False, (32, 32, 1))
    assert corpus.read_all().labels is None
