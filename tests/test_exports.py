"""The fastest of several precisions: timed for real, and judged by times that are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flabc import api, exports
from flabc.artifact import Artifact
from flabc.cli import cli
from flabc.errors import ParityError, UsageError
from flabc.export import parity, precision
from flabc.export.precision import Storage
from flabc.runtime.measure import race
from flabc.runtime.measure.result import Sample
from flabc.runtime.session import Session


@pytest.fixture(autouse=True)
def three_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    few = (("fp32", Storage()), ("int8", Storage(block_size=64)), ("int4", Storage()))
    monkeypatch.setitem(precision.CANDIDATES, "onnx", few)


def samples(ms: float) -> list[Sample]:
    return [Sample(ttft_ms=ms, token_ms=(ms,) * 31)] * 3


def test_candidates_are_made_proven_and_timed(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    true = parity.listen

    def listen(*arguments: Any, **more: Any) -> Any:
        asked.append(more["max_batch"])
        return true(*arguments, **more)

    monkeypatch.setattr(parity, "listen", listen)
    found = api.export(tiny("qwen2-tied"), tmp_path / "e", precision="auto")
    assert [each.precision for each in found.candidates] == ["fp32", "int8", "int4"]
    assert len(asked) == 1  # of three candidates one torch model
    verdicts = [each.verdict for each in found.candidates]
    assert sorted(verdicts[:2]) == ["fastest", "slower"]
    assert verdicts[2].startswith("a KL of 0.1")
    timed = {each.verdict: each for each in found.candidates[:2]}
    best, other = timed["fastest"], timed["slower"]
    assert best.total_ms < other.total_ms  # type: ignore[operator]
    assert found.precision == best.precision
    assert list(tmp_path.iterdir()) == [tmp_path / "e"]
    kept = Artifact.open(tmp_path / "e").manifest.receipts["candidates"]
    assert [each["kl"] for each in kept] == [each.kl for each in found.candidates]
    assert Session.open(tmp_path / "e").generate("def f(").token_ids


def test_the_one_that_answers_soonest_is_kept(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(engines: Sequence[Path], *_: object) -> list[list[Sample]]:
        return [samples(ms) for ms in (20.0, 10.0)[: len(engines)]]

    monkeypatch.setattr(race, "race", given)
    result = CliRunner().invoke(cli, ["export", str(tiny_checkpoint), "-o", str(tmp_path / "e"), "--precision", "auto"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if "tokens/s" in line]
    assert [line.split()[0] for line in lines] == ["fp32", "int8"]
    assert "prefill   6400 tokens/s  decode   50.0 tokens/s  slower" in lines[0]
    assert "block_size=64" in lines[1]
    assert lines[1].endswith("fastest")
    manifest = Artifact.open(tmp_path / "e").manifest
    assert manifest.receipts["parity"]["stored"]["layers"]["bits"] == 8
    assert manifest.recipe == Artifact.open(tiny_checkpoint).manifest.recipe


def test_openvino_has_candidates_of_its_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    found = api.export(tiny("qwen2-tied"), tmp_path / "e", target="openvino", precision="auto")
    tried = [(each.precision, each.storage.get("activations")) for each in found.candidates]
    assert tried == [("fp32", None), ("int8", None), ("int8", "tokens"), ("int8", "full")]
    assert [each.verdict for each in found.candidates].count("fastest") == 1
    assert Session.open(tmp_path / "e").backend.name == "openvino"


def test_nothing_near_enough_leaves_no_folder(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"No precision is near enough.*int8: a KL of 0\.00.*larger --kl-bound"):
        api.export(tiny("qwen2-tied"), tmp_path / "e", precision="auto", kl_bound=1e-15)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"target": "gguf"}, "gguf has no candidates"), ({"storage": Storage(block_size=64)}, "auto settles how")],
)
def test_auto_is_refused_where_it_settles_nothing(
    tiny: Callable[[str], Path], tmp_path: Path, choice: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        api.export(tiny("qwen2-tied"), tmp_path / "e", precision="auto", **choice)  # type: ignore[arg-type]


def test_a_kl_bound_is_what_export_is_told() -> None:
    option = next(each for each in cli.commands["export"].params if each.name == "kl_bound")
    assert option.default == exports.KL_BOUND
