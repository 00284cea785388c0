from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flabc.errors import ModelError, UnknownNameError
from flabc.families import Part
from flabc.spec import LayerSpec, ModelSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}

layers = st.builds(
    lambda kv, group, ffn: LayerSpec(num_attention_heads=kv * group, num_key_value_heads=kv, intermediate_size=ffn),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(0, 64),
)
specs = st.builds(
    lambda some: ModelSpec.from_config(LLAMA).model_copy(update={"layers": tuple(some)}),
    st.lists(layers, min_size=1, max_size=5),
)


def test_shapes_equal_those_of_transformers(any_tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = ModelSpec.from_config(json.loads((any_tiny / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(any_tiny)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert spec.shapes() == expected


@given(specs)
def test_components_add_up(spec: ModelSpec) -> None:
    assert sum(spec.parameters().values()) == spec.num_parameters
    assert spec.bytes_at("fp32") == 4 * spec.num_parameters


@given(specs)
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@given(specs)
def test_a_missing_sub_block_costs_nothing(spec: ModelSpec) -> None:
    for layer in spec.layers:
        alone = spec.model_copy(update={"layers": (layer,)})
        counts = alone.parameters()
        assert (counts[Part.ATTENTION] > 0) == layer.has_attention
        assert (counts[Part.FFN] > 0) == layer.has_ffn


def test_kv_bytes_and_flops_by_hand() -> None:
    spec = ModelSpec.from_config(LLAMA)
    assert spec.kv_bytes_per_token(2) == 2 * 2 * 2 * 16 * 2  # key and value, layers, heads, head_dim, bytes
    one_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
    assert spec.flops_per_token() == 2 * (2 * one_layer + 1000 * 64) + 4 * (2 * 4) * 16


def test_heads_must_form_groups() -> None:
    with pytest.raises(ValidationError, match="multiple of num_key_value_heads"):
        LayerSpec(num_attention_heads=5, num_key_value_heads=2, intermediate_size=1)


def test_a_config_says_the_spec_whether_layers_differ_or_not() -> None:
    spec = ModelSpec.from_config(LLAMA)
    assert "per_layer_config" not in spec.config_fields()
    assert ModelSpec.from_config(LLAMA | spec.config_fields()) == spec
    thin = spec.layers[0].model_copy(update={"intermediate_size": 8})
    bare = LayerSpec(num_attention_heads=0, num_key_value_heads=0, intermediate_size=0)
    uneven = spec.model_copy(update={"layers": (spec.layers[0], thin, bare)})
    config = LLAMA | uneven.config_fields()
    assert config["model_type"] == "flabc_llama"
    assert ModelSpec.from_config(config) == uneven


def test_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(UnknownNameError, match=r"'lama'. Did you mean 'llama'\? Known: .*llama, mistral, phi3, qwen2"):
        ModelSpec.from_config(LLAMA | {"model_type": "lama"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelSpec.from_config(LLAMA | change)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ModelError, match="vocab_size"):
        ModelSpec.from_config({key: value for key, value in LLAMA.items() if key != "vocab_size"})


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}]
)
def test_the_rotary_base_is_read_from_both_generations_of_configs(rope: dict[str, Any]) -> None:
    assert ModelSpec.from_config(LLAMA | rope).rope_theta == 5e5
