"""Where to cut how much: costs are those of transformers on the same answers; splits follow from them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flabc.compress.devices import compute_dtype
from flabc.errors import UsageError
from flabc.perf import axes, methods
from flabc.runtime.measure.shapes import shape_named

PACKAGE = '''def double(number):
    """Return twice the number.

    >>> double(2)
    4
    """
    return 2 * number


def shout(words):
    """Return the words in upper case, with a mark behind them.

    >>> shout("so it is")
    'SO IT IS!'
    """
    return words.upper() + "!"
'''


def test_costs_are_nats_of_the_dense_models_answers(
    tiny: Callable[[str], Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "spoken"
    package.mkdir()
    (package / "words.py").write_text(PACKAGE)
    few = {"corpus": str(texts), "sequences": 4, "sequence_length": 32}
    for name, value in {
        "CALIBRATION": few,
        "VOCABULARY": str(texts),
        "RESULTS": tmp_path,
        "ROWS": (400,),
        "SHARES": (0.5,),
        "TOKENS": 8,
    }.items():
        monkeypatch.setattr(axes, name, value)
    monkeypatch.setattr(axes, "SEQUENCES", 4)
    model, work = tiny("qwen2-tied"), tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["axes.py", str(model), str(package), "--name", "tiny", "--work", str(work)])
    axes.main()
    result = json.loads((tmp_path / "tiny.axes.json").read_text())
    answers = [row for row in json.loads((work / "answers.json").read_text()) if row[1]]
    assert result["answers"] == len(answers) > 0
    assert all(said.rstrip().endswith('"""') for said, _ in answers)

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=compute_dtype(torch.device("cpu")))
    tokenizer = AutoTokenizer.from_pretrained(model)
    nats = []
    for said, answer in answers:
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (said, answer))
        with torch.no_grad():
            logits = theirs(torch.tensor([before + after])).logits[0].float().log_softmax(-1)
        nats.append(-sum(float(logits[len(before) - 1 + at, token]) for at, token in enumerate(after)))
    assert result["dense_nats"] == pytest.approx(
        sum(nats) / len(nats), rel=1e-4 if theirs.dtype == torch.float32 else 0.01
    )
    assert set(result["costs"]) == {"rows-400", "channels-0.5"}
    assert result["costs"]["channels-0.5"]["nats"] != 0 < result["costs"]["channels-0.5"]["parameters_gone"]

    seen = (tmp_path / "tiny.axes.json").read_text()
    axes.main()
    assert json.loads(seen)["costs"] == json.loads((tmp_path / "tiny.axes.json").read_text())["costs"]
    (tmp_path / "tiny.axes.json").write_text(json.dumps({**result, "dense_nats": result["dense_nats"] + 1}))
    with pytest.raises(UsageError, match="other answers"):
        axes.main()
    (tmp_path / "tiny.axes.json").write_text(json.dumps({**result, "first_tokens": 0.0}))
    with pytest.raises(UsageError, match=r"other first tokens.*'first_tokens': 0\.0"):
        axes.main()


@pytest.mark.parametrize(("rows", "channels", "kept"), [(1, 2, axes.ROWS[-1]), (2, 1, axes.ROWS[0])])
def test_the_cheaper_axis_gives_all_that_it_can(rows: float, channels: float, kept: int) -> None:
    spec = shape_named("qwen2.5-coder-0.5b")
    gone = (50_000_000, 200_000_000)
    costs = {f"rows-{n}": {"parameters_gone": n, "nats": rows * n / 1e6} for n in gone}
    costs |= {f"channels-{n}": {"parameters_gone": n, "nats": channels * n / 1e6} for n in gone}
    assert axes.rows_for(spec, round(0.65 * spec.num_parameters), costs) == kept


@pytest.mark.parametrize("size", ["all-22", "all-35"])
def test_the_methods_keep_the_rows_that_were_measured_to_be_best(size: str) -> None:
    dense = shape_named("qwen2.5-coder-0.5b")
    costs = json.loads((methods.RESULTS / "qwen2.5-coder-0.5b.axes.json").read_text())["costs"]
    left = round(methods.TARGETS[size]["params"] * dense.num_parameters)
    assert methods.ROWS[size] == axes.rows_for(dense, left, costs)


def test_sizes_beyond_what_was_measured_are_refused() -> None:
    dense = shape_named("qwen2.5-coder-0.5b")
    costs = json.loads((methods.RESULTS / "qwen2.5-coder-0.5b.axes.json").read_text())["costs"]
    with pytest.raises(UsageError, match="more channels"):
        axes.rows_for(dense, dense.num_parameters // 3, costs)
