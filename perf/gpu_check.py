"""Whether the decoder says on this device what transformers says, before anything is timed. Needs transformers."""

from __future__ import annotations

from typing import Any

import torch

from flabc.errors import ParityError, require
from flabc.runtime.backends.decoder_weights import gathered
from flabc.runtime.backends.static_decoder import REACH, StaticDecoder
from flabc.spec import ModelSpec

#: A model of milliseconds; its prompt ends just before the edge of a reach, so that two graphs take turns.
CONFIG: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2 * REACH,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}
PROMPT, STEPS = REACH - 8, 24

#: How far the logits may lie apart, as a share of the largest: float32, and TF32 off.
TOLERANCE = 1e-3


@torch.inference_mode()
def check_decoder(device: torch.device, **how: Any) -> dict[str, Any]:
    """Greedy tokens and first logits of a random Llama in float32, in transformers and here.

    Args:
        device: where.
        how: ``graphs``, and what else the decoder is told.

    Returns:
        how many tokens agree, and how far the logits lie apart.

    Raises:
        MissingExtraError: if transformers is not installed.
        ParityError: if they differ.
    """
    transformers: Any = require("transformers", "compress")
    torch.manual_seed(11)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval().to(device)
    state, spec = theirs.state_dict(), ModelSpec.from_config(theirs.config.to_dict())
    weights = gathered(spec, lambda name, shape: state[name].clone())
    decoder = StaticDecoder(spec, weights, 2, 2 * REACH, graph_prompts=how["graphs"], **how)
    ids = torch.randint(0, spec.vocab_size, (2, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    said = theirs(ids).logits[:, -1]
    found = decoder.prompt(ids, torch.full((2,), PROMPT - 1, device=device)).clone()
    apart = float((said - found).abs().max() / said.abs().max())
    wanted = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, pad_token_id=0
    )[:, PROMPT:]
    tokens = _tokens(decoder, found)
    agree = int((tokens == wanted).all(0).sum())
    if apart > TOLERANCE or agree < STEPS:
        raise ParityError(
            "The decoder does not say what transformers says on this device; nothing was measured.",
            expected=f"{STEPS} equal tokens and logits within {TOLERANCE}",
            found=f"{agree} equal tokens, logits {apart:.2g} apart",
        )
    return {"tokens": agree, "logits_apart": apart, **how}


def _tokens(decoder: StaticDecoder, logits: torch.Tensor) -> torch.Tensor:
    """Greedy tokens of two rows, the first from logits that are there, (2, STEPS)."""
    token = logits.argmax(-1, keepdim=True)
    decoder.begin(token, torch.full_like(token, PROMPT))
    return torch.cat([token, *(decoder.next(2, PROMPT + step).clone() for step in range(1, STEPS))], 1)
