"""From a checkpoint folder to the files of an engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from flabc.artifact import GRAPH, SCORING_GRAPH
from flabc.console import progress
from flabc.spec import ModelSpec

from .architecture import architecture
from .dialects.dialect import Dialect
from .dialects.onnxruntime_contrib import OnnxRuntimeDialect
from .dialects.openvino import OpenVinoDialect
from .dialects.standard import StandardDialect
from .genai_config import genai_config
from .graph import DTYPES, Graph, build
from .precision import PRECISIONS as KNOWN
from .precision import Precision
from .weights import CheckpointWeights

#: What an engine folder takes over from the checkpoint as it is.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
    "vocab_map.json",
)

#: The weights that both graphs read.
DATA = f"{GRAPH}.data"

#: How the graph of each ONNX target is spelt.
DIALECTS: dict[str, Callable[[ModelSpec, ir.DataType], Dialect]] = {
    "onnx": OnnxRuntimeDialect,
    "onnx-standard": StandardDialect,
    "openvino": OpenVinoDialect,
}

#: The precisions that each can store weights in, the first by default.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "onnx": tuple(KNOWN),
    "onnx-standard": ("fp32", "fp16", "bf16"),
    "openvino": ("fp32", "int8"),
}


def write(
    checkpoint: Path,
    spec: ModelSpec,
    out: Path,
    target: str = "onnx",
    precision: Precision = KNOWN["fp32"],
    *,
    cache_length: int | None = None,
) -> None:
    """Write graphs, weights, tokenizer and configs into ``out``.

    Args:
        checkpoint: a Hugging Face folder with safetensors.
        spec: its shapes.
        out: a folder that exists.
        target: one of ``DIALECTS``.
        precision: what it computes in, and how matrices are stored.
        cache_length: fixes how long the cache of ``onnx-standard`` is, for runtimes that must know it.

    Raises:
        ModelError: if the graph cannot be built for this model, or a tensor is missing.
    """
    weights = CheckpointWeights(checkpoint, spec)
    known = architecture(spec, read_json(checkpoint / "config.json"))
    dialect, dtype = DIALECTS[target], DTYPES[precision.compute]
    if cache_length is not None:
        dialect = partial(StandardDialect, places=cache_length)
    model = build(Graph(spec, known, weights, precision), dialect(spec, dtype))
    total = len(model.graph.initializers)
    with progress("writing weights", total) as advance:
        ir.save(model, out / GRAPH, external_data=DATA, callback=lambda *_: advance(1))
    stored = {name: value.const_value for name, value in ir.load(out / GRAPH).graph.initializers.items()}
    external = {name: tensor for name, tensor in stored.items() if isinstance(tensor, ir.ExternalTensor)}
    scoring = Graph(spec, known, weights, precision, external)
    ir.save(build(scoring, dialect(spec, dtype), scoring=True), out / SCORING_GRAPH)
    for name in COPIED:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    if target != "onnx":
        return
    generation = read_json(checkpoint / "generation_config.json") or read_json(checkpoint / "config.json")
    write_json(out / "genai_config.json", genai_config(spec, generation))


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, or {} if there is none."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write JSON as a person would like to read it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
