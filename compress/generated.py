"""Text that the dense model writes itself, to listen to beside the text of others.

A served model mostly reads its own words: behind a short prompt every token is one that it chose. So a fit should hear
them as well. Calibrating on a model's own text is self-calibration (Williams, Chrysostomou and Aletras, 2024), there
for quantisation and sparsity.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flabc.console import progress
from flabc.errors import CorpusError
from flabc.families.per_layer import PER_LAYER

from . import checkpoint
from .config import Calibration
from .data.corpus import Document, names_of
from .gguf_file import quiet_transformers
from .model import CausalLM
from .stage import before_text, encoder, sequences
from .stored import loaded

#: The name that such documents have as a corpus.
GENERATED = "generated"

#: The share of a sequence that is given.
GIVEN = 1 / 4

#: How much longer than a sequence a text becomes, and how many more are written than are needed: what was sampled token
#: by token may be fewer tokens once it is read.
MARGIN = SPARE = 1 / 8

#: Below 1, so that a text keeps to what the model thinks likely; above 0, so that it does not begin to repeat itself.
TEMPERATURE = 0.7

#: Sequences at once.
BATCH = 32


def needed(calibration: Calibration) -> int:
    """How many texts are needed: as many as sequences are drawn from any other corpus."""
    return -(-calibration.sequences // (len(names_of(calibration.corpus)) + 1))


def count(calibration: Calibration) -> int:
    """How many texts are written."""
    return 1 + round(needed(calibration) * (1 + SPARE))


def length(calibration: Calibration) -> int:
    """Tokens of each, with those that it goes on from."""
    return round(calibration.sequence_length * (1 + MARGIN))


def written(
    model: CausalLM,
    documents: Sequence[Document],
    calibration: Calibration,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> list[Document]:
    """What the model makes of beginnings of other documents, and these: one document each, long enough for a sequence.

    It never ends a text and never speaks in turns: special tokens are not sampled.

    Args:
        model: the dense model.
        documents: whose beginnings and middles it goes on from.
        calibration: how much.
        device: where to compute.
        dtype: in which precision.
        seed: what picks the beginnings and the tokens.

    Raises:
        CorpusError: if there are not enough documents, or too few texts become long enough.
    """
    tokenizer = encoder(model.tokenizer)
    given = max(1, round(calibration.sequence_length * GIVEN))
    whole = min(length(calibration), model.spec.max_position_embeddings)
    prompts = sequences(tokenizer, documents, count(calibration), given, seed, [before_text(tokenizer)])
    special = [entry["id"] for entry in model.tokenizer.tokenizer.get("added_tokens", []) if entry["special"]]
    network = _network(model, dtype).to(device)
    texts = list[str]()
    with torch.random.fork_rng(), progress("writing text to listen to", len(prompts)) as advance:
        torch.manual_seed(seed)
        for part in prompts.to(device).split(BATCH):  # type: ignore[no-untyped-call]
            rows = network.generate(
                part,
                attention_mask=torch.ones_like(part),
                max_new_tokens=whole - given,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                suppress_tokens=special or None,
            )
            texts += tokenizer.decode_batch(rows.tolist(), skip_special_tokens=True)
            advance(len(part))
    found = [
        Document(f"{GENERATED}:{n}", text.rstrip("\ufffd"), GENERATED)  # a character may be cut in two at the end
        for n, text in enumerate(texts)
        if len(tokenizer.encode(text, add_special_tokens=False).ids) >= calibration.sequence_length
    ]
    if len(found) < needed(calibration):
        raise CorpusError(
            f"Of {len(texts)} texts that the model wrote, {len(found)} are as long as a sequence when they are read.",
            expected=f"{needed(calibration)}",
            fix="Switch calibration.generated off: this model does not go on from such text as others do.",
        )
    return found


def _network(model: CausalLM, dtype: torch.dtype) -> Any:
    """The model in transformers."""
    import transformers

    from .recover import open_model

    if PER_LAYER in checkpoint.config_of(model):  # the family's own class cannot build it
        with tempfile.TemporaryDirectory(prefix="flabc-") as folder:
            checkpoint.write(model, Path(folder))
            return open_model(Path(folder), model.spec, dtype).eval()
    with quiet_transformers():
        network: Any = getattr(transformers, model.family.architecture).from_pretrained(
            None,
            config=transformers.AutoConfig.for_model(**model.config),
            state_dict={name: loaded(tensor) for name, tensor in model.weights.items()},
            dtype=dtype,
        )
    return network.eval()
