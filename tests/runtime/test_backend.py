"""Both backends keep one contract, and neither answers with less than was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from flabc import api
from flabc.errors import EngineError, UnknownNameError
from flabc.runtime.backend import Backend, Limits
from flabc.runtime.backends.ort_state import cache_dtype
from flabc.runtime.session import Session

IDS = np.random.default_rng(1).integers(3, 500, (2, 9))


@pytest.fixture(params=["tiny_engine", "tiny_standard_engine", "tiny_openvino_engine", "tiny_checkpoint"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Engines for ONNX Runtime, then a checkpoint for torch."""
    found: Path = request.getfixturevalue(request.param)
    return found


def opened(folder: Path, **limits: Any) -> Backend:
    return Session.open(folder, limits=Limits(**limits)).backend


@pytest.mark.parametrize("engine", ["tiny_engine", "tiny_standard_engine", "tiny_openvino_engine"])
def test_backends_agree_on_a_ragged_batch(engine: str, tiny_checkpoint: Path, request: pytest.FixtureRequest) -> None:
    answers = []
    for folder in (request.getfixturevalue(engine), tiny_checkpoint):
        backend = opened(folder, max_batch=2)
        backend.start(2)
        backend.extend(IDS, np.array([4, 9]))
        answers.append(backend.extend(IDS[:, :1], np.array([1, 1])))
    np.testing.assert_allclose(*answers, atol=2e-4)


@pytest.mark.parametrize(
    "variant", ["gemma2-tied", "gemma3_text-tied", "granite-tied", "mistral-untied", "phi3-untied", "starcoder2-tied"]
)
def test_torch_says_in_a_ragged_batch_what_transformers_says_of_each_row(
    tiny: Callable[[str], Path], variant: str
) -> None:
    """With prompts longer than the window, tokens behind padding, and a sequence that joins."""
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(5).integers(3, 500, (3, 44))
    backend = opened(tiny(variant), max_batch=3)
    backend.start(0)
    first = backend.join(ids[:2, :40], np.array([5, 40]))
    second = backend.extend(ids[:2, 40:41], np.array([1, 1]))
    joined = backend.join(ids[2:, :9], np.array([9]))
    third = backend.extend(ids[:, 41:42], np.array([1, 1, 1]))
    theirs = AutoModelForCausalLM.from_pretrained(tiny(variant), dtype=torch.float32).eval()
    rows = [np.concatenate([ids[0, :5], ids[0, 40:42]]), ids[1, :42], np.concatenate([ids[2, :9], ids[2, 41:42]])]
    with torch.no_grad():
        said = [theirs(torch.from_numpy(row[None]), use_cache=False).logits[0].numpy() for row in rows]
    np.testing.assert_allclose(first, [said[0][4], said[1][39]], atol=2e-4)
    np.testing.assert_allclose(second, [said[0][5], said[1][40]], atol=2e-4)
    np.testing.assert_allclose(joined, [said[2][8]], atol=2e-4)
    np.testing.assert_allclose(third, [each[-1] for each in said], atol=2e-4)


VARIED = ["gemma2-tied", "starcoder2-tied"]


@pytest.fixture(params=[*VARIED, "tiny_engine", "tiny_standard_engine", "tiny_openvino_engine", "tiny_checkpoint"])
def with_reference(
    request: pytest.FixtureRequest, tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An engine, or a checkpoint, and the checkpoint that transformers opens."""
    if request.param not in VARIED:
        return request.getfixturevalue(request.param), request.getfixturevalue("tiny_checkpoint")
    out = tmp_path_factory.mktemp("varied") / "engine"
    api.export(tiny(request.param), out)
    return out, tiny(request.param)


def test_one_sequence_grows_in_pieces_while_others_run(with_reference: tuple[Path, Path]) -> None:
    """What chunked prefill and reused prefixes do, against transformers on each whole sequence."""
    from transformers import AutoModelForCausalLM

    engine, checkpoint = with_reference
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def said(*ids: int) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()

    ids = np.random.default_rng(8).integers(3, 500, 80).tolist()
    one, two, long = ids[:5], ids[5:12], ids[20:60]
    backend = opened(engine, max_batch=4, max_length=64)
    backend.start(0)
    backend.join(np.array([[*one, 0, 0], two]), np.array([5, 7]))
    backend.join(np.array([long[:9]]), np.array([9]))
    ones = np.array([1, 1])
    for begin, end in ((9, 26), (26, 27), (27, 40)):  # the others get a token between any two pieces
        one, two = [*one, ids[begin]], [*two, ids[end]]
        both = backend.extend(np.array([[ids[begin]], [ids[end]]]), ones)
        np.testing.assert_allclose(both, [said(*one), said(*two)], atol=5e-4)
        piece = backend.extend(np.array([long[begin:end]]), np.array([end - begin]), first=2)
        np.testing.assert_allclose(piece[0], said(*long[:end]), atol=5e-4)
    saved = backend.save(2, 33)
    backend.keep([1, 2])
    backend.restore(saved, 30)
    branch = [*long[:30], 77, 78, 79]
    np.testing.assert_allclose(
        backend.extend(np.array([branch[30:]]), np.array([3]), first=2)[0], said(*branch), atol=5e-4
    )
    last = backend.extend(np.array([[9], [8], [7]]), np.array([1, 1, 1]))
    np.testing.assert_allclose(last, [said(*two, 9), said(*long, 8), said(*branch, 7)], atol=5e-4)


def test_a_restored_sequence_takes_a_place_too(folder: Path) -> None:
    backend = opened(folder, max_batch=1)
    backend.start(1)
    backend.extend(IDS[:1], np.array([9]))
    with pytest.raises(EngineError, match=r"batch of 2.*at most 1"):
        backend.restore(backend.save(0, 9), 9)


def test_a_static_cache_takes_ragged_chunks_up_to_its_last_place(
    tiny_standard_engine: Path, tiny_checkpoint: Path
) -> None:
    """Rows grow by different numbers of tokens at once; padding never falls on what another step has written."""
    ids = np.random.default_rng(2).integers(3, 500, (2, 20))
    said = opened(tiny_checkpoint).score(ids)
    backend = opened(tiny_standard_engine, max_batch=2, max_length=20)
    backend.start(2)
    lengths = np.zeros(2, int)
    for counts in ([5, 2], [1, 9], [6, 1], [7, 2], [1, 6]):
        chunk = np.zeros((2, max(counts)), np.int64)
        for row, count in enumerate(counts):
            chunk[row, :count] = ids[row, lengths[row] : lengths[row] + count]
        lengths += counts
        found = backend.extend(chunk, np.array(counts))
        np.testing.assert_allclose(found, said[[0, 1], lengths - 1], atol=2e-4)
    assert lengths.tolist() == [20, 20]


def test_logits_that_were_given_out_do_not_change_later(folder: Path) -> None:
    backend = opened(folder)
    backend.start(1)
    first = backend.extend(IDS[:1], np.array([9]))
    kept = first.copy()
    backend.extend(IDS[1:, :1], np.array([1]))
    np.testing.assert_array_equal(first, kept)


def test_scoring_leaves_the_cache_alone(folder: Path) -> None:
    answers = []
    for between in (False, True):
        backend = opened(folder)
        backend.start(1)
        backend.extend(IDS[:1], np.array([9]))
        if between:
            backend.score(IDS)
        answers.append(backend.extend(IDS[1:, :1], np.array([1])))
    np.testing.assert_array_equal(*answers)


def test_a_sequence_longer_than_the_limit_is_refused(folder: Path) -> None:
    backend = opened(folder, max_length=9)
    backend.start(1)
    backend.extend(IDS[:1], np.array([9]))
    with pytest.raises(EngineError, match=r"grow to 10 tokens.*at most 9"):
        backend.extend(IDS[:1, :1], np.array([1]))


def test_a_batch_larger_than_the_limit_is_refused(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    for folder in (tiny_engine, tiny_checkpoint):
        with pytest.raises(EngineError, match=r"batch of 3.*at most 2"):
            opened(folder, max_batch=2).start(3)


def test_a_running_batch_takes_one_token_at_a_time(tiny_engine: Path) -> None:
    backend = opened(tiny_engine, max_batch=2)
    backend.start(2)
    backend.extend(IDS, np.array([4, 9]))
    with pytest.raises(EngineError, match="one token at a time"):
        backend.extend(IDS, np.array([1, 1]))


def test_unknown_names_get_a_guess(tiny_engine: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'onnxruntime'"):
        Session.open(tiny_engine, backend="onnxruntim")
    with pytest.raises(UnknownNameError, match="Did you mean 'cpu'"):
        opened(tiny_engine, provider="cpuu")


def test_a_graph_that_onnxruntime_refuses_is_named(tiny_engine: Path, tmp_path: Path) -> None:
    from flabc.runtime.backend import open_backend

    spec = Session.open(tiny_engine).spec
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"cannot open .*model\.onnx"):
        open_backend("onnxruntime", tmp_path, spec, Limits())


def test_asking_for_cuda_is_never_answered_with_the_cpu(folder: Path) -> None:
    if torch.cuda.is_available() or "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    with pytest.raises(EngineError, match="CUDA"):
        opened(folder, provider="cuda")


def test_nor_is_asking_for_tensorrt(tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "TensorrtExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has TensorRT")
    with pytest.raises(EngineError, match="no working TensorrtExecutionProvider"):
        opened(tiny_engine, provider="tensorrt")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    with pytest.raises(EngineError, match="no working CUDAExecutionProvider"):  # for what TensorRT leaves
        opened(tiny_engine, provider="tensorrt")
    with pytest.raises(UnknownNameError, match="provider 'tensorrt'"):  # torch has none
        opened(tiny_checkpoint, provider="tensorrt")


def test_a_provider_that_is_listed_but_does_not_load_is_told(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has CUDA")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all that onnxruntime says before it takes the CPU
        with pytest.raises(EngineError, match=r"no working CUDA.*Found: CPUExecutionProvider"):
            opened(tiny_engine, provider="cuda")


def test_a_cache_in_bfloat16_is_refused_with_what_runs_it() -> None:
    given = SimpleNamespace(name="past_key_values.0.key", type="tensor(bfloat16)")
    with pytest.raises(EngineError, match=r"TensorRT or onnxruntime-genai.*Found: bfloat16.*fp16"):
        cache_dtype(SimpleNamespace(get_inputs=lambda: [given]))
