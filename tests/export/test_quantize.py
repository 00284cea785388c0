"""Weights in blocks of bits: against numpy's reading of the blocks, torch on what they hold, and onnxruntime-genai."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc import api
from flabc.errors import ParityError
from flabc.export import engine, parity, quantize
from flabc.export.precision import Blocks, Storage, precision_named
from flabc.runtime.backend import Backend, Limits, open_backend
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session
from flabc.spec import ModelSpec

from .test_genai import greedy

IDS = np.random.default_rng(0).integers(3, 600, (2, 40))


def unpacked(packed: Any, scales: Any, points: Any, bits: int, inputs: int) -> Any:
    """What blocks hold, (N, K), by the documentation of MatMulNBits."""
    numbers = packed.astype(np.float32)
    if bits == 4:
        numbers = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1).astype(np.float32)
    middle = np.full(scales.shape, 2 ** (bits - 1), np.float32)
    if points is not None:
        flat = np.stack([points & 15, points >> 4], -1).reshape(len(points), -1) if bits == 4 else points
        middle = flat[:, : scales.shape[1]].astype(np.float32)
    held = (numbers - middle[..., None]) * scales[..., None]
    return held.reshape(len(held), -1)[:, :inputs]


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 64]),
    symmetric=st.booleans(),
    inputs=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_no_number_moves_by_more_than_a_step(
    bits: int, block_size: int, symmetric: bool, inputs: int, seed: int
) -> None:
    matrix = np.random.default_rng(seed).normal(size=(inputs, 5)).astype(np.float32)
    made = quantize.packed(matrix, Blocks(bits, block_size, symmetric))
    held = unpacked(made["packed"], made["scales"], None if symmetric else made["zero_points"], bits, inputs)
    steps = np.repeat(np.abs(made["scales"]), block_size, 1)[:, :inputs]
    assert (np.abs(held - matrix.T) <= 1.01 * steps).all()


def tensors(graph: Path) -> dict[str, Any]:
    model = onnx.load(str(graph))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@torch.no_grad()
def rounded_model(folder: Path, graph: Path, bits: int) -> Any:
    """Transformers' model with the matrices that the graph holds."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), tensors(graph)

    def held(name: str, bits: int, inputs: int) -> Any:
        points = found.get(f"{name}.zero_points")
        blocks = unpacked(found[f"{name}.packed"], found[f"{name}.scales"], points, bits, inputs)
        return torch.from_numpy(blocks)

    size = model.config.hidden_size
    model.model.embed_tokens.weight.copy_(held("model.embed_tokens", 8, size))
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.copy_(held("lm_head", 8, size))
    for at, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        together = held(f"model.layers.{at}.q_k_v", bits, size)
        rows = [p.out_features for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        for projection, part in zip(
            (attention.q_proj, attention.k_proj, attention.v_proj), together.split(rows), strict=True
        ):
            projection.weight.copy_(part)
        for role, projection in (
            ("o", attention.o_proj),
            ("gate", mlp.gate_proj),
            ("up", mlp.up_proj),
            ("down", mlp.down_proj),
        ):
            projection.weight.copy_(held(f"model.layers.{at}.{role}", bits, projection.in_features))
    return model


def assert_says_the_same(backend: Backend, model: Any) -> None:
    """A backend against transformers' model, at every position and step by step with the cache."""
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(backend.score(IDS), expected, atol=2e-3)
    backend.start(2)
    steps = [backend.extend(IDS[:, :30], np.array([30, 30]))]
    steps += [backend.extend(IDS[:, at : at + 1], np.array([1, 1])) for at in range(30, 40)]
    np.testing.assert_allclose(np.stack(steps, 1), expected[:, 29:], atol=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_engine_says_what_torch_says_with_the_same_numbers(
    any_tiny: Path, tmp_path: Path, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "INTEGER_PRODUCTS", 1)  # float32 products: nothing else is rounded
    spec = ModelSpec.from_config(json.loads((any_tiny / "config.json").read_text()))
    how = precision_named(f"int{bits}", Storage(symmetric=symmetric))
    engine.write(any_tiny, spec, tmp_path, precision=how)
    backend = open_backend("onnxruntime", tmp_path, spec, Limits(max_batch=2, max_length=64))
    model = rounded_model(any_tiny, tmp_path / engine.GRAPH, bits)
    assert_says_the_same(backend, model)


@pytest.mark.parametrize("name", ["gemma3_text-tied", "starcoder2-tied", "phi3-untied"])
def test_engines_are_proven_and_small(tiny: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    stored = {}
    for precision in ("fp32", "int8", "int4"):
        out = tmp_path / precision
        found = api.export(tiny(name), out, precision=precision)
        assert found.precision == precision
        assert found.parity["holds"]
        stored[precision] = (out / engine.DATA).stat().st_size
        if precision != "fp32":
            assert 0 < found.parity["kl"] <= found.parity["kl_bound"]
            assert "tolerance" not in found.parity
    assert stored["int4"] < stored["int8"] < 0.6 * stored["fp32"]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnxruntime_genai_says_the_same(tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    api.export(tiny_checkpoint, tmp_path / "e", precision=precision)
    session = Session.open(tmp_path / "e")
    prompt = "def fibonacci(n):"
    ours = session.generate(prompt, SamplingParams(max_tokens=24)).token_ids
    theirs = greedy(tmp_path / "e", session.encode(prompt), 24)
    eos = session.codec.eos_ids
    assert [i for i in theirs if i not in eos] == [i for i in ours if i not in eos]


def test_too_coarse_an_engine_leaves_no_folder(any_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.BOUNDS, "int4", {**parity.BOUNDS["int4"], "kl_bound": 1e-9})
    with pytest.raises(ParityError, match=r"In int4 the engine says too little.*at most 1e-09 nats.*more bits"):
        api.export(any_tiny, tmp_path / "engine", precision="int4")
    assert not list(tmp_path.iterdir())
