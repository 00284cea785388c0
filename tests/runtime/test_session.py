from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flabc.errors import ArtifactError, EngineError
from flabc.runtime.backend import Limits
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def session(tiny_engine: Path) -> Session:
    return Session.open(tiny_engine)


def test_greedy_tokens_are_those_of_transformers(session: Session, tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    for opened in (session, Session.open(tiny_checkpoint)):
        assert list(opened.generate(PROMPT, SamplingParams(max_tokens=32)).token_ids) == expected


def test_streaming_joined_is_the_whole_answer(session: Session) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=3)
    whole = session.generate(PROMPT, params)
    chunks = list(session.stream(PROMPT, params))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(i for chunk in chunks for i in chunk.token_ids) == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason


def test_a_stop_text_ends_the_answer_before_itself(session: Session) -> None:
    free = session.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True)).text
    stop = free[5:8]
    stopped = session.generate(PROMPT, SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop,)))
    assert stopped.text == free[: free.find(stop)]
    assert stopped.finish_reason == "stop"


def test_the_end_token_ends_and_can_be_ignored(session: Session) -> None:
    first = session.generate(PROMPT, SamplingParams(max_tokens=1)).token_ids[0]
    ids = session.codec.eos_ids
    try:
        session.codec.eos_ids = frozenset({first})
        ended = session.generate(PROMPT, SamplingParams(max_tokens=8))
        ignored = session.generate(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True))
    finally:
        session.codec.eos_ids = ids
    assert (ended.token_ids, ended.finish_reason) == ((first,), "stop")
    assert (len(ignored.token_ids), ignored.finish_reason) == (8, "length")


def test_one_answer_leaves_nothing_behind_for_the_next(session: Session) -> None:
    first = session.generate(PROMPT)
    session.generate("something else entirely, and longer than before")
    assert session.generate(PROMPT) == first


def test_limits_are_kept_and_told(tiny_engine: Path) -> None:
    short = Session.open(tiny_engine, limits=Limits(max_length=12))
    assert len(short.generate("a", SamplingParams(max_tokens=99, ignore_eos=True)).token_ids) <= 12
    with pytest.raises(EngineError, match=r"fewer than 12.*max-length"):
        short.generate(PROMPT * 9)
    with pytest.raises(EngineError, match="empty"):
        short.generate("")


def test_never_more_tokens_than_the_model_has_positions(tiny_engine: Path) -> None:
    opened = Session.open(tiny_engine, limits=Limits(max_length=10**6))
    assert opened.backend.limits.max_length == opened.spec.max_position_embeddings


def test_a_flipped_byte_is_refused_by_name(tiny_engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(tiny_engine, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data"):
        Session.open(copy)


def test_a_conversation_goes_through_the_template(session: Session, tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "print(1)?"}]
    expected = AutoTokenizer.from_pretrained(tiny_checkpoint).apply_chat_template(talk, add_generation_prompt=True)
    assert session.encode(talk) == expected["input_ids"]
    assert session.generate(talk, SamplingParams(max_tokens=4)).prompt_tokens == len(expected["input_ids"])


def test_a_seed_makes_an_answer_repeatable(session: Session) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)
        return session.generate(PROMPT, params).token_ids

    assert draw(1) == draw(1) != draw(2)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"is no model.*config\.json"):
        Session.open(tmp_path)


@pytest.mark.parametrize("harmed", ["model.onnx.data", "model.onnx", "tokenizer.json", "score.onnx"])
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_harmed_engine_is_not_opened_and_the_file_is_named(
    tiny_engine: Path, tmp_path: Path, harmed: str, how: str
) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    file = folder / harmed
    if how == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1  # one bit
        file.write_bytes(content)
    problem = "is missing" if how == "missing" else "is not the file that was written"
    with pytest.raises(ArtifactError, match=f"{harmed} {problem}"):
        Session.open(folder)


def test_an_engine_of_another_schema_is_not_opened(tiny_engine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    manifest = json.loads((folder / "flabc.json").read_text())
    (folder / "flabc.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(ArtifactError, match=r"flabc\.json was written by another version.*Found: 99"):
        Session.open(folder)
