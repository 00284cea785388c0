"""Operators of the ONNX standard alone (opset 24), over a KV cache of fixed length, as TensorRT documents it.

The cache is written by TensorScatter, whose output may lie where its input does, and read whole by an Attention with
one output; a mask made of positions says what a token sees. NVIDIA, TensorRT documentation, "Working with
Transformers"; ONNX operators, version 24.

Letters in shape comments: B sequences, S new tokens, M places in the cache, H head_dim, R rotated numbers of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from flabc.export.graph import Graph
from flabc.spec import ModelSpec

from .operations import (
    added_norm,
    cache_names,
    cache_value,
    heads_joined,
    heads_of,
    rotary_tables,
    scalar,
    value,
)

#: How long the cache is, as a dimension's name.
PLACES = "max_length"

#: Where each row's new tokens begin, and how many of them are real: (B,) each.
WRITE_INDICES, TOKEN_COUNTS = "write_indices", "token_counts"


class StandardDialect:
    """See ``Dialect`` for the contract."""

    opsets: Mapping[str, int] = MappingProxyType({"": 24})

    def __init__(self, spec: ModelSpec, dtype: ir.DataType = ir.DataType.FLOAT, places: int | None = None) -> None:
        """Inputs and outputs; ``places`` fixes the length of the cache, else whoever runs the graph chooses it."""
        length = places or PLACES
        self._begin = value(WRITE_INDICES, ir.DataType.INT64, ("batch",))
        self._counts = value(TOKEN_COUNTS, ir.DataType.INT64, ("batch",))
        self._past = {name: cache_value("past_key_values", name, length, spec, dtype) for name in cache_names(spec)}
        self._present = {name: cache_value("present", name, length, spec, dtype) for name in cache_names(spec)}

    @property
    def inputs(self) -> list[ir.Value]:
        """Where the new tokens go, how many they are if that matters, and the cache of every layer that attends."""
        counts = [self._counts] if self._counts.uses() else []  # a scoring graph picks no last token
        return [self._begin, *counts, *self._past.values()]

    @property
    def outputs(self) -> list[ir.Value]:
        """The same caches with the new tokens in them."""
        return list(self._present.values())

    def begin(self, graph: Graph, ids: ir.Value) -> None:
        """Positions of the new tokens, and for each type of layer its angles and what its tokens see."""
        zero, one = graph.constant("zero", np.array(0)), graph.constant("one", np.array(1))
        length = graph.op("Shape", ids, start=1, end=2)
        steps = graph.op("Range", zero, scalar(graph, length), one)  # (S,)
        last_axis = graph.constant("last_axis", np.array([-1]))
        positions = graph.op("Add", graph.op("Unsqueeze", self._begin, last_axis), steps)  # (B, S)
        kinds = dict.fromkeys(graph.architecture.layer_types)
        self._angles = {kind: self._turns(graph, kind, positions) for kind in kinds}
        self._masks = {kind: self._seen(graph, kind, positions) for kind in kinds if self._past}

    def _turns(self, graph: Graph, kind: str, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of the new tokens, (B, S, R / 2) each."""
        cos, sin = rotary_tables(graph, kind)
        return graph.op("Gather", cos, positions), graph.op("Gather", sin, positions)

    def _seen(self, graph: Graph, kind: str, positions: ir.Value) -> ir.Value:
        """Whether a new token attends to a place of the cache, (B, 1, S, M): those up to itself, within the window."""
        zero, one = graph.constant("zero", np.array(0)), graph.constant("one", np.array(1))
        length = graph.op("Shape", next(iter(self._past.values())), start=2, end=3)
        places = graph.op("Range", zero, scalar(graph, length), one)  # (M,)
        rows = graph.op("Unsqueeze", positions, graph.constant("around_rows", np.array([1, 3])))  # (B, 1, S, 1)
        seen = graph.op("LessOrEqual", places, rows)
        window = graph.architecture.windows[kind]
        if window is None:
            return seen
        oldest = graph.op("Sub", rows, graph.constant(f"window_{window}", np.array(window)))
        return graph.op("And", seen, graph.op("Greater", places, oldest))

    def norm(
        self, graph: Graph, residual: ir.Value, branch: ir.Value | None, role: str, layer: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMSNorm, or LayerNorm, of residual + branch, and that sum."""
        return added_norm(graph, residual, branch, role, layer)

    def attention(self, graph: Graph, x: ir.Value, layer: int) -> ir.Value:
        """Turn query and key, write key and value to their places, attend to all places that the mask shows."""
        architecture = graph.architecture
        kind = architecture.layer_types[layer]
        query, key, new_value = (self._heads(graph, x, role, layer) for role in ("q", "k", "v"))
        cached = [self._write(graph, name, layer, new) for name, new in (("key", key), ("value", new_value))]
        softcap = architecture.attention_softcap or 0.0  # none
        mask, scale = self._masks[kind], architecture.attention_scale
        said = graph.op("Attention", query, *cached, mask, scale=scale, softcap=softcap)  # (B, heads, S, H)
        return heads_joined(graph, said)

    def _heads(self, graph: Graph, x: ir.Value, role: str, layer: int) -> ir.Value:
        """Queries, keys or values, (B, heads, S, H): normed where the family norms them, turned unless values."""
        heads = heads_of(graph, x, role, layer)
        if role == "v":
            return heads
        kind = graph.architecture.layer_types[layer]
        turned = 2 * len(graph.architecture.rotary[kind].frequencies)
        part = turned if turned < graph.spec.head_dim else 0  # the whole head
        return graph.op("RotaryEmbedding", heads, *self._angles[kind], rotary_embedding_dim=part)

    def _write(self, graph: Graph, name: str, layer: int, new: ir.Value) -> ir.Value:
        """The layer's keys or values with the new ones in their places, (B, KV heads, M, H)."""
        present = self._present[f"{layer}.{name}"]
        inputs = [self._past[f"{layer}.{name}"], new, self._begin]
        graph.tape.op_multi_out("TensorScatter", inputs, {"axis": 2, "mode": "linear"}, outputs=[present])
        return present

    def last(self, graph: Graph, x: ir.Value) -> ir.Value:
        """The hidden state of each row's last real token, (B, S, D) to (B, 1, D)."""
        last_axis = graph.constant("last_axis", np.array([-1]))
        index = graph.op("Sub", self._counts, graph.constant("one", np.array(1)))
        picked = graph.op("GatherND", x, graph.op("Unsqueeze", index, last_axis), batch_dims=1)  # (B, D)
        return graph.op("Unsqueeze", picked, graph.constant("row_axis", np.array([1])))
