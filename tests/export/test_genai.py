"""onnxruntime-genai runs our engines and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

genai = pytest.importorskip("onnxruntime_genai")


@pytest.mark.parametrize("prompt", ["def fibonacci(n):", "import os\nclass A"])
@pytest.mark.parametrize("engine", ["tiny_engine", "tiny_dense_engine"])
def test_greedy_tokens_are_the_same(engine: str, prompt: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(engine)
    session = Session.open(folder)
    ids = session.encode(prompt)
    ours = session.generate(prompt, SamplingParams(max_tokens=24)).token_ids
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 24, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    theirs: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert [i for i in theirs if i not in session.codec.eos_ids] == [i for i in ours if i not in session.codec.eos_ids]
