"""Examples: what a model is trained on, as token ids and labels.

Letters in shape comments: B sequences, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

#: A label that no loss looks at, as torch has it.
IGNORED = -100

#: A split ``dev`` of less than one row in so many is too small to choose by; one in so many of the others joins it.
DEV_ENOUGH, DEV_ONE_IN = 20, 10

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One sequence, and how many tokens at its begin are not learnt: the prompt. The first token never is."""

    ids: tuple[int, ...]
    given: int = 1

    @property
    def labels(self) -> tuple[int, ...]:
        """The ids, without what is given."""
        return (IGNORED,) * self.given + self.ids[self.given :]


def sides(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to train on and to watch; those of the split ``test`` are neither.

    Where the split ``dev`` has few rows, too few to choose by, one in ten of the others is watched too, by the hash of
    its prompt.
    """
    used = [row for row in rows if row.get("split") != "test"]
    dev = [row for row in used if row.get("split") == "dev"]
    if len(dev) * DEV_ENOUGH < len(used):
        dev += [row for row in used if row.get("split") != "dev" and _is_aside(row)]
    chosen = {id(row) for row in dev}
    return [row for row in used if id(row) not in chosen], dev


def _is_aside(row: Row) -> bool:
    digest = sha256(str(row.get("prompt")).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % DEV_ONE_IN == 0


def of_pairs(
    pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, *, begin: Sequence[int], end: Sequence[int], max_length: int
) -> list[Example]:
    """Examples of prompts and answers; those whose prompt leaves no room are left out, longer ones are cut.

    Args:
        pairs: prompts and answers.
        tokenizer: the model's.
        begin: ids before the prompt.
        end: ids after the answer.
        max_length: tokens of an example at most.
    """
    found = []
    for prompt, answer in pairs:
        given = [*begin, *tokenizer.encode(prompt, add_special_tokens=False).ids]
        ids = [*given, *tokenizer.encode(answer, add_special_tokens=False).ids, *end][:max_length]
        if len(ids) > max(1, len(given)):
            found.append(Example(tuple(ids), max(1, len(given))))
    return found


def of_texts(texts: Iterable[str], tokenizer: Tokenizer, *, begin: Sequence[int], max_length: int) -> list[Example]:
    """Texts, cut into pieces; all of each is learnt."""
    size, found = max_length - len(begin), list[Example]()
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = (ids[at : at + size] for at in range(0, len(ids), size))
        found += (Example((*begin, *piece), max(1, len(begin))) for piece in pieces if len(piece) > 1)
    return found


def packed(examples: Sequence[Example], max_length: int) -> list[tuple[Example, ...]]:
    """Examples put together, first fit in their order, until each sequence is full."""
    rows, room = list[list[Example]](), list[int]()
    for example in examples:
        place = next((at for at, left in enumerate(room) if left >= len(example.ids)), None)
        if place is None:
            rows.append([])
            room.append(max_length)
            place = len(rows) - 1
        rows[place].append(example)
        room[place] -= len(example.ids)
    return [tuple(row) for row in rows]


def collate(pad: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """What makes a batch of examples, padded on the right."""

    def batch(examples: Sequence[Example]) -> dict[str, Tensor]:
        length = max(len(example.ids) for example in examples)
        ids = [[*example.ids, *[pad] * (length - len(example.ids))] for example in examples]
        labels = [[*example.labels, *[IGNORED] * (length - len(example.ids))] for example in examples]
        mask = [[1] * len(example.ids) + [0] * (length - len(example.ids)) for example in examples]
        return {
            "input_ids": torch.tensor(ids),  # (B, T)
            "labels": torch.tensor(labels),  # (B, T)
            "attention_mask": torch.tensor(mask),  # (B, T)
        }

    return batch


def collate_packed(pad: int) -> Callable[[Sequence[tuple[Example, ...]]], dict[str, Tensor]]:
    """What makes a batch of packed examples: positions begin anew with each, by which transformers keeps them apart.

    Padding is one more example, whose labels nobody looks at.
    """

    def batch(rows: Sequence[tuple[Example, ...]]) -> dict[str, Tensor]:
        length = max(sum(len(example.ids) for example in row) for row in rows)
        filled = []
        for row in rows:
            left = length - sum(len(example.ids) for example in row)
            filled.append([*row, Example((pad,) * left, left)] if left else list(row))
        columns = {
            "input_ids": [[token for example in row for token in example.ids] for row in filled],
            "labels": [[label for example in row for label in example.labels] for row in filled],
            "position_ids": [[at for example in row for at in range(len(example.ids))] for row in filled],
        }
        return {name: torch.tensor(values) for name, values in columns.items()}

    return batch
