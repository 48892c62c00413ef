"""An encoder as an ONNX graph, which ONNX Runtime computes: in float32, or its layers in int8.

In int8 the weights of convolutions and linear maps are rounded channel by channel, and what goes into them by the range
that a sample of items had there; what lies between (normalizations, say) stays float32, and so does the last layer,
which is small and whose errors nothing evens out. A graph is one file without code. A row's representation does not
depend on the rows that it comes with: a batch is cut into parts of one size, and the last is filled up. This module
does not know where graphs are kept, nor who decides for one.
"""

# Shapes: N items, D dims of a representation

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gsl_dist.encoders import Encoder, FusedEncoder
from gsl_dist.errors import ArtefactError, ConfigError
from gsl_dist.fit import IMAGES_AT_ONCE

FIELD = "execution"
_OPSET = 21  # the first that normalizes groups of channels in one node
_VECTORS_AT_ONCE = 256
_INPUT = "items"
_LAYERS = ("Conv", "Gemm", "MatMul")


class GraphEncoder(nn.Module):
    """Items in, representations out, by a graph; stands where the encoder stood that it was made of.

    Args:
        content: the file of the graph.
        threads: how many compute.
        path: where it lies, for errors.

    Raises:
        ConfigError: ONNX Runtime is not installed.
        ArtefactError: it cannot read the file.
    """

    def __init__(self, content: bytes, threads: int, path: str = "the graph") -> None:
        super().__init__()
        runtime = _import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        errors = runtime.capi.onnxruntime_pybind11_state
        try:
            self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except (errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.Fail) as error:
            raise ArtefactError(path, f"ONNX Runtime cannot read it ({error})") from error

    def forward(self, items: Tensor) -> Tensor:
        """Give representations.

        Shapes: (N, D_in) float32 or (N, H, W, channels) uint8 -> (N, D) float32.
        """
        rows = IMAGES_AT_ONCE if items.ndim > 2 else _VECTORS_AT_ONCE
        return torch.cat([self._compute(part.numpy(), rows) for part in items.split(rows)])

    def _compute(self, items: NDArray[Any], rows: int) -> Tensor:
        # Kernels choose their way by the size of a batch, and with it the last digits.
        filled = np.concatenate([items, np.zeros((rows - len(items), *items.shape[1:]), items.dtype)])
        [y_ND] = self._session.run(None, {_INPUT: filled})
        return torch.from_numpy(y_ND[: len(items)])


def export_graph(encoder: Encoder, items: Tensor) -> bytes:
    """Write an encoder as a graph in float32.

    Args:
        encoder: the network, in evaluation mode.
        items: at least two that it takes, of any content.

    Raises:
        ConfigError: what writes graphs is not installed, or the network cannot be written as one.
    """
    if isinstance(encoder, FusedEncoder):
        wanted = "what an encoder of several modalities computes depends on which are there: leave it at torch"
        raise ConfigError(FIELD, "a graph", wanted)
    rows = {0: torch.export.Dim("rows")}
    try:
        with _silence():
            program = torch.onnx.export(
                encoder,
                (items[:2],),
                dynamo=True,
                dynamic_shapes=(rows,),
                opset_version=_OPSET,
                input_names=[_INPUT],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        raise ConfigError(FIELD, "a graph", f"this network cannot be written as one ({reason}): torch can") from error
    assert program is not None, "it is not told to write a file"
    return _strip(program.model_proto).SerializeToString(deterministic=True)


def quantize_graph(content: bytes, items: Tensor) -> bytes:
    """Give a graph whose layers, but for the last, are computed in int8.

    Args:
        content: the graph in float32.
        items: a sample, by which the ranges between layers are measured.

    Raises:
        ConfigError: what quantizes is not installed, or there is no layer but the last.
    """
    onnx = _import_module("onnx")
    quantization = _import_module("onnxruntime.quantization")
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(content))
    layers = [node.name for node in model.graph.node if node.op_type in _LAYERS]
    if len(layers) < 2:
        raise ConfigError(FIELD, "int8", "this network has no layer before its last, which stays float32: take onnx")
    rows = IMAGES_AT_ONCE if items.ndim > 2 else _VECTORS_AT_ONCE
    with tempfile.TemporaryDirectory(prefix="gsl-") as place, _silence():
        written = Path(place) / "int8.onnx"
        quantization.quantize_static(
            model,
            written,
            _Sample(part.numpy() for part in items.split(rows)),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=list(_LAYERS),
            nodes_to_exclude=layers[-1:],
        )
        return _strip(onnx.load(written)).SerializeToString(deterministic=True)


def check_installed() -> None:
    """See to it that graphs can be made and computed here.

    Raises:
        ConfigError: something is not installed; the error names it.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _import_module(name)


def name_runtime() -> str:
    """Name what computes graphs, with its version.

    Raises:
        ConfigError: it is not installed.
    """
    return f"ONNX Runtime {_import_module('onnxruntime').__version__}"


class _Sample:
    """Hands items to what measures ranges."""

    def __init__(self, parts: Iterator[NDArray[Any]]) -> None:
        self._parts = parts

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        part = next(self._parts, None)
        return None if part is None else {_INPUT: part}

    def __iter__(self) -> _Sample:
        return self

    def __next__(self) -> dict[str, NDArray[Any]]:
        return {_INPUT: next(self._parts)}


def _strip(model: Any) -> Any:
    """Leave out where in the source a node comes from: paths of this machine, and other bytes on the next."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep back what exporters and quantizers say on the way; errors come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _import_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        allowed = (
            f"graphs need {error.name}: pip install 'gsl_dist[int8]', here and on the workers, or leave it at torch"
        )
        raise ConfigError(FIELD, "a graph", allowed) from error
