"""onnxruntime-genai runs our engines and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from flabc.compress.model import CausalLM
from flabc.export.engine import write
from flabc.runtime.backend import Limits, open_backend
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session
from flabc.runtime.text import TextCodec

genai = pytest.importorskip("onnxruntime_genai")


PROMPTS = ("def fibonacci(n):", "import os\nclass A")


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """The answer of onnxruntime-genai, which stops before or at an end token."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + count, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def check(session: Session, folder: Path, prompt: str) -> None:
    ids = session.encode(prompt)
    ours = session.generate(prompt, SamplingParams(max_tokens=24)).token_ids
    theirs = greedy(folder, ids, 24)
    eos = session.codec.eos_ids
    assert [i for i in theirs if i not in eos] == [i for i in ours if i not in eos]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("engine", ["tiny_engine", "tiny_dense_engine"])
def test_greedy_tokens_are_the_same(engine: str, prompt: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(engine)
    check(Session.open(folder), folder, prompt)


def test_layers_may_differ_in_heads_and_lack_attention(uneven: tuple[CausalLM, Path], tmp_path: Path) -> None:
    model, checkpoint = uneven
    folder = tmp_path / "engine"
    folder.mkdir()
    write(checkpoint, model.spec, folder)
    session = Session(open_backend("onnxruntime", folder, model.spec, Limits(max_length=64)), TextCodec(folder))
    check(session, folder, PROMPTS[0])
