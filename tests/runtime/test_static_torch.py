"""The static decoder against transformers: equal layers, uneven ones, ragged batches, tokens; on a GPU its graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flabc import artifact
from flabc.compress import checkpoint, load
from flabc.compress.model import cut_channels, cut_heads, cut_sub_blocks
from flabc.errors import EngineError, UnknownNameError
from flabc.runtime.backend import Limits, open_backend
from flabc.runtime.backends.decoder_weights import bytes_read, gathered, random_source
from flabc.runtime.backends.static_decoder import Captured, Inputs, StaticDecoder
from flabc.runtime.session import Session
from flabc.spec import LayerSpec, ModelSpec

VARIANTS = [
    "llama-tied",
    "llama-untied-biased",
    "llama-scaled",
    "llama-yarn",
    "qwen2-tied",
    "qwen2-untied",
    "qwen3-tied",
]

SPEC = ModelSpec(
    family="llama",
    vocab_size=96,
    hidden_size=32,
    head_dim=16,
    tie_word_embeddings=False,
    max_position_embeddings=600,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    flags={"attention_bias": False, "mlp_bias": False},
    layers=(
        LayerSpec(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48),
        LayerSpec(num_attention_heads=0, num_key_value_heads=0, intermediate_size=24),
        LayerSpec(num_attention_heads=2, num_key_value_heads=1, intermediate_size=0),
    ),
)


def opened(folder: Path, **limits: Any) -> Any:
    return open_backend("torch-static", folder, Session.open(folder).spec, Limits(**limits))


def theirs(folder: Path) -> Any:
    """Transformers' own model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


def check(folder: Path) -> None:
    """A ragged batch, pieces, and greedy tokens, all against transformers without a cache, row by row."""
    model = theirs(folder)
    ids = np.random.default_rng(3).integers(3, 500, (2, 40))

    def said(row: np.ndarray) -> Any:
        with torch.no_grad():
            return model(torch.from_numpy(row[None]), use_cache=False).logits[0].numpy()

    backend = opened(folder, max_batch=2, max_length=64)
    backend.start(2)
    found = backend.extend(ids[:, :20], np.array([6, 20]))
    np.testing.assert_allclose(found, [said(ids[0, :6])[-1], said(ids[1, :20])[-1]], atol=3e-4)
    rows = [list(ids[0, :6]), list(ids[1, :20])]
    for begin, counts in ((20, [1, 1]), (21, [3, 9]), (30, [1, 1])):  # a token each, ragged pieces, a token each
        new = ids[:, begin : begin + max(counts)]
        found = backend.extend(new, np.array(counts))
        rows = [row + list(new[at, :count]) for at, (row, count) in enumerate(zip(rows, counts, strict=True))]
        np.testing.assert_allclose(found, [said(np.array(row))[-1] for row in rows], atol=3e-4)
    np.testing.assert_allclose(backend.score(ids[:1]), said(ids[0])[None], atol=3e-4)
    prompt = torch.from_numpy(ids[:1, :12])
    wanted = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 12:]
    assert greedy(backend, ids[:1, :12], 16) == wanted.tolist()


def greedy(backend: Any, ids: np.ndarray, count: int) -> list[int]:
    """The tokens by ``next``, which never leave the device until they are all there."""
    decoder = backend._decoder
    new = torch.from_numpy(ids).to(decoder.device)
    last = torch.full((len(ids),), ids.shape[1] - 1, device=decoder.device)
    token = decoder.prompt(new, last).argmax(-1, keepdim=True)
    tokens, at = [int(token)], torch.full_like(token, ids.shape[1])
    decoder.begin(token, at)
    for step in range(1, count):
        tokens.append(int(decoder.next(1, ids.shape[1] + step)))
    return tokens


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_says_what_transformers_says(tiny: Callable[[str], Path], variant: str) -> None:
    check(tiny(variant))


@pytest.mark.parametrize("variant", ["llama-untied-biased", "qwen2-tied", "qwen3-tied"])
def test_layers_that_differ_say_what_their_module_says_in_transformers(
    tiny: Callable[[str], Path], tmp_path: Path, variant: str
) -> None:
    """No attention in the first layer, half the heads and a thin FFN in the second, no FFN in the last."""
    model = cut_channels(cut_sub_blocks(load.load(str(tiny(variant))), attention=[0], ffn=[2]), {1: range(0, 80, 2)})
    model = cut_heads(model, {1: [1]})
    with artifact.create(tmp_path / "uneven", "checkpoint") as draft:
        checkpoint.write(model, draft.path)
        draft.spec = model.spec
    assert not Session.open(tmp_path / "uneven").spec.is_uniform
    check(tmp_path / "uneven")


def test_every_way_of_attending_says_the_same() -> None:
    device = torch.device("cpu")
    wanted = tokens_of(random_decoder(device, graphs=False, attention="fused"), 60, 12)
    assert tokens_of(random_decoder(device, graphs=False, attention="products"), 60, 12) == wanted
    with pytest.raises(UnknownNameError, match="Did you mean 'products'"):
        random_decoder(device, graphs=False, attention="product")


def test_rows_that_leave_and_come_back_say_the_same(tiny: Callable[[str], Path]) -> None:
    folder = tiny("qwen2-tied")
    ids, ones = np.random.default_rng(4).integers(3, 500, (3, 12)), np.array([1, 1])
    backend = opened(folder, max_batch=3, max_length=32)
    backend.start(0)
    backend.join(ids, np.array([4, 8, 12]))
    saved = backend.save(2, 10)
    backend.keep([2, 0])
    after = backend.extend(ids[:2, :1], ones)
    backend.restore(saved, 9)
    last = backend.extend(ids[:1, :1], np.array([1]), first=2)
    model = theirs(folder)
    rows = [[*ids[2], ids[0, 0]], [*ids[0, :4], ids[1, 0]], [*ids[2, :9], ids[0, 0]]]
    with torch.no_grad():
        said = [model(torch.tensor([row])).logits[0, -1].numpy() for row in rows]
    np.testing.assert_allclose([*after, *last], said, atol=3e-4)


def test_what_it_cannot_do_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UnknownNameError, match=r"family of the static decoder 'gemma2'.*llama"):
        opened(tiny("gemma2-tied"))
    with pytest.raises(UnknownNameError, match="Did you mean 'float16'"):
        opened(tiny("qwen2-tied"), dtype="flaot16")
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="CUDA was asked for"):
            opened(tiny("qwen2-tied"), provider="cuda")
        with pytest.raises(EngineError, match="CUDA graphs were asked for"):
            random_decoder(torch.device("cpu"), graphs=True)


def random_decoder(device: torch.device, **how: Any) -> StaticDecoder:
    weights = gathered(SPEC, random_source(torch.float32, device))
    return StaticDecoder(SPEC, weights, 3, 600, graph_prompts=how["graphs"], **how)


def tokens_of(decoder: StaticDecoder, prompt: int, count: int) -> list[list[int]]:
    """Greedy tokens of three rows."""
    ids = torch.randint(0, 96, (3, prompt), generator=torch.Generator().manual_seed(1)).to(decoder.device)
    last = torch.full((3,), prompt - 1, device=decoder.device)
    token = decoder.prompt(ids, last).argmax(-1, keepdim=True)
    decoder.begin(token, torch.full_like(token, prompt))
    steps = [token, *(decoder.next(3, prompt + step).clone() for step in range(1, count))]
    return torch.cat(steps, 1).tolist()


def test_bytes_are_those_of_the_weights_that_a_step_reads_and_of_the_cache() -> None:
    decoder = random_decoder(torch.device("cpu"), graphs=False)
    assert bytes_read(decoder.weights) == 4 * (SPEC.num_parameters - SPEC.vocab_size * SPEC.hidden_size)
    cache = sum(part.nbytes for part in (*decoder.keys, *decoder.values))
    assert cache == 3 * 640 * SPEC.kv_bytes_per_token(4)  # 600 places, as kernels want them


class Recorded:
    """Stands in for a CUDA graph: what was recorded is done at each replay, and not before."""

    def __init__(self, step: Callable[[], torch.Tensor], logits: torch.Tensor) -> None:
        self._step, self._logits = step, logits

    def replay(self) -> None:
        self._logits.copy_(self._step())


class Stopwatch:
    """Stands in for CUDA's events: as if time stood still."""

    def __init__(self, **_: Any) -> None:
        self.record = self.synchronize = lambda: None

    def elapsed_time(self, _: Stopwatch) -> float:
        return 0.0


def test_graphs_are_kept_by_shape_and_reach_and_trying_them_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bookkeeping around graphs, with stand-ins for them; the graphs themselves need a GPU."""
    device = torch.device("cpu")
    wanted = tokens_of(random_decoder(device, graphs=False), 250, 16)
    decoder = random_decoder(device, graphs=False)

    def capture(shape: tuple[int, int, int], inputs: Inputs, attention: str) -> Captured:
        logits = torch.zeros(shape[0], SPEC.vocab_size)
        return Captured(Recorded(lambda: decoder._stepped(shape, inputs, attention), logits), logits, attention)

    monkeypatch.setattr(torch.cuda, "Event", Stopwatch)
    monkeypatch.setattr(decoder, "_capture", capture)
    decoder.graphs = decoder.graph_prompts = True
    assert tokens_of(decoder, 250, 16) == wanted
    assert set(decoder._captured) == {(3, 250, 0), (3, 1, 256), (3, 1, 512)}
    assert set(decoder.attentions) == {"3x256", "3x512"}
    monkeypatch.setattr(
        decoder, "_replayed_ms", lambda captured, _: {"fused": 2.0, "products": 1.0}[captured.attention]
    )
    assert tokens_of(decoder, 520, 4)
    assert decoder.attentions["3x640"] == "products"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_graphs_say_what_steps_without_them_say() -> None:
    """Over the edge of a reach, so that two graphs take turns; and a second time, over a used cache."""
    device = torch.device("cuda", 0)
    graphed = random_decoder(device, graphs=True)
    wanted = tokens_of(random_decoder(device, graphs=False, fused=True), 250, 16)
    assert tokens_of(graphed, 250, 16) == wanted
    assert tokens_of(graphed, 250, 16) == wanted
    assert len(graphed._captured) == 3  # the prompt, and two reaches


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_a_gpu_says_what_the_processor_says(tiny: Callable[[str], Path]) -> None:
    ids = np.random.default_rng(3).integers(3, 500, (1, 12))
    cpu, gpu = (opened(tiny("qwen2-tied"), provider=provider) for provider in ("cpu", "cuda"))
    assert greedy(gpu, ids, 16) == greedy(cpu, ids, 16)
