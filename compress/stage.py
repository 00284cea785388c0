"""What a stage is: it makes a plan that can be printed, and applies a plan exactly.

Nothing is cut while a plan is made. A stage stops at the recipe's target, but for the step that sizes are rounded by:
``Context.spare`` says how many parameters may still go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from flabc.errors import CorpusError
from flabc.frozen import Frozen
from flabc.tokenizer_files import whole

from .chat import before_user
from .config import Calibration
from .data.corpus import Document
from .model import CausalLM, TokenizerFiles
from .stored import Weight, spill

C = TypeVar("C", bound=Frozen)
P = TypeVar("P", bound="Plan")


@dataclass(frozen=True)
class Plan:
    """What a stage is going to do.

    Args:
        summary: one line for a person.
        details: the same and more for the receipt; plain data.
    """

    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What every stage may use.

    Args:
        dense: the model before any cut.
        calibration: how much text to listen to.
        documents: calibration text.
        heldout: text that is never calibrated on.
        target_parameters: parameters to be left at the end, or None if no target is set.
        device: where to compute.
        dtype: in which precision to compute.
        seed: what picks the sequences.
        scratch: a folder for new tensors if the model is streamed.
    """

    dense: CausalLM
    calibration: Calibration
    documents: Sequence[Document]
    heldout: Sequence[Document]
    target_parameters: int | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    scratch: Path | None = None

    def keep(self, tensor: Tensor, model: CausalLM) -> Weight:
        """A tensor that will be part of a model, in its dtype: on disk if the model is streamed."""
        tensor = tensor.to(device="cpu", dtype=model.dtype)
        return tensor if self.scratch is None else spill(tensor, self.scratch)

    def spare(self, model: CausalLM) -> int:
        """How many parameters may still be removed; all of them without a target."""
        return model.spec.num_parameters - (self.target_parameters or 0)

    def tokens(self, model: CausalLM) -> Tensor:
        """The calibration sequences in the model's present tokens, (N, T)."""
        return sequences(
            encoder(model.tokenizer),
            self.documents,
            self.calibration.sequences,
            self.calibration.sequence_length,
            self.seed,
            openings(model),
        )

    def firsts(self, model: CausalLM, tokens: Tensor) -> Tensor | None:
        """The tokens that fits hear each as the first of a text, (M, T), the most frequent of the sequences, (N, T).

        A model makes of the first token what the token alone says, and all that come after attend to it (Xiao et al.,
        2023, "attention sinks"). The sequences have as many first tokens as there are sequences; where a text begins
        with another one, a model that was fitted to these alone has lost that state, and is worse at the whole text.

        Returns:
            None if the tokenizer itself puts a first token before every text.
        """
        count = math.ceil(len(tokens) * self.calibration.first_tokens)
        if not count or before_text(encoder(model.tokenizer)):
            return None
        frequent = tokens.flatten().bincount().sort(descending=True, stable=True)
        found = frequent.indices[frequent.values > 0]
        return found.repeat(-(-count * tokens.shape[1] // len(found)))[: count * tokens.shape[1]].view(count, -1)


@dataclass(frozen=True)
class Stage(Generic[C, P]):
    """A stage: two functions. ``apply`` does what the plan says; the pipeline checks the tensors that come out."""

    plan: Callable[[CausalLM, C, Context], P]
    apply: Callable[[CausalLM, P], CausalLM]


def encoder(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer as a ``tokenizers.Tokenizer`` that gives every text whole, whatever its file says."""
    return whole(Tokenizer.from_str(json.dumps(files.tokenizer)))


def openings(model: CausalLM) -> list[list[int]]:
    """The ways in which a sequence begins where the model serves: as its tokenizer begins a text, or with a chat.

    The first token gathers attention and activations a hundred times those of others (Xiao et al., 2023, "attention
    sinks"). A model that is cut and refitted on text alone loses that state for the tokens it never saw there, and
    with it every sequence that begins with one. Beginnings that are not served get nothing of the fit.
    """
    tokenizer = encoder(model.tokenizer)
    chat = tokenizer.encode(before_user(model.tokenizer), add_special_tokens=False).ids
    return [before_text(tokenizer), *([chat] if chat else [])]


def before_text(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer itself puts before every text: a beginning-of-sequence token, or nothing."""
    text = tokenizer.encode("a")
    return list(text.ids[: text.special_tokens_mask.index(0)])


def sequences(
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    count: int,
    length: int,
    seed: int,
    openings: Sequence[Sequence[int]] = ((),),
) -> Tensor:
    """``count`` windows of ``length`` tokens, each from one document, the documents drawn by their size.

    Of several corpora each gives as many windows as the others, in turn; so do the openings, which stand before the
    text of a window; each stands as often before the beginning of a document as before its middle, since what a
    window begins with decides how its first token becomes an attention sink.

    Raises:
        CorpusError: if one does not fill so many.
    """
    corpora = list(dict.fromkeys(sorted(document.corpus for document in documents))) or [""]
    shares = [len(range(at, count, len(corpora))) for at in range(len(corpora))]
    drawn = [
        _windows(tokenizer, [d for d in documents if d.corpus == corpus], share, length, seed, len(openings))
        for corpus, share in zip(corpora, shares, strict=True)
        if share
    ]
    plain = [window for turn in zip_longest(*drawn) for window in turn if window is not None]
    # By rows of corpora, so that no corpus always has the same opening.
    turns = [list(openings[at // len(corpora) % len(openings)])[: length // 2] for at in range(count)]
    return torch.tensor([[*opening, *window][:length] for opening, window in zip(turns, plain, strict=True)])


def _windows(
    tokenizer: Tokenizer, documents: Sequence[Document], count: int, length: int, seed: int, turns: int
) -> list[list[int]]:
    """Windows of one corpus: ``turns`` of them from the beginning of their documents, as many from anywhere, again.

    No document gives a second one before each has given one. Then what windows have left over of the long ones is
    drawn from in the same way: no token is in two windows.

    Raises:
        CorpusError: if the documents do not fill so many.
    """
    rng = np.random.default_rng(seed)
    # A token is at least one byte, so shorter documents cannot fill a window.
    long_enough = [document for document in documents if len(document.text) >= length]
    sizes = np.array([len(document.text) for document in long_enough], dtype=float)
    order = rng.choice(len(sizes), len(sizes), replace=False, p=sizes / sizes.sum()) if len(sizes) else ()
    encoded = (tokenizer.encode(long_enough[index].text, add_special_tokens=False).ids for index in order)
    windows: list[list[int]] = []
    rest: list[list[int]] = []
    for ids in chain(encoded, rest):
        if len(ids) >= length:
            start = int(rng.integers(0, len(ids) - length + 1)) * (len(windows) // turns % 2)
            windows.append(ids[start : start + length])
            rest += [ids[:start], ids[start + length :]]
        if len(windows) == count:
            return windows
    raise CorpusError(
        f"The calibration text fills {len(windows)} windows of {length} tokens.",
        expected=f"{count}",
        fix="Give more text, or lower calibration.sequences or calibration.sequence_length.",
    )
