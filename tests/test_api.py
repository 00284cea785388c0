"""The Python API: exported names, and the whole walk through it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import flabc
from flabc import api
from flabc.artifact import Artifact
from flabc.compress import retraining
from flabc.errors import ArtifactError, ModelError, UnknownNameError, UsageError
from flabc.recipe import load as load_recipe
from flabc.recipe import parse
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.measure.result import Workload
from flabc.spec import LayerSpec, ModelSpec


def test_every_exported_name_is_there_and_documented() -> None:
    for module in (flabc, api):
        for name in module.__all__:
            found = getattr(module, name)
            assert isinstance(found, str) or found.__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flabc.nonsense  # noqa: B018


def test_inspect_counts_what_transformers_counts(any_tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = api.inspect(str(any_tiny))
    assert found.total_parameters == AutoModelForCausalLM.from_pretrained(any_tiny).num_parameters()
    assert found.savings["one layer"] > 0


def test_compress_reaches_the_target_and_records_itself(tiny_checkpoint: Path) -> None:
    manifest = Artifact.open(tiny_checkpoint, "checkpoint").manifest
    assert manifest.recipe is not None
    assert [stage["stage"] for stage in manifest.recipe["stages"]] == ["vocab", "layers", "widths"]
    stages = manifest.receipts["stages"]
    assert [receipt["stage"] for receipt in stages] == ["vocab", "layers", "widths"]
    assert manifest.spec == ModelSpec.from_config(json.loads((tiny_checkpoint / "config.json").read_text()))
    assert stages[-1]["parameters"] == manifest.spec.num_parameters
    assert manifest.receipts["quality"]["calibration"] != manifest.receipts["quality"]["heldout"]


def test_the_target_is_reached_from_below_by_less_than_a_step(tiny_checkpoint: Path, tiny: object) -> None:
    dense = api.inspect(str(tiny("qwen2-tied"))).total_parameters  # type: ignore[operator]
    spec = Artifact.open(tiny_checkpoint).manifest.spec
    assert spec is not None
    step = 8 * 3 * spec.hidden_size * len(spec.layers)
    assert 0.7 * dense - step <= spec.num_parameters <= 0.7 * dense


def test_compress_is_repeatable(tiny: object, tiny_recipe: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    api.compress(str(tiny("qwen2-tied")), tiny_recipe, tmp_path / "again")  # type: ignore[operator]
    first, second = (Artifact.open(path).manifest.files for path in (tiny_checkpoint, tmp_path / "again"))
    assert first == second


def test_a_dry_run_writes_nothing(tiny: object, tiny_recipe: Path, tmp_path: Path) -> None:
    done = api.compress(str(tiny("llama-tied")), tiny_recipe, None)  # type: ignore[operator]
    assert done.path is None
    assert done.spec.num_parameters < done.dense.num_parameters
    assert not list(tmp_path.iterdir())


def test_a_dry_run_does_not_train(
    tiny: object, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(*_: object) -> None:
        raise AssertionError("it trains")

    content = load_recipe(tiny_recipe).model_dump(mode="json", exclude_defaults=True)
    stages = json.loads(tiny_recipe.read_text())["stages"]
    more = parse({**content, "stages": [{"stage": "recover"}, *stages]}, "more")
    monkeypatch.setattr(retraining, "_trained", trained)
    done = api.compress(str(tiny("llama-tied")), more, None)  # type: ignore[operator]
    assert [stage["stage"] for stage in done.stages] == ["vocab", "layers", "widths"]
    assert "does not train" in capsys.readouterr().err


def test_a_full_folder_is_refused_before_any_work(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="--force"):
        api.compress("no-such-model", tiny_recipe, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_export_carries_the_proof_on(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    manifest = Artifact.open(tiny_engine, "engine").manifest
    assert manifest.receipts["parity"]["holds"] is True
    assert manifest.receipts["parity"]["greedy_steps"] == 64
    assert manifest.recipe == Artifact.open(tiny_checkpoint).manifest.recipe


def test_evaluate_agrees_between_torch_and_the_engine(tiny_checkpoint: Path, tiny_engine: Path) -> None:
    result = api.evaluate(tiny_engine, EvalOptions(limit=3), baseline=tiny_checkpoint)
    perplexity = result.rows[0]
    assert perplexity.baseline is not None
    assert perplexity.target.n == 3
    assert perplexity.target.value == pytest.approx(perplexity.baseline.value, rel=1e-4)


def test_an_evaluation_is_no_benchmark(tiny_engine: Path, tmp_path: Path) -> None:
    api.evaluate(tiny_engine, EvalOptions(limit=1), output=tmp_path / "report")
    with pytest.raises(ArtifactError, match=r"is no benchmark of two engines\. Expected: bench\.json"):
        api.read_bench(tmp_path / "report")


def test_an_unknown_task_is_told(tiny_engine: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'perplexity'"):
        api.evaluate(tiny_engine, EvalOptions(task="perplexty"))


def test_engines_that_are_never_opened_are_not_measured(
    tiny_engine: Path, tiny_dense_engine: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"at least 1\. Found: 0"):
        api.bench(tiny_engine, tiny_dense_engine, tmp_path / "report", openings=0)


def test_bench_measures_both_sides_alike(tiny_engine: Path, tiny_dense_engine: Path, tmp_path: Path) -> None:
    workload = Workload(prompt_tokens=16, output_tokens=8, rounds=2)
    done = api.bench(tiny_engine, tiny_dense_engine, tmp_path / "report", workload=workload, openings=2)
    result = api.read_bench(done.path)
    assert result.openings == 2
    for side in (result.baseline, result.candidate):
        assert len(side.samples) == 8
        assert all(len(sample.token_ms) == 7 for sample in side.samples)
        assert side.perplexity is not None
    assert result.baseline.perplexity.bytes == result.candidate.perplexity.bytes  # type: ignore[union-attr]
    assert done.table["parameters"]["ratio"] < 1
    assert "<svg" in done.html.read_text(encoding="utf-8")


def test_a_model_too_short_to_be_checked_is_refused(tmp_path: Path, short_model: Path) -> None:
    with pytest.raises(ModelError, match=r"at least 192.*Found: 64"):
        api.export(short_model, tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_savings_are_of_each_layers_own_sizes() -> None:
    """By hand: a channel of a Llama's FFN is three rows of hidden_size."""
    sizes = ((6, 2, 256), (0, 0, 128), (3, 1, 32))
    layers = tuple(
        LayerSpec(num_attention_heads=heads, num_key_value_heads=groups, intermediate_size=width)
        for heads, groups, width in sizes
    )
    spec = ModelSpec(
        family="llama",
        hidden_size=48,
        head_dim=16,
        vocab_size=700,
        layers=layers,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        flags={"attention_bias": False, "mlp_bias": False},
    )
    found = api.savings(spec)
    gone = 48  # the norm before a sub-block goes with all of it
    assert found["64 FFN channels in every layer"] == 3 * 48 * (64 + 64 + 32) + gone
    group = 3 * 16 * 48 * 2 + 2 * 16 * 48  # of q and o, and of k and v
    assert found["one attention group in every layer"] == 2 * group + gone
