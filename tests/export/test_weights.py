from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flabc.errors import ModelError
from flabc.export.weights import CheckpointWeights
from flabc.spec import ModelSpec


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_is_read_exactly(any_tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    spec = ModelSpec.from_config(json.loads((any_tiny / "config.json").read_text()))
    weights = {name: tensor.to(dtype) for name, tensor in load_file(any_tiny / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    found = CheckpointWeights(tmp_path, spec).get("k", 1)
    np.testing.assert_array_equal(found, weights["model.layers.1.self_attn.k_proj.weight"].float().numpy())


def test_shards_are_found_by_their_index(any_tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(any_tiny).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    spec = ModelSpec.from_config(json.loads((any_tiny / "config.json").read_text()))
    sharded, whole = CheckpointWeights(tmp_path, spec), CheckpointWeights(any_tiny, spec)
    for role, layer in (("embedding", None), ("down", 2), ("final_norm", None)):
        np.testing.assert_array_equal(sharded.get(role, layer), whole.get(role, layer))


def test_a_missing_tensor_is_named(any_tiny: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_config(json.loads((any_tiny / "config.json").read_text()))
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        CheckpointWeights(tmp_path, spec).get("up", 0)


def test_a_tensor_missing_from_the_index_is_named(any_tiny: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_config(json.loads((any_tiny / "config.json").read_text()))
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"other": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.self_attn\.v_proj\.weight"):
        CheckpointWeights(tmp_path, spec).get("v", 2)


def test_a_folder_without_weights_says_so(any_tiny: Path, tmp_path: Path) -> None:
    spec = ModelSpec.from_config(json.loads((any_tiny / "config.json").read_text()))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight"):
        CheckpointWeights(tmp_path, spec).get("embedding")
