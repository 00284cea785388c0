"""Text for calibration and evaluation, split so that the two never share a document.

Which split a document belongs to is decided by the hash of its content alone, so two copies of one file never end up
on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from flabc.errors import CorpusError

from . import source
from .source import CORPORA

__all__ = ["CORPORA", "Document", "Split", "fingerprint", "load", "names_of", "stream"]

Split = Literal["calibration", "heldout"]

#: One document in this many is held out.
HELDOUT_ONE_IN = 5

#: Characters of a corpus that ``load`` holds at most: calibration takes windows of a sample.
HELD_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class Document:
    """One text, where it came from, and the corpus that it belongs to."""

    name: str
    text: str
    corpus: str = ""

    @property
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
        for name, text in source.read(corpus):
            document = Document(name, text, corpus)
            if document.split == split:
                found = True
                yield document
        if not found:
            raise CorpusError(
                f"The corpus {corpus!r} has no {split} text.",
                expected="UTF-8 text; one document in five is held out, by the hash of its content",
                fix="Give a larger folder.",
            )


def load(corpora: str | Sequence[str], split: Split) -> list[Document]:
    """One side of one corpus or several, in memory: the first ``HELD_CHARACTERS`` of each.

    Returns:
        the documents, ordered by their hash, so that a prefix is a sample of the whole.

    Raises:
        UnknownNameError: see ``stream``.
        CorpusError: see ``stream``.
    """
    documents: list[Document] = []
    for corpus in names_of(corpora):
        held = 0
        for document in stream(corpus, split):
            documents.append(document)
            held += len(document.text)
            if held >= HELD_CHARACTERS:
                break
    return sorted(documents, key=lambda document: document.digest[::-1])


def fingerprint(documents: Sequence[Document]) -> str:
    """A sha256 over the documents' content, for receipts."""
    whole = hashlib.sha256()
    for document in documents:
        whole.update(document.digest)
    return whole.hexdigest()
