"""StarCoder2: LayerNorm, an FFN without a gate, and biases."""

from __future__ import annotations

from .family import Axis, Family, Part, classes, linear, norm
from .llama import FFN, LAYER, OUTER, attention

STARCODER2 = Family(
    name="starcoder2",
    **classes("starcoder2", "Starcoder2"),
    tensors=(OUTER[0], *norm("model.norm", "final_norm", Part.NORM, bias=True), OUTER[-1]),
    layer_tensors=(
        *norm(f"{LAYER}.input_layernorm", "attention_norm", Part.ATTENTION, bias=True),
        *attention("use_bias", "use_bias"),
        *norm(f"{LAYER}.post_attention_layernorm", "ffn_norm", Part.FFN, bias=True),
        *linear(f"{FFN}.c_fc", "up", Part.FFN, Axis.INTERMEDIATE, Axis.HIDDEN, "use_bias"),
        *linear(f"{FFN}.c_proj", "down", Part.FFN, Axis.HIDDEN, Axis.INTERMEDIATE, "use_bias"),
    ),
    defaults={"use_bias": True},
    norm_eps="norm_epsilon",
)
