"""What is written for TensorRT where TensorRT is not, and what would be asked of it."""

from __future__ import annotations

import inspect
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from polygraphy.backend.trt import (
    CreateConfig,
    Profile,
    engine_bytes_from_network,
    network_from_onnx_path,
    set_decomposable_attentions,
)

from flabc import api, tensorrt_target
from flabc.artifact import Artifact
from flabc.errors import EngineError, ModelError, UnknownNameError, UsageError
from flabc.export import engine, tensorrt_engine, tensorrt_plan, tensorrt_rules
from flabc.export.precision import precision_named
from flabc.export.tensorrt_plan import BuildOptions, BuildPlan
from flabc.runtime.backend import Limits
from flabc.runtime.session import Session
from flabc.spec import LayerSpec, ModelSpec

MISSING = tensorrt_engine.missing()
only_without = pytest.mark.skipif(MISSING is None, reason="TensorRT is here, so that nothing is left out")

FLABC = [sys.executable, "-m", "flabc"]


def spec(positions: int = 4096) -> ModelSpec:
    """Layers of different heads, one without attention."""
    heads = [(4, 2), (0, 0), (2, 1)]
    layers = tuple(LayerSpec(num_attention_heads=q, num_key_value_heads=kv, intermediate_size=8) for q, kv in heads)
    return ModelSpec(
        family="llama",
        vocab_size=32,
        hidden_size=16,
        head_dim=4,
        tie_word_embeddings=True,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        layers=layers,
    )


def test_profiles_hold_prompts_and_single_tokens_for_every_layers_own_heads() -> None:
    plan = tensorrt_plan.plan(spec(), "fp16", BuildOptions(max_batch=4, max_input=100, max_length=256))
    serving, scoring = plan.engines
    prefill, decode = serving.profiles
    assert (prefill.shapes["input_ids"].min, prefill.shapes["input_ids"].max) == ((1, 1), (4, 100))
    assert (decode.shapes["input_ids"].min, decode.shapes["input_ids"].max) == ((1, 1), (4, 1))
    assert prefill.shapes["past_key_values.0.key"].max == (4, 2, 256, 4)
    assert decode.shapes["past_key_values.2.value"].opt == (4, 1, 256, 4)
    assert not any(name.startswith("past_key_values.1.") for name in prefill.shapes)
    assert scoring.profiles[0].shapes["input_ids"].max == (1, 256)


def test_without_a_length_the_models_positions_bound_it() -> None:
    assert tensorrt_plan.plan(spec(4096), "fp16", BuildOptions()).max_length == 2048
    assert tensorrt_plan.plan(spec(1000), "fp16", BuildOptions()).max_length == 960
    assert tensorrt_plan.plan(spec(300), "fp16", BuildOptions()).options.max_input == 256
    with pytest.raises(ModelError, match=r"at least 192\. Found: 100"):
        tensorrt_plan.plan(spec(100), "fp16", BuildOptions(), least_length=190)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_length": 200}, r"--max-length 200.*a multiple of 64 from 64 to 4096"),
        ({"max_length": 8192}, "--max-length 8192"),
        ({"max_length": 64, "max_input": 512}, "--max-input 512 is longer than a sequence"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(options: dict[str, int], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        tensorrt_plan.plan(spec(), "fp16", BuildOptions(**options))


@pytest.mark.parametrize("head_dim", [2, 64, 80, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_every_row_of_a_cache_lies_where_tensorrt_accepts_it(head_dim: int, heads: int) -> None:
    half_precision = 2
    assert heads * tensorrt_plan.PLACES_STEP * head_dim * half_precision % 256 == 0


def test_the_plan_is_written_and_read_back(tmp_path: Path) -> None:
    plan = tensorrt_plan.plan(spec(), "bf16", BuildOptions(timing_cache="/caches/timing file", strip_weights=True))
    plan.write(tmp_path)
    assert BuildPlan.model_validate_json((tmp_path / "build_plan.json").read_text()) == plan
    script = (tmp_path / "build.sh").read_text()
    subprocess.run(["sh", "-n", tmp_path / "build.sh"], check=True)
    commands = [shlex.split(line) for line in script.splitlines() if line.startswith("trtexec")]
    assert len(commands) == 2
    for words in commands:
        assert {"--timingCacheFile=/caches/timing file", "--stripWeights", "--stronglyTyped", "--noTF32"} <= set(words)
        assert not {"--fp16", "--bf16", "--int8", "--best"} & set(words)  # TensorRT 11 has them no more
    assert "--profile=1" in commands[0]
    assert "--minShapes=input_ids:1x1,write_indices:1" in script


def test_the_line_has_only_flags_that_were_asked_for() -> None:
    plain = " ".join(tensorrt_plan.plan(spec(), "fp16", BuildOptions()).commands())
    options = BuildOptions(version_compatible=True, hardware_compatible=True)
    both = " ".join(tensorrt_plan.plan(spec(), "fp16", options).commands())
    for flag in ("--versionCompatible", "--hardwareCompatibilityLevel=ampere+"):
        assert flag not in plain
        assert both.count(flag) == 2


def test_polygraphy_takes_what_it_is_given() -> None:
    """Its signatures and its profiles need no TensorRT."""
    options = BuildOptions(hardware_compatible=True, strip_weights=True, timing_cache="cache")
    plan = tensorrt_plan.plan(spec(), "fp16", options)
    levels = SimpleNamespace(HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"))
    arguments = tensorrt_engine.config_arguments(plan, levels)
    known = {*inspect.signature(CreateConfig.__init__).parameters, *inherited(CreateConfig)}
    assert {"profiles", "progress_monitor", *arguments} <= known
    assert "strongly_typed" in inspect.signature(network_from_onnx_path).parameters
    assert "save_timing_cache" in inspect.signature(engine_bytes_from_network).parameters
    assert list(inspect.signature(set_decomposable_attentions).parameters) == ["network"]
    made = tensorrt_engine.profiles(plan.engines[0])
    assert all(isinstance(profile, Profile) for profile in made)
    assert tuple(made[0]["input_ids"]) == ((1, 1), (1, 512), (8, 512))


def inherited(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}


def test_a_bar_for_the_outermost_phases_of_a_build(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flabc.console.PATIENCE_S", 0.0)
    phases = tensorrt_engine.Phases("model.plan")
    phases.start("building", None, 3)
    phases.start("inner", "building", 100)
    for phase in ("building", "inner", "building", "building"):
        phases.step(phase)
    phases.finish("inner")
    phases.finish("building")
    phases.start("failing", None, 5)
    phases.close()
    assert phases._open == {}
    shown = capsys.readouterr().err
    assert "model.plan: building" in shown
    assert "3/3" in shown
    assert "inner" not in shown


@pytest.fixture(scope="module")
def written(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[api.Exported, Path]:
    """A tiny model, exported for TensorRT."""
    out = tmp_path_factory.mktemp("exported") / "for-tensorrt"
    options = BuildOptions(max_batch=2, max_input=32, max_length=256)
    return api.export(tiny("llama-untied-biased"), out, target="tensorrt", build=options), out


@only_without
def test_graph_plan_and_proof_are_there_and_the_engine_is_said_to_be_missing(
    written: tuple[api.Exported, Path],
) -> None:
    done, out = written
    assert done.missing is not None
    assert "build.sh" in done.missing
    manifest = Artifact.open(out, "engine").manifest
    assert (manifest.target, manifest.receipts["parity"]["tensorrt"]["built"]) == ("tensorrt", False)
    assert manifest.receipts["parity"]["holds"]  # of the ONNX file, in ONNX Runtime
    assert {"model.onnx", "score.onnx", "build_plan.json", "build.sh"} <= set(manifest.files)
    for name in (engine.GRAPH, engine.SCORING_GRAPH):
        assert tensorrt_rules.violations(out / name) == []
    with pytest.raises(EngineError, match=r"no engine: model\.plan has not been built"):
        Session.open(out)


def test_the_graph_runs_in_onnx_runtime_with_its_fixed_cache(written: tuple[api.Exported, Path]) -> None:
    _, out = written
    session = onnxruntime.InferenceSession(str(out / engine.GRAPH), providers=["CPUExecutionProvider"])
    assert {given.shape[2] for given in session.get_inputs() if len(given.shape) == 4} == {256}
    opened = Session.open(out, backend="onnxruntime-static", limits=Limits(max_length=2048))
    assert opened.backend.limits.max_length == 256
    assert opened.generate("def f(x):").token_ids


def test_the_precision_is_one_that_can_be_exported_and_tensorrt_computes_in(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    known = tensorrt_target.precisions()
    assert known
    assert set(known) <= {"fp16", "bf16", "fp32"} & set(engine.PRECISIONS["onnx-standard"])
    with pytest.raises(UnknownNameError, match="precision 'int4'"):
        api.export(tiny("qwen2-tied"), tmp_path / "engine", target="tensorrt", precision="int4")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_the_rules(tiny: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    """Every family that TensorRT can have: nothing is cast in silence, whatever its norms, gates and multipliers."""
    for variant in ("granite-tied", "gemma3_text-tied", "starcoder2-tied", "phi3-partial", "llama-yarn"):
        folder, out = tiny(variant), tmp_path / variant
        out.mkdir()
        made = ModelSpec.from_config(json.loads((folder / "config.json").read_text()))
        engine.write(folder, made, out, "onnx-standard", precision_named(precision), cache_length=256)
        for name in (engine.GRAPH, engine.SCORING_GRAPH):
            assert tensorrt_rules.violations(out / name) == [], variant


def test_a_family_whose_attention_tensorrt_does_not_have_is_refused_whole(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"softcap is 50"):
        api.export(tiny("gemma2-tied"), tmp_path / "engine", target="tensorrt")
    assert not list(tmp_path.iterdir())


def flabc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FLABC, *map(str, arguments)], capture_output=True, text=True, timeout=600)


@only_without
def test_the_command_keeps_the_folder_says_why_and_exits_with_three(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    done = flabc(
        "export", tiny("qwen2-tied"), "--target", "tensorrt", "-o", tmp_path / "e", "--max-batch", "3", "--json"
    )
    assert done.returncode == 3
    assert "no TensorRT engine was built" in done.stderr
    assert "pip install 'flabc[tensorrt]'" in done.stderr
    assert json.loads(done.stdout)["parity"]["tensorrt"]["built"] is False
    assert json.loads((tmp_path / "e" / "build_plan.json").read_text())["options"]["max_batch"] == 3


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--max-batch", "4"], "--max-batch is for TensorRT. Expected: --target tensorrt. Found: --target onnx"),
        (["--target", "gguf", "--strip-weights", "--timing-cache", "x"], "--strip-weights, --timing-cache is for"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    tiny: Callable[[str], Path], tmp_path: Path, arguments: list[str], problem: str
) -> None:
    done = flabc("export", tiny("qwen2-tied"), "-o", tmp_path / "e", *arguments)
    assert done.returncode == 2
    assert problem in done.stderr
    assert not (tmp_path / "e").exists()
