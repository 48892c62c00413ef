"""Ways of computing an encoder on one CPU core, beside each other: torch, compiled, as a graph, and in int8.

Networks have the weights that they begin with, which changes no time; images are those of the demo's database. Ways
are timed turn by turn, by the clock of the process; agreement is with torch's float32. `torch at once` takes 1,024
images together, the others 64. Compiled ways (`--compiled`) need a C++ compiler, and int8 among them torchao.

With `--trained` nothing is timed: of a model that the demo or the pipeline left, the database is coded by each way, and
asked by queries that go through torch, as a service has it.

python benchmarks/execution.py NETWORK [--rows 1024] [--rounds 5] [--compiled]
python benchmarks/execution.py --trained build/demo/model
"""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from record import spread, write_result
from torch import Tensor, nn
from torch.nn import functional as F

from gsl_dist.cluster.graph import GraphEncoder, export_graph, name_runtime, quantize_graph
from gsl_dist.cluster.model import load_encoder, load_trained_codebook
from gsl_dist.data import open_corpus
from gsl_dist.demo import Held, images, score_representations
from gsl_dist.encoders import CnnConfig, Encoder, make_encoder
from gsl_dist.fit import IMAGES_AT_ONCE, embed
from gsl_dist.quantizers import open_quantizer

SHAPE = (28, 28, 1)
SAMPLE = 512
Way = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Two convolutions and a way past them, normalized over the batch."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.Conv2d(after, after, 3, 1, 1, bias=False)]
        self.inside = nn.Sequential(convs[0], nn.BatchNorm2d(after), nn.ReLU(), convs[1], nn.BatchNorm2d(after))
        past = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.past = past if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Give the next maps."""
        return F.relu(self.inside(x) + self.past(x))


def make_residual() -> Encoder:
    """Give the layers of a ResNet-18 but for its last stage, and with its first at the size of small images."""
    stem = [nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks = [Block(64, 64, 1), Block(64, 64, 1), Block(64, 128, 2), Block(128, 128, 1), Block(128, 256, 2)]
    last = [Block(256, 256, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 64)]
    return Encoder(nn.Sequential(*stem, *blocks, *last), 64, normalize=True)


def make_cnn(dim: int, channels: tuple[int, ...], depths: tuple[int, ...] | None, grid: int) -> Encoder:
    config = CnnConfig(kind="cnn", dim=dim, channels=channels, depths=depths, grid=grid)
    return make_encoder(config, SHAPE)


NETWORKS: dict[str, Callable[[], Encoder]] = {
    "demo": functools.partial(make_cnn, 48, (16, 32, 64), None, 4),
    "shared": functools.partial(make_cnn, 48, (32, 32, 32), (1, 1, 7), 1),
    "deep": functools.partial(make_cnn, 64, (64, 128, 256), (2, 2, 3), 1),
    "residual": make_residual,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS, nargs="?", default="demo")
    parser.add_argument("--trained", metavar="FOLDER")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if wanted.trained:
        return write_result("execution-trained", {"runtime": name_runtime(), "ways": score_ways(wanted.trained)})
    encoder = NETWORKS[wanted.network]().eval()
    items = torch.from_numpy(
        next(iter(open_corpus(images("database")).read(0, wanted.rows, batch_rows=wanted.rows))).items
    )
    started: dict[str, float] = {}
    ways = start_ways(encoder, items, started, compiled=wanted.compiled)
    found = compare_ways(ways, items, wanted.rounds)
    for way, seconds in started.items():
        found[way]["start_s"] = seconds
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    setting = vars(wanted) | {"parameters": parameters, "runtime": name_runtime(), "processor": describe_processor()}
    write_result(f"execution-{wanted.network}", {"setting": setting, "ways": found})


def score_ways(model: str) -> dict[str, dict[str, float]]:
    """Give the coded mAP of a trained model by each way, and how much its codes and vectors are those of torch."""
    encoder, codebook = load_encoder(model)[0], load_trained_codebook(model)
    held = Held(*(open_corpus(images(part)).read_all() for part in ("database", "queries")))
    items = torch.from_numpy(held.database.items)
    sample = items[np.linspace(0, len(items) - 1, SAMPLE).astype(np.int64)]
    content = export_graph(encoder, sample)
    ways = {"torch": encoder, "onnx": GraphEncoder(content, 1)}
    ways["int8"] = GraphEncoder(quantize_graph(content, sample), 1)
    y_ND, quantizer = embed(encoder, items), open_quantizer(codebook)
    cells_N, codes_NM = quantizer.encode(y_ND, codebook)
    found = {}
    for name, way in ways.items():
        other_ND = embed(way, items)
        other_cells_N, other_codes_NM = quantizer.encode(other_ND, codebook)
        scored = score_representations(encoder, codebook, held, coded_by=way)
        cosines_N = F.cosine_similarity(y_ND, other_ND)
        found[name] = {"map_coded": scored.map, "error": scored.error, "cosine": float(cosines_N.mean())}
        found[name] |= {"least_cosine": float(cosines_N.min())}
        found[name] |= {"distance": float((other_ND - y_ND).norm(dim=1).mean())}
        found[name] |= {"equal_codes": float((codes_NM == other_codes_NM).float().mean())}
        found[name] |= {"equal_cells": float((cells_N == other_cells_N).float().mean())}
    return found


def start_ways(encoder: Encoder, items: Tensor, started: dict[str, float], *, compiled: bool) -> dict[str, Way]:
    """Give all ways, and how long each took to be made ready."""
    last = copy.deepcopy(encoder).to(memory_format=torch.channels_last)
    ways: dict[str, Way] = {
        "torch at once": functools.partial(embed, encoder, batch_rows=1024),
        "torch": functools.partial(embed, encoder),
        "torch, channels last": functools.partial(embed, last),
    }
    start = time.perf_counter()
    content = export_graph(encoder, items)
    ways["onnx"] = functools.partial(embed, GraphEncoder(content, 1))
    started["onnx"] = time.perf_counter() - start
    ways["int8"] = functools.partial(embed, GraphEncoder(quantize_graph(content, items[:SAMPLE]), 1))
    started["int8"] = time.perf_counter() - start
    if compiled:
        ways |= compile_ways(encoder, items, started)
    return ways


def compile_ways(encoder: Encoder, items: Tensor, started: dict[str, float]) -> dict[str, Way]:
    """Give the network compiled by torch, in float32 and through PT2E in int8."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    torch._inductor.config.freezing = True
    first = items[:IMAGES_AT_ONCE].permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    ways: dict[str, Way] = {}
    with torch.no_grad():
        start = time.perf_counter()
        ways["torch compiled"] = through(torch.compile(copy.deepcopy(encoder.backbone)))
        ways["torch compiled"](items[:IMAGES_AT_ONCE])
        started["torch compiled"] = time.perf_counter() - start
        start = time.perf_counter()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(encoder.backbone, (first,)).module(), quantizer)
        for part in items[:SAMPLE].split(IMAGES_AT_ONCE):
            prepared(part.permute(0, 3, 1, 2).float().div_(127.5).sub_(1))
        ways["PT2E compiled, int8"] = through(torch.compile(convert_pt2e(prepared)))
        ways["PT2E compiled, int8"](items[:IMAGES_AT_ONCE])
        started["PT2E compiled, int8"] = time.perf_counter() - start
    return ways


def through(backbone: Way) -> Way:
    """Give representations by a backbone that takes so many images and no other number."""

    def compute(items: Tensor) -> Tensor:
        with torch.no_grad():
            parts = items.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).split(IMAGES_AT_ONCE)
            return F.normalize(torch.cat([backbone(part) for part in parts]), dim=1)

    return compute


def compare_ways(ways: dict[str, Way], items: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    y_ND = ways["torch"](items)
    found: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        other_ND = way(items)
        far = float((other_ND - y_ND).square().sum(1).mean() / (y_ND - y_ND.mean(0)).square().sum(1).mean())
        cosines_N = F.cosine_similarity(y_ND, other_ND)
        found[name] = {"cosine": float(cosines_N.mean()), "least_cosine": float(cosines_N.min()), "error": far}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way(items)
            taken[name].append(time.process_time() - start)
    for name, seconds in taken.items():
        found[name] |= {"rows_per_s": len(items) / float(np.median(seconds)), "seconds": spread(seconds)}
        found[name]["over_torch"] = float(np.median(taken["torch"])) / float(np.median(seconds))
    return found


def describe_processor() -> str:
    """Tell whether the processor multiplies bytes fast."""
    return str(torch.backends.cpu.get_cpu_capability())


if __name__ == "__main__":
    main()
