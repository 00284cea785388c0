"""The ``genai_config.json`` with which onnxruntime-genai runs an engine folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flabc.spec import ModelSpec

#: onnxruntime-genai runs all decoders alike but takes names that it knows only.
_ALIASES = {"starcoder2": "llama"}


def genai_config(spec: ModelSpec, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The config for a spec.

    Args:
        spec: the model's shapes; the first attending layer's heads stand for all, the runtime reads the others
            from the graph's inputs.
        generation: a Hugging Face generation config, for the special tokens.
    """
    first = next((layer for layer in spec.layers if layer.has_attention), spec.layers[0])
    eos = generation.get("eos_token_id")
    eos_first = eos[0] if isinstance(eos, list) else eos
    pad = generation.get("pad_token_id")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": first.num_attention_heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": first.num_key_value_heads,
    }
    return {
        "model": {
            "bos_token_id": generation.get("bos_token_id", eos_first),
            "context_length": spec.max_position_embeddings,
            "decoder": decoder,
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else eos_first,
            "type": _ALIASES.get(spec.family, spec.family),
            "vocab_size": spec.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": spec.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
