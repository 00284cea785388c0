"""Llama 1-3, CodeLlama, DeepSeek-Coder, SmolLM, Yi: gated FFN, rotary positions, RMSNorm before each sub-block."""

from __future__ import annotations

from .family import Axis, Family, Part, TensorSlot, linear

_LAYER = "model.layers.{layer}"

OUTER = (
    TensorSlot("model.embed_tokens.weight", (Axis.VOCAB, Axis.HIDDEN), Part.EMBEDDING, "embedding"),
    TensorSlot("model.norm.weight", (Axis.HIDDEN,), Part.NORM, "final_norm"),
    TensorSlot("lm_head.weight", (Axis.VOCAB, Axis.HIDDEN), Part.HEAD, "head", when="untied"),
)


def layer_tensors(qkv_bias: str | None, output_bias: str | None, mlp_bias: str | None) -> tuple[TensorSlot, ...]:
    """The tensors of a layer as Llama names them; each argument is the config flag that adds the biases."""
    attention, ffn = f"{_LAYER}.self_attn", f"{_LAYER}.mlp"
    return (
        TensorSlot(f"{_LAYER}.input_layernorm.weight", (Axis.HIDDEN,), Part.ATTENTION, "attention_norm"),
        *linear(f"{attention}.q_proj", "q", Part.ATTENTION, Axis.QUERY, Axis.HIDDEN, qkv_bias),
        *linear(f"{attention}.k_proj", "k", Part.ATTENTION, Axis.KV, Axis.HIDDEN, qkv_bias),
        *linear(f"{attention}.v_proj", "v", Part.ATTENTION, Axis.KV, Axis.HIDDEN, qkv_bias),
        *linear(f"{attention}.o_proj", "o", Part.ATTENTION, Axis.HIDDEN, Axis.QUERY, output_bias),
        TensorSlot(f"{_LAYER}.post_attention_layernorm.weight", (Axis.HIDDEN,), Part.FFN, "ffn_norm"),
        *linear(f"{ffn}.gate_proj", "gate", Part.FFN, Axis.INTERMEDIATE, Axis.HIDDEN, mlp_bias),
        *linear(f"{ffn}.up_proj", "up", Part.FFN, Axis.INTERMEDIATE, Axis.HIDDEN, mlp_bias),
        *linear(f"{ffn}.down_proj", "down", Part.FFN, Axis.HIDDEN, Axis.INTERMEDIATE, mlp_bias),
    )


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    decoder_layer="transformers.models.llama.modeling_llama:LlamaDecoderLayer",
    rotary="transformers.models.llama.modeling_llama:LlamaRotaryEmbedding",
    tensors=OUTER,
    layer_tensors=layer_tensors("attention_bias", "attention_bias", "mlp_bias"),
    defaults={"attention_bias": False, "mlp_bias": False},
    requires={"hidden_act": ("silu",)},
)
