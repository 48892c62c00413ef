"""Search texts by their words: what the functions of Python's standard library say of themselves, in this process.

    python examples/text_search.py "compress a file" [FOLDER]

A text is the sum of a random vector for each of its words, rare words weighing more; in earnest a language model makes
the vectors. Nearest is the cosine. The index is searched where it lies, without a service.
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gsl_dist.cluster.build import BuildConfig, run_build
from gsl_dist.cluster.codebook import CodebookConfig, run_codebook
from gsl_dist.cluster.encode import EncodeConfig, run_encode
from gsl_dist.index.search import open_searcher

question, home = sys.argv[1], (sys.argv[2:] or ["build/examples/texts"])[0]
Path(home).mkdir(parents=True, exist_ok=True)
texts = {}
for path in sorted(Path(ast.__file__).parent.glob("*.py")):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            texts[f"{path.stem}.{node.name}"] = f"{node.name} {ast.get_docstring(node).splitlines()[0]}"
asked, *words = [sorted(set(re.findall("[a-z]{3,}", text.lower()))) for text in [question, *texts.values()]]
counts, rng = Counter(word for each in words for word in each), np.random.default_rng(0)
place = {word: rng.normal(size=128) * np.log(len(words) / count) for word, count in counts.items()}
vectors = np.array([sum((place[word] for word in each), np.full(128, 1e-9)) for each in words], np.float32)
query = sum((place[word] for word in asked if word in place), np.full(128, 1e-9))

rows = {"path": f"{home}/embeddings.parquet", "id_column": "id", "vector_column": "vector", "normalize": True}
pq.write_table(pa.table({"id": range(len(texts)), "vector": list(vectors)}), rows["path"])
codebook, codes, index = f"{home}/codebook", f"{home}/codes", f"{home}/index"
quantizer = {"kind": "opq", "sub_vectors": 32, "cells": 16}
run_codebook(CodebookConfig(source="fitted", corpus=rows, quantizer=quantizer, metric="cosine", output=codebook))
run_encode(EncodeConfig(corpus=rows, codebook=codebook, output=codes, keep_vectors=True))
run_build(BuildConfig(codes=codes, codebook=codebook, index=index, vectors="int8"))

hits = open_searcher(index).search(query, 5, probes=16)
for item, cosine in zip(hits.ids[0], hits.distances[0], strict=True):
    print(f"{cosine:.2f} {list(texts)[item]}")
