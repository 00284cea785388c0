"""The times are a machine's; here what is timed: the same candidates, and costs that agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flabc.compress import load
from flabc.compress.config import Calibration
from flabc.perf import population_speed


def test_ways_measure_the_same_candidates(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population_speed, "TOP_K", 8)
    model = load.load(str(tiny("llama-tied")))
    monkeypatch.setattr(population_speed, "STAGE", population_speed.STAGE.model_copy(update={"multiple_of": 4}))
    monkeypatch.setattr(population_speed, "LEFT", 0.9)
    calibration = Calibration(corpus="python-stdlib", sequences=2, sequence_length=32)
    found = population_speed.compare(model, calibration, 2)
    assert len(found[population_speed.LIKELY]) == 2
    assert 64 <= found["tokens_compared"] < found["vocab_size"] == 700
    assert found["largest_difference"] < 0.5 * found["kl"][1]
    said = population_speed.as_text({"model": "tiny", "candidates": 16, **found})
    assert f"over the {found['tokens_compared']} of 700 tokens" in said
