"""The decoder's ONNX graph, built directly from a ``ModelSpec`` and weights: no tracing.

What a layer does is written here once; how an operation is spelt is the dialect's business. Heads, widths and
missing sub-blocks are read layer by layer.

Letters in shape comments: B sequences, S new tokens, P past tokens, D hidden_size, V vocab_size, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from flabc.spec import LayerSpec, ModelSpec

from .dialects.dialect import Dialect
from .weights import Array, CheckpointWeights

IR_VERSION = 10


@dataclass
class Graph:
    """A graph under construction.

    Args:
        spec: the model's shapes.
        weights: where tensors come from, when they are written.
        stored: initializers that already lie in a data file; those are referred to instead of written again.
        tape: records the nodes.
    """

    spec: ModelSpec
    weights: CheckpointWeights
    stored: Mapping[str, ir.TensorProtocol] = field(default_factory=dict)
    tape: Tape = field(default_factory=Tape)

    def constant(self, name: str, value: Array) -> ir.Value:
        """A small tensor that is part of the graph; one of each name."""
        return self._initializer(name, self.stored[name] if name in self.stored else ir.tensor(value, name=name))

    def weight(self, name: str, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.Value:
        """A tensor of the model, made when the file is written.

        Args:
            name: its name in the graph.
            shape: its shape.
            make: reads it, float32.
        """

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(make()), name=name)

        return self._initializer(name, ir.LazyTensor(tensor, ir.DataType.FLOAT, ir.Shape(shape), name=name))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.tape.op(kind, list(inputs), attributes or None, domain=domain)

    def linear(self, x: ir.Value, roles: tuple[str, ...], layer: int) -> ir.Value:
        """X Wᵀ + b, (B, S, in) to (B, S, out); several roles side by side become one product."""
        shape = self.spec.layers[layer]
        name = f"model.layers.{layer}.{'_'.join(roles)}"
        rows = [self._axes(role, shape) for role in roles]
        size = (rows[0][1], sum(out for out, _ in rows))

        def transposed() -> Array:
            return np.concatenate([self.weights.get(role, layer).T for role in roles], axis=1)

        y = self.op("MatMul", x, self.weight(f"{name}.weight", size, transposed))
        if not self.weights.has(f"{roles[0]}_bias", self.spec):
            return y

        def bias() -> Array:
            return np.concatenate([self.weights.get(f"{role}_bias", layer) for role in roles])

        return self.op("Add", y, self.weight(f"{name}.bias", (size[1],), bias))

    def _axes(self, role: str, layer: LayerSpec) -> tuple[int, int]:
        """Rows and columns of a linear weight, as torch stores it."""
        rows, columns = self.weights.axes(role)
        return self.spec.axis_size(rows, layer), self.spec.axis_size(columns, layer)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        for value in self.tape.initializers:
            if value.name == name:
                return value
        return self.tape.initializer(self.stored.get(name, tensor), name)


def build(graph: Graph, dialect: Dialect, *, scoring: bool = False) -> ir.Model:
    """The whole decoder.

    Args:
        graph: an empty graph over the model.
        dialect: which operators to use.
        scoring: logits at every position, (B, S, V), instead of after each row's last token, (B, 1, V).
    """
    spec = graph.spec
    ids = _input("input_ids", ir.DataType.INT64, ("batch", "sequence"))
    dialect.begin(graph, ids)
    embedding = graph.weight(
        "model.embed_tokens.weight",
        (spec.vocab_size, spec.hidden_size),
        lambda: graph.weights.get("embedding"),
    )
    residual, branch = graph.op("Gather", embedding, ids), None  # (B, S, D)
    for index, layer in enumerate(spec.layers):
        if layer.has_attention:
            x, residual = dialect.norm(graph, residual, branch, "attention_norm", index)
            branch = graph.linear(dialect.attention(graph, x, index), ("o",), index)
        if layer.has_ffn:
            x, residual = dialect.norm(graph, residual, branch, "ffn_norm", index)
            branch = _ffn(graph, x, index)
    x, _ = dialect.norm(graph, residual, branch, "final_norm", None)
    if not scoring:
        x = dialect.last(graph, x)
    logits = _logits(graph, x, embedding)
    return _model(graph, dialect, ids, logits, scoring)


def _ffn(graph: Graph, x: ir.Value, layer: int) -> ir.Value:
    """The gated FFN with SiLU, (B, S, D) to (B, S, D)."""
    gate = graph.linear(x, ("gate",), layer)
    silu = graph.op("Mul", gate, graph.op("Sigmoid", gate))
    return graph.linear(graph.op("Mul", silu, graph.linear(x, ("up",), layer)), ("down",), layer)


def _logits(graph: Graph, x: ir.Value, embedding: ir.Value) -> ir.Value:
    """(B, S, D) to (B, S, V). A tied matrix is the embedding itself, stored once; Gemm reads it transposed."""
    spec = graph.spec
    matrix = embedding
    if not spec.tie_word_embeddings:
        shape = (spec.vocab_size, spec.hidden_size)
        matrix = graph.weight("lm_head.weight", shape, lambda: graph.weights.get("head"))
    flat = graph.op("Reshape", x, graph.constant("rows_of_hidden", np.array([-1, spec.hidden_size])))
    product = graph.op("Gemm", flat, matrix, transB=1)  # (B * S, V)
    outer = graph.op("Shape", x, start=0, end=2)
    size = graph.op("Concat", outer, graph.constant("vocab_size", np.array([spec.vocab_size])), axis=0)
    return graph.op("Reshape", product, size)


def _model(graph: Graph, dialect: Dialect, ids: ir.Value, logits: ir.Value, scoring: bool) -> ir.Model:
    spec = graph.spec
    logits.name = "logits"
    logits.dtype = ir.DataType.FLOAT
    logits.shape = ir.Shape(["batch", "sequence" if scoring else 1, spec.vocab_size])
    initializers = graph.tape.initializers
    inner = ir.Graph(
        inputs=[ids, *dialect.inputs],
        outputs=[logits, *dialect.outputs],
        nodes=graph.tape.nodes,
        initializers=initializers,
        opset_imports=dict(dialect.opsets),
        name=f"{spec.family}_scoring" if scoring else spec.family,
    )
    return ir.Model(inner, ir_version=IR_VERSION, producer_name="flabc")


def _input(name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
