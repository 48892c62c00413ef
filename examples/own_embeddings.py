"""Search the embeddings of somebody's model: what recall they keep in 16 bytes each, and for how many probes.

    python examples/own_embeddings.py FILE.parquet [FOLDER]    # columns: id, vector

The last 200 rows are kept out and asked for; how many of their true ten nearest come back is printed, for codes alone
and for codes with a byte a number beside them.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.index.search import open_searcher

home = (sys.argv[2:] or ["build/examples/own"])[0]
Path(home).mkdir(parents=True, exist_ok=True)
table = pq.read_table(sys.argv[1], columns=["id", "vector"])
vectors = np.stack(table["vector"].to_numpy()).astype(np.float32)
rows = {"path": f"{home}/rows.parquet", "id_column": "id", "vector_column": "vector"}
pq.write_table(table.slice(0, len(table) - 200), rows["path"])
queries, base = vectors[-200:], vectors[:-200]
order = np.argsort((base**2).sum(1) - 2 * queries @ base.T, axis=1)[:, :10]
truth = table["id"].to_numpy()[order]

codebook, codes, index = f"{home}/codebook", f"{home}/codes", f"{home}/index"
quantizer = {"kind": "opq", "sub_vectors": 16, "cells": 32}
run_codebook(CodebookConfig(source="fitted", corpus=rows, quantizer=quantizer, output=codebook))
run_encode(EncodeConfig(corpus=rows, codebook=codebook, output=codes, keep_vectors=True))
for kept in (None, "int8"):
    manifest = run_build(BuildConfig(codes=codes, codebook=codebook, index=index, vectors=kept))
    for probes in (1, 4, 16):
        found = open_searcher(index, manifest.version).search(queries, 10, probes=probes).ids
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])
        print(f"{'codes and bytes' if kept else 'codes alone'}, {probes} probes: recall@10 {recall:.3f}")
