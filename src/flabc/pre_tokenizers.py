"""What llama.cpp calls the ways in which byte-level tokenizers split a text before they merge.

A GGUF does not hold the expressions, only a name (``tokenizer.ggml.pre``) for which llama.cpp has them in its source.
Its convert script finds the name by hashing how the tokenizer encodes one fixed text; a cut vocabulary encodes it
differently, so the name is found here by the expressions themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: A step of a pre-tokenizer, without what does not change the pieces.
Step = tuple[Any, ...]


@dataclass(frozen=True)
class PreTokenizer:
    """One way of splitting.

    Args:
        steps: as ``steps_of`` gives them.
        ignore_merges: whether a whole word of the vocabulary is taken without asking the merges.
    """

    steps: tuple[Step, ...]
    ignore_merges: bool = False

    def as_json(self) -> dict[str, Any]:
        """The ``pre_tokenizer`` of a ``tokenizer.json``."""
        return {"type": "Sequence", "pretokenizers": [_as_json(step) for step in self.steps]}


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Step, ...]:
    """The steps of the ``pre_tokenizer`` of a ``tokenizer.json``, those inside a sequence one by one."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(step for inner in pre_tokenizer["pretokenizers"] for step in steps_of(inner))
    return (_step(pre_tokenizer),)


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """The name that llama.cpp has for how a ``tokenizer.json`` splits text; None if it has none that is known here."""
    found = PreTokenizer(steps_of(tokenizer["pre_tokenizer"]), bool(tokenizer["model"].get("ignore_merges")))
    return next((name for name, known in PRE_TOKENIZERS.items() if known == found), None)


def _step(content: Mapping[str, Any]) -> Step:
    kind = content["type"]
    if kind == "Split":
        pattern = content["pattern"]
        return kind, pattern.get("Regex"), pattern.get("String"), content["behavior"], bool(content.get("invert"))
    if kind == "Digits":
        return kind, bool(content.get("individual_digits"))
    if kind == "ByteLevel":
        return kind, bool(content.get("add_prefix_space")), bool(content.get("use_regex", True))
    return (kind,)


def _as_json(step: Step) -> dict[str, Any]:
    kind = step[0]
    if kind == "Split":
        return {"type": kind, "pattern": {"Regex": step[1]}, "behavior": step[3], "invert": step[4]}
    if kind == "Digits":
        return {"type": kind, "individual_digits": step[1]}
    return {"type": kind, "add_prefix_space": step[1], "trim_offsets": True, "use_regex": step[2]}


def _split(expression: str) -> Step:
    return "Split", expression, None, "Isolated", False


#: GPT-2's expression, or none where other steps have split the text already.
_GPT2, _BYTES = ("ByteLevel", False, True), ("ByteLevel", False, False)
_DIGITS = ("Digits", True)

_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = _split(_WORDS + r"|\p{N}" + _REST)
_LLAMA3 = _split(_WORDS + r"|\p{N}{1,3}" + _REST)
_DEEPSEEK = tuple(_split(expression) for expression in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"))

#: By name: ``get_vocab_base_pre`` of llama.cpp's convert script says which model has which name, and
#: ``llm_tokenizer_bpe`` in its ``llama-vocab.cpp`` what the name stands for. Several names share expressions
#: (StarCoder2's are SmolLM's); the one given here stands for all.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((_DIGITS, _GPT2)),
    "qwen2": PreTokenizer((_QWEN2, _BYTES)),
    "llama-bpe": PreTokenizer((_LLAMA3, _BYTES), ignore_merges=True),
    "smaug-bpe": PreTokenizer((_LLAMA3, _BYTES)),
    "deepseek-coder": PreTokenizer((*_DEEPSEEK, _DIGITS, _BYTES)),
}
