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

from flabc.artifact import ACTIVATIONS_NOTE
from flabc.spec import LayerSpec, ModelSpec

from . import quantize
from .architecture import Architecture
from .dialects.dialect import Dialect
from .precision import PRECISIONS, Precision
from .weights import Array, CheckpointWeights

IR_VERSION = 10

#: What a precision computes in.
DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

#: The projections whose output a sub-block adds to the residual stream.
OUTPUTS = ("o", "down")


@dataclass
class Graph:
    """A graph under construction.

    Args:
        spec: the model's shapes.
        architecture: what it computes beyond them.
        weights: where tensors come from, when they are written.
        precision: what it computes in, and how its matrices are stored.
        stored: initializers that already lie in a data file; those are referred to instead of written again.
        tape: records the nodes.
    """

    spec: ModelSpec
    architecture: Architecture
    weights: CheckpointWeights
    precision: Precision = PRECISIONS["fp32"]
    stored: Mapping[str, ir.TensorProtocol] = field(default_factory=dict)
    tape: Tape = field(default_factory=Tape)

    @property
    def dtype(self) -> ir.DataType:
        """What activations, the cache and weights that are not in blocks are."""
        return DTYPES[self.precision.compute]

    def constant(self, name: str, value: Array) -> ir.Value:
        """A small tensor that is part of the graph; one of each name."""
        return self._initializer(name, self.stored[name] if name in self.stored else ir.tensor(value, name=name))

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        make: Callable[[], Array],
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A tensor of the model, made when the file is written.

        Args:
            name: its name in the graph.
            shape: its shape.
            make: reads it.
            dtype: what it holds; by default what is computed in.
        """
        held = dtype or self.dtype

        def tensor() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(make().astype(held.numpy(), copy=False)), name=name)

        return self._initializer(name, ir.LazyTensor(tensor, held, ir.Shape(shape), name=name))

    def scalar(self, name: str, value: float) -> ir.Value:
        """A number that is part of the graph; one of each name."""
        return self.constant(name, np.array(value, self.dtype.numpy()))

    def norm_weight(self, role: str, layer: int | None) -> ir.Value:
        """What a norm multiplies by, (D,) or (H,): the family's offset is in it."""
        size = self.spec.axis_size(self.weights.spaces(role)[0])
        offset = np.float32(self.architecture.family.norm_offset)
        return self.weight(f"{_owner(layer)}.{role}.weight", (size,), lambda: self.weights.get(role, layer) + offset)

    def norm_bias(self, role: str, layer: int | None) -> ir.Value:
        """What a norm adds, (D,)."""
        name, bias = f"{_owner(layer)}.{role}.bias", f"{role}_bias"
        return self.weight(name, (self.spec.hidden_size,), lambda: self.weights.get(bias, layer))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.tape.op(kind, list(inputs), attributes or None, domain=domain)

    def linear(self, x: ir.Value, roles: tuple[str, ...], layer: int) -> ir.Value:
        """X Wᵀ + b, (B, S, in) to (B, S, out); several roles side by side become one product."""
        shape = self.spec.layers[layer]
        name = f"model.layers.{layer}.{'_'.join(roles)}"
        rows = [self._axes(role, shape) for role in roles]
        size = (rows[0][1], sum(out for out, _ in rows))

        # What multiplies the output of a sub-block is in its last projection.
        scale = np.float32(self.architecture.output_scale if roles[0] in OUTPUTS else 1)

        def transposed() -> Array:
            return np.concatenate([self.weights.get(role, layer).T for role in roles], axis=1) * scale

        y = self._product(x, name, size, transposed)
        if not self.weights.has(f"{roles[0]}_bias", self.spec):
            return y

        def bias() -> Array:
            return np.concatenate([self.weights.get(f"{role}_bias", layer) for role in roles]) * scale

        return self.op("Add", y, self.weight(f"{name}.bias", (size[1],), bias))

    def _product(self, x: ir.Value, name: str, size: tuple[int, int], make: Callable[[], Array]) -> ir.Value:
        if self.precision.layers is not None:
            return quantize.product(self, x, name, size, make, self.precision.layers)
        return self.op("MatMul", x, self.weight(f"{name}.weight", size, make))

    def _axes(self, role: str, layer: LayerSpec) -> tuple[int, int]:
        """Rows and columns of a linear weight, as torch stores it."""
        rows, columns = self.weights.spaces(role)
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
    residual, branch = _scaled(graph, _embedded(graph, ids), "embedding"), None  # (B, S, D)
    for index, layer in enumerate(spec.layers):
        if layer.has_attention:
            x, residual = dialect.norm(graph, residual, branch, "attention_norm", index)
            branch = graph.linear(dialect.attention(graph, x, index), ("o",), index)
            branch = _output_norm(graph, dialect, branch, "attention_output_norm", index)
        if layer.has_ffn:
            x, residual = dialect.norm(graph, residual, branch, "ffn_norm", index)
            branch = _output_norm(graph, dialect, _ffn(graph, x, index), "ffn_output_norm", index)
    x, _ = dialect.norm(graph, residual, branch, "final_norm", None)
    if not scoring:
        x = dialect.last(graph, x)
    logits = _logits(graph, x)
    return _model(graph, dialect, ids, logits, scoring)


def _output_norm(graph: Graph, dialect: Dialect, branch: ir.Value, role: str, layer: int) -> ir.Value:
    """The norm between a sub-block and the residual stream, in families that have one."""
    return dialect.norm(graph, branch, None, role, layer)[0] if graph.architecture.family.has(role) else branch


def _ffn(graph: Graph, x: ir.Value, layer: int) -> ir.Value:
    """The FFN, gated or not, (B, S, D) to (B, S, D)."""
    activate = ACTIVATIONS[graph.architecture.activation]
    up = graph.linear(x, ("up",), layer)
    if not graph.architecture.gated:
        return graph.linear(activate(graph, up), ("down",), layer)
    gate = graph.linear(x, ("gate",), layer)
    return graph.linear(graph.op("Mul", activate(graph, gate), up), ("down",), layer)


#: How each activation is spelt.
ACTIVATIONS: dict[str, Callable[[Graph, ir.Value], ir.Value]] = {
    "gelu": lambda graph, x: graph.op("Gelu", x),
    "gelu_pytorch_tanh": lambda graph, x: graph.op("Gelu", x, approximate="tanh"),
    "relu": lambda graph, x: graph.op("Relu", x),
    "silu": lambda graph, x: graph.op("Mul", x, graph.op("Sigmoid", x)),
}


def _scaled(graph: Graph, x: ir.Value, what: str) -> ir.Value:
    """X times the architecture's scale of that name; nothing where it is one."""
    scale = getattr(graph.architecture, f"{what}_scale")
    return x if scale == 1 else graph.op("Mul", x, graph.scalar(f"{what}_scale", scale))


#: The matrices outside the layers, by their roles.
OUTER = {"embedding": "model.embed_tokens", "head": "lm_head"}


def _outer(graph: Graph, role: str) -> ir.Value:
    """The embedding or the output matrix, (V, D)."""
    shape = (graph.spec.vocab_size, graph.spec.hidden_size)
    return graph.weight(f"{OUTER[role]}.weight", shape, lambda: graph.weights.get(role))


def _embedded(graph: Graph, ids: ir.Value) -> ir.Value:
    """(B, S) to (B, S, D)."""
    blocks = graph.precision.embedding
    if blocks is None:
        return graph.op("Gather", _outer(graph, "embedding"), ids)
    size = (graph.spec.hidden_size, graph.spec.vocab_size)
    return quantize.gather(graph, ids, OUTER["embedding"], size, lambda: graph.weights.get("embedding").T, blocks)


def _logits(graph: Graph, x: ir.Value) -> ir.Value:
    """(B, S, D) to (B, S, V), float32. A tied matrix is the embedding itself; Gemm reads it transposed."""
    spec, blocks = graph.spec, graph.precision.head
    role = "embedding" if spec.tie_word_embeddings else "head"
    flat = graph.op("Reshape", x, graph.constant("rows_of_hidden", np.array([-1, spec.hidden_size])))
    if blocks is None:
        product = graph.op("Gemm", flat, _outer(graph, role), transB=1)  # (B * S, V)
    else:
        once = blocks == graph.precision.embedding
        name, size = OUTER[role if once else "head"], (spec.hidden_size, spec.vocab_size)
        product = quantize.product(graph, flat, name, size, lambda: graph.weights.get(role).T, blocks)
    product = _scaled(graph, product, "logits")
    if cap := graph.architecture.logits_softcap:
        bound = graph.scalar("logits_softcap", cap)
        product = graph.op("Mul", graph.op("Tanh", graph.op("Div", product, bound)), bound)
    if graph.dtype != ir.DataType.FLOAT:
        product = graph.op("Cast", product, to=ir.DataType.FLOAT)
    outer = graph.op("Shape", x, start=0, end=2)
    shape = graph.op("Concat", outer, graph.constant("vocab_size", np.array([spec.vocab_size])), axis=0)
    return graph.op("Reshape", product, shape)


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
    activations = graph.precision.activations
    said = {} if activations is None else {ACTIVATIONS_NOTE: activations}
    return ir.Model(inner, ir_version=IR_VERSION, producer_name="flabc", metadata_props=said)


def _owner(layer: int | None) -> str:
    return "model" if layer is None else f"model.layers.{layer}"


def _input(name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
