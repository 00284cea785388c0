"""Processes that train together, as ``accelerate launch`` starts them: the first one reads, tells and writes for all.

How many there are and which this one is stand in the environment, as torch's launcher and accelerate set it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from flabc.console import Advance, progress
from flabc.errors import RecoveryError


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def meet(device: str) -> None:
    """Wait until all processes are here.

    Args:
        device: a torch device; on the processor they talk by gloo.
    """
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu").wait_for_everyone()


def check() -> None:
    """Refuse what is not supported, before long work begins.

    Raises:
        RecoveryError: if the processes were started to share the weights.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or "ACCELERATE_USE_DEEPSPEED" in os.environ:
        raise RecoveryError(
            "These processes were started to share the weights (FSDP or DeepSpeed).",
            expected="processes that each hold the whole model",
            fix="Launch them with accelerate launch --multi_gpu, or with torchrun.",
        )


def told(description: str, total: int) -> AbstractContextManager[Advance]:
    """The progress of all, which the first process shows."""
    return progress(description, total) if is_first() else nullcontext(lambda steps, said=None: None)


@contextmanager
def shared(made: AbstractContextManager[Path], folder: Path, device: str) -> Iterator[Path]:
    """A folder that the first process makes, and removes when all are done.

    Args:
        made: makes and removes it.
        folder: its path, which the others wait for.
        device: a torch device.
    """
    if not is_first():
        meet(device)
        yield folder
        meet(device)
        return
    with made as path:
        meet(device)
        yield path
        meet(device)
