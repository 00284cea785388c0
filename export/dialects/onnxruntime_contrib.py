"""ONNX Runtime's fused operators (domain com.microsoft), under onnxruntime-genai's names.

GroupQueryAttention rotates, attends and extends the cache in place where past and present are one buffer. It takes
its head counts per node, so every layer may have its own. Its documentation: ONNX Runtime, ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from flabc.errors import ModelError
from flabc.export.graph import Graph
from flabc.export.quantize import MICROSOFT
from flabc.spec import ModelSpec

from .operations import cache_names, cache_value, head_norm, plain_norm, rotary_tables, value

#: GroupQueryAttention turns a multiple of this many pairs of numbers.
ROTARY_STEP = 8


class OnnxRuntimeDialect:
    """See ``Dialect`` for the contract."""

    opsets: Mapping[str, int] = MappingProxyType({"": 23, MICROSOFT: 1})

    def __init__(self, spec: ModelSpec, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        self._mask = value("attention_mask", ir.DataType.INT64, ("batch", "total"))
        self._past = {name: cache_value("past_key_values", name, "past", spec, dtype) for name in cache_names(spec)}
        self._present = {name: cache_value("present", name, "total", spec, dtype) for name in cache_names(spec)}

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
        # S of every row, counted where it is compared: a number of the host's beside one of the device's would have to
        # be copied there, and ONNX Runtime captures no CUDA graph then.
        self._new = graph.op("ReduceSum", graph.op("Expand", one, graph.op("Shape", ids)), one, keepdims=0)  # (B,)
        for rotary in graph.architecture.rotary.values():
            if len(rotary.frequencies) % ROTARY_STEP:
                raise ModelError(
                    "ONNX Runtime cannot turn heads by this many angles.",
                    expected=f"a multiple of {ROTARY_STEP}",
                    found=str(len(rotary.frequencies)),
                    fix="Serve the checkpoint with transformers: it loads there.",
                )
        self._tables = {kind: rotary_tables(graph, kind) for kind in dict.fromkeys(graph.architecture.layer_types)}

    def norm(
        self, graph: Graph, residual: ir.Value, branch: ir.Value | None, role: str, layer: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMSNorm, or LayerNorm, of residual + branch, and that sum."""
        weight, epsilon = graph.norm_weight(role, layer), graph.spec.rms_norm_eps
        bias = [graph.norm_bias(role, layer)] if graph.architecture.layer_norm else []
        if branch is None:
            return plain_norm(graph, residual, [weight, *bias], epsilon), residual
        outputs = graph.tape.op_multi_out(
            "SkipLayerNormalization" if bias else "SkipSimplifiedLayerNormalization",
            [residual, branch, weight, *bias],
            {"epsilon": epsilon},
            num_outputs=4,
            domain=MICROSOFT,
        )
        outputs[1].name = outputs[2].name = ""  # mean and variance are not wanted
        return outputs[0], outputs[3]

    def attention(self, graph: Graph, x: ir.Value, layer: int) -> ir.Value:
        """One product for query, key and value, or three where heads are normed; then GroupQueryAttention."""
        shape, architecture = graph.spec.layers[layer], graph.architecture
        kind = architecture.layer_types[layer]
        past = [self._past[f"{layer}.{name}"] for name in ("key", "value")]
        outputs = [ir.Value(), *(self._present[f"{layer}.{name}"] for name in ("key", "value"))]
        states = self._states(graph, x, layer)
        inputs = [*states, *past, self._last_index, self._total, *self._tables[kind]]
        attributes = {
            "num_heads": shape.num_attention_heads,
            "kv_num_heads": shape.num_key_value_heads,
            "scale": architecture.attention_scale,
            "do_rotary": 1,
        }
        if window := architecture.windows[kind]:
            attributes["local_window_size"] = window
        if architecture.attention_softcap:
            attributes["softcap"] = architecture.attention_softcap
        graph.tape.op_multi_out("GroupQueryAttention", inputs, attributes, outputs=outputs, domain=MICROSOFT)
        return outputs[0]

    def _states(self, graph: Graph, x: ir.Value, layer: int) -> list[ir.Value | None]:
        """Query, key and value as the operator takes them: packed, or (B, S, heads * H) each."""
        if not graph.architecture.family.has("q_norm"):
            return [graph.linear(x, ("q", "k", "v"), layer), None, None]
        # Only the CUDA provider norms heads inside the operator.
        query, key = (head_norm(graph, graph.linear(x, (role,), layer), role, layer) for role in ("q", "k"))
        return [query, key, graph.linear(x, ("v",), layer)]

    def last(self, graph: Graph, x: ir.Value) -> ir.Value:
        """Row b's last token stands at min(length - 1, S - 1): in a prompt it is padded behind, later S is 1."""
        end = graph.op("Sub", self._new, graph.constant("one", np.array([1])))
        index = graph.op("Min", graph.op("Cast", self._last_index, to=ir.DataType.INT64), end)  # (B,)
        index = graph.op("Unsqueeze", index, graph.constant("one", np.array([1])))  # (B, 1)
        picked = graph.op("GatherND", x, index, batch_dims=1)  # (B, D)
        return graph.op("Unsqueeze", picked, graph.constant("one", np.array([1])))
