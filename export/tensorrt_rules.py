"""What TensorRT's documents ask of an ONNX file, checked before any GPU is there to refuse it.

A graph that breaks a rule would be refused by TensorRT's parser, or worse, would be built and say something else.
Sources, read for versions 10.15 to 11.4: ONNX-TensorRT, "Supported ONNX Operators" (operators.md) and its static
checkers; TensorRT documentation, "KV Cache", "Fused Attention", "ONNX Opset Guide", "Strongly Typed Networks".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir

from flabc.errors import ModelError

OPERATORS = "ONNX-TensorRT, Supported ONNX Operators"
KV_CACHE = "TensorRT, Working with Transformers: KV Cache"
ATTENTION = "TensorRT, Working with Transformers: Fused Attention"
OPSETS = "TensorRT, ONNX Opset Guide"
TYPING = "TensorRT, Strongly Typed Networks"
EXTERNAL = "ONNX, External Data"

#: The versions of the ONNX standard that every release of TensorRT 11 reads (11.5 reads 25 too).
OPSET_RANGE = range(9, 25)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operators that take numbers of floating point alone.
FLOAT_ONLY = _words("""
    Attention BatchNormalization Ceil Conv ConvTranspose Cos Erf Exp Floor Gemm GroupNormalization HardSigmoid HardSwish
    InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax MatMul Mish PRelu Reciprocal
    RMSNormalization RotaryEmbedding Round Sigmoid Sin Softmax Softplus Softsign Sqrt Tanh TensorScatter
""")

#: Operators that take truth values alone.
BOOL_ONLY = _words("And Not Or Xor")

#: Operators that take integers as well as floating point.
MIXED = _words("""
    Abs Add ArgMax ArgMin Cast CastLike Concat Constant ConstantOfShape Div Equal Expand EyeLike Flatten Gather
    GatherElements GatherND Gelu Greater GreaterOrEqual Identity IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg OneHot
    Pad Pow Range ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    ScatterElements ScatterND Shape Sign Size Slice Split Squeeze Sub Sum Tile TopK Transpose Trilu Unsqueeze Where
""")

SUPPORTED = FLOAT_ONLY | BOOL_ONLY | MIXED

PAIRS = _words("""
    Add And Div Equal Greater GreaterOrEqual Less LessOrEqual MatMul Mod Mul Or Pow RMSNormalization Sub TensorScatter
    Xor
""")

#: Operators whose inputs must be of one type: from which place on, and up to but not including which.
SAME_TYPE: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(PAIRS, (0, 2)),
    **dict.fromkeys(("Attention", "Gemm", "LayerNormalization", "RotaryEmbedding"), (0, 3)),
    **dict.fromkeys(("Concat", "Max", "Mean", "Min", "Sum"), (0, None)),
    "Where": (1, 3),
}

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
TYPES = FLOATS | {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL}

#: What operators say whose result is not of their first operand's type.
RESULTS = {
    **dict.fromkeys(_words("Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual"), ir.DataType.BOOL),
    **dict.fromkeys(_words("ArgMax ArgMin Shape Size"), ir.DataType.INT64),
}

#: How many violations a message tells.
TOLD = 5


@dataclass(frozen=True)
class Violation:
    """A rule that a graph breaks.

    Args:
        rule: its name, a key of ``RULES``.
        node: where.
        problem: what is wrong there.
        document: where TensorRT says so.
    """

    rule: str
    node: str
    problem: str
    document: str

    def __str__(self) -> str:
        return f"{self.node}: {self.problem} (rule {self.rule!r}; {self.document})"


#: What a rule finds: the place, and the problem.
Found = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Checked:
    """A graph with the types of its values, and the folder of its data.

    Args:
        model: the graph.
        folder: where it lies.
        untyped: why types could not be inferred; None if they were.
    """

    model: ir.Model
    folder: Path
    untyped: str | None = None
    inputs: frozenset[str] = field(init=False)
    outputs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", frozenset(str(value.name) for value in self.model.graph.inputs))
        object.__setattr__(self, "outputs", frozenset(str(value.name) for value in self.model.graph.outputs))

    @property
    def nodes(self) -> Iterator[ir.Node]:
        """All nodes, those of sub-graphs too."""
        return ir.traversal.RecursiveGraphIterator(self.model.graph)

    def of(self, kind: str) -> Iterator[ir.Node]:
        """All nodes of one operator."""
        return (node for node in self.nodes if node.op_type == kind and node.domain == "")

    @property
    def values(self) -> Iterator[ir.Value]:
        """All values that have a type: inputs, weights, results."""
        yield from self.model.graph.inputs
        yield from self.model.graph.initializers.values()
        yield from (value for node in self.nodes for value in node.outputs)


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def _given(node: ir.Node, at: int) -> ir.Value | None:
    """The input at that place, None if it is left out."""
    return node.inputs[at] if at < len(node.inputs) else None


def _opset(graph: Checked) -> Found:
    version = graph.model.opset_imports.get("", 0)
    if version not in OPSET_RANGE:
        yield "the file", f"opset {version}; expected {OPSET_RANGE.start} to {OPSET_RANGE.stop - 1}"


def _operators(graph: Checked) -> Found:
    for node in graph.nodes:
        if node.domain not in ("", "ai.onnx"):
            yield _name(node), f"it is of the domain {node.domain!r}, of which the parser knows nothing"
        elif node.op_type not in SUPPORTED:
            yield _name(node), "the parser has no such operator"


def _attention_io(graph: Checked) -> Found:
    for node in graph.of("Attention"):
        if len(node.outputs) > 1:
            yield _name(node), f"{len(node.outputs)} outputs; expected 1"
        names = ("past_key", "past_value", "nonpad_kv_seqlen")
        for at, name in enumerate(names, start=4):
            if _given(node, at) is not None:
                yield _name(node), f"the input {name} is given"


def _attention_attributes(graph: Checked) -> Found:
    for node in graph.of("Attention"):
        for name in ("softcap", "qk_matmul_output_mode"):
            if name in node.attributes and node.attributes[name].value:
                yield _name(node), f"{name} is {node.attributes[name].value}; expected 0"
        if "softmax_precision" in node.attributes:
            yield _name(node), "softmax_precision is set"


def _attention_mask(graph: Checked) -> Found:
    """``is_causal`` counts from the upper left, where a cache has its oldest token: a mask must say what is seen."""
    for node in graph.of("Attention"):
        causal, mask = node.attributes.get("is_causal"), _given(node, 3)
        if mask is None:
            yield _name(node), "there is no mask over the places of the cache"
        elif causal is not None and causal.value:
            yield _name(node), "is_causal beside a mask"
        elif mask.dtype not in (ir.DataType.BOOL, None) and mask.dtype != node.inputs[0].dtype:  # type: ignore[union-attr]
            yield _name(node), f"the mask is {mask.dtype}; expected BOOL or the type of the query"


def _attention_rank(graph: Checked) -> Found:
    for node in graph.of("Attention"):
        for at, what in enumerate(("query", "key", "value", "mask")):
            value = _given(node, at)
            if value is not None and value.shape is not None and len(value.shape) != 4:
                yield _name(node), f"the {what} has {len(value.shape)} dimensions; expected 4"


def _scatter_form(graph: Checked) -> Found:
    for node in graph.of("TensorScatter"):
        axis, mode = node.attributes.get("axis"), node.attributes.get("mode")
        if axis is not None and axis.value not in (2, -2):
            yield _name(node), f"axis {axis.value}; expected -2, the sequence"
        if mode is not None and mode.value != "linear":
            yield _name(node), f"mode {mode.value!r}; expected 'linear'"
        for value in node.inputs[:2]:
            if value is not None and value.shape is not None and len(value.shape) != 4:
                yield _name(node), f"{value.name} has {len(value.shape)} dimensions; expected 4"


def _scatter_input(graph: Checked) -> Found:
    for node in graph.of("TensorScatter"):
        cache = node.inputs[0]
        if cache is None or cache.name not in graph.inputs:
            yield _name(node), "the cache that it writes to is no input of the graph"


def _scatter_output(graph: Checked) -> Found:
    for node in graph.of("TensorScatter"):
        if node.outputs[0].name not in graph.outputs:
            yield _name(node), "the written cache is no output of the graph"


def _scatter_length(graph: Checked) -> Found:
    for node in graph.of("TensorScatter"):
        cache = node.inputs[0]
        if cache is not None and cache.shape is not None and not isinstance(cache.shape[-2], int):
            yield _name(node), f"the cache is {cache.shape[-2]} places long; expected a number"


def _types(graph: Checked) -> Found:
    for value in graph.values:
        if value.dtype is not None and value.dtype not in TYPES:
            allowed = ", ".join(sorted(kind.name for kind in TYPES))
            yield f"value {value.name!r}", f"it is {value.dtype.name}; expected one of {allowed}"


def _operand_types(graph: Checked) -> Found:
    for node in graph.nodes:
        data = node.inputs[:2] if node.op_type in ("MatMul", "Gemm", "TensorScatter") else node.inputs[:1]
        for value in data:
            if value is None or value.dtype is None:
                continue
            if node.op_type in FLOAT_ONLY and value.dtype not in FLOATS:
                yield _name(node), f"{value.name} is {value.dtype.name}; expected floating point"
            if node.op_type in BOOL_ONLY and value.dtype != ir.DataType.BOOL:
                yield _name(node), f"{value.name} is {value.dtype.name}; expected BOOL"


def _one_type(graph: Checked) -> Found:
    for node in graph.nodes:
        begin, end = SAME_TYPE.get(node.op_type, (0, 0))
        kinds = {value.dtype for value in node.inputs[begin:end] if value is not None and value.dtype is not None}
        if len(kinds) > 1:
            names = " and ".join(sorted(kind.name for kind in kinds))
            yield _name(node), f"its inputs are {names}; nothing is cast in a strongly typed network"


def _known_types(graph: Checked) -> Found:
    if graph.untyped is not None:
        yield "the file", graph.untyped
        return
    for value in graph.values:
        if value.dtype is None and value.name:
            yield f"value {value.name!r}", "its type cannot be inferred"


def _constant_axes(graph: Checked) -> Found:
    for kind in ("Squeeze", "Unsqueeze"):
        for node in graph.of(kind):
            axes = _given(node, 1)
            if axes is None or (axes.const_value is None and not _is_constant(axes)):
                yield _name(node), "its axes are no constant"


def _is_constant(value: ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type == "Constant"


def _one_output(graph: Checked) -> Found:
    for node in graph.of("LayerNormalization"):
        if len(node.outputs) > 1:
            yield _name(node), f"{len(node.outputs)} outputs; expected 1"


def _data(graph: Checked) -> Found:
    for value in graph.model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = graph.folder / tensor.location
        needed = (tensor.offset or 0) + (tensor.length or 0)
        if not file.resolve().is_relative_to(graph.folder.resolve()):
            yield f"weight {value.name!r}", f"its data lies outside the folder, in {tensor.location}"
        elif not file.is_file():
            yield f"weight {value.name!r}", f"its data file {tensor.location} is missing"
        elif file.stat().st_size < needed:
            yield f"weight {value.name!r}", f"{tensor.location} has {file.stat().st_size} bytes; expected {needed}"


#: The rules by name: what finds their violations, and the document that states them.
RULES: dict[str, tuple[Callable[[Checked], Found], str]] = {
    "opset": (_opset, OPSETS),
    "operator": (_operators, OPERATORS),
    "attention inputs and outputs": (_attention_io, OPERATORS),
    "attention attributes": (_attention_attributes, OPERATORS),
    "attention mask": (_attention_mask, ATTENTION),
    "attention dimensions": (_attention_rank, OPERATORS),
    "cache form": (_scatter_form, OPERATORS),
    "cache input": (_scatter_input, KV_CACHE),
    "cache output": (_scatter_output, KV_CACHE),
    "cache length": (_scatter_length, KV_CACHE),
    "type": (_types, OPERATORS),
    "operand type": (_operand_types, OPERATORS),
    "strong typing": (_one_type, TYPING),
    "known type": (_known_types, TYPING),
    "constant axes": (_constant_axes, OPERATORS),
    "one output": (_one_output, OPERATORS),
    "weight data": (_data, EXTERNAL),
}


def _read(file: Path) -> Checked:
    proto = onnx.load(str(file), load_external_data=False)
    try:
        return Checked(ir.from_proto(onnx.shape_inference.infer_shapes(proto)), file.parent)
    except onnx.shape_inference.InferenceError as error:
        model = ir.from_proto(proto)
        _propagate(model)  # so that the node at fault can be named
        return Checked(model, file.parent, untyped=f"types cannot be inferred: {error}")


def _propagate(model: ir.Model) -> None:
    """Give weights their type, and results without one that of the first operand, or what the operator says."""
    for weight in model.graph.initializers.values():
        if weight.const_value is not None:
            weight.dtype = weight.const_value.dtype
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        operand = _given(node, 1 if node.op_type == "Where" else 0)
        kind = RESULTS.get(node.op_type) or (operand.dtype if operand is not None else None)
        if node.op_type == "Cast":
            kind = ir.DataType(node.attributes["to"].as_int())
        for value in node.outputs:
            if value.dtype is None and kind is not None:
                value.dtype = kind


def violations(file: Path) -> list[Violation]:
    """Every rule that an ONNX file breaks, in the order of ``RULES``; weights are not read."""
    graph = _read(file)
    return [
        Violation(rule, node, problem, document)
        for rule, (find, document) in RULES.items()
        for node, problem in find(graph)
    ]


def check(file: Path) -> None:
    """Make sure that TensorRT can build a file.

    Raises:
        ModelError: with the first of the violations: node, rule and document of each.
    """
    found = violations(file)
    if found:
        told = "; ".join(map(str, found[:TOLD])) + (f"; and {len(found) - TOLD} more" if len(found) > TOLD else "")
        raise ModelError(f"TensorRT does not take {file.name}: {told}.")
