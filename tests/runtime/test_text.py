from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flabc.errors import EngineError
from flabc.runtime.text import TextCodec, until_stop

texts = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(texts, stops, st.lists(st.integers(0, 30)))
def test_a_stop_text_is_found_however_the_pieces_fall(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    given_out = list(until_stop(pieces, stop))
    end = min((at for at in (text.find(s) for s in stop) if at >= 0), default=len(text))
    assert "".join(piece for piece, _ in given_out) == text[:end]
    assert given_out[-1][1] == any(s in text for s in stop)
    shown = ""
    for piece, _ in given_out:  # nothing is shown that would have to be taken back
        shown += piece
        assert not any(s in shown for s in stop)


@pytest.fixture(scope="module")
def codec(tiny_checkpoint: Path) -> TextCodec:
    return TextCodec(tiny_checkpoint)


@given(text=st.text(max_size=40))
def test_streaming_gives_whole_characters_and_all_of_them(codec: TextCodec, text: str) -> None:
    ids = codec.encode_plain(text)
    pieces = list(codec.pieces(ids))
    normalizer = codec.tokenizer.normalizer  # the qwen2 family composes characters (NFC) before it cuts
    expected = normalizer.normalize_str(text) if normalizer else text
    assert "".join(pieces) == codec.decode(ids) == expected
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


MESSAGES = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": 'Say "ü" & 😀'}]
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "system first": "{%- if messages[0].role == 'system' %}{{ bos_token + messages[0].content | trim }}\n{%- endif %}"
    "{% for m in messages[1:] %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(
    codec: TextCodec, tiny_checkpoint: Path, template: str, prompt: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    codec = TextCodec(tiny_checkpoint)
    codec.chat_template = template
    assert codec.render(MESSAGES, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{% if %}",
    ],
)
def test_a_template_cannot_reach_out(tiny_checkpoint: Path, template: str) -> None:
    codec = TextCodec(tiny_checkpoint)
    codec.chat_template = template
    with pytest.raises(EngineError, match="refuses"):
        codec.render(MESSAGES)


def test_a_model_without_a_template_says_so(tiny_checkpoint: Path) -> None:
    codec = TextCodec(tiny_checkpoint)
    codec.chat_template = None
    with pytest.raises(EngineError, match="no chat template"):
        codec.render(MESSAGES)
