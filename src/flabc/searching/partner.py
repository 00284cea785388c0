"""Whom the operator ``llm`` asks: an endpoint, a model that is run here, or a transcript."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flabc.errors import FlabcError, LanguageModelError
from flabc.source import model_folder

from .options import Options

if TYPE_CHECKING:
    from flabc.compress.search.journal import Journal
    from flabc.compress.search.llm import Client, Dialogue, Message

#: Of a language model that is run here: tokens of a conversation at most, an answer's share of them, the temperature.
LLM_LENGTH, LLM_SHARE, LLM_TEMPERATURE = 16384, 0.25, 0.7


@contextmanager
def dialogue_with(options: Options, journal: Journal, seed: int) -> Iterator[Dialogue | None]:
    """The operator ``llm``'s conversation with whom it asks; the others have none."""
    from flabc.compress.search.client import endpoint, transcript
    from flabc.compress.search.llm import Dialogue

    if options.operator != "llm":
        yield None
        return
    fallback = options.fallback is not None
    if options.llm_replay is not None:
        yield Dialogue(transcript(options.llm_replay, len(journal.replies)), journal, fallback)
    elif options.llm_folder is not None:
        with model_folder(options.llm_folder) as source:
            yield Dialogue(_here(source.folder, journal, seed), journal, fallback)
    else:
        assert options.llm_url is not None, "it was checked"
        assert options.llm_model is not None, "it was checked"
        yield Dialogue(endpoint(options.llm_url, options.llm_model, seed), journal, fallback)


def _here(folder: Path, journal: Journal, seed: int) -> Client:
    """A model that is run in this process; its n-th reply is drawn with the seed's n-th successor."""
    from flabc.compress.search.journal import Reply
    from flabc.runtime.backend import Limits
    from flabc.runtime.sampling import SamplingParams
    from flabc.runtime.session import Session

    session = Session.open(folder, limits=Limits(max_length=LLM_LENGTH))

    def ask(messages: Sequence[Message]) -> Reply:
        most = int(LLM_SHARE * session.backend.limits.max_length)  # the rest is for asking again
        params = SamplingParams(max_tokens=most, temperature=LLM_TEMPERATURE, seed=seed + len(journal.replies))
        try:
            said = session.generate([dict(each) for each in messages], params)
        except FlabcError as error:  # no template, or no room for an answer
            raise LanguageModelError(f"The language model in {folder} does not answer: {error}") from error
        return Reply(said.text, said.prompt_tokens, len(said.token_ids))

    return ask
