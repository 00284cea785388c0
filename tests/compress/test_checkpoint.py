"""Checkpoints, read back by transformers alone in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flabc.compress import checkpoint, load, pipeline
from flabc.compress.config import Calibration, LayersConfig, Target, VocabConfig, WidthsConfig
from flabc.compress.model import CausalLM, cut_layers
from flabc.spec import ModelSpec

VARIANTS = ["llama-tied", "llama-untied-biased", "qwen2-tied", "qwen2-untied"]
STAGES = [VocabConfig(max_size=512), LayersConfig(count=1, sequences=4), WidthsConfig(rate=0.25, multiple_of=4)]

#: What anybody would run who has transformers and not flabc; it must not even import flabc.
READER = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in map(Path, sys.argv[1:]):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    ids = tokenizer("def f(x):\\n    return x + 1<|im_end|>")["input_ids"]
    special = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokenizer.special_tokens_map.items()}
    generated = model.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    found = {"logits": logits, "ids": ids, "text": tokenizer.decode(ids), "special": special,
             "generated": generated, "class": type(model).__name__, "dtype": str(model.dtype),
             "lost": sorted([*info["missing_keys"], *info["unexpected_keys"]]),
             "eos": model.generation_config.eos_token_id, "size": len(tokenizer)}
    torch.save(found, folder / "found.pt")
assert "flabc" not in sys.modules
"""


def cut(folder: Path, corpus_folder: Path) -> CausalLM:
    calibration = Calibration.model_validate({"corpus": str(corpus_folder), "sequences": 4, "sequence_length": 48})
    return pipeline.run(load.load(str(folder)), STAGES, target=None, calibration=calibration)[0]


@pytest.fixture(scope="module")
def models(tiny: Callable[[str], Path], corpus_folder: Path) -> dict[str, CausalLM]:
    """Every tiny model cut along all three axes, and one of them in half precision."""
    made = {variant: cut(tiny(variant), corpus_folder) for variant in VARIANTS}
    half = {name: tensor.bfloat16() for name, tensor in made["qwen2-tied"].weights.items()}
    config = {**made["qwen2-tied"].config, "dtype": "bfloat16"}
    return {**made, "half": replace(made["qwen2-tied"], weights=half, config=config)}


@pytest.fixture(scope="module")
def read_elsewhere(models: dict[str, CausalLM], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a fresh process with nothing but transformers finds in each saved model; ``folder`` is where it lies."""
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        checkpoint.write(model, folders[name])
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", READER, *map(str, folders.values())],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {name: {**torch.load(folder / "found.pt"), "folder": folder} for name, folder in folders.items()}


each = pytest.mark.parametrize("name", [*VARIANTS, "half"])


def logits_of(model: CausalLM) -> Tensor:
    """Logits of transformers' own class around the very tensors in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**checkpoint.config_of(model))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    module = module.to_empty(device="cpu")
    module.model.rotary_emb = type(module.model.rotary_emb)(config=config)
    module.load_state_dict(dict(model.weights), strict=not model.spec.tie_word_embeddings)
    module.tie_weights()
    with torch.no_grad():
        logits: Tensor = module.eval()(torch.arange(64).reshape(2, 32)).logits
    return logits


@each
def test_a_fresh_process_computes_the_same_bits(
    models: dict[str, CausalLM], read_elsewhere: dict[str, dict[str, Any]], name: str
) -> None:
    found = read_elsewhere[name]
    assert found["logits"].shape[-1] == models[name].spec.vocab_size == 512
    assert torch.equal(found["logits"], logits_of(models[name]))
    assert found["lost"] == []
    assert found["class"] == models[name].family.architecture


@each
def test_the_dtype_is_the_model_s(
    models: dict[str, CausalLM], read_elsewhere: dict[str, dict[str, Any]], name: str
) -> None:
    assert read_elsewhere[name]["dtype"] == str(models[name].dtype)


@each
def test_the_tokenizer_and_its_special_ids_fit_the_model(
    models: dict[str, CausalLM], read_elsewhere: dict[str, dict[str, Any]], name: str
) -> None:
    found, model = read_elsewhere[name], models[name]
    assert found["text"] == "def f(x):\n    return x + 1<|im_end|>"
    assert found["size"] == model.spec.vocab_size
    assert max(found["ids"]) < model.spec.vocab_size
    added = {entry["content"]: entry["id"] for entry in model.tokenizer.tokenizer["added_tokens"]}
    assert found["special"]
    assert set(found["special"].values()) <= set(added.values())
    assert found["ids"][-1] == added["<|im_end|>"] == found["eos"]


@each
def test_what_is_saved_is_read_back_by_flabc(
    models: dict[str, CausalLM], read_elsewhere: dict[str, dict[str, Any]], name: str
) -> None:
    again, model = load.load(str(read_elsewhere[name]["folder"])), models[name]
    assert again.spec == model.spec
    assert again.weights.keys() == model.weights.keys()
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in model.weights.items())


@each
def test_the_folder_is_plain(read_elsewhere: dict[str, dict[str, Any]], name: str) -> None:
    """No remote code, no pickles, and a config without traces of the layers that are gone."""
    folder = read_elsewhere[name]["folder"]
    assert {file.suffix for file in folder.iterdir()} == {".json", ".jinja", ".safetensors", ".pt"}
    config = json.loads((folder / "config.json").read_text())
    assert not {"auto_map", "layer_types", "max_window_layers", "per_layer_config"} & config.keys()
    assert config["num_hidden_layers"] == 2
    assert config["intermediate_size"] == 60
    assert ModelSpec.from_config(config).vocab_size == 512


def test_a_target_is_what_the_saved_model_has(tiny: Callable[[str], Path], corpus_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    dense = load.load(str(tiny("llama-untied-biased")))
    calibration = Calibration.model_validate({"corpus": str(corpus_folder), "sequences": 4, "sequence_length": 48})
    stages = [VocabConfig(max_size=512), LayersConfig(count=1), WidthsConfig(multiple_of=4)]
    model, _, _ = pipeline.run(dense, stages, target=Target(params=0.6), calibration=calibration)
    checkpoint.write(model, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters()
    step = 4 * 2 * (3 * dense.spec.hidden_size + 2)
    assert 0.6 * dense.spec.num_parameters - step <= saved <= 0.6 * dense.spec.num_parameters + 1


def test_whoever_may_read_the_config_may_read_the_weights(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint.write(load.load(str(tiny("llama-tied"))), tmp_path)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


@torch.no_grad()
def test_a_layer_that_looks_all_the_way_back_does_so_when_it_is_first(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without its types Gemma would take its first layer for one that looks through a window."""
    from transformers import AutoModelForCausalLM

    source = tiny("gemma2-tied")
    checkpoint.write(cut_layers(load.load(str(source)), [1]), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    theirs.model.layers = torch.nn.ModuleList([theirs.model.layers[1]])
    theirs.config.num_hidden_layers, theirs.config.layer_types = 1, ["full_attention"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = torch.arange(3, 43)[None]  # longer than the window of 16
    torch.testing.assert_close(found(tokens).logits, theirs(tokens, use_cache=False).logits)
