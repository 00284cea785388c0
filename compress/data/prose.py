"""A little prose in several languages, to see what a vocabulary that was cut for code does to people's words."""

from __future__ import annotations

import json
from pathlib import Path

from .corpus import Document

#: One text for each language, written for this purpose.
FILE = Path(__file__).with_name("prose.json")


def samples() -> tuple[Document, list[Document]]:
    """The English text, and those in other languages, each named after its language."""
    texts = dict(json.loads(FILE.read_text(encoding="utf-8")))
    return Document("english", texts.pop("english")), [Document(name, text) for name, text in texts.items()]
