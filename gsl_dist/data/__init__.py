"""Corpora of vectors and images in the formats people have, and the shipped demo set."""

from gsl_dist.data.corpus import Batch, Corpus, CorpusConfig, Reject, merge_batches, open_corpus, split_rows
from gsl_dist.data.images import FASHION_CLASSES, ImageConfig, decode_image, fashion_folder
from gsl_dist.data.vectors import write_fvecs

__all__ = [
    "FASHION_CLASSES",
    "Batch",
    "Corpus",
    "CorpusConfig",
    "ImageConfig",
    "Reject",
    "decode_image",
    "fashion_folder",
    "merge_batches",
    "open_corpus",
    "split_rows",
    "write_fvecs",
]
