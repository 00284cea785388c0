"""The vocabulary stage: keep the tokens that the corpus needs, and all that the tokenizer needs to make them.

Flab-Pruner (Fang et al., 2024) keeps the tokens that were seen; here the set is also closed under derivation, so
that every kept token can still be produced (see ``bpe``), and ids keep their order.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flabc.console import progress
from flabc.errors import StageError

from .bpe import BytePairs
from .chat import Messages, rendered
from .config import VocabConfig
from .data import corpus
from .data.corpus import Document
from .inflation import inflation, removed_mass
from .model import CausalLM, TokenizerFiles, cut_vocab
from .stage import Context, Plan, Stage, encoder
from .subwords import Subwords
from .unigram import Unigram

#: Kinds of tokenizers that can be cut, by the name of their model in ``tokenizer.json``.
KINDS: Mapping[str, Callable[[Mapping[str, Any]], Subwords]] = {"BPE": BytePairs.of, "Unigram": Unigram.of}

#: How often each id occurs, (V,).
Counts = np.ndarray[Any, np.dtype[np.float64]]

#: Characters tokenised at once: work enough for every core, and all the text that is held.
BATCH_CHARACTERS = 2_000_000

#: Config keys that hold token ids: an id, a list of ids, or lists of them.
_ID_KEY = re.compile(r"(_token_ids?|suppress_tokens|bad_words_ids|forced_decoder_ids)$")


@dataclass(frozen=True)
class VocabPlan(Plan):
    """Which old ids are kept, ascending: position in the tuple is the new id."""

    keep: tuple[int, ...] = ()


def plan(model: CausalLM, config: VocabConfig, context: Context) -> VocabPlan:
    """Choose the rows to keep.

    Raises:
        StageError: if the tokenizer is of no known kind, or ``max_size`` is less than what must stay.
    """
    subwords = subwords_of(model.tokenizer.tokenizer)
    tokenizer = encoder(model.tokenizer)
    documents = context.documents if config.corpus is None else corpus.stream(config.corpus, "calibration")
    counts = balanced(count_tokens(tokenizer, documents, model.spec.vocab_size))
    fixed = subwords.closure(must_keep(model, tokenizer) | subwords.symbols)
    kept = subwords.closure(frequent(counts, config.coverage)) | fixed
    size = _rows(len(kept), model, config, context)
    if size < len(kept):
        kept = subwords.shrink(kept, fixed, dict(enumerate(counts.tolist())), size)
    elif size > len(kept):
        kept = subwords.grow(kept, size, (index for index in by_frequency(counts) if index not in kept))
        rest = (index for index in range(model.spec.vocab_size) if index not in kept)  # padding rows: no token's
        kept |= set(islice(rest, size - len(kept)))
    keep = tuple(sorted(kept))
    grown = inflation(tokenizer, encoder(remap_tokenizer(model.tokenizer, keep)), context.heldout)
    mass = removed_mass(model, keep, tokenizer, context)
    summary = (
        f"vocab: keep {len(keep):,} of {model.spec.vocab_size:,} tokens; held-out text grows {grown['code'] - 1:.2%}, "
        f"the dense model gave {mass:.2%} to those removed"
    )
    details = {
        "rows": len(keep),
        "rows_before": model.spec.vocab_size,
        "seen_in_corpus": int((counts > 0).sum()),
        "heldout_token_inflation": grown,
        "removed_mass": round(mass, 6),
    }
    return VocabPlan(summary, details, keep)


def subwords_of(tokenizer: Mapping[str, Any]) -> Subwords:
    """The model of a ``tokenizer.json``, as what the stage can cut.

    Raises:
        StageError: if it is of another kind; the message names it.
    """
    kind = tokenizer["model"]["type"]
    if kind not in KINDS:
        raise StageError("The vocabulary stage cannot cut this tokenizer.", expected=" or ".join(KINDS), found=kind)
    return KINDS[kind](tokenizer)


def apply(model: CausalLM, plan: VocabPlan) -> CausalLM:
    """Cut the rows and remap every id that the model's files mention."""
    new_ids = {old: new for new, old in enumerate(plan.keep)}
    cut = cut_vocab(model, plan.keep)
    return replace(
        cut,
        tokenizer=remap_tokenizer(model.tokenizer, plan.keep),
        config=remap_ids(cut.config, new_ids),
        generation_config=remap_ids(cut.generation_config, new_ids),
    )


VOCAB: Stage[VocabConfig, VocabPlan] = Stage(plan, apply)


def count_tokens(tokenizer: Tokenizer, documents: Iterable[Document], size: int) -> dict[str, Counts]:
    """How often each id occurs in each corpus, (V,) each. Documents are read as they are needed."""
    counts: dict[str, Counts] = {}
    with progress("counting the tokens of characters", None) as advance:
        for batch in batched(documents):
            encodings = tokenizer.encode_batch_fast([d.text for d in batch], add_special_tokens=False)  # in parallel
            ids: dict[str, list[int]] = {}
            for document, encoding in zip(batch, encodings, strict=True):
                ids.setdefault(document.corpus, []).extend(encoding.ids)
            for corpus, found in ids.items():
                seen = counts.setdefault(corpus, np.zeros(size))
                seen += np.bincount(np.asarray(found, np.int64), minlength=size)
            advance(sum(len(document.text) for document in batch))
    return counts


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches of about ``BATCH_CHARACTERS``."""
    batch, size = list[Document](), 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def balanced(counts: Mapping[str, Counts]) -> Counts:
    """The counts of several corpora as one, (V,): each corpus weighs the same however long it is."""
    if len(counts) == 1:
        return next(iter(counts.values()))
    shares = np.stack([seen / max(1.0, seen.sum()) for seen in counts.values()])
    return np.asarray(shares.sum(axis=0))


def frequent(counts: Counts, coverage: float) -> set[int]:
    """The most frequent ids that together make up ``coverage`` of all occurrences."""
    order = by_frequency(counts)
    reached = np.cumsum(counts[order]) >= coverage * counts.sum()
    return set(order[: int(np.argmax(reached)) + 1 if reached.any() else len(order)])


def by_frequency(counts: Counts) -> list[int]:
    """The ids that occur at all, the most frequent first."""
    order = np.argsort(-counts, kind="stable")
    return [int(index) for index in order[counts[order] > 0]]


def must_keep(model: CausalLM, tokenizer: Tokenizer) -> set[int]:
    """Ids that stay whatever the corpus says: special and added tokens, ids in configs, the chat template's words."""
    keep = {entry["id"] for entry in model.tokenizer.tokenizer.get("added_tokens", [])}
    for config in (model.config, model.generation_config):
        keep |= {index for key, value in config.items() if _ID_KEY.search(key) for index in _ids_in(value)}
    unknown = model.tokenizer.tokenizer["model"].get("unk_token")  # a Unigram's is among its symbols
    if unknown is not None and (index := tokenizer.token_to_id(unknown)) is not None:
        keep.add(index)
    for text in template_texts(model.tokenizer):
        keep |= set(tokenizer.encode(text, add_special_tokens=False).ids)
    return {index for index in keep if 0 <= index < model.spec.vocab_size}


def template_texts(files: TokenizerFiles) -> list[str]:
    """What the chat template emits around short messages: with and without a system message, and with a tool."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    conversations: list[tuple[Messages, list[Any] | None]] = [
        (turns, None),
        ([{"role": "system", "content": "s"}, *turns], None),
        (turns, [tool]),
    ]
    texts = [
        rendered(files, messages, tools=tools, prompt=prompt)
        for messages, tools in conversations
        for prompt in (False, True)
    ]
    return [text for text in texts if text is not None]  # a template may refuse a role: then it never emits it


def remap_tokenizer(files: TokenizerFiles, keep: Sequence[int]) -> TokenizerFiles:
    """The tokenizer over the kept ids: vocabulary, merges, added tokens and post-processor renumbered.

    Args:
        files: the dense model's tokenizer.
        keep: the old ids kept, ascending; must be closed under derivation.
    """
    new_ids = {old: new for new, old in enumerate(keep)}
    content = copy.deepcopy(dict(files.tokenizer))
    content["model"] |= subwords_of(files.tokenizer).cut(keep)
    for entry in content.get("added_tokens", []):
        entry["id"] = new_ids[entry["id"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new_ids[content["padding"]["pad_id"]]
    _remap_post_processor(content.get("post_processor"), new_ids)
    config = dict(files.config)
    if "added_tokens_decoder" in config:  # written by transformers 4
        decoder = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {str(new_ids[int(old)]): entry for old, entry in decoder.items()}
    return replace(files, tokenizer=content, config=config)


def remap_ids(config: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The config with every token id in it replaced."""
    return {key: _mapped(value, new_ids) if _ID_KEY.search(key) else value for key, value in config.items()}


def _rows(needed: int, model: CausalLM, config: VocabConfig, context: Context) -> int:
    """How many rows to keep: what is needed, as a multiple within ``max_size``; the target goes before both.

    Where the target decides, it is reached by less than a step, so that no other stage has to cut for the remainder.
    """
    per_row = model.spec.hidden_size * (1 if model.spec.tie_word_embeddings else 2)
    least = model.spec.vocab_size - context.spare(model) // per_row
    rows = max(min(needed, config.max_size or needed), least)
    bound = rows == least and rows > min(needed, config.max_size or needed)
    padded = (rows if bound else rows + config.multiple_of - 1) // config.multiple_of * config.multiple_of
    if config.max_size is not None and padded > config.max_size and padded - config.multiple_of >= least:
        padded -= config.multiple_of
    return max(1, min(padded, model.spec.vocab_size))


def _remap_post_processor(processor: dict[str, Any] | None, new_ids: Mapping[int, int]) -> None:
    if processor is None:
        return
    for inner in processor.get("processors", []):
        _remap_post_processor(inner, new_ids)
    special = processor.get("special_tokens")
    for entry in special.values() if isinstance(special, dict) else ():
        entry["ids"] = [new_ids[old] for old in entry["ids"]]
    for key in ("sep", "cls"):
        if key in processor:
            token, old = processor[key]
            processor[key] = [token, new_ids[old]]


def _mapped(value: Any, new_ids: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_mapped(item, new_ids) for item in value]
    return new_ids.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _ids_in(value: Any) -> list[int]:
    """The token ids that a config's value holds: an id, a list of ids, or lists of them."""
    if isinstance(value, list):
        return [index for item in value for index in _ids_in(item)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []
