from __future__ import annotations

from pathlib import Path

import pytest

from flabc.errors import EngineError
from flabc.runtime import doctor
from flabc.runtime.measure import bench
from flabc.runtime.measure.result import Sample, Workload

SMALL = Workload(prompt_tokens=8, output_tokens=4, rounds=1)
TEXT = "def f(a, b):\n    return a * b + 1\n"


def test_a_sample_derives_its_figures() -> None:
    sample = Sample(ttft_ms=100, token_ms=(10, 20, 30))
    assert (sample.total_ms, sample.tpot_ms) == (160, 20)
    assert sample.tokens_per_s == pytest.approx(4 / 0.160)


def test_runs_are_interleaved_so_that_drift_cancels(
    tiny_engine: Path, tiny_dense_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    true = bench.Process.run

    def run(self: bench.Process, text: str, workload: Workload) -> Sample:
        order.append(self.folder.name)
        return true(self, text, workload)

    monkeypatch.setattr(bench.Process, "run", run)
    monkeypatch.setattr(bench, "_warm_up", lambda *_: 0)
    result = bench.bench(tiny_engine, tiny_dense_engine, SMALL.model_copy(update={"rounds": 2}), [TEXT], [])
    a, b = tiny_dense_engine.name, tiny_engine.name
    assert order == [a, b, b, a] * 2
    assert result.baseline.perplexity is None
    assert result.baseline.peak_rss_mib > 20


def test_a_worker_that_dies_is_told_with_its_exit_code(tiny_engine: Path) -> None:
    process = bench.Process(tiny_engine, SMALL)
    process._pipe.kill()
    with pytest.raises(EngineError, match="exit code -9"):
        process.run(TEXT, SMALL)
    process.close()


def test_a_text_too_short_for_the_prompt_is_refused(tiny_engine: Path) -> None:
    process = bench.Process(tiny_engine, SMALL)
    with pytest.raises(EngineError, match="8 tokens"):
        process.run("a", SMALL)
    process.close()


def test_an_engine_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is no model"):
        bench.Process(tmp_path, SMALL)


def test_two_onnxruntimes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda _: "1.0")
    (clash,) = [finding for finding in doctor.examine() if finding.name == "clashing packages"]
    assert clash.status == "problem"
    assert "pip uninstall" in clash.fix


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda _: None)
    findings = {finding.name: finding for finding in doctor.examine()}
    for extra in doctor.EXTRAS:
        assert findings[f"extra {extra}"].fix == f"pip install 'flabc[{extra}]'"
    assert findings["clashing packages"].status == "ok"
