"""What dialects spell alike, in operators of the ONNX standard (opset 23)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from flabc.export.graph import Graph


def plain_norm(graph: Graph, x: ir.Value, parameters: Sequence[ir.Value], epsilon: float) -> ir.Value:
    """RMSNorm over the last axis, or LayerNorm if there is a bias beside the weight."""
    kind = "LayerNormalization" if len(parameters) > 1 else "RMSNormalization"
    return graph.op(kind, x, *parameters, axis=-1, epsilon=epsilon, stash_type=1)


def head_norm(graph: Graph, x: ir.Value, role: str, layer: int) -> ir.Value:
    """RMSNorm of every head, (B, S, heads * H) to the same."""
    apart = graph.op("Reshape", x, graph.constant("heads_apart", np.array([0, 0, -1, graph.spec.head_dim])))
    normed = plain_norm(graph, apart, [graph.norm_weight(f"{role}_norm", layer)], graph.spec.rms_norm_eps)
    return graph.op("Reshape", normed, graph.constant("heads_together", np.array([0, 0, -1])))


def rotary_tables(graph: Graph, kind: str) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines for a type of layer, (max_position_embeddings, R / 2) each; stored once where types agree."""
    rotary = graph.architecture.rotary
    same = next(name for name, other in rotary.items() if np.array_equal(other.frequencies, rotary[kind].frequencies))
    suffix = "" if same == next(iter(rotary)) else f"_{same}"
    cos, sin = rotary[kind].tables(graph.spec.max_position_embeddings)
    return graph.constant(f"cos_cache{suffix}", cos), graph.constant(f"sin_cache{suffix}", sin)
