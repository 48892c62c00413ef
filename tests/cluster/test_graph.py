"""Encoders as graphs: what they give, on what it depends, what a file holds, and what cannot be one."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsl_dist.cluster.graph import GraphEncoder, check_installed, export_graph, quantize_graph
from gsl_dist.encoders import CnnConfig, Encoder, FusionConfig, HeadConfig, MlpConfig, TableConfig, make_encoder
from gsl_dist.encoders.crosslayer import CompressConfig, factor_layers, plan_compression
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.fit import IMAGES_AT_ONCE, embed

onnx, _, _ = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))
IMAGE, VECTOR = (12, 12, 1), (16,)


def make(config, shape):
    torch.manual_seed(0)
    return make_encoder(config, shape).eval(), draw(shape)


def draw(shape, rows=150):
    torch.manual_seed(1)
    return torch.randint(0, 255, (rows, *shape), dtype=torch.uint8) if len(shape) > 1 else torch.randn(rows, *shape)


def make_compressed():
    encoder, items = make(CnnConfig(kind="cnn", dim=8, channels=(8, 8), depths=(2, 3), grid=1), IMAGE)
    factor_layers(encoder, plan_compression(encoder, CompressConfig(model="m", ratio=2)))
    return encoder.eval(), items


NETWORKS = {
    "cnn": lambda: make(CnnConfig(kind="cnn", dim=8, channels=(8, 16)), IMAGE),
    "mlp": lambda: make(MlpConfig(kind="mlp", dim=8, hidden=(32,)), VECTOR),
    "head": lambda: make(HeadConfig(kind="head", dim=8, hidden=(32,)), VECTOR),
    "layers that share": make_compressed,
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A network, items, what it gives for them, and both graphs of it."""
    encoder, items = NETWORKS[request.param]()
    written = export_graph(encoder, items)
    return encoder, items, embed(encoder, items), {"onnx": written, "int8": quantize_graph(written, items)}


def test_a_graph_gives_what_the_network_gives_and_int8_nearly_so(network):
    _, items, y_ND, graphs = network
    torch.testing.assert_close(embed(GraphEncoder(graphs["onnx"], 1), items), y_ND, atol=2e-6, rtol=1e-5)
    rounded_ND = embed(GraphEncoder(graphs["int8"], 1), items)
    assert not torch.equal(rounded_ND, y_ND)
    assert F.cosine_similarity(rounded_ND, y_ND).min() > 0.99


@pytest.mark.parametrize("path", ["onnx", "int8"])
def test_a_row_depends_neither_on_its_batch_nor_on_threads(network, path):
    _, items, _, graphs = network
    one, two = GraphEncoder(graphs[path], 1), GraphEncoder(graphs[path], 2)
    y_ND = embed(one, items)
    assert torch.equal(embed(one, items[3:77], batch_rows=13), y_ND[3:77])
    assert torch.equal(embed(one, items[5:6])[0], y_ND[5])
    assert torch.equal(embed(two, items), y_ND)


def test_a_graph_is_the_same_bytes_each_time_and_tells_nothing_of_this_machine(network):
    encoder, items, _, graphs = network
    written = export_graph(encoder, items)
    assert written == graphs["onnx"]
    assert quantize_graph(written, items) == graphs["int8"]
    for content in graphs.values():
        assert b".py" not in content and b"site-packages" not in content


def test_in_int8_all_layers_but_the_last_are_quantized_and_their_weights_are_bytes(network):
    *_, graphs = network
    for path, content in graphs.items():
        nodes = onnx.load_from_string(content).graph.node
        made_by = {name: node.op_type for node in nodes for name in node.output}
        layers = [node for node in nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
        quantized = [made_by.get(node.input[0]) == made_by.get(node.input[1]) == "DequantizeLinear" for node in layers]
        assert quantized == [path == "int8"] * (len(layers) - 1) + [False]


def test_images_in_parts_give_what_they_give_at_once():
    encoder, items = NETWORKS["cnn"]()
    assert len(items) > 2 * IMAGES_AT_ONCE
    assert torch.equal(embed(encoder, items), embed(encoder, items, batch_rows=len(items)))


class Undecided(nn.Module):
    """A module that does one thing or another by what it sees."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_a_graph_is_refused_with_the_way_out():
    modalities = {"image": 1, "edges": 1}
    fused = make_encoder(FusionConfig(kind="asymfusion", dim=8), (*IMAGE[:2], 3), modalities).eval()
    with pytest.raises(ConfigError, match=r"execution.*several modalities.*leave it at torch"):
        export_graph(fused, draw((*IMAGE[:2], 3)))
    with pytest.raises(ConfigError, match=r"execution.*cannot be written as one \(.*torch can"):
        export_graph(Encoder(Undecided(), 16, normalize=False).eval(), draw(VECTOR))
    encoder, items = make(TableConfig(kind="table", normalize=True), VECTOR)
    with pytest.raises(ConfigError, match=r"no layer before its last.*take onnx"):
        quantize_graph(export_graph(encoder, items), items)


def test_a_damaged_graph_is_an_error_that_names_its_file():
    with pytest.raises(ArtefactError, match=r"codes/encoder\.onnx.*cannot read it"):
        GraphEncoder(b"not a graph", 1, "codes/encoder.onnx")


@pytest.mark.parametrize("lacking", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_not_installed_is_named_with_the_extra_that_has_it(monkeypatch, lacking):
    found = importlib.import_module

    def load(name):
        if name == lacking:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name)

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(ConfigError, match=rf"graphs need {lacking}: pip install 'gsl_dist\[int8\]'"):
        check_installed()
