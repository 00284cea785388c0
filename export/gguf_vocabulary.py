"""A checkpoint's tokenizer as the metadata of a GGUF.

Two kinds are written: byte-level BPE (``gpt2`` in llama.cpp) and SentencePiece's BPE with byte fallback (``llama``).
llama.cpp does not normalise: of a byte-level tokenizer with NFC (Qwen) the same ids come for text that is in NFC, as
code practically always is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flabc.errors import ModelError
from flabc.pre_tokenizers import PRE_TOKENIZERS, name_of
from flabc.tokenizer_files import read_chat_template, read_tokenizer

#: The keys of a GGUF for what Hugging Face's files call so.
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "pad", "unk_token": "unk"}


class Kind(IntEnum):
    """What llama.cpp knows about a token (``llama_token_type``)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.ggml`` says.

    Args:
        model: ``gpt2`` or ``llama``.
        pre: what llama.cpp calls the way text is split.
        tokens: by id; ids that no token has are named after themselves.
        kinds: of each token.
        merges: pairs, in the order of their rank.
        special: ids by the gguf package's names.
        adds: whether a text gets a beginning and an end.
        prefix_space: whether a text gets a space in front; None if that is no question.
        chat_template: Jinja, or None.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
    merges: tuple[tuple[str, str], ...]
    special: Mapping[str, int]
    adds: tuple[bool, bool]
    prefix_space: bool | None
    chat_template: str | None

    @classmethod
    def of(cls, folder: Path, size: int) -> Vocabulary:
        """Read the tokenizer of a Hugging Face folder whose model has ``size`` rows.

        Raises:
            ModelError: if llama.cpp has no tokenizer that does the same.
        """
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{folder} has no tokenizer.json.")
        content, tokenizer = _read_json(file), read_tokenizer(file)
        model, pre = _kind(content)
        added = {entry["id"]: entry for entry in content["added_tokens"]}
        names = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
        special = _special_ids(folder, tokenizer)
        return cls(
            model=model,
            pre=pre,
            tokens=tuple(names.get(index, f"[PAD{index}]") for index in range(size)),
            kinds=tuple(_kind_of(index, names.get(index), added, content["model"]) for index in range(size)),
            merges=tuple(_pair(merge) for merge in content["model"]["merges"]),
            special=special,
            adds=_adds(tokenizer, special),
            prefix_space=tokenizer.encode("a").tokens[-1].startswith("▁") if model == "llama" else None,
            chat_template=read_chat_template(folder),
        )

    def add_to(self, writer: Any) -> None:
        """Hand all of it to a ``GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types([int(kind) for kind in self.kinds])
        writer.add_token_merges([" ".join(pair) for pair in self.merges])
        if self.model == "llama":
            writer.add_token_scores(self.scores())
            writer.add_add_space_prefix(bool(self.prefix_space))
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.adds[0])
        writer.add_add_eos_token(self.adds[1])
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)

    def scores(self) -> list[float]:
        """By which llama.cpp chooses what to merge next in SentencePiece's BPE: the rank of what makes the token."""
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(self.merges):
            ranks.setdefault(left + right, rank)
        return [-float(ranks.get(token, len(self.merges))) for token in self.tokens]


def _kind(content: Mapping[str, Any]) -> tuple[str, str]:
    """The tokenizer's model and pre-tokenizer as llama.cpp calls them.

    Raises:
        ModelError: naming what it does not have. An unknown name would make it guess, and every id could be wrong.
    """
    model, steps = content["model"], content["pre_tokenizer"]
    if model["type"] != "BPE":
        raise ModelError(
            "This tokenizer cannot be written as GGUF.", expected="BPE", found=f"a tokenizer of kind {model['type']}"
        )
    if model.get("byte_fallback") and _marks_spaces(content):
        return "llama", "default"
    name = name_of(content)
    normalizer = (content["normalizer"] or {}).get("type")
    if name is None or normalizer not in (None, "NFC"):
        raise ModelError(
            "llama.cpp has no name for how this tokenizer splits text, so it would give other ids.",
            expected=f"a pre-tokenizer as {', '.join(PRE_TOKENIZERS)} have it",
            found=json.dumps(steps if name is None else content["normalizer"], ensure_ascii=False),
        )
    return "gpt2", name


def _marks_spaces(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer writes spaces as SentencePiece does, in one of the three ways that are about.

    A normaliser may do it, before nothing (Llama 2) or before a split at spaces that are gone by then (Gemma); or
    the pre-tokenizer does.
    """
    steps, normalizer = content["pre_tokenizer"], content["normalizer"] or {}
    if steps is not None and steps["type"] == "Metaspace":
        return not steps.get("split", True)
    replaces = [part for part in normalizer.get("normalizers", [normalizer]) if part.get("type") == "Replace"]
    spaced = [(part["pattern"].get("String"), part["content"]) for part in replaces] == [(" ", "▁")]
    return spaced and (steps is None or (steps["type"], steps.get("pattern")) == ("Split", {"String": " "}))


def _kind_of(index: int, token: str | None, added: Mapping[int, Any], model: Mapping[str, Any]) -> Kind:
    if token is None:
        return Kind.UNUSED
    if token == model.get("unk_token") and model.get("byte_fallback"):
        return Kind.UNKNOWN
    if index in added:
        return Kind.CONTROL if added[index]["special"] else Kind.USER_DEFINED
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return Kind.BYTE if is_byte and model.get("byte_fallback") else Kind.NORMAL


def _special_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """The special ids, as llama.cpp's converter finds them: the tokenizer's own, or else the model's."""
    own, config = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "config.json")
    model: dict[str, Any] = config | _read_json(folder / "generation_config.json")
    found = {}
    for key, name in _SPECIAL.items():
        named, ids = tokenizer.token_to_id(_content(own.get(key)) or ""), model.get(f"{key}_id")
        first = ids[0] if isinstance(ids, list) else ids
        if (index := first if named is None else named) is not None:
            found[name] = int(index)
    return found


def _adds(tokenizer: Tokenizer, special: Mapping[str, int]) -> tuple[bool, bool]:
    """Whether the tokenizer puts its beginning in front of a text, and its end behind.

    Raises:
        ModelError: if it adds anything else, which llama.cpp would not.
    """
    whole, bare = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    bos, eos = special.get("bos"), special.get("eos")
    begins, ends = bool(whole) and whole[0] == bos and whole != bare, whole[-1] == eos and whole != bare
    if [bos] * begins + bare + [eos] * ends != whole:
        raise ModelError(
            "This tokenizer adds tokens that llama.cpp would not add.",
            expected="its beginning and its end at most",
            found=" ".join(tokenizer.encode("a").tokens),
        )
    return begins, ends


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
