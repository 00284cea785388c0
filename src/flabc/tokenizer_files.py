"""What the tokenizer files of a Hugging Face folder say, read alike by whoever encodes, renders or converts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_tokenizer(file: Path) -> Tokenizer:
    """A ``tokenizer.json`` that gives every text whole.

    The file keeps the truncation and padding of the last training run, which transformers does not obey either
    unless it is asked to.
    """
    from tokenizers import Tokenizer

    return whole(Tokenizer.from_file(str(file)))


def whole(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, told to neither cut texts nor fill them up."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read_chat_template(folder: Path) -> str | None:
    """The Jinja template of conversations: of its own file, or where older folders keep it; None if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    found: Any = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # several by name
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found if isinstance(found, str) else None
