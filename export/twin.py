"""Twin: an engine's own graph and stored weights with the arithmetic of float32, to be proven where bf16 cannot run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from flabc.artifact import GRAPH, SCORING_GRAPH

HALF = ir.DataType.BFLOAT16


def write(engine: Path, out: Path) -> None:
    """Write an engine whose every bfloat16 number and operation is float32 instead; the numbers keep their values.

    Args:
        engine: a folder with graphs that compute in bfloat16.
        out: a folder that exists.
    """
    for name in (GRAPH, SCORING_GRAPH):
        model = ir.load(engine / name)
        for value in _values(model.graph):
            if value.dtype == HALF:
                value.dtype = ir.DataType.FLOAT
            if value.const_value is not None and value.const_value.dtype == HALF:
                value.const_value = _widened(value.const_value)
        ir.save(model, out / name, external_data=f"{name}.data")
    for file in engine.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, out / file.name)


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.outputs, *graph.initializers.values(), *made]


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def widened() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(widened, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()), name=tensor.name)
