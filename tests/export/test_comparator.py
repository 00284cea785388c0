"""Both dialects, and torch's own exporter, side by side in polygraphy's runners under its comparator.

The graphs are asked for the logits of every position; each has inputs of its own for a cache that is still empty.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

from flabc.artifact import SCORING_GRAPH
from flabc.export import engine
from flabc.spec import ModelSpec

from ..conftest import VARIANTS

IDS = np.random.default_rng(4).integers(3, 600, (2, 40))

#: Families that are exported by torch too: an ordinary one, one with caps and windows, one that turns part of a head.
TRACED = ("qwen2-untied", "gemma2-tied", "phi3-partial")

TOLERANCE = 2e-4


def written(model: Path, out: Path, target: str) -> Path:
    out.mkdir()
    engine.write(model, ModelSpec.from_config(json.loads((model / "config.json").read_text())), out, target)
    return out / SCORING_GRAPH


def traced(model: Path, out: Path) -> Path:
    """The model as torch exports it: opset 23, no cache, logits at every position."""
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids, use_cache=False).logits

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # inside torch's exporter
        program = torch.onnx.export(
            Logits().eval(),
            (torch.from_numpy(IDS),),
            dynamo=True,
            opset_version=23,
            input_names=["input_ids"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    assert program.model.opset_imports[""] == 23
    program.save(str(out / "traced.onnx"))
    return out / "traced.onnx"


def said(name: str, file: Path) -> tuple[str, list[IterationResult]]:
    """The logits of ``IDS`` in polygraphy's ONNX Runtime runner, under a name."""
    with OnnxrtRunner(SessionFromOnnx(str(file), providers=["cpu"]), name=name) as runner:
        asked = runner.get_input_metadata(use_numpy_dtypes=False)
        outputs = runner.infer({name: given(name, meta.shape) for name, meta in asked.items()}, check_inputs=True)
        return name, [IterationResult({"logits": np.array(outputs["logits"])}, runner_name=name)]


def given(name: str, shape: tuple[Any, ...]) -> Any:
    """What goes in before anything has been read."""
    rows, length = IDS.shape
    if name == "input_ids":
        return IDS
    if name == "attention_mask":
        return np.ones_like(IDS)
    if name == "write_indices":
        return np.zeros(rows, np.int64)
    if name == "beam_idx":
        return np.arange(rows, dtype=np.int32)
    assert name.startswith("past_key_values.")
    sizes = {"batch": rows, "max_length": length}  # the other dialect's cache has no place yet
    return np.zeros([size if isinstance(size, int) else sizes.get(size, 0) for size in shape], np.float32)


def agree(graphs: Mapping[str, Path]) -> bool:
    """Whether all graphs say the same, each against the next."""
    results = RunResults([said(name, file) for name, file in graphs.items()])
    assert len(results) == len(graphs)
    return bool(Comparator.compare_accuracy(results, compare_func=SimpleCompareFunc(atol=TOLERANCE, rtol=0)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_dialects_say_the_same(tiny: Callable[[str], Path], tmp_path: Path, variant: str) -> None:
    assert agree({target: written(tiny(variant), tmp_path / target, target) for target in engine.DIALECTS})


@pytest.mark.parametrize("variant", TRACED)
def test_they_say_what_torchs_own_export_says(tiny: Callable[[str], Path], tmp_path: Path, variant: str) -> None:
    graphs = {"torch": traced(tiny(variant), tmp_path)}
    assert agree(graphs | {target: written(tiny(variant), tmp_path / target, target) for target in engine.DIALECTS})


def test_the_comparator_sees_another_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    one = written(tiny("llama-tied"), tmp_path / "one", "onnx")
    other = written(tiny("llama-scaled"), tmp_path / "other", "onnx-standard")  # the same weights, other positions
    assert not agree({"one": one, "other": other})
