"""Precision: what numbers an engine computes in, and how its matrices are stored. Data only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from flabc.errors import UnknownNameError, UsageError
from flabc.frozen import Frozen

#: What activations and the cache can be.
COMPUTES = ("fp32", "fp16", "bf16")

#: What can be said of the embedding and of the output matrix: bits of a number in blocks, or as computed.
OUTER_BITS = {"int4": 4, "int8": 8, "full": None}

#: What matrices of whole rows are multiplied with: numbers rounded to eight bits, where 32 or all of a token's share a
#: scale, or those that were computed.
ACTIVATIONS = ("blocks", "tokens", "full")

#: Numbers that may share a scale, as ONNX Runtime's kernels have it.
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Blocks:
    """A matrix cut into blocks of small integers.

    Args:
        bits: of a number, 4 or 8.
        block_size: numbers that share a scale; None for a whole row, as torch stores it.
        symmetric: whether nought is the middle of the range, instead of a zero point for every block.
    """

    bits: int
    block_size: int | None = 32
    symmetric: bool = True


@dataclass(frozen=True)
class Precision:
    """What an engine is made of.

    Args:
        compute: what activations, the cache and all that is not in blocks are; one of ``COMPUTES``.
        layers: how the layers' matrices are stored; None as computed.
        embedding: how the embedding is.
        head: how the output matrix is. Where it is the embedding's and both are stored alike, it is stored once.
        activations: one of ``ACTIVATIONS``, where rows share a scale; None where nothing is said. With blocks it is
            ONNX Runtime's kernels that settle it.
    """

    compute: str = "fp32"
    layers: Blocks | None = None
    embedding: Blocks | None = None
    head: Blocks | None = None
    activations: str | None = None

    @property
    def coarsest(self) -> str:
        """The name of what rounds most: ``int4`` or ``int8`` if any matrix is stored so, else what is computed in."""
        bits = [blocks.bits for blocks in (self.layers, self.embedding, self.head) if blocks]
        return f"int{min(bits)}" if bits else self.compute


#: By name. What is outside the layers keeps eight bits: its errors reach every logit.
PRECISIONS = {
    "fp32": Precision(),
    "fp16": Precision("fp16"),
    "bf16": Precision("bf16"),
    "int8": Precision(layers=Blocks(8), embedding=Blocks(8), head=Blocks(8)),
    "int4": Precision(layers=Blocks(4), embedding=Blocks(8), head=Blocks(8)),
}

#: Where a target stores it otherwise. OpenVINO's kernels for whole rows are the ones for AMX.
_ROWS = Blocks(8, None)
BY_TARGET = {"openvino": {"int8": Precision(layers=_ROWS, embedding=_ROWS, head=_ROWS, activations="blocks")}}


class Storage(Frozen):
    """What may be changed about a precision; None leaves it as it is.

    Args:
        compute: one of ``COMPUTES``.
        block_size: one of ``BLOCK_SIZES``.
        symmetric: see ``Blocks``.
        embedding: a key of ``OUTER_BITS``.
        head: a key of ``OUTER_BITS``, for the output matrix.
        activations: one of ``ACTIVATIONS``, for targets that leave a choice.
    """

    compute: str | None = None
    block_size: int | None = None
    symmetric: bool | None = None
    embedding: str | None = None
    head: str | None = None
    activations: str | None = None


#: What ``auto`` tries, by target.
CANDIDATES: dict[str, tuple[tuple[str, Storage], ...]] = {
    "onnx": (
        ("fp32", Storage()),
        ("int8", Storage()),
        ("int8", Storage(block_size=128)),
        ("int4", Storage()),
        ("int4", Storage(block_size=128)),
    ),
    "openvino": (
        ("fp32", Storage()),
        ("int8", Storage()),
        ("int8", Storage(activations="tokens")),
        ("int8", Storage(activations="full")),
    ),
}


def precision_named(name: str, storage: Storage | None = None, target: str = "onnx") -> Precision:
    """A precision of a target, with details changed.

    Raises:
        UnknownNameError: for a name that is not known.
        UsageError: if nothing is stored in few bits, or the target leaves no choice, so that there is nothing to
            change; or for another block size.
    """
    _check("precision", name, PRECISIONS)
    found = BY_TARGET.get(target, PRECISIONS).get(name, PRECISIONS[name])
    if storage is None or storage == Storage():
        return found
    if found.coarsest == found.compute:
        raise UsageError(f"{name} stores nothing in few bits.", expected="int8 or int4", fix="Give --precision int8.")
    _check_choice(storage, target)
    size = storage.block_size
    if size is not None and size not in BLOCK_SIZES:
        raise UsageError("No kernel takes such blocks.", expected=f"one of {BLOCK_SIZES}", found=str(size))
    if storage.compute is not None:
        _check("precision to compute in", storage.compute, COMPUTES)
    changes: dict[str, Any] = storage.model_dump(include={"block_size", "symmetric"}, exclude_none=True)
    stored = {
        "layers": found.layers,
        "embedding": _outer(found.embedding, "embedding", storage.embedding),
        "head": _outer(found.head, "output matrix", storage.head),
    }
    parts: dict[str, Any] = {part: blocks and replace(blocks, **changes) for part, blocks in stored.items()}
    parts["activations"] = storage.activations or found.activations
    return replace(found, compute=storage.compute or found.compute, **parts)


def _check_choice(storage: Storage, target: str) -> None:
    """Refuse what a target leaves no choice about."""
    asked = set(storage.model_dump(exclude_none=True))
    if target in BY_TARGET and asked - {"activations"}:
        raise UsageError(f"{target} settles how matrices are stored.", fix="Leave the options away.")
    if storage.activations is not None:
        if target not in BY_TARGET:
            fix = f"Leave --activations away, or give --target {' or '.join(BY_TARGET)}."
            raise UsageError(f"{target} settles what matrices are multiplied with.", fix=fix)
        _check("rounding of activations", storage.activations, ACTIVATIONS)


def _outer(blocks: Blocks | None, part: str, asked: str | None) -> Blocks | None:
    if asked is None:
        return blocks
    _check(f"precision of the {part}", asked, OUTER_BITS)
    bits = OUTER_BITS[asked]
    return None if bits is None else Blocks(bits)


def _check(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise UnknownNameError(kind, name, known)
