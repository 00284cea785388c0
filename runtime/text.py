"""Text in and out: tokenizer, chat template, streaming of whole characters only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from flabc.errors import EngineError
from flabc.tokenizer_files import read_chat_template, read_tokenizer

Message = dict[str, str]


class TextCodec:
    """A model folder's tokenizer, chat template and special tokens."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise EngineError(f"{folder} has no tokenizer.json.")
        self.tokenizer = read_tokenizer(file)
        self._config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json") or _read_json(folder / "config.json")
        self.eos_ids = frozenset(_ids(generation.get("eos_token_id")))
        bos = _ids(generation.get("bos_token_id"))
        #: What lm-evaluation-harness puts before a text without context.
        self.prefix_id: int | None = next(iter([*bos, *sorted(self.eos_ids)]), None)
        self.chat_template = read_chat_template(folder)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer adds around it."""
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text and nothing else."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def before_text(self) -> list[int]:
        """The ids that the tokenizer itself puts before every text: a beginning-of-sequence token, or nothing."""
        encoding = self.tokenizer.encode("a")
        return list(encoding.ids[: encoding.special_tokens_mask.index(0)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens and all."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def piece(self, index: int) -> str:
        """The text of one token by itself; half a character is a replacement character."""
        return self.decode_all([index])

    def decoder(self) -> Callable[[int], str]:
        """A function from each next id of a stream to the text that it makes certain: never half a character."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda index: stream.step(self.tokenizer, index) or ""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt that the model's chat template makes of messages, in Jinja's sandbox.

        Raises:
            EngineError: if the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise EngineError("The model has no chat template.", fix="Give it a plain prompt.")
        special = {key: _content(value) for key, value in self._config.items() if key.endswith("_token") and value}
        given = {"messages": messages, "tools": None, "documents": None, **special}
        try:
            template = _template_environment().from_string(self.chat_template)
            prompt: str = template.render(add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # a template computes, so it may fail as any program may
            raise EngineError(f"The chat template refuses the messages: {error}") from error
        return prompt


def _template_environment() -> Any:
    """Jinja as transformers' ``apply_chat_template`` sets it up: what templates are written for."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
