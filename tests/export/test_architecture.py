"""What is read of a config, against what transformers' own modules compute with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flabc.errors import ModelError, UnknownNameError
from flabc.export.architecture import architecture
from flabc.spec import ModelSpec

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def read(folder: Path, **changes: Any) -> Any:
    config = json.loads((folder / "config.json").read_text()) | changes
    return architecture(ModelSpec.from_config(config), config)


@pytest.mark.parametrize("rope", [YARN, LINEAR])
def test_scaled_positions_are_those_of_transformers(tiny: Callable[[str], Path], rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = tiny("llama-tied")
    config = json.loads((folder / "config.json").read_text()) | {"rope_parameters": rope}
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**config))(torch.zeros(1), torch.arange(200)[None])
    found = read(folder, rope_parameters=rope).rotary["sliding_attention"].tables(200)
    for table, wanted in zip(found, (cos, sin), strict=True):
        np.testing.assert_allclose(table, wanted[0, :, : table.shape[1]], atol=2e-5)


def test_layers_look_through_the_window_of_their_type(tiny: Callable[[str], Path]) -> None:
    found = read(tiny("gemma3_text-tied"))
    assert [found.windows[kind] for kind in found.layer_types] == [16, None, 16]
    local, whole = (found.rotary[kind].frequencies for kind in ("sliding_attention", "full_attention"))
    assert not np.array_equal(local, whole)


def test_part_of_a_head_may_be_turned(tiny: Callable[[str], Path]) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    found = read(tiny("phi3-untied"), rope_parameters=rope)
    assert [table.shape for table in next(iter(found.rotary.values())).tables(9)] == [(9, 4), (9, 4)]


def test_positions_that_depend_on_the_length_are_refused(tiny: Callable[[str], Path]) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ModelError, match=r"'dynamic'.*default, linear, llama3, yarn"):
        read(tiny("llama-tied"), rope_parameters=rope)


def test_an_unknown_activation_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UnknownNameError, match=r"activation 'quick_gelu'.*silu"):
        read(tiny("granite-tied"), hidden_act="quick_gelu")
