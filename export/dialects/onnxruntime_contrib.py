"""ONNX Runtime's fused operators (domain com.microsoft), under onnxruntime-genai's names.

GroupQueryAttention rotates, attends and extends the cache in place where past and present are one buffer. It takes
its head counts per node, so every layer may have its own. Its documentation: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from flabc.export.graph import Graph
from flabc.export.weights import Array
from flabc.spec import ModelSpec

MICROSOFT = "com.microsoft"


class OnnxRuntimeDialect:
    """See ``Dialect`` for the contract."""

    opsets: Mapping[str, int] = MappingProxyType({"": 23, MICROSOFT: 1})

    def __init__(self, spec: ModelSpec) -> None:
        self._mask = _value("attention_mask", ir.DataType.INT64, ("batch", "total"))
        self._past = {name: _cache("past_key_values", name, "past", spec) for name in _cache_names(spec)}
        self._present = {name: _cache("present", name, "total", spec) for name in _cache_names(spec)}

    @property
    def inputs(self) -> list[ir.Value]:
        """The mask and the past of every layer that attends."""
        return [self._mask, *self._past.values()]

    @property
    def outputs(self) -> list[ir.Value]:
        """The present of every layer that attends."""
        return list(self._present.values())

    def begin(self, graph: Graph, ids: ir.Value) -> None:
        """From the mask: the index of each row's last token, and the longest row's length."""
        one = graph.constant("one", np.array([1]))
        lengths = graph.op("ReduceSum", self._mask, one, keepdims=0)  # (B,)
        self._last_index = graph.op("Cast", graph.op("Sub", lengths, one), to=ir.DataType.INT32)
        longest = graph.op("Shape", self._mask, start=1, end=2)
        scalar = graph.op("Squeeze", longest, graph.constant("zero", np.array([0])))
        self._total = graph.op("Cast", scalar, to=ir.DataType.INT32)
        self._new = graph.op("Shape", ids, start=1, end=2)  # S
        self._cos, self._sin = (
            graph.constant(f"{name}_cache", table)
            for name, table in zip(("cos", "sin"), rotary(graph.spec), strict=True)
        )

    def norm(
        self, graph: Graph, residual: ir.Value, branch: ir.Value | None, role: str, layer: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMSNorm of residual + branch, and that sum."""
        prefix = "model" if layer is None else f"model.layers.{layer}"
        weight = graph.weight(
            f"{prefix}.{role}.weight", (graph.spec.hidden_size,), lambda: graph.weights.get(role, layer)
        )
        epsilon = graph.spec.rms_norm_eps
        if branch is None:
            normed = graph.op("RMSNormalization", residual, weight, axis=-1, epsilon=epsilon, stash_type=1)
            return normed, residual
        outputs = graph.tape.op_multi_out(
            "SkipSimplifiedLayerNormalization",
            [residual, branch, weight],
            {"epsilon": epsilon},
            num_outputs=4,
            domain=MICROSOFT,
        )
        outputs[1].name = outputs[2].name = ""  # mean and variance are not wanted
        return outputs[0], outputs[3]

    def attention(self, graph: Graph, x: ir.Value, layer: int) -> ir.Value:
        """One product for query, key and value, then GroupQueryAttention."""
        shape = graph.spec.layers[layer]
        packed = graph.linear(x, ("q", "k", "v"), layer)
        past = [self._past[f"{layer}.{kind}"] for kind in ("key", "value")]
        outputs = [ir.Value(), *(self._present[f"{layer}.{kind}"] for kind in ("key", "value"))]
        inputs = [packed, None, None, *past, self._last_index, self._total, self._cos, self._sin]
        attributes = {
            "num_heads": shape.num_attention_heads,
            "kv_num_heads": shape.num_key_value_heads,
            "scale": graph.spec.head_dim**-0.5,
            "do_rotary": 1,
        }
        graph.tape.op_multi_out("GroupQueryAttention", inputs, attributes, outputs=outputs, domain=MICROSOFT)
        return outputs[0]

    def last(self, graph: Graph, x: ir.Value) -> ir.Value:
        """Row b's last token stands at min(length - 1, S - 1): in a prompt it is padded behind, later S is 1."""
        end = graph.op("Sub", self._new, graph.constant("one", np.array([1])))
        index = graph.op("Min", graph.op("Cast", self._last_index, to=ir.DataType.INT64), end)  # (B,)
        index = graph.op("Unsqueeze", index, graph.constant("one", np.array([1])))  # (B, 1)
        picked = graph.op("GatherND", x, index, batch_dims=1)  # (B, D)
        return graph.op("Unsqueeze", picked, graph.constant("one", np.array([1])))


def rotary(spec: ModelSpec) -> tuple[Array, Array]:
    """Cosines and sines of every position, (max_position_embeddings, H / 2) each (RoFormer, Su et al., 2021)."""
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    frequencies = (1.0 / spec.rope_theta**exponents).astype(np.float32)
    angles = np.outer(np.arange(spec.max_position_embeddings, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


def _cache_names(spec: ModelSpec) -> list[str]:
    return [f"{i}.{kind}" for i, layer in enumerate(spec.layers) if layer.has_attention for kind in ("key", "value")]


def _cache(prefix: str, name: str, length: str, spec: ModelSpec) -> ir.Value:
    heads = spec.layers[int(name.split(".")[0])].num_key_value_heads
    return _value(f"{prefix}.{name}", ir.DataType.FLOAT, ("batch", heads, length, spec.head_dim))


def _value(name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
