"""Half precision, and the details of blocks: against torch, and against what the files hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from flabc import api
from flabc.errors import EngineError, ParityError, UnknownNameError, UsageError
from flabc.export import engine, parity, twin
from flabc.export.precision import PRECISIONS, Blocks, Precision, Storage, precision_named
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session
from flabc.spec import ModelSpec


def kinds(graph: Path) -> dict[str, str]:
    """The element type of every input, output and initializer, as the onnx library reads it."""
    model = onnx.load(str(graph), load_external_data=False).graph
    values = {value.name: value.type.tensor_type.elem_type for value in [*model.input, *model.output]}
    values |= {tensor.name: tensor.data_type for tensor in model.initializer}
    return {name: onnx.TensorProto.DataType.Name(kind) for name, kind in values.items()}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_family_says_nearly_the_same_in_half_precision(
    every_tiny: Path, tmp_path: Path, half_target: str, precision: str
) -> None:
    found = api.export(every_tiny, tmp_path / "e", target=half_target, precision=precision)
    assert found.parity["holds"]
    assert 0 < found.parity["kl"] < parity.BOUNDS[precision]["kl_bound"]
    assert found.parity.get("computed_in") == ("fp32" if precision == "bf16" else None)
    for name in (engine.GRAPH, engine.SCORING_GRAPH):
        onnx.checker.check_model(str(tmp_path / "e" / name))
        held = kinds(tmp_path / "e" / name)
        assert held.pop("logits") == "FLOAT"
        assert set(held.values()) == {"INT64", "FLOAT16" if precision == "fp16" else "BFLOAT16"}


def test_half_an_engine_is_half_as_large_and_generates(tiny_checkpoint: Path, tmp_path: Path, half_target: str) -> None:
    full, half = (api.export(tiny_checkpoint, tmp_path / p, target=half_target, precision=p) for p in ("fp32", "fp16"))
    sizes = [(found.path / engine.DATA).stat().st_size for found in (full, half)]
    assert sizes[1] < 0.51 * sizes[0]
    short = SamplingParams(max_tokens=16)  # sooner or later a random model meets a tie
    texts = [Session.open(found.path).generate("def fibonacci(n):", short).text for found in (full, half)]
    assert texts[0] == texts[1]


def test_the_twin_holds_the_numbers_of_the_engine(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny("qwen2-tied")
    spec = ModelSpec.from_config(json.loads((folder / "config.json").read_text()))
    made, other = tmp_path / "bf16", tmp_path / "twin"
    made.mkdir(), other.mkdir()
    engine.write(folder, spec, made, precision=PRECISIONS["bf16"])
    twin.write(made, other)
    assert [file.name for file in other.glob("*.data")] == [engine.DATA]  # the weights once
    ours, theirs = (onnx.load(str(at / engine.GRAPH)).graph for at in (made, other))
    assert [node.op_type for node in ours.node] == [node.op_type for node in theirs.node]
    for mine, wide in zip(ours.initializer, theirs.initializer, strict=True):
        numbers = onnx.numpy_helper.to_array(wide)
        if mine.data_type == onnx.TensorProto.BFLOAT16:
            assert numbers.dtype == np.float32
            held = np.frombuffer(mine.raw_data, ml_dtypes.bfloat16).reshape(numbers.shape)
            np.testing.assert_array_equal(numbers, held.astype(np.float32))


def test_a_wrong_number_in_a_bf16_engine_is_caught_by_its_twin(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = engine.write

    def damaged(checkpoint: Path, spec: ModelSpec, out: Path, *others: object) -> None:
        true(checkpoint, spec, out, *others)  # type: ignore[arg-type]
        file = out / engine.DATA
        file.write_bytes(bytes(len(file.read_bytes())))

    monkeypatch.setattr(engine, "write", damaged)
    with pytest.raises(ParityError):
        api.export(tiny("qwen2-tied"), tmp_path / "e", precision="bf16")


def test_a_bf16_engine_on_a_cpu_is_refused_with_what_to_do(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    api.export(tiny("qwen2-tied"), tmp_path / "e", precision="bf16")
    with pytest.raises(EngineError, match=r"CPUExecutionProvider lacks an operation.*export the engine in fp32"):
        Session.open(tmp_path / "e")


@pytest.mark.parametrize(
    "storage",
    [
        {"block_size": 16},
        {"block_size": 64},
        {"symmetric": False},
        {"embedding": "full", "head": "int8"},
        {"embedding": "int4", "head": "full"},
        {"embedding": "full", "head": "full"},
        {"compute": "fp16"},
        {"compute": "bf16"},
    ],
)
@pytest.mark.parametrize("name", ["qwen2-tied", "llama-untied-biased"])
def test_details_of_int8(tiny: Callable[[str], Path], tmp_path: Path, name: str, storage: dict[str, object]) -> None:
    asked = Storage.model_validate(storage)
    out = tmp_path / "e"
    found = api.export(tiny(name), out, precision="int8", storage=asked)
    assert found.parity["holds"]
    wanted = precision_named("int8", asked)
    stored = found.parity["stored"]
    assert stored["layers"] == {"bits": 8, "block_size": wanted.layers.block_size, "symmetric": asked.symmetric is None}  # type: ignore[union-attr]
    held = kinds(out / engine.GRAPH)
    outer = {
        part: f"{engine_name}.packed" in held
        for part, engine_name in (("embedding", "model.embed_tokens"), ("head", "lm_head"))
    }
    assert outer["embedding"] == (asked.embedding != "full")
    separate = name == "llama-untied-biased" or asked.embedding != asked.head
    assert outer["head"] == (asked.head != "full" and separate)


def test_what_a_precision_with_other_details_is() -> None:
    found = precision_named("int4", Storage(block_size=128, symmetric=False, head="full", compute="fp16"))
    blocks = Blocks(4, 128, symmetric=False)
    assert found == Precision("fp16", layers=blocks, embedding=Blocks(8, 128, symmetric=False), head=None)
    assert precision_named("int4", Storage()) is PRECISIONS["int4"]


@pytest.mark.parametrize(
    ("name", "storage", "error", "message"),
    [
        ("fp16", {"block_size": 32}, UsageError, "fp16 stores nothing in few bits"),
        ("int8", {"block_size": 33}, UsageError, r"No kernel takes such blocks.*\(16, 32.*Found: 33"),
        ("int8", {"compute": "fp61"}, UnknownNameError, "Did you mean 'fp16'"),
        ("int8", {"head": "int16"}, UnknownNameError, "precision of the output matrix 'int16'"),
        ("itn8", {}, UnknownNameError, "Did you mean 'int8'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, storage: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        precision_named(name, Storage.model_validate(storage))


def test_details_are_not_for_gguf(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="settled by its precision"):
        api.export(tiny("qwen2-tied"), tmp_path / "g", target="gguf", storage=Storage(block_size=64))
