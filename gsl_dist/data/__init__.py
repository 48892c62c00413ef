"""Where rows come from: vectors, tables and images, read in bounded memory by one small interface."""

from gsl_dist.data.corpus import Batch, Corpus, Reject, merge_batches, open_corpus, split_rows
from gsl_dist.data.images import FASHION_CLASSES, decode_image, fashion_folder, join_modalities, modality_image
from gsl_dist.data.source import CorpusConfig, ImageConfig, ModalityConfig
from gsl_dist.data.vectors import read_vectors, write_vectors

__all__ = [
    "FASHION_CLASSES",
    "Batch",
    "Corpus",
    "CorpusConfig",
    "ImageConfig",
    "ModalityConfig",
    "Reject",
    "decode_image",
    "fashion_folder",
    "join_modalities",
    "merge_batches",
    "modality_image",
    "open_corpus",
    "read_vectors",
    "split_rows",
    "write_vectors",
]
