"""What a smaller vocabulary costs: tokens that text grows by, and what the dense model would have said instead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from flabc.console import progress
from flabc.errors import StageError

from .data.corpus import Document
from .data.prose import samples
from .model import CausalLM
from .stage import Context
from .walk import Walk, dense_variant

#: Held-out windows, and their length in tokens, on which the removed mass is measured.
WINDOWS, LENGTH = 4, 256

#: Texts that are encoded at once, by all cores.
TOGETHER = 32

#: How the samples that are neither code nor English are called together.
OTHER = "other languages"


def inflation(dense: Tokenizer, pruned: Tokenizer, documents: Sequence[Document]) -> dict[str, float]:
    """Tokens per character of held-out text after over before: of code, English, and other languages.

    Args:
        dense: the tokenizer before the cut.
        pruned: the one after.
        documents: held-out text, which counts as code.

    Raises:
        StageError: if a text does not survive encoding and decoding as it did before.
    """
    english, others = samples()
    kinds = {
        "code": [document.text for document in documents],
        "english": [english.text],
        OTHER: [document.text for document in others],
    }
    return {kind: round(_growth(dense, pruned, texts), 5) for kind, texts in kinds.items()}


def removed_mass(model: CausalLM, keep: Sequence[int], dense: Tokenizer, context: Context) -> float:
    """The probability that the dense model puts on tokens that go, per position of held-out text."""
    walk = Walk(model, windows(dense, context.heldout), context.device, context.dtype)
    gone = torch.ones(model.spec.vocab_size, dtype=torch.bool, device=context.device)
    gone[torch.as_tensor(keep, device=context.device)] = False
    variant = dense_variant(model.spec)
    masses = [group[variant].log_probs[:, gone].exp().sum(-1) for group in walk.readouts(walk.run([variant]))]
    return float(torch.cat(masses).mean())


def windows(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tensor:
    """The begin of held-out text as windows of tokens, (N, T); one short window if there is not enough for more."""
    ids: list[int] = []
    for document in documents:
        ids += tokenizer.encode(document.text, add_special_tokens=False).ids[: WINDOWS * LENGTH - len(ids)]
        if len(ids) == WINDOWS * LENGTH:
            break
    count = max(1, len(ids) // LENGTH)
    return torch.tensor(ids[: count * LENGTH]).reshape(count, -1)


def _growth(dense: Tokenizer, pruned: Tokenizer, texts: Sequence[str]) -> float:
    before = after = 0
    with progress("checking the tokenizer", len(texts)) as advance:
        for at in range(0, len(texts), TOGETHER):
            some = texts[at : at + TOGETHER]
            old, new = (_ids(tokenizer, some) for tokenizer in (dense, pruned))
            for text, was, now in zip(some, dense.decode_batch(old), pruned.decode_batch(new), strict=True):
                if was != now:
                    found = repr(text[:60])
                    raise StageError("The pruned tokenizer does not give this text back as it was.", found=found)
            before, after = before + sum(map(len, old)), after + sum(map(len, new))
            advance(len(some))
    return after / max(1, before)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
