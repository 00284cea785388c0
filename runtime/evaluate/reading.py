"""Tasks that read: perplexity of one model, and KL of one to another, document by document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path

from flabc.console import progress
from flabc.errors import CorpusError, EngineError, UsageError

from .divergence import Divergence
from .perplexity import score_text
from .record import RECORDS, Journal, Record
from .subject import Local, Server

#: What one document adds up to.
Measure = Callable[[str], dict[str, float]]


def read_perplexity(texts: Mapping[str, str], subject: Local | Server, folder: Path, label: str) -> list[Record]:
    """Score every document; a server scores it by ``echo``, all tokens but the first.

    Raises:
        CorpusError: if there is no text.
        EngineError: if a server gives no log-probabilities of prompts.
    """

    def measure(text: str) -> dict[str, float]:
        if isinstance(subject, Server):
            scores = subject.token_logprobs(text)
            nll, tokens = -sum(scores), len(scores)
        else:
            nll, tokens = score_text(subject.session.backend, subject.session.codec, text)
        return {"nll_nats": nll, "tokens": tokens, "bytes": len(text.encode())}

    return _read(texts, measure, folder, f"{label}: scoring text")


def read_kl(
    texts: Mapping[str, str], dense: Local | Server, subject: Local | Server, folder: Path, label: str
) -> list[Record]:
    """KL(dense || subject) over token logits, every position of every document.

    Raises:
        CorpusError: if there is no text.
        UsageError: if either is a server, which does not give whole distributions.
        EngineError: if the vocabulary of the one is not part of the other's.
    """
    if isinstance(dense, Server) or isinstance(subject, Server):
        raise UsageError("KL needs every logit, and a server gives a few.", expected="folders on both sides")
    divergence = Divergence(dense.session, subject.session)
    return _read(texts, divergence.measure, folder, f"{label}: comparing logits")


def _read(texts: Mapping[str, str], measure: Measure, folder: Path, doing: str) -> list[Record]:
    if not any(texts.values()):
        raise CorpusError("There is no text to score.")
    journal = Journal(folder / RECORDS, Record)
    known = {row.task_id for row in journal.rows}
    with progress(doing, len(texts)) as advance:
        for name, text in texts.items():
            if name not in known:
                numbers = measure(text)
                if not all(map(isfinite, numbers.values())):
                    raise EngineError(f"The model's answer to {name} is no number: {numbers}.")
                journal.append(Record(task_id=name, unit=name, numbers=numbers))
            advance(1)
    place = {name: number for number, name in enumerate(texts)}
    return sorted(journal.rows, key=lambda row: place[row.task_id])
