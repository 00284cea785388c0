"""Operators of the ONNX standard (opset 23) in the forms that OpenVINO's CPU plugin fuses, over a cache that grows.

Keys and values are joined to what a layer has held before; a runtime that keeps them as state joins in place. Rows of
a batch share their places: a place that a row does not use is nought in ``attention_mask``, wherever it lies, and a
token's position is the number of its row's places before it. OpenVINO's documentation, "Stateful models and State
API"; its CPU plugin fuses Gather, Concat, the repeating of heads, and attention into one kernel that owns the cache.

Letters in shape comments: B sequences, S new tokens, P places before them, T = P + S, H head_dim, R rotated numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from flabc.export.graph import Graph
from flabc.spec import ModelSpec

from .operations import (
    added_norm,
    cache_names,
    cache_value,
    heads_apart,
    heads_joined,
    heads_of,
    rotary_tables,
    scalar,
    value,
)

#: Added to the score of a place that is not seen, so that nothing is left of it. A mask of numbers: with one of
#: booleans the plugin's attention took seven times as long.
UNSEEN = -65504

#: The axes that are put in to compare new tokens with places, (B, 1, S, T).
AROUND = {"own": [0, 1, 3], "tokens": [1, 3], "places": [1, 2]}


class OpenVinoDialect:
    """See ``Dialect`` for the contract."""

    opsets: Mapping[str, int] = MappingProxyType({"": 23})

    def __init__(self, spec: ModelSpec, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        self._mask = value("attention_mask", ir.DataType.INT64, ("batch", "total"))
        self._rows = value("beam_idx", ir.DataType.INT32, ("batch",))
        self._past = {name: cache_value("past_key_values", name, "past", spec, dtype) for name in cache_names(spec)}
        self._present = {name: cache_value("present", name, "total", spec, dtype) for name in cache_names(spec)}

    @property
    def inputs(self) -> list[ir.Value]:
        """The mask, which row of the past each row goes on from, and the past of every layer that attends."""
        return [self._mask, *([self._rows] if self._past else []), *self._past.values()]

    @property
    def outputs(self) -> list[ir.Value]:
        """The present of every layer that attends."""
        return list(self._present.values())

    def begin(self, graph: Graph, ids: ir.Value) -> None:
        """From the mask: positions, and for each type of layer its angles and what its tokens see."""
        self._zero, self._one = (graph.constant(*named) for named in (("zero", np.array(0)), ("one", np.array(1))))
        self._places_axis = graph.constant("places_axis", np.array([1]))
        self._total = graph.op("Shape", self._mask, start=1, end=2)  # T
        self._begin = graph.op("Sub", self._total, graph.op("Shape", ids, start=1, end=2))  # P
        counted = graph.op("Sub", graph.op("CumSum", self._mask, self._one), self._one)
        self._positions = graph.op("Max", counted, self._zero)  # (B, T)
        self._new = self._newest(graph, self._positions)  # (B, S)
        kinds = dict.fromkeys(graph.architecture.layer_types)
        self._angles = {kind: self._turns(graph, kind) for kind in kinds}
        self._masks = {kind: self._seen(graph, kind) for kind in kinds if self._past}

    def _newest(self, graph: Graph, x: ir.Value) -> ir.Value:
        """What belongs to the new tokens, (B, T) to (B, S)."""
        return graph.op("Slice", x, self._begin, self._total, self._places_axis)

    def _turns(self, graph: Graph, kind: str) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines of the new tokens, (B, 1, S, R) each: those of the first half of a head, twice."""
        halves = (graph.op("Gather", table, self._new) for table in rotary_tables(graph, kind))  # (B, S, R / 2)
        whole = (graph.op("Concat", half, half, axis=-1) for half in halves)
        cos, sin = (graph.op("Unsqueeze", each, self._places_axis) for each in whole)
        return cos, sin

    def _seen(self, graph: Graph, kind: str) -> ir.Value:
        """What is added to a new token's score of a place, (B, 1, S, T): nothing if it may attend to it."""
        places = graph.op("Range", self._zero, scalar(graph, self._total), self._one)  # (T,)
        axes = {name: graph.constant(f"around_{name}", np.array(at)) for name, at in AROUND.items()}
        own = graph.op("Slice", places, self._begin, self._total, graph.constant("first_axis", np.array([0])))  # (S,)
        seen = graph.op("LessOrEqual", places, graph.op("Unsqueeze", own, axes["own"]))  # (1, 1, S, T)
        used = graph.op("Cast", graph.op("Unsqueeze", self._mask, axes["places"]), to=ir.DataType.BOOL)
        seen = graph.op("And", used, seen)
        if window := graph.architecture.windows[kind]:
            now = graph.op("Unsqueeze", self._new, axes["tokens"])  # (B, 1, S, 1)
            oldest = graph.op("Sub", now, graph.constant(f"window_{window}", np.array(window)))
            there = graph.op("Unsqueeze", self._positions, axes["places"])  # (B, 1, 1, T)
            seen = graph.op("And", seen, graph.op("Greater", there, oldest))
        return graph.op("Where", seen, graph.scalar("seen", 0), graph.scalar("unseen", UNSEEN))

    def norm(
        self, graph: Graph, residual: ir.Value, branch: ir.Value | None, role: str, layer: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMSNorm, or LayerNorm, of residual + branch, and that sum."""
        return added_norm(graph, residual, branch, role, layer)

    def attention(self, graph: Graph, x: ir.Value, layer: int) -> ir.Value:
        """Turn query and key, join key and value to those before, attend to what the mask shows."""
        architecture, shape = graph.architecture, graph.spec.layers[layer]
        kind = architecture.layer_types[layer]
        query, key, new_value = _states(graph, x, layer)
        query, key = (self._turned(graph, heads, kind) for heads in (query, key))
        joined = [self._joined(graph, name, layer, new) for name, new in (("key", key), ("value", new_value))]
        sharing = shape.num_attention_heads // shape.num_key_value_heads
        keys, values = (_repeated(graph, each, shape.num_attention_heads, sharing) for each in joined)
        scale, cap = architecture.attention_scale, architecture.attention_softcap or 0.0  # none
        said = graph.op("Attention", query, keys, values, self._masks[kind], scale=scale, softcap=cap)
        return heads_joined(graph, said)

    def _turned(self, graph: Graph, x: ir.Value, kind: str) -> ir.Value:
        """Heads turned by their positions, (B, heads, S, H) to the same: x cos + (-x2, x1) sin."""
        turned, size = 2 * len(graph.architecture.rotary[kind].frequencies), graph.spec.head_dim
        part = x if turned == size else _numbers(graph, x, 0, turned)
        cos, sin = self._angles[kind]
        second = _numbers(graph, part, turned // 2, turned)
        minus = graph.op("Mul", second, graph.scalar("minus_one", -1))
        across = graph.op("Concat", minus, _numbers(graph, part, 0, turned // 2), axis=-1)
        result = graph.op("Add", graph.op("Mul", part, cos), graph.op("Mul", across, sin))
        return result if turned == size else graph.op("Concat", result, _numbers(graph, x, turned, size), axis=-1)

    def _joined(self, graph: Graph, name: str, layer: int, new: ir.Value) -> ir.Value:
        """The layer's keys or values, those before and the new ones, (B, KV heads, T, H)."""
        present = self._present[f"{layer}.{name}"]
        before = graph.op("Gather", self._past[f"{layer}.{name}"], self._rows, axis=0)
        graph.tape.op_multi_out("Concat", [before, new], {"axis": 2}, outputs=[present])
        return present

    def last(self, graph: Graph, x: ir.Value) -> ir.Value:
        """The hidden state of each row's last real token, (B, S, D) to (B, 1, D)."""
        real = graph.op("ReduceSum", self._newest(graph, self._mask), self._places_axis)  # (B, 1)
        picked = graph.op("GatherND", x, graph.op("Sub", real, self._one), batch_dims=1)  # (B, D)
        return graph.op("Unsqueeze", picked, self._places_axis)


def _states(graph: Graph, x: ir.Value, layer: int) -> Sequence[ir.Value]:
    """Query, key and value, (B, heads, S, H) each: of one product, or of three where heads are normed."""
    if graph.architecture.family.has("q_norm"):
        return [heads_of(graph, x, role, layer) for role in ("q", "k", "v")]
    shape = graph.spec.layers[layer]
    heads = [shape.num_attention_heads, shape.num_key_value_heads, shape.num_key_value_heads]
    together = heads_apart(graph, graph.linear(x, ("q", "k", "v"), layer))
    sizes = graph.constant(f"heads_{heads[0]}_{heads[1]}", np.array(heads))
    states: Sequence[ir.Value] = graph.tape.op_multi_out("Split", [together, sizes], {"axis": 1}, num_outputs=3)
    return states


def _numbers(graph: Graph, x: ir.Value, begin: int, end: int) -> ir.Value:
    """Some numbers of each head, (..., H) to (..., end - begin)."""
    bounds = [graph.constant(f"number_{at}", np.array([at])) for at in (begin, end)]
    return graph.op("Slice", x, *bounds, graph.constant("numbers_axis", np.array([3])))


def _repeated(graph: Graph, x: ir.Value, heads: int, sharing: int) -> ir.Value:
    """Keys or values, once for each head that reads them, (B, KV heads, T, H) to (B, heads, T, H)."""
    if sharing == 1:
        return x
    apart = graph.op("Unsqueeze", x, graph.constant("sharing_axis", np.array([2])))
    spread = graph.op("Expand", apart, graph.constant(f"sharing_{sharing}", np.array([1, 1, sharing, 1, 1])))
    shape = graph.constant(f"shape_of_{heads}_heads", np.array([0, heads, -1, graph.spec.head_dim]))
    return graph.op("Reshape", spread, shape)
