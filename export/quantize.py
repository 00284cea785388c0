"""Weights in blocks of 8 or 4 bits: ONNX Runtime's own quantiser, its operators, one matrix in memory at a time.

Every row of a matrix, as torch stores it, is cut into blocks that share a scale (and, if not symmetric, a zero point).
ONNX Runtime, ContribOperators.md: MatMulNBits, GatherBlockQuantized.

Letters in shape comments: N outputs, K inputs, V vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from flabc.errors import require

from .weights import Array

if TYPE_CHECKING:
    from .graph import Graph

MICROSOFT = "com.microsoft"

#: MatMulNBits' accuracy level that multiplies in 8-bit integers, which is what processors have units for.
INTEGER_PRODUCTS = 4


@dataclass(frozen=True)
class Quantization:
    """How weights are stored.

    Args:
        bits: of a number in the layers' matrices, 4 or 8.
        outer_bits: of one in the embedding and the output matrix, whose errors reach every logit.
        block_size: numbers that share a scale, a power of two from 16 on.
        symmetric: whether nought is the middle of the range, instead of a zero point for every block.
    """

    bits: int
    outer_bits: int = 8
    block_size: int = 32
    symmetric: bool = True

    def product(
        self, graph: Graph, x: ir.Value, name: str, size: tuple[int, int], make: Callable[[], Array], *, outer: bool
    ) -> ir.Value:
        """X W with W in blocks.

        Args:
            graph: the graph.
            x: (..., K).
            name: of the matrix.
            size: (K, N).
            make: reads W, (K, N), float32.
            outer: whether it is the output matrix.
        """
        bits = self.outer_bits if outer else self.bits
        inputs = self._stored(graph, name, size, make, bits)
        return graph.op(
            "MatMulNBits",
            x,
            *inputs,
            domain=MICROSOFT,
            K=size[0],
            N=size[1],
            bits=bits,
            block_size=self.block_size,
            accuracy_level=INTEGER_PRODUCTS,
        )

    def gather(
        self, graph: Graph, ids: ir.Value, name: str, size: tuple[int, int], make: Callable[[], Array]
    ) -> ir.Value:
        """Rows of an embedding in blocks, (B, S) to (B, S, D); stored as the matrix of a product is, so once if tied.

        Args:
            graph: the graph.
            ids: (B, S).
            name: of the matrix.
            size: (D, V).
            make: reads it, (D, V), float32.
        """
        packed, *others = self._stored(graph, name, size, make, self.outer_bits)
        rows = graph.op("Reshape", packed, graph.constant("rows_of_blocks", np.array([size[1], -1])))
        points = [graph.op("Reshape", p, graph.constant("rows_of_blocks", np.array([size[1], -1]))) for p in others[1:]]
        found = graph.op(
            "GatherBlockQuantized",
            rows,
            ids,
            others[0],
            *points,
            domain=MICROSOFT,
            bits=self.outer_bits,
            block_size=self.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if size[0] % self.block_size == 0:
            return found
        begin, end, axis = (np.array([number]) for number in (0, size[0], 2))  # the last block is filled up
        bounds = [graph.constant(f"hidden_{what}", at) for what, at in (("begin", begin), ("end", end), ("axis", axis))]
        return graph.op("Slice", found, *bounds)

    def _stored(
        self, graph: Graph, name: str, size: tuple[int, int], make: Callable[[], Array], bits: int
    ) -> list[ir.Value]:
        """The packed numbers, (N, blocks, bytes of a block), scales and, if any, zero points, (N, blocks)."""
        blocks, per_byte = -(-size[0] // self.block_size), 8 // bits
        parts = _Parts(lambda: self.packed(make(), bits))
        shapes = {
            "packed": ((size[1], blocks, self.block_size // per_byte), ir.DataType.UINT8),
            "scales": ((size[1], blocks), ir.DataType.FLOAT),
        }
        if not self.symmetric:
            shapes["zero_points"] = ((size[1], -(-blocks // per_byte)), ir.DataType.UINT8)
        return [
            graph.weight(f"{name}.{part}", shape, lambda part=part: parts.take(part), dtype)  # type: ignore[misc]
            for part, (shape, dtype) in shapes.items()
        ]

    def packed(self, matrix: Array, bits: int) -> dict[str, Array]:
        """A matrix, (K, N), as ONNX Runtime's quantiser stores it: see ``_stored`` for the shapes."""
        require("onnxruntime", "cpu")
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

        config = DefaultWeightOnlyQuantConfig(block_size=self.block_size, is_symmetric=self.symmetric, bits=bits)
        matrix = np.ascontiguousarray(matrix)
        packed, scales, points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
        return {"packed": packed, "scales": scales, "zero_points": points}


@dataclass
class _Parts:
    """What a matrix becomes, made when the first part is asked for and forgotten with the last."""

    make: Callable[[], dict[str, Array]]
    left: dict[str, Array] = field(default_factory=dict)

    def take(self, name: str) -> Array:
        if name not in self.left:
            self.left = self.make()
        return self.left.pop(name)


#: By the name of a precision; None stores numbers as they are.
PRECISIONS: dict[str, Quantization | None] = {"fp32": None, "int8": Quantization(8), "int4": Quantization(4)}
