from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flabc import api
from flabc.errors import ParityError
from flabc.export import parity
from flabc.export.weights import CheckpointWeights
from flabc.runtime.backend import Limits, open_backend
from flabc.runtime.backends.ort import OrtBackend
from flabc.spec import ModelSpec

IDS = list(range(3, 3 + sum(parity.LENGTHS)))


class Bent:
    """A backend whose logits are changed on their way out."""

    def __init__(self, inner: Any, bend: Any) -> None:
        self.inner, self.bend = inner, bend

    def start(self, batch: int) -> None:
        self.inner.start(batch)

    def extend(self, ids: Any, counts: Any) -> Any:
        return self.bend(self.inner.extend(ids, counts).copy())

    def score(self, ids: Any) -> Any:
        return self.bend(self.inner.score(ids).copy())


def opened(folder: Path) -> OrtBackend:
    spec = ModelSpec.from_config(parity_config(folder))
    backend = open_backend("onnxruntime", folder, spec, Limits(max_batch=4, max_length=256))
    assert isinstance(backend, OrtBackend)
    return backend


def heard(model: parity.Answers) -> list[parity.Turn]:
    return parity.listen(model, IDS, max_batch=4)


def parity_config(folder: Path) -> dict[str, Any]:
    import json

    return dict(json.loads((folder / "config.json").read_text()))


def test_a_model_agrees_with_itself(tiny_engine: Path) -> None:
    found = parity.check(opened(tiny_engine), heard(opened(tiny_engine)))
    assert found.holds
    assert found.max_relative == 0
    assert found.greedy_steps == parity.STEPS
    assert found.positions == 2 * 4 - 4 + sum(parity.LENGTHS) + 5 * 4 + parity.STEPS


def off_by_a_thousandth(logits: Any) -> Any:
    return logits + 1e-3 * np.abs(logits).max()


def not_a_number(logits: Any) -> Any:
    logits[..., 5] = np.nan
    return logits


def best_and_second_swapped(logits: Any) -> Any:
    top = np.argsort(logits, axis=-1)[..., -2:]
    return np.put_along_axis(logits, top, np.take_along_axis(logits, top[..., ::-1], -1), -1) or logits


@pytest.mark.parametrize("bend", [off_by_a_thousandth, not_a_number, best_and_second_swapped])
def test_a_bent_engine_is_caught(tiny_engine: Path, bend: Any) -> None:
    with pytest.raises(ParityError, match="No folder was written"):
        parity.check(Bent(opened(tiny_engine), bend), heard(opened(tiny_engine)))


def test_a_scoring_graph_alone_that_is_wrong_is_caught(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Bent(opened(tiny_engine), not_a_number)
    monkeypatch.setattr(engine, "extend", engine.inner.extend)
    with pytest.raises(ParityError, match="a difference of inf, 0 of 64 tokens"):
        parity.check(engine, heard(opened(tiny_engine)))


def test_a_tie_is_not_a_difference() -> None:
    a, b = np.array([1.0, 1.0 + 1e-7, 0.0]), np.array([1.0 + 1e-7, 1.0, 0.0])
    assert not parity._differ(a, b, 1e-4)
    assert parity._differ(np.array([1.0, 1.5, 0.0]), b, 1e-4)


class Table:
    """A model whose next-token logits depend on the last token alone."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def start(self, batch: int) -> None:
        pass

    def extend(self, ids: Any, counts: Any) -> Any:
        return self.logits[ids[np.arange(len(ids)), counts - 1]]

    def score(self, ids: Any) -> Any:
        return self.logits[ids]


@pytest.mark.parametrize(("lead", "holds"), [(1e-4, True), (1e-2, False)])
def test_a_swap_of_the_two_best_counts_only_if_one_was_clearly_better(lead: float, holds: bool) -> None:
    logits = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
    logits[:, 7], logits[:, 9] = 10 + lead, 10
    swapped = logits.copy()
    swapped[:, [7, 9]] = logits[:, [9, 7]]
    if holds:
        found = parity.check(Table(swapped), heard(Table(logits)))
        assert (found.greedy_mismatches, found.top1_agreement) == (0, 0)
        return
    with pytest.raises(ParityError, match="64 of 64 tokens"):
        parity.check(Table(swapped), heard(Table(logits)))


def test_other_greedy_tokens_are_caught_even_within_the_tolerance() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
    logits[:, 7], logits[:, 9] = 10 + 1.5e-3, 10  # a clear lead
    found = logits.copy()
    found[:, 7] -= 0.8e-3  # each logit is within 1e-4 of 10, but the order turns round
    found[:, 9] += 0.8e-3
    with pytest.raises(ParityError, match="64 of 64 tokens"):
        parity.check(Table(found), heard(Table(logits)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_stored_in_half_precision_is_proven_in_full(
    tiny: Callable[[str], Path], tmp_path: Path, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, half = tiny("llama-untied-biased"), tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(half)
    AutoTokenizer.from_pretrained(source).save_pretrained(half)
    assert api.export(half, tmp_path / "engine").parity["max_relative"] < 1e-5


def test_export_leaves_no_folder_when_the_engine_is_wrong(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = CheckpointWeights.get

    def wrong(self: CheckpointWeights, role: str, layer: int | None = None) -> Any:
        tensor = true(self, role, layer)
        return tensor * 1.01 if (role, layer) == ("up", 0) else tensor

    monkeypatch.setattr(CheckpointWeights, "get", wrong)
    with pytest.raises(ParityError):
        api.export(tiny_checkpoint, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_a_clear_choice_turned_round_is_caught_where_all_else_is_within_bounds() -> None:
    logits = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
    logits[:, 7] = 20  # the same token everywhere, and clearly
    found = logits.copy()
    last = IDS[parity.LENGTHS[0] + parity.LENGTHS[1] - 1]  # seen a few times
    found[last, 9] = 20.5
    turns = heard(Table(logits))
    parity_found = parity.compare(Table(found), turns, tolerance=None, kl_bound=1.0, top1_bound=0.9)
    assert 0 < parity_found.clearly_wrong < 0.05
    assert parity_found.holds
    assert not parity.compare(Table(found), turns, tolerance=None, wrong_bound=0.0).holds
    nearly = logits.copy()
    nearly[:, 9] = 20 + 1e-3  # another token everywhere, but no less likely to the model: not clearly wrong
    logits[:, 9] = 20 - 1e-3
    turned = parity.compare(Table(nearly), heard(Table(logits)), tolerance=None)
    assert (turned.top1_agreement, turned.clearly_wrong) == (0, 0)


@pytest.mark.parametrize("length", [8, 33, 40])
def test_a_model_with_few_positions_is_asked_less(length: int) -> None:
    asked: list[int] = []

    class Short(Table):
        def start(self, batch: int) -> None:
            self.length = 0

        def extend(self, ids: Any, counts: Any) -> Any:
            self.length += ids.shape[1]
            asked.append(self.length)
            return super().extend(ids, counts)

    logits = np.random.default_rng(0).normal(size=(200, 200)).astype(np.float32)
    turns = parity.listen(Short(logits), IDS, max_batch=1, max_length=length)
    assert max(asked) == length
    assert max(turn.ids.shape[1] for turn in turns) <= length
    assert parity.compare(Table(logits), turns).holds
