"""Llama 1-3, CodeLlama, DeepSeek-Coder, SmolLM, Yi: gated FFN, rotary positions, RMSNorm before each sub-block."""

from __future__ import annotations

from .family import Axis, Family, Part, TensorSlot, classes, linear, norm

LAYER = "model.layers.{layer}"
ATTENTION, FFN = f"{LAYER}.self_attn", f"{LAYER}.mlp"

OUTER = (
    TensorSlot("model.embed_tokens.weight", (Axis.VOCAB, Axis.HIDDEN), Part.EMBEDDING, "embedding"),
    *norm("model.norm", "final_norm", Part.NORM),
    TensorSlot("lm_head.weight", (Axis.VOCAB, Axis.HIDDEN), Part.HEAD, "head", when="untied"),
)


def attention(qkv_bias: str | None = None, output_bias: str | None = None) -> tuple[TensorSlot, ...]:
    """The attention's projections as Llama names them; each argument is the config flag that adds the biases."""
    return (
        *linear(f"{ATTENTION}.q_proj", "q", Part.ATTENTION, Axis.QUERY, Axis.HIDDEN, qkv_bias),
        *linear(f"{ATTENTION}.k_proj", "k", Part.ATTENTION, Axis.KV, Axis.HIDDEN, qkv_bias),
        *linear(f"{ATTENTION}.v_proj", "v", Part.ATTENTION, Axis.KV, Axis.HIDDEN, qkv_bias),
        *linear(f"{ATTENTION}.o_proj", "o", Part.ATTENTION, Axis.HIDDEN, Axis.QUERY, output_bias),
    )


def gated_ffn(bias: str | None = None) -> tuple[TensorSlot, ...]:
    """The gated FFN's projections as Llama names them; the argument is the config flag that adds the biases."""
    return (
        *linear(f"{FFN}.gate_proj", "gate", Part.FFN, Axis.INTERMEDIATE, Axis.HIDDEN, bias),
        *linear(f"{FFN}.up_proj", "up", Part.FFN, Axis.INTERMEDIATE, Axis.HIDDEN, bias),
        *linear(f"{FFN}.down_proj", "down", Part.FFN, Axis.HIDDEN, Axis.INTERMEDIATE, bias),
    )


#: The norm before each sub-block.
ATTENTION_NORM = norm(f"{LAYER}.input_layernorm", "attention_norm", Part.ATTENTION)
FFN_NORM = norm(f"{LAYER}.post_attention_layernorm", "ffn_norm", Part.FFN)


def layer_tensors(qkv_bias: str | None, output_bias: str | None, mlp_bias: str | None) -> tuple[TensorSlot, ...]:
    """The tensors of a layer as Llama names them."""
    return (*ATTENTION_NORM, *attention(qkv_bias, output_bias), *FFN_NORM, *gated_ffn(mlp_bias))


LLAMA = Family(
    name="llama",
    **classes("llama", "Llama"),
    tensors=OUTER,
    layer_tensors=layer_tensors("attention_bias", "attention_bias", "mlp_bias"),
    defaults={"attention_bias": False, "mlp_bias": False},
    requires={"hidden_act": ("silu",)},
)
