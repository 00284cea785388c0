"""The graph against transformers, and against the walk where layers differ in shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from flabc import api
from flabc.compress.model import CausalLM
from flabc.compress.walk import Walk, dense_variant
from flabc.errors import ModelError, UnknownNameError
from flabc.export import engine
from flabc.runtime.backend import RUNS, Backend, Limits, open_backend
from flabc.spec import ModelSpec

LIMITS = Limits(max_batch=3, max_length=64)


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec.from_config(json.loads((folder / "config.json").read_text()))


def engine_of(folder: Path, spec: ModelSpec, out: Path, target: str = "onnx") -> Backend:
    out.mkdir()
    engine.write(folder, spec, out, target)
    return open_backend(RUNS[target], out, spec, LIMITS)


def reference(folder: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits: np.ndarray[Any, Any] = model(torch.from_numpy(ids)).logits.numpy()
    return logits


def some_ids(shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(3, 600, shape)


def test_every_position_is_scored_as_transformers_does(every_tiny: Path, tmp_path: Path, target: str) -> None:
    ids = some_ids((2, 40))  # longer than the windows of those that look through one
    scores = engine_of(every_tiny, spec_of(every_tiny), tmp_path / "e", target).score(ids)
    np.testing.assert_allclose(scores, reference(every_tiny, ids), atol=2e-4)


def test_prompt_and_steps_with_the_cache(every_tiny: Path, tmp_path: Path, target: str) -> None:
    ids = some_ids((1, 40))
    expected = reference(every_tiny, ids)[0]
    backend = engine_of(every_tiny, spec_of(every_tiny), tmp_path / "e", target)
    backend.start(1)
    np.testing.assert_allclose(backend.extend(ids[:, :13], np.array([13]))[0], expected[12], atol=2e-4)
    for at in range(13, 40):
        np.testing.assert_allclose(backend.extend(ids[:, at : at + 1], np.array([1]))[0], expected[at], atol=2e-4)


def test_a_running_sequence_takes_several_tokens_at_once(every_tiny: Path, tmp_path: Path, target: str) -> None:
    ids = some_ids((1, 40))
    backend = engine_of(every_tiny, spec_of(every_tiny), tmp_path / "e", target)
    backend.start(1)
    backend.extend(ids[:, :6], np.array([6]))
    found = backend.extend(ids[:, 6:], np.array([34]))[0]
    np.testing.assert_allclose(found, reference(every_tiny, ids)[0, -1], atol=2e-4)


def test_ragged_rows_do_not_see_each_other(every_tiny: Path, tmp_path: Path, target: str) -> None:
    counts = np.array([3, 30, 7])
    ids, more = some_ids((3, 30)), some_ids((3, 2))
    backend = engine_of(every_tiny, spec_of(every_tiny), tmp_path / "e", target)
    backend.start(3)
    steps = [backend.extend(ids, counts)] + [backend.extend(more[:, i : i + 1], np.ones(3, int)) for i in (0, 1)]
    for row, count in enumerate(counts):
        alone = np.concatenate([ids[row : row + 1, :count], more[row : row + 1]], axis=1)
        expected = reference(every_tiny, alone)[0, count - 1 :]
        for step, wanted in zip(steps, expected, strict=True):
            np.testing.assert_allclose(step[row], wanted, atol=2e-4)


def walked(model: CausalLM, ids: np.ndarray[Any, Any]) -> torch.Tensor:
    """Log-probabilities after each token but the last, (S - 1, V), in torch."""
    walk = Walk(model, torch.from_numpy(ids), torch.device("cpu"), torch.float32)
    variant = dense_variant(model.spec)
    return torch.cat([group[variant].log_probs for group in walk.readouts(walk.run([variant]))])


def log_probs(logits: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(logits), -1)


def test_layers_of_different_shapes_and_missing_sub_blocks(
    uneven: tuple[CausalLM, Path], tmp_path: Path, target: str
) -> None:
    model, folder = uneven
    backend = engine_of(folder, model.spec, tmp_path / "e", target)
    ids = some_ids((1, 40))
    expected = walked(model, ids)
    torch.testing.assert_close(log_probs(backend.score(ids)[0, :-1]), expected, atol=2e-4, rtol=1e-4)
    backend.start(1)
    steps = [backend.extend(ids[:, :9], np.array([9]))]
    steps += [backend.extend(ids[:, at : at + 1], np.array([1])) for at in range(9, 39)]
    torch.testing.assert_close(log_probs(np.concatenate(steps)), expected[8:], atol=2e-4, rtol=1e-4)
    inputs = onnx.load(str(tmp_path / "e" / engine.GRAPH), load_external_data=False).graph.input
    shapes = {value.name: dims[1].dim_value for value in inputs if len(dims := value.type.tensor_type.shape.dim) == 4}
    whole = model.spec.layers[2].num_key_value_heads
    assert (shapes["past_key_values.0.key"], shapes["past_key_values.2.key"]) == (1, whole)
    assert "past_key_values.1.key" not in shapes  # no attention, no cache


def test_the_files_are_valid_and_share_their_weights(tiny_engine: Path) -> None:
    for name in (engine.GRAPH, engine.SCORING_GRAPH):
        onnx.checker.check_model(str(tiny_engine / name))
    assert [file.name for file in tiny_engine.glob("*.data")] == [engine.DATA]
    spec = spec_of(tiny_engine)
    tables = 2 * spec.max_position_embeddings * spec.head_dim // 2
    stored = (tiny_engine / engine.DATA).stat().st_size
    assert 4 * spec.num_parameters <= stored <= 4 * (spec.num_parameters + tables) * 1.01  # a tied matrix once


#: Inputs that CUDA's kernels of these operators want in the host's memory (ONNX Runtime, their ``InputMemoryType``).
HOST_INPUTS = {"Reshape": {1}, "Expand": {1}, "Squeeze": {1}, "Unsqueeze": {1}, "GroupQueryAttention": {6}}


def copied_to_the_device(file: Path) -> list[str]:
    """Values that a CUDA provider would have to copy from the host: ONNX Runtime then captures no CUDA graph.

    ``Shape`` gives numbers of the host's; what is made of these alone, and of constants, stays there, unless the device
    takes it from the host (``GetCpuPreferredNodes`` of ONNX Runtime).
    """
    graph = onnx.load(str(file), load_external_data=False).graph
    constants, host, copied = {tensor.name for tensor in graph.initializer}, set[str](), list[str]()
    for node in graph.node:
        wanted = HOST_INPUTS.get(node.op_type, set())
        given = [name for at, name in enumerate(node.input) if name and name not in constants and at not in wanted]
        if node.op_type == "Shape" or (given and host.issuperset(given)):
            host |= set(node.output)
        else:
            copied += [name for name in given if name in host]
    return copied


def test_a_cuda_graph_can_be_captured_of_a_step(any_tiny: Path, tmp_path: Path) -> None:
    engine_of(any_tiny, spec_of(any_tiny), tmp_path / "e")
    assert copied_to_the_device(tmp_path / "e" / engine.GRAPH) == []


def test_the_scoring_graph_reads_the_weights_of_the_serving_graph(any_tiny: Path, tmp_path: Path, target: str) -> None:
    engine_of(any_tiny, spec_of(any_tiny), tmp_path / "e", target)
    serving, scoring = (places_of(tmp_path / "e" / name) for name in (engine.GRAPH, engine.SCORING_GRAPH))
    assert "model.embed_tokens.weight" in scoring
    assert scoring == serving


def places_of(graph: Path) -> dict[str, dict[str, str]]:
    """Where each external tensor of a graph lies, as the onnx library reads it."""
    tensors = onnx.load(str(graph), load_external_data=False).graph.initializer
    return {t.name: {entry.key: entry.value for entry in t.external_data} for t in tensors if t.external_data}


@pytest.mark.parametrize(
    ("choice", "problem"),
    [({"precision": "int3"}, "Did you mean 'int8'|'int4'"), ({"target": "onx"}, "Did you mean 'onnx'")],
)
def test_an_unknown_target_or_precision_is_refused(
    any_tiny: Path, tmp_path: Path, choice: dict[str, str], problem: str
) -> None:
    with pytest.raises(UnknownNameError, match=problem):
        api.export(any_tiny, tmp_path / "engine", **choice)  # type: ignore[arg-type]
    assert not (tmp_path / "engine").exists()


def test_heads_that_onnx_runtime_cannot_turn_are_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((tiny("phi3-partial") / "config.json").read_text())
    config["rope_parameters"]["partial_rotary_factor"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"multiple of 8.*Found: 4"):
        engine.write(tmp_path, ModelSpec.from_config(config), tmp_path)
