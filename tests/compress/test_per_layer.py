"""Models whose layers differ: cut, saved, and loaded by transformers in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flabc import api, artifact
from flabc.compress import checkpoint, load
from flabc.compress.model import CausalLM, cut_channels, cut_sub_blocks
from flabc.compress.walk import Decision, Walk
from flabc.errors import EngineError
from flabc.runtime.session import Session
from flabc.spec import LayerSpec, ModelSpec

VARIANTS = ["llama-tied", "llama-untied-biased", "qwen2-tied", "qwen2-untied"]

#: Loads a folder as a user would, without flabc, and answers with and without the cache.
ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, out = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
)
assert "flabc" not in sys.modules
ids = torch.arange(3, 35).reshape(2, 16)
with torch.no_grad():
    logits = model.eval()(ids).logits
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    padded = torch.cat([torch.zeros(2, 5, dtype=int), ids], 1)
    mask = (torch.arange(21) > 4).long().expand(2, -1)
    assert torch.equal(
        model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 5:], tokens
    )
model.save_pretrained(out + "/again")
again = AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    assert torch.equal(again(ids).logits, logits)
torch.save({"logits": logits, "tokens": tokens, "lost": sorted(map(str, info["missing_keys"]))}, out + "/found.pt")
"""


def uneven(model: CausalLM) -> CausalLM:
    """No attention in the first layer, a thin FFN in the second, none in the last."""
    return cut_channels(cut_sub_blocks(model, attention=[0], ffn=[2]), {1: range(0, 80, 2)})


@pytest.fixture(scope="module", params=VARIANTS)
def saved(
    request: pytest.FixtureRequest, tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[CausalLM, Path]:
    """An uneven model and the artifact it was written to."""
    model = uneven(load.load(str(tiny(request.param))))
    out = tmp_path_factory.mktemp("uneven") / "checkpoint"
    with artifact.create(out, "checkpoint") as draft:
        checkpoint.write(model, draft.path)
        draft.spec = model.spec
    return model, out


@pytest.fixture(scope="module")
def elsewhere(saved: tuple[CausalLM, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers finds in the folder, in a fresh process."""
    out = tmp_path_factory.mktemp("found")
    command = [sys.executable, "-c", ELSEWHERE, str(saved[1]), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(out / "found.pt")
    return found


def test_transformers_computes_what_the_walk_computes(
    saved: tuple[CausalLM, Path], elsewhere: dict[str, Any], tiny: Callable[[str], Path]
) -> None:
    model, _ = saved
    ids = torch.arange(3, 35).reshape(2, 16)
    walk = Walk(model, ids, torch.device("cpu"), torch.float32)
    variant = tuple(Decision(attention=s.has_attention, ffn=s.has_ffn) for s in model.spec.layers)
    hidden = walk.run([variant])
    (readout,) = (group[variant] for group in walk.readouts(hidden))
    expected = elsewhere["logits"][:, :-1].reshape(-1, model.spec.vocab_size).log_softmax(-1)
    torch.testing.assert_close(readout.log_probs, expected, atol=2e-5, rtol=1e-4)
    assert elsewhere["lost"] == []


def test_generation_with_the_cache_is_argmax_without(saved: tuple[CausalLM, Path], elsewhere: dict[str, Any]) -> None:
    backend = Session.open(saved[1]).backend
    tokens = elsewhere["tokens"].numpy()
    assert tokens.shape == (2, 24)
    np.testing.assert_array_equal(backend.score(tokens[:, :-1])[:, 15:].argmax(-1), tokens[:, 16:])


def test_it_is_read_back_as_it_was(saved: tuple[CausalLM, Path]) -> None:
    model, folder = saved
    again = load.load(str(folder))
    assert again.spec == model.spec
    assert again.spec.layers[0].num_attention_heads == again.spec.layers[2].intermediate_size == 0
    assert again.config["model_type"] == model.spec.family
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in model.weights.items())
    assert checkpoint.config_of(again) == checkpoint.config_of(model)


def test_it_becomes_an_engine_that_says_the_same(saved: tuple[CausalLM, Path], tmp_path: Path) -> None:
    done = api.export(saved[1], tmp_path / "engine")  # proves itself against torch
    assert done.parity["holds"]
    cached = [layer for layer in Session.open(tmp_path / "engine").spec.layers if layer.has_attention]
    assert len(cached) == 2


def test_a_sub_block_that_is_cut_out_adds_nothing(saved: tuple[CausalLM, Path], tiny: Callable[[str], Path]) -> None:
    model = load.load(str(tiny("qwen2-tied")))
    cut = cut_sub_blocks(model, attention=[1], ffn=[0])
    silent = {name: t.clone() for name, t in model.weights.items()}
    for name in ("self_attn.o_proj.weight",):
        silent[f"model.layers.1.{name}"].zero_()
    silent["model.layers.0.mlp.down_proj.weight"].zero_()
    ids = torch.arange(3, 35).reshape(2, 16)
    states = []
    from dataclasses import replace

    for each in (cut, replace(model, weights=silent)):
        variant = tuple(Decision(attention=s.has_attention, ffn=s.has_ffn) for s in each.spec.layers)
        states.append(Walk(each, ids, torch.device("cpu"), torch.float32).run([variant])[variant])
    torch.testing.assert_close(*states)
    gone = model.spec.num_parameters - cut.spec.num_parameters
    assert gone == sum(t.numel() for name, t in model.weights.items() if name not in cut.weights)


@pytest.mark.parametrize(("parts", "count"), [("attention", 1), ("ffn", 1), ("sub_blocks", 3)])
def test_a_recipe_removes_sub_blocks(tiny: Callable[[str], Path], tmp_path: Path, parts: str, count: int) -> None:
    recipe = tmp_path / "r.yaml"
    stage = {"stage": "layers", "parts": parts, "count": count, "sequences": 2}
    calibration = {"sequences": 2, "sequence_length": 64}
    recipe.write_text(json.dumps({"name": "r", "calibration": calibration, "stages": [stage]}))
    done = api.compress(str(tiny("llama-tied")), recipe, tmp_path / "cut")
    removed = done.stages[0]["details"]["removed"]
    assert len(removed) == count
    assert {entry["part"] for entry in removed} <= ({parts} if parts != "sub_blocks" else {"attention", "ffn"})
    gone = sum((not layer.has_attention) + (not layer.has_ffn) for layer in done.spec.layers) + 2 * (
        len(done.dense.layers) - len(done.spec.layers)
    )
    assert gone == count
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert ModelSpec.from_config(config) == done.spec
    assert ("auto_map" in config) == (not done.spec.is_uniform)


def test_other_code_in_a_checkpoint_is_not_run(saved: tuple[CausalLM, Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "changed"
    shutil.copytree(saved[1], folder)
    (folder / "flabc.json").unlink()
    (folder / "modeling_flabc.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(EngineError, match="is not run"):
        Session.open(folder)


def test_a_layer_without_anything_is_a_shape_too() -> None:
    empty = LayerSpec(num_attention_heads=0, num_key_value_heads=0, intermediate_size=0)
    assert not empty.has_attention
    assert not empty.has_ffn
