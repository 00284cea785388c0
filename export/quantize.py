"""Matrices of 8 or 4 bits, one in memory at a time.

In blocks, by ONNX Runtime's own quantiser for its own operators: every row of a matrix, as torch stores it, is cut into
blocks that share a scale (and, if not symmetric, a zero point). ONNX Runtime, ContribOperators.md: MatMulNBits,
GatherBlockQuantized. Or with one scale for each row, in the standard's DequantizeLinear, which OpenVINO multiplies
without unpacking.

Letters in shape comments: N outputs, K inputs, V vocab_size, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from flabc.errors import require

from .precision import Blocks
from .weights import Array

if TYPE_CHECKING:
    from .graph import Graph

MICROSOFT = "com.microsoft"

#: MatMulNBits' accuracy level that multiplies in 8-bit integers, which is what processors have units for.
INTEGER_PRODUCTS = 4


def product(
    graph: Graph, x: ir.Value, name: str, size: tuple[int, int], make: Callable[[], Array], blocks: Blocks
) -> ir.Value:
    """X W with W in few bits.

    Args:
        graph: the graph.
        x: (..., K).
        name: of the matrix.
        size: (K, N).
        make: reads W, (K, N), float32.
        blocks: how it is stored.
    """
    if blocks.block_size is None:
        unpacked = _unpacked(graph, name, size, make, blocks)
        return graph.op("MatMul", x, graph.op("Transpose", unpacked, perm=[1, 0]))
    return graph.op(
        "MatMulNBits",
        x,
        *_stored(graph, name, size, make, blocks),
        domain=MICROSOFT,
        K=size[0],
        N=size[1],
        bits=blocks.bits,
        block_size=blocks.block_size,
        accuracy_level=INTEGER_PRODUCTS,
    )


def gather(
    graph: Graph, ids: ir.Value, name: str, size: tuple[int, int], make: Callable[[], Array], blocks: Blocks
) -> ir.Value:
    """Rows of an embedding in few bits, (B, S) to (B, S, D); stored as the matrix of a product is, so once if tied.

    Args:
        graph: the graph.
        ids: (B, S).
        name: of the matrix.
        size: (D, V).
        make: reads it, (D, V), float32.
        blocks: how it is stored.
    """
    if blocks.block_size is None:
        return graph.op("Gather", _unpacked(graph, name, size, make, blocks), ids)
    packed, *others = _stored(graph, name, size, make, blocks)
    rows = graph.op("Reshape", packed, graph.constant("rows_of_blocks", np.array([size[1], -1])))
    points = [graph.op("Reshape", p, graph.constant("rows_of_blocks", np.array([size[1], -1]))) for p in others[1:]]
    found = graph.op(
        "GatherBlockQuantized",
        rows,
        ids,
        others[0],
        *points,
        domain=MICROSOFT,
        bits=blocks.bits,
        block_size=blocks.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if size[0] % blocks.block_size == 0:
        return found
    begin, end, axis = (np.array([number]) for number in (0, size[0], 2))  # the last block is filled up
    bounds = [graph.constant(f"hidden_{what}", at) for what, at in (("begin", begin), ("end", end), ("axis", axis))]
    return graph.op("Slice", found, *bounds)


def _unpacked(graph: Graph, name: str, size: tuple[int, int], make: Callable[[], Array], blocks: Blocks) -> ir.Value:
    """A matrix with one scale for each row, as torch stores it, (N, K), for a runtime to multiply as it is stored."""
    parts = _Parts(lambda: by_rows(make().T, blocks.bits))
    kept = graph.weight(f"{name}.packed", (size[1], size[0]), lambda: parts.take("packed"), ir.DataType.INT8)
    scales = graph.weight(f"{name}.scales", (size[1],), lambda: parts.take("scales"))
    return graph.op("DequantizeLinear", kept, scales, axis=0)


def by_rows(matrix: Array, bits: int) -> dict[str, Array]:
    """A matrix, (N, K), as whole numbers, and what each row is multiplied by, (N,): its largest is the range's end."""
    most = 2 ** (bits - 1) - 1
    scales = np.maximum(np.abs(matrix).max(1), np.finfo(np.float32).tiny) / most
    return {"packed": np.rint(matrix / scales[:, None]).astype(np.int8), "scales": scales}


def _stored(
    graph: Graph, name: str, size: tuple[int, int], make: Callable[[], Array], blocks: Blocks
) -> list[ir.Value]:
    """The packed numbers, (N, blocks, bytes of a block), scales and, if any, zero points, (N, blocks)."""
    assert blocks.block_size is not None, "rows are not cut"
    count, per_byte = -(-size[0] // blocks.block_size), 8 // blocks.bits
    parts = _Parts(lambda: packed(make(), blocks))
    shapes = {
        "packed": ((size[1], count, blocks.block_size // per_byte), ir.DataType.UINT8),
        "scales": ((size[1], count), graph.dtype),
    }
    if not blocks.symmetric:
        shapes["zero_points"] = ((size[1], -(-count // per_byte)), ir.DataType.UINT8)
    return [
        graph.weight(f"{name}.{part}", shape, lambda part=part: parts.take(part), dtype)  # type: ignore[misc]
        for part, (shape, dtype) in shapes.items()
    ]


def packed(matrix: Array, blocks: Blocks) -> dict[str, Array]:
    """A matrix, (K, N), as ONNX Runtime's quantiser stores it: see ``_stored`` for the shapes; scales in float32."""
    require("onnxruntime", "cpu")
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=blocks.block_size, is_symmetric=blocks.symmetric, bits=blocks.bits)
    numbers, scales, points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(matrix))
    return {"packed": numbers, "scales": scales, "zero_points": points}


@dataclass
class _Parts:
    """What a matrix becomes, made when the first part is asked for and forgotten with the last."""

    make: Callable[[], dict[str, Array]]
    left: dict[str, Array] = field(default_factory=dict)

    def take(self, name: str) -> Array:
        if name not in self.left:
            self.left = self.make()
        return self.left.pop(name)
