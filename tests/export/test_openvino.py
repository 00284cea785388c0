"""Engines for OpenVINO: rows of eight bits, what the plugin makes of the graph, and how the state is kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc import api
from flabc.errors import EngineError, UnknownNameError, UsageError
from flabc.export import engine, parity, quantize
from flabc.export.precision import Storage, precision_named
from flabc.runtime.backend import Limits, open_backend
from flabc.runtime.backends import openvino_state
from flabc.runtime.backends.openvino_state import OpenVinoBackend
from flabc.spec import ModelSpec

from .test_quantize import IDS, assert_says_the_same


def spec_of(folder: Path) -> ModelSpec:
    return ModelSpec.from_config(json.loads((folder / "config.json").read_text()))


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), columns=st.integers(1, 99), seed=st.integers(0, 99))
def test_no_number_of_a_row_moves_by_more_than_half_a_step(bits: int, rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    matrix[0] = 0
    made = quantize.by_rows(matrix, bits)
    steps = made["scales"][:, None]
    assert np.abs(made["packed"]).max() < 2 ** (bits - 1)
    assert (np.abs(made["packed"] * steps - matrix) <= 0.5001 * steps).all()


@torch.no_grad()
def rounded_model(folder: Path, graph: Path) -> Any:
    """Transformers' model with the matrices that the graph holds."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(graph)).graph.initializer}

    def put(name: str, *modules: Any) -> None:
        held = torch.from_numpy(found[f"{name}.packed"] * found[f"{name}.scales"][:, None])
        for module, part in zip(modules, held.split([len(module.weight) for module in modules]), strict=True):
            module.weight.copy_(part)

    put("model.embed_tokens", model.model.embed_tokens)
    if not model.config.tie_word_embeddings:
        put("lm_head", model.lm_head)
    for at, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        put(f"model.layers.{at}.q_k_v", attention.q_proj, attention.k_proj, attention.v_proj)
        put(f"model.layers.{at}.o", attention.o_proj)
        for role in ("gate", "up", "down"):
            put(f"model.layers.{at}.{role}", getattr(mlp, f"{role}_proj"))
    return model


def test_the_engine_says_what_torch_says_with_the_same_numbers(
    any_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
    monkeypatch.setattr(openvino_state, "_settings", lambda *_: exact)  # nothing but the matrices is rounded
    spec = spec_of(any_tiny)
    engine.write(any_tiny, spec, tmp_path, "openvino", precision_named("int8", target="openvino"))
    backend = open_backend("openvino", tmp_path, spec, Limits(max_batch=2, max_length=64))
    model = rounded_model(any_tiny, tmp_path / engine.GRAPH)
    assert_says_the_same(backend, model)


def test_every_family_is_proven_in_eight_bits(
    every_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random models hardly prefer any token, so rounding turns more of them round.
    monkeypatch.setitem(parity.BOUNDS, "int8", {**parity.BOUNDS["int8"], "top1_bound": 0.8})
    found = api.export(every_tiny, tmp_path / "e", target="openvino", precision="int8")
    assert found.parity["holds"]
    assert 0 < found.parity["kl"] <= found.parity["kl_bound"]
    assert found.parity["stored"]["layers"] == {"bits": 8, "block_size": None, "symmetric": True}
    for name in (engine.GRAPH, engine.SCORING_GRAPH):
        onnx.checker.check_model(str(tmp_path / "e" / name))


def test_how_rows_are_stored_is_settled(any_tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="openvino settles how matrices are stored"):
        api.export(any_tiny, tmp_path / "e", target="openvino", precision="int8", storage=Storage(block_size=64))
    with pytest.raises(UnknownNameError, match="precision 'int4'"):
        api.export(any_tiny, tmp_path / "e", target="openvino", precision="int4")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["llama-tied", "qwen2-tied", "qwen3-tied", "phi3-untied", "gemma3_text-tied"])
def test_the_plugin_fuses_attention_with_its_cache(
    tiny: Callable[[str], Path], tmp_path: Path, name: str, precision: str
) -> None:
    """Else every step copies the whole cache, and nothing but the time would tell."""
    folder = tiny(name)
    spec = spec_of(folder)
    engine.write(folder, spec, tmp_path, "openvino", precision_named(precision, target="openvino"))
    backend = openvino_state.open_backend(tmp_path, spec, Limits())
    run = [node.get_rt_info() for node in backend._model.get_runtime_model().get_ops()]
    kinds = Counter(str(each["layerType"].astype(str)) for each in run)
    layers = len(spec.layers)
    assert (kinds["ScaledDotProductAttention"], kinds["MemoryOutput"]) == (layers, 2 * layers)
    assert (kinds["Softmax"], kinds["MatMul"]) == (0, 0)
    assert kinds["RoPE"] == 2 * layers


def places(backend: OpenVinoBackend) -> list[tuple[int, int]]:
    """Rows and places of each segment."""
    return [segment.used.shape for segment in backend._segments]


def test_sequences_run_apart_until_they_run_together(tiny_openvino_engine: Path) -> None:
    backend = openvino_state.open_backend(
        tiny_openvino_engine, spec_of(tiny_openvino_engine), Limits(max_batch=4, max_length=64)
    )
    backend.start(0)
    backend.join(IDS[:, :12], np.array([12, 3]))
    backend.join(IDS[:1, :5], np.array([5]))
    assert places(backend) == [(2, 12), (1, 5)]
    one = np.ones(3, np.int64)
    backend.extend(IDS[:1, 5:9], np.array([4]), first=2)
    backend.extend(IDS[:, 12:13], one[:2])
    assert places(backend) == [(2, 13), (1, 9)]
    backend.extend(np.array([[7], [8], [9]]), one)
    assert places(backend) == [(3, 14)]
    assert backend._segments[0].lengths.tolist() == [14, 5, 10]
    backend.keep([2, 1])
    assert places(backend) == [(2, 10)]  # what the longest row alone had used is gone
    backend.extend(np.array([[7]]), one[:1], first=1)
    assert places(backend) == [(1, 10), (1, 6)]
    backend.keep([])
    backend.join(IDS[:1, :5], np.array([5]))
    assert places(backend) == [(1, 5)]
    assert len(backend._free) >= 1  # requests are used again


def test_a_graph_that_openvino_refuses_is_named(tiny_openvino_engine: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"OpenVINO cannot open .*model\.onnx"):
        openvino_state.open_backend(tmp_path, spec_of(tiny_openvino_engine), Limits())


def test_openvino_is_asked_for_the_processor_only(tiny_openvino_engine: Path) -> None:
    spec = spec_of(tiny_openvino_engine)
    with pytest.raises(EngineError, match="does not run on TENSORRT"):
        openvino_state.open_backend(tiny_openvino_engine, spec, Limits(provider="tensorrt"))
    with pytest.raises(UnknownNameError, match="Did you mean 'cpu'"):
        openvino_state.open_backend(tiny_openvino_engine, spec, Limits(provider="cpuu"))
