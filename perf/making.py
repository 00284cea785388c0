"""Models made by many recipes: what they listen to is read once, and what they begin with alike is made once."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flabc import artifact
from flabc.compress import checkpoint, load, pipeline, vocab
from flabc.compress.config import Calibration
from flabc.compress.data import corpus
from flabc.compress.model import CausalLM
from flabc.compress.pipeline import StageReceipt
from flabc.compress.stage import Context, encoder
from flabc.frozen import Frozen
from flabc.recipe import Recipe
from flabc.runtime.measure.environment import cpu_name


@dataclass(frozen=True)
class Made:
    """A model, and how it was made; in ``seconds`` is what came before the stages."""

    start: tuple[Any, ...]
    stages: tuple[Frozen, ...]
    model: CausalLM
    context: Context
    seconds: float = 0.0
    receipts: tuple[StageReceipt, ...] = ()


class Maker:
    """Makes models out of one, and remembers the last.

    A recipe that only adds stages to the last one goes on from there, and is said to take what both took.

    Args:
        model: whatever ``flabc compress`` takes as a model.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._texts: dict[Calibration, pipeline.Text] = {}
        self._last: Made | None = None

    def fingerprint(self, calibration: Calibration) -> str:
        """Of the text that models of a recipe listen to: it changes with the packages that are installed."""
        return corpus.fingerprint(self._text(calibration)["calibration"])

    def make(self, recipe: Recipe, folder: Path, *, emitted: bool = False) -> dict[str, Any]:
        """Write a model; how long it took without reading and writing, and what is left.

        Args:
            recipe: the stages, with what they listen to.
            folder: where.
            emitted: cut the vocabulary first to what the corpus emits, see ``emitted_only``.

        Raises:
            FlabcError: see ``flabc.errors``.
        """
        begun = self._begun(recipe, emitted=emitted)
        self._last = None  # not two of them in memory
        left = tuple(recipe.stages[len(begun.stages) :])
        cut, receipts = pipeline.run_stages(begun.model, left, begun.context)
        pipeline.check_target(cut, begun.context)
        made = replace(begun, stages=tuple(recipe.stages), model=cut, receipts=(*begun.receipts, *receipts))
        self._last = made
        said = {"stages": [receipt.as_dict() for receipt in made.receipts]}
        write(cut, folder, recipe.model_dump(mode="json"), said)
        shape = [layer.model_dump() for layer in cut.spec.layers]
        return {
            "parameters": cut.spec.num_parameters,
            "vocab_size": cut.spec.vocab_size,
            "layers": shape if len({json.dumps(layer) for layer in shape}) > 1 else [len(shape), shape[0]],
            "seconds": round(made.seconds + sum(receipt.seconds for receipt in made.receipts), 1),
            "cpu": cpu_name(),
            "calibration": self.fingerprint(recipe.calibration),
            "stages": [receipt.summary for receipt in made.receipts],
        }

    def _begun(self, recipe: Recipe, *, emitted: bool) -> Made:
        """The last model, if the recipe begins with its stages, or the dense one."""
        last, start = self._last, (recipe.calibration, recipe.target, emitted)
        if last is not None and last.start == start and last.stages == tuple(recipe.stages[: len(last.stages)]):
            return last
        dense, text = load.load(self.model), self._text(recipe.calibration)
        began = time.monotonic()
        first = emitted_only(dense, recipe.calibration) if emitted else dense
        seconds = time.monotonic() - began
        context = pipeline.context_of(first, recipe.target, recipe.calibration, "cpu", 0, text)
        return Made(start, (), first, context, seconds)

    def _text(self, calibration: Calibration) -> pipeline.Text:
        read = as_read(calibration)
        if read not in self._texts:
            self._texts[read] = pipeline.text_of(load.load(self.model), read, "cpu", 0)
        return self._texts[read]


def as_read(calibration: Calibration) -> Calibration:
    """What of a calibration decides which text is read."""
    return calibration.model_copy(update={"first_tokens": 0.0})


def write(model: CausalLM, folder: Path, recipe: Any = None, receipts: Any = None) -> None:
    """A checkpoint folder."""
    with artifact.create(folder, "checkpoint", force=False) as draft:
        checkpoint.write(model, draft.path)
        draft.spec, draft.recipe, draft.source, draft.seed = model.spec, recipe, model.source, 0
        draft.receipts = receipts or {}


def emitted_only(model: CausalLM, calibration: Calibration) -> CausalLM:
    """The vocabulary cut to the tokens that text gives and the added ones, as Flab-Pruner's code cuts it."""
    counts = vocab.count_tokens(
        encoder(model.tokenizer), corpus.stream(calibration.corpus, "calibration"), model.spec.vocab_size
    )
    seen = {int(index) for each in counts.values() for index in each.nonzero()[0]}
    added = {entry["id"] for entry in model.tokenizer.tokenizer.get("added_tokens", [])}
    return vocab.apply(model, vocab.VocabPlan("", keep=tuple(sorted(seen | added))))
