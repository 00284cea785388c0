"""Proofs: does what was exported say what torch says of the checkpoint? Here the parts meet.

Each gives the receipt that ends up in the manifest, or raises ``ParityError``, so that no folder appears.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flabc.console import note
from flabc.errors import ParityError
from flabc.export.precision import Precision
from flabc.source import Source, model_folder

if TYPE_CHECKING:
    from flabc.export.parity import Parity
    from flabc.runtime.text import TextCodec


def graph(folder: Path, source: Source, target: str, stored: Precision) -> dict[str, Any]:
    """Compare a draft's graph in ONNX Runtime with torch, in the way that its precision can be run.

    ONNX Runtime cannot compute in bfloat16 on a CPU: the engine's float32 twin is run then, and the receipt says so.

    Args:
        folder: the draft.
        source: what it was made of.
        target: how its graph is spelt.
        stored: its precision.

    Raises:
        ParityError: if it is out of bounds.
    """
    if stored.compute != "bf16":
        return engine(folder, source, target, stored)
    from flabc.export import twin

    note("bf16 has no kernels on a CPU: the proof runs this graph and its stored weights in float32")
    with tempfile.TemporaryDirectory(prefix="flabc-") as other:
        twin.write(folder, Path(other))
        return engine(Path(other), source, target, stored) | {"computed_in": "fp32"}


def engine(
    folder: Path, source: Source, target: str, stored: Precision, max_batch: int | None = None
) -> dict[str, Any]:
    """Compare an engine that is still a draft with torch; the receipt also says how it is stored.

    Args:
        folder: the draft.
        source: what it was made of.
        target: decides which backend runs it.
        stored: its precision.
        max_batch: sequences that it can hold; None for as many as are asked about.

    Raises:
        ParityError: if it is out of bounds.
    """
    from flabc.export import parity
    from flabc.runtime.backend import RUNS, Limits, open_backend

    limits = Limits(min(len(parity.LENGTHS), max_batch or len(parity.LENGTHS)), parity.LONGEST)
    turns = source.turns(limits.max_batch)  # before the engine is in memory too
    candidate = open_backend(RUNS[target], folder, source.spec, limits)
    receipt = parity.check(candidate, turns, precision=stored.coarsest).receipt()
    # What a runtime chose for this machine, where it has a choice.
    settings = {"settings": candidate.settings} if hasattr(candidate, "settings") else {}
    return receipt | {"stored": asdict(stored)} | settings


def gguf(file: Path, source: Source, precision: str, length: int) -> dict[str, Any]:
    """Load a GGUF that is still a draft back with transformers, and compare it with its checkpoint in torch.

    The bound of float32 holds between the file and the checkpoint with its matrices rounded as the file has them, so
    that rounding hides no fault; what rounding itself costs is measured and bounded beside it.

    Raises:
        ParityError: if one of the bounds does not hold, or the tokenizers give other ids.
    """
    from flabc.export import gguf_writer, parity
    from flabc.runtime.backend import Limits
    from flabc.runtime.backends.reference import TorchBackend
    from flabc.runtime.text import TextCodec

    codec, limits = TextCodec(source.folder), Limits(max_length=length)
    ids = codec.encode_plain(parity.text())
    rounding: dict[str, Any] = {}
    reference = TorchBackend(source.folder, source.spec, limits)
    turns = parity.listen(reference, ids, max_batch=1, max_length=length)
    if precision != "fp32":
        reference.change_matrices(lambda matrix: gguf_writer.rounded(matrix, precision))
        cost = parity.compare(reference, turns, tolerance=gguf_writer.ROUNDING[precision])
        rounding = {"rounding": cost.receipt()}
        _hold(
            cost.max_relative <= gguf_writer.ROUNDING[precision],
            f"Rounding to {precision} changes the model too much.",
            cost,
        )
        turns = parity.listen(reference, ids, max_batch=1, max_length=length)
    del reference
    with model_folder(str(file)) as back:
        _same_tokens(codec, TextCodec(back.folder), (parity.text(), parity.ODD_TEXT))
        proof = parity.compare(TorchBackend(back.folder, back.spec, limits), turns)
        _hold(proof.holds, "The file does not say what the checkpoint says.", proof)
    return proof.receipt() | rounding


def _hold(holds: bool, problem: str, parity: Parity) -> None:
    if not holds:
        raise ParityError(
            problem,
            expected=f"logits within {parity.tolerance:g} of torch's",
            found=f"a difference of {parity.max_relative:.3g}, {parity.greedy_mismatches} other tokens",
            fix="No folder was written.",
        )


def _same_tokens(ours: TextCodec, theirs: TextCodec, texts: Sequence[str]) -> None:
    """Make sure that two tokenizers do the same with texts.

    Raises:
        ParityError: at the first that they encode differently.
    """
    for text in texts:
        expected, found = ours.encode(text), theirs.encode(text)
        if expected != found:
            at = next((n for n, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
            raise ParityError(
                "The tokenizer that transformers reads from the file gives other ids.",
                expected=f"{expected[at : at + 5]} at {at}",
                found=str(found[at : at + 5]),
                fix="No folder was written.",
            )
