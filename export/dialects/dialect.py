"""Dialect: what the graph builder asks of a set of operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import onnx_ir as ir

if TYPE_CHECKING:
    from flabc.export.graph import Graph


class Dialect(Protocol):
    """Spells the operations that differ between runtimes. An instance serves one graph.

    Letters: B sequences, S new tokens, D hidden_size.
    """

    @property
    def inputs(self) -> Sequence[ir.Value]:
        """The graph's inputs beside ``input_ids``."""
        ...

    @property
    def outputs(self) -> Sequence[ir.Value]:
        """The graph's outputs beside ``logits``."""
        ...

    @property
    def opsets(self) -> Mapping[str, int]:
        """The version of each domain that is used."""
        ...

    def begin(self, graph: Graph, ids: ir.Value) -> None:
        """Declare the inputs beside ``input_ids`` and what is computed once from them."""
        ...

    def norm(
        self, graph: Graph, residual: ir.Value, branch: ir.Value | None, role: str, layer: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """RMSNorm of residual + branch, and that sum; all (B, S, D)."""
        ...

    def attention(self, graph: Graph, x: ir.Value, layer: int) -> ir.Value:
        """Causal attention with rotary positions over past and new tokens, before its output projection.

        (B, S, D) to (B, S, num_attention_heads * head_dim).
        """
        ...

    def last(self, graph: Graph, x: ir.Value) -> ir.Value:
        """The hidden state of each row's last real token, (B, S, D) to (B, 1, D)."""
        ...
