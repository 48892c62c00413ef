"""Search images by their looks: 7,000 pictures of clothes as 48 numbers each, served from 8 bytes and a byte a number.

    python examples/image_search.py [FOLDER]

The numbers are principal components of the pixels; in earnest they come from an encoder. The pictures are payload, so
the page of the service shows them: open it, give an id, and go from like to like.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gsl_dist.client import Client
from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.cluster.serve import ServeConfig, serve, stop_service
from gsl_dist.data import CorpusConfig, fashion_folder, open_corpus

home, shipped = (sys.argv[1:] or ["build/examples/images"])[0], f"{fashion_folder()}/database.parquet"
Path(home).mkdir(parents=True, exist_ok=True)
shape = {"height": 28, "width": 28, "channels": 1}
pixels = open_corpus(CorpusConfig(path=shipped, image_column="image", image=shape)).read_all().items.reshape(-1, 784)
_, directions = np.linalg.eigh(np.cov(pixels.T / 255.0))
vectors = (pixels / 255.0) @ directions[:, -48:]
embeddings = {"path": f"{home}/embeddings.parquet", "id_column": "id", "vector_column": "vector"}
pq.write_table(pq.read_table(shipped).append_column("vector", [list(vectors.astype(np.float32))]), embeddings["path"])

codebook, codes, index = f"{home}/codebook", f"{home}/codes", f"{home}/index"
quantizer = {"kind": "opq", "sub_vectors": 8, "cells": 32}
run_codebook(CodebookConfig(source="fitted", corpus=embeddings, quantizer=quantizer, output=codebook))
shown = embeddings | {"payload_columns": ["label", "image"]}
run_encode(EncodeConfig(corpus=shown, codebook=codebook, output=codes, keep_vectors=True, shards=2))
run_build(BuildConfig(codes=codes, codebook=codebook, index=index, vectors="int8"))

service = serve(ServeConfig(index=index, port=0))
with Client(service.url) as client:
    for hit in client.search(vectors[:1], k=5, payload=["label"]).rows()[0]:
        print(hit)
if sys.stdin.isatty():
    input(f"{service.url} shows the pictures; Enter ends it. ")
stop_service()
