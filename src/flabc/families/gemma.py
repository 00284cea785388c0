"""Gemma 2 and Gemma 3 (text): norms before and after each sub-block, full and sliding attention in turn."""

from __future__ import annotations

from .family import Family, Part, classes, norm
from .llama import ATTENTION_NORM, LAYER, OUTER, attention, gated_ffn
from .qwen3 import HEAD_NORMS

_LAYER_TENSORS = (
    *ATTENTION_NORM,
    *attention("attention_bias", "attention_bias"),
    *norm(f"{LAYER}.post_attention_layernorm", "attention_output_norm", Part.ATTENTION),
    *norm(f"{LAYER}.pre_feedforward_layernorm", "ffn_norm", Part.FFN),
    *gated_ffn(),
    *norm(f"{LAYER}.post_feedforward_layernorm", "ffn_output_norm", Part.FFN),
)

GEMMA2 = Family(
    name="gemma2",
    **classes("gemma2", "Gemma2"),
    tensors=OUTER,
    layer_tensors=_LAYER_TENSORS,
    defaults={"attention_bias": False},
    logits_softcapping="final_logit_softcapping",
    normed_outputs=True,
    typed_masks=True,
    activation="hidden_activation",
    norm_offset=1.0,
    embedding_root=True,
    query_scalar="query_pre_attn_scalar",
    attention_softcapping="attn_logit_softcapping",
    eager=True,  # attention scores are soft-capped, which the fused kernels leave out
)

GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    config="Gemma3TextConfig",
    decoder_layer="transformers.models.gemma3.modeling_gemma3:Gemma3DecoderLayer",
    backbone="transformers.models.gemma3.modeling_gemma3:Gemma3TextModel",
    tensors=OUTER,
    layer_tensors=(*_LAYER_TENSORS, *HEAD_NORMS),
    defaults={"attention_bias": False},
    requires={"use_bidirectional_attention": (False, None)},
    logits_softcapping="final_logit_softcapping",
    normed_outputs=True,
    typed_masks=True,
    activation="hidden_activation",
    norm_offset=1.0,
    embedding_root=True,
    query_scalar="query_pre_attn_scalar",
)
