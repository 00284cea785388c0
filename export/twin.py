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
    serving = _float32(ir.load(engine / GRAPH))
    ir.save(serving, out / GRAPH, external_data=f"{GRAPH}.data")
    written = {name: value.const_value for name, value in ir.load(out / GRAPH).graph.initializers.items()}
    scoring = _float32(ir.load(engine / SCORING_GRAPH))
    for name, value in scoring.graph.initializers.items():
        value.const_value = written.get(name, value.const_value)  # both read one file, as the engine's do
    ir.save(scoring, out / SCORING_GRAPH)
    for file in engine.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, out / file.name)


def _float32(model: ir.Model) -> ir.Model:
    """The model, changed in place."""
    for value in _values(model.graph):
        if value.dtype == HALF:
            value.dtype = ir.DataType.FLOAT
        if value.const_value is not None and value.const_value.dtype == HALF:
            value.const_value = _widened(value.const_value)
    return model


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.outputs, *graph.initializers.values(), *made]


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def widened() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    return ir.LazyTensor(widened, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()), name=tensor.name)
