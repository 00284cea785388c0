from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from flabc.errors import EngineError
from flabc.runtime.answer import StopFilter
from flabc.runtime.text import Message, TextCodec

texts = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@given(texts, stops, st.lists(st.integers(0, 30)))
@example("\naa", ["a", "\naa"], [2])  # the longer one begins earlier and is complete later
def test_a_stop_text_is_found_however_the_pieces_fall(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    found = StopFilter(stop)
    given_out = [found.push(piece) for piece in pieces] + [found.flush()]
    _, begin = min(((at + len(s), at) for s in stop if (at := text.find(s)) >= 0), default=(0, len(text)))
    assert "".join(given_out) == text[:begin]
    assert found.stopped == any(s in text for s in stop)
    shown = ""
    for piece in given_out:  # nothing is shown that would have to be taken back
        shown += piece
        assert not any(s in shown for s in stop)


@pytest.fixture(scope="module")
def codec(tiny_checkpoint: Path) -> TextCodec:
    return TextCodec(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.mark.parametrize("text", ["😀", "a👩‍👩‍👧b", "漢字かな交じり", "naïve 😀😀 größer"])
def test_a_character_cut_over_tokens_comes_in_one_piece(codec: TextCodec, text: str) -> None:
    ids = codec.encode_plain(text)
    assert len(ids) > len(text)  # every byte of a rare character is a token
    pieces = [*map(codec.decoder(), ids)]
    assert len(pieces) == len(ids)
    assert "".join(pieces) == codec.decode(ids) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_encoding_and_decoding_are_those_of_transformers(codec: TextCodec, tokenizer: Any) -> None:
    for text in ("def f(x):\n    return x", "<|im_start|>user\nhi<|im_end|>", "漢字 😀"):
        assert codec.encode(text) == tokenizer(text)["input_ids"]
        assert codec.encode_plain(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = codec.encode(text)
        assert codec.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


@given(text=st.text(max_size=40))
def test_streaming_gives_whole_characters_and_all_of_them(codec: TextCodec, text: str) -> None:
    ids = codec.encode_plain(text)
    pieces = [*map(codec.decoder(), ids)]
    normalizer = codec.tokenizer.normalizer  # the qwen2 family composes characters (NFC) before it cuts
    expected = normalizer.normalize_str(text) if normalizer else text
    assert "".join(pieces) == codec.decode(ids) == expected
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_a_text_stays_whole_whatever_the_last_training_run_left_in_the_file(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    shutil.copy(tiny_checkpoint / "tokenizer_config.json", tmp_path)
    trained = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    trained.enable_truncation(4)
    trained.enable_padding(length=12, pad_token="<|im_end|>", pad_id=2)
    trained.save(str(tmp_path / "tokenizer.json"))
    text = "def f(a, b):\n    return a * b + 1\n"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert len(ids) > 12
    assert TextCodec(tmp_path).encode(text) == ids


MESSAGES = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": 'Say "ü" & 😀'}]

#: As Qwen2.5's own: a system message is added where there is none, tools are told, tool calls are rendered.
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or
           (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TALKS = {
    "with system": MESSAGES,
    "without system": MESSAGES[1:],
    "with tools answering": [
        *MESSAGES,
        {"role": "assistant", "content": "  Wait.\n"},
        {"role": "tool", "content": '{"a": 1}'},
        {"role": "tool", "content": "<2>"},
    ],
}
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "system first": "{%- if messages[0].role == 'system' %}{{ bos_token + messages[0].content | trim }}\n{%- endif %}"
    "{% for m in messages[1:] %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "qwen": QWEN,
    "what transformers defines": "{{ strftime_now('%Y') }} {{ tools is none }} {{ documents is none }} "
    "{{ messages | tojson(indent=2, sort_keys=true) }} {{ messages[0] | tojson(separators=(',', ':')) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token is defined }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(
    tokenizer: Any, tiny_checkpoint: Path, template: str, talk: list[Message], prompt: bool
) -> None:
    expected = tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, add_generation_prompt=prompt)
    codec = TextCodec(tiny_checkpoint)
    codec.chat_template = template
    assert codec.render(talk, add_generation_prompt=prompt) == expected


def test_the_template_of_the_model_is_the_one_used(codec: TextCodec, tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert codec.render(MESSAGES) == expected


@pytest.mark.parametrize("several", [False, True])
def test_older_folders_keep_the_template_in_the_tokenizers_config(
    tiny_checkpoint: Path, tmp_path: Path, several: bool
) -> None:
    from transformers import AutoTokenizer

    config = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = TEMPLATES["chatml"]
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": template}]
    config["chat_template"] = named if several else template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert TextCodec(tmp_path).render(MESSAGES) == expected


def test_a_special_token_that_is_null_is_undefined_as_in_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = json.loads((tiny_checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None}), encoding="utf-8")
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    template = "{{ bos_token }}|{{ bos_token is defined }}|{{ eos_token }}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    expected = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False)
    assert TextCodec(tmp_path).render(MESSAGES) == expected == "|False|<|im_end|>"


def test_a_template_refuses_in_its_own_words(tiny_checkpoint: Path) -> None:
    codec = TextCodec(tiny_checkpoint)
    codec.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(EngineError, match="Roles must alternate"):
        codec.render(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**7) %}{% endfor %}",
        "{{ messages[0].content + 1 }}",
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
