"""Engines of a shape that no Hugging Face config can say."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from flabc.compress import load
from flabc.compress.checkpoint import write_tokenizer
from flabc.compress.model import CausalLM, cut_channels
from flabc.export import engine
from flabc.spec import LayerSpec


def half_the_heads(model: CausalLM, layer: int) -> CausalLM:
    """Only the first key-value head of a layer and the three query heads that read it."""
    weights = dict(model.weights)
    for role, rows in (("q", 48), ("k", 16), ("v", 16)):
        for kind in ("weight", "bias"):
            name = f"model.layers.{layer}.self_attn.{role}_proj.{kind}"
            if name in weights:
                weights[name] = weights[name][:rows]
    out = f"model.layers.{layer}.self_attn.o_proj.weight"
    weights[out] = weights[out][:, :48]
    layers = list(model.spec.layers)
    layers[layer] = layers[layer].model_copy(update={"num_attention_heads": 3, "num_key_value_heads": 1})
    return replace(model, spec=model.spec.model_copy(update={"layers": tuple(layers)}), weights=weights)


def made_uneven(model: CausalLM) -> CausalLM:
    """Other widths in every layer, other heads in the first, no attention in the second, no FFN in the third."""
    cut = half_the_heads(cut_channels(model, {0: range(0, 80, 2), 1: range(24), 2: range(8)}), 0)
    layers = list(cut.spec.layers)
    layers[1] = LayerSpec(num_attention_heads=0, num_key_value_heads=0, intermediate_size=24)
    layers[2] = layers[2].model_copy(update={"intermediate_size": 0})
    spec = cut.spec.model_copy(update={"layers": tuple(layers)})
    return replace(cut, spec=spec, weights={name: cut.weights[name] for name in spec.shapes()})


def checkpoint_of(model: CausalLM, config: Path, folder: Path) -> Path:
    folder.mkdir()
    save_file({name: t.contiguous() for name, t in model.weights.items()}, folder / "model.safetensors")
    write_tokenizer(model, folder)
    shutil.copy(config, folder)
    return folder


@pytest.fixture
def uneven(any_tiny: Path, tmp_path: Path) -> tuple[CausalLM, Path]:
    """Every tiny model in turn with uneven layers, and its engine."""
    model = made_uneven(load.load(str(any_tiny)))
    folder = checkpoint_of(model, any_tiny / "config.json", tmp_path / "uneven")
    out = tmp_path / "uneven-engine"
    out.mkdir()
    engine.write(folder, model.spec, out)
    return model, out
