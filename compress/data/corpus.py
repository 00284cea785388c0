"""Text for calibration and evaluation, split so that the two never share a document.

Which split a document belongs to is decided by the hash of its content alone, so two copies of one file never end up
on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from flabc.errors import CorpusError

from . import source
from .source import CORPORA

__all__ = ["CORPORA", "Document", "Split", "fingerprint", "load", "names_of", "prompts", "sides", "stream"]

Split = Literal["calibration", "heldout"]

#: One document in this many is held out.
HELDOUT_ONE_IN = 5

#: Characters of a corpus that ``load`` holds at most: calibration takes windows of a sample.
HELD_CHARACTERS = 64_000_000

#: Characters per token that a text must have to be sure to fill a prompt.
CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class Document:
    """One text, where it came from, and the corpus that it belongs to."""

    name: str
    text: str
    corpus: str = ""

    @cached_property
    def digest(self) -> bytes:
        """The sha256 of the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).digest()

    @property
    def split(self) -> Split:
        """The side that the document's content puts it on."""
        return "heldout" if int.from_bytes(self.digest[:8], "big") % HELDOUT_ONE_IN == 0 else "calibration"


def names_of(corpora: str | Sequence[str]) -> tuple[str, ...]:
    """One corpus or several, as several."""
    return (corpora,) if isinstance(corpora, str) else tuple(corpora)


def stream(corpora: str | Sequence[str], split: Split) -> Iterator[Document]:
    """One side of one corpus or several, one document after another; nothing is held.

    Args:
        corpora: whatever ``source.read`` takes, or several of these.
        split: ``calibration`` or ``heldout``.

    Raises:
        UnknownNameError: if one is no corpus and no path that exists.
        CorpusError: if there is no text on that side of one of them.
    """
    for corpus in names_of(corpora):
        found = False
        for document in _documents(corpus):
            if document.split == split:
                found = True
                yield document
        _check_found(corpus, split, found)


def load(corpora: str | Sequence[str], split: Split) -> list[Document]:
    """One of the ``sides``."""
    return sides(corpora, (split,))[split]


def sides(
    corpora: str | Sequence[str], wanted: Sequence[Split] = ("calibration", "heldout")
) -> dict[Split, list[Document]]:
    """Sides of one corpus or several, in memory, by one reading: the first ``HELD_CHARACTERS`` of each.

    Returns:
        the documents of each side, ordered by their hash, so that a prefix is a sample of the whole.

    Raises:
        UnknownNameError: see ``stream``.
        CorpusError: see ``stream``.
    """
    documents: dict[Split, list[Document]] = {split: [] for split in wanted}
    for corpus in names_of(corpora):
        held = dict.fromkeys(wanted, 0)
        for document in _documents(corpus):
            if held.get(document.split, HELD_CHARACTERS) < HELD_CHARACTERS:
                documents[document.split].append(document)
                held[document.split] += len(document.text)
            if min(held.values()) >= HELD_CHARACTERS:
                break
        for split, characters in held.items():
            _check_found(corpus, split, characters > 0)
    return {split: sorted(found, key=lambda document: document.digest[::-1]) for split, found in documents.items()}


def prompts(corpora: str | Sequence[str], tokens: int, count: int) -> list[str]:
    """Up to so many held-out texts that are long enough for a prompt, each cut to a length that is sure to fill it.

    Args:
        corpora: see ``stream``.
        tokens: of a prompt.
        count: how many texts at most.

    Raises:
        UnknownNameError: see ``stream``.
        CorpusError: if none is long enough.
    """
    size = CHARACTERS_PER_TOKEN * tokens
    texts = [document.text[:size] for document in load(corpora, "heldout") if len(document.text) >= size]
    if not texts:
        raise CorpusError(f"No held-out text is long enough for a prompt of {tokens} tokens.")
    return texts[:count]


def fingerprint(documents: Sequence[Document]) -> str:
    """A sha256 over the documents' content, for receipts."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(document.digest)
    return whole.hexdigest()


def _documents(corpus: str) -> Iterator[Document]:
    return (Document(name, text, corpus) for name, text in source.read(corpus))


def _check_found(corpus: str, split: Split, found: bool) -> None:
    if not found:
        raise CorpusError(
            f"The corpus {corpus!r} has no {split} text.",
            expected="UTF-8 text; one document in five is held out, by the hash of its content",
            fix="Give a larger folder.",
        )
