"""What is kept of first tokens: distances are those of transformers' logits; nothing is lost where nothing is cut."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flabc.compress import load, pipeline
from flabc.compress.config import Calibration
from flabc.perf import first_tokens
from flabc.perf.making import write
from flabc.recipe import parse


def test_each_model_is_compared_behind_each_beginning(
    tiny: Callable[[str], Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"corpus": str(texts), "sequences": 4, "sequence_length": 32}
    for name, value in {
        "CALIBRATION": few,
        "RESULTS": tmp_path,
        "SEQUENCES": 4,
        "COMPARED": 3,
        "ALONE": 50,
        "CUT": {**first_tokens.CUT, "score": "wanda"},
    }.items():
        monkeypatch.setattr(first_tokens, name, value)
    model = tiny("qwen2-tied")
    monkeypatch.setattr(sys, "argv", ["first_tokens.py", str(model), "--name", "tiny"])
    first_tokens.main()
    cells = json.loads((tmp_path / "tiny.first-tokens.json").read_text())["cells"]
    assert set(cells) == {"texts", "first-tokens"}
    assert cells["texts"]["restored"]["lost"] > cells["first-tokens"]["restored"]["lost"]
    assert cells["texts"]["cut"]["nothing"] != cells["texts"]["restored"]["nothing"]
    table = first_tokens.as_markdown(cells).splitlines()
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1


def test_distances_are_those_of_transformers(
    tiny: Callable[[str], Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_tokens, "ALONE", 50)
    dense = load.load(str(tiny("qwen2-tied")))
    calibration = Calibration(corpus=str(texts), sequences=4, sequence_length=32)
    context = pipeline.context_of(dense, None, calibration, "cpu", 0)
    assert first_tokens.distances(dense, context) == {"nothing": 0, "line_break": 0, "chat": 0, "lost": 0}

    recipe = parse({"name": "half", "stages": [{"stage": "widths", "score": "wanda", "rate": 0.5}]}, "half")
    cut, _ = pipeline.run_stages(dense, recipe.stages, context)
    write(cut, tmp_path / "cut")
    theirs = [
        AutoModelForCausalLM.from_pretrained(at, dtype=context.dtype) for at in (tiny("qwen2-tied"), tmp_path / "cut")
    ]
    before = first_tokens.beginnings(context)["line_break"]
    windows = first_tokens.compared(context)
    assert not set(map(tuple, windows.tolist())) & set(map(tuple, context.tokens(dense).tolist()))
    with torch.no_grad():
        tokens = torch.cat([torch.tensor(before).expand(len(windows), -1), windows], dim=1)
        base, other = (model(tokens).logits[:, :-1].float().log_softmax(-1) for model in theirs)
    wanted = float((base.exp() * (base - other)).sum(-1).mean())
    found = first_tokens.kl_to_dense(cut, context, before)
    assert found == pytest.approx(wanted, rel=1e-3 if context.dtype == torch.float32 else 0.1)
    assert found > 0
