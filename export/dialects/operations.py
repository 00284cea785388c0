"""What dialects spell alike, in operators of the ONNX standard (opset 23)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from flabc.export.graph import Graph
from flabc.spec import ModelSpec


def plain_norm(graph: Graph, x: ir.Value, parameters: Sequence[ir.Value], epsilon: float) -> ir.Value:
    """RMSNorm over the last axis, or LayerNorm if there is a bias beside the weight."""
    kind = "LayerNormalization" if len(parameters) > 1 else "RMSNormalization"
    return graph.op(kind, x, *parameters, axis=-1, epsilon=epsilon, stash_type=1)


def added_norm(
    graph: Graph, residual: ir.Value, branch: ir.Value | None, role: str, layer: int | None
) -> tuple[ir.Value, ir.Value]:
    """RMSNorm, or LayerNorm, of residual + branch, and that sum; all (B, S, D)."""
    total = residual if branch is None else graph.op("Add", residual, branch)
    bias = [graph.norm_bias(role, layer)] if graph.architecture.layer_norm else []
    weights = [graph.norm_weight(role, layer), *bias]
    return plain_norm(graph, total, weights, graph.spec.rms_norm_eps), total


def head_norm(graph: Graph, x: ir.Value, role: str, layer: int) -> ir.Value:
    """RMSNorm of every head, (B, S, heads * H) to the same."""
    apart = graph.op("Reshape", x, graph.constant("heads_apart", np.array([0, 0, -1, graph.spec.head_dim])))
    normed = plain_norm(graph, apart, [graph.norm_weight(f"{role}_norm", layer)], graph.spec.rms_norm_eps)
    return graph.op("Reshape", normed, graph.constant("heads_together", np.array([0, 0, -1])))


def heads_of(graph: Graph, x: ir.Value, role: str, layer: int) -> ir.Value:
    """Queries, keys or values, (B, S, D) to (B, heads, S, H): normed where the family norms them."""
    flat = graph.linear(x, (role,), layer)
    if graph.architecture.family.has(f"{role}_norm"):
        flat = head_norm(graph, flat, role, layer)
    return heads_apart(graph, flat)


def heads_apart(graph: Graph, x: ir.Value) -> ir.Value:
    """(B, S, heads * H) to (B, heads, S, H)."""
    apart = graph.op("Reshape", x, graph.constant("heads_apart", np.array([0, 0, -1, graph.spec.head_dim])))
    return graph.op("Transpose", apart, perm=[0, 2, 1, 3])


def heads_joined(graph: Graph, x: ir.Value) -> ir.Value:
    """(B, heads, S, H) to (B, S, heads * H)."""
    together = graph.op("Transpose", x, perm=[0, 2, 1, 3])
    return graph.op("Reshape", together, graph.constant("heads_together", np.array([0, 0, -1])))


def scalar(graph: Graph, one: ir.Value) -> ir.Value:
    """The only number of a vector, (1,) to (). TensorRT wants the axis named."""
    return graph.op("Squeeze", one, graph.constant("first_axis", np.array([0])))


def rotary_tables(graph: Graph, kind: str) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines for a type of layer, (max_position_embeddings, R / 2) each; stored once where types agree."""
    rotary = graph.architecture.rotary
    tables = {name: each.tables(graph.spec.max_position_embeddings) for name, each in rotary.items()}
    cos, sin = tables[kind]
    same = next(name for name, (c, s) in tables.items() if np.array_equal(c, cos) and np.array_equal(s, sin))
    suffix = "" if same == next(iter(rotary)) else f"_{same}"
    held = graph.dtype.numpy()
    return (
        graph.constant(f"cos_cache{suffix}", cos.astype(held)),
        graph.constant(f"sin_cache{suffix}", sin.astype(held)),
    )


def cache_names(spec: ModelSpec) -> list[str]:
    """The keys and the values of every layer that attends, as ``LAYER.key`` and ``LAYER.value``."""
    return [f"{i}.{kind}" for i, layer in enumerate(spec.layers) if layer.has_attention for kind in ("key", "value")]


def cache_value(prefix: str, name: str, length: str | int, spec: ModelSpec, dtype: ir.DataType) -> ir.Value:
    """A layer's keys or values as an input or output of the graph, (B, KV heads, length, H)."""
    heads = spec.layers[int(name.split(".")[0])].num_key_value_heads
    return value(f"{prefix}.{name}", dtype, ("batch", heads, length, spec.head_dim))


def value(name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
    """An input or output of the graph."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
