"""What a person at the terminal sees while work goes on: progress and notes, always on stderr.

Stdout belongs to data. A bar appears only for work that has already taken two seconds.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")

#: Work shorter than this many seconds gets no bar.
PATIENCE_S = 2.0


class Advance(Protocol):
    """Tell how much more is done, and what is to be said of it from now on."""

    def __call__(self, steps: int, said: str | None = None) -> None:
        """So many steps are done; ``said`` takes the description's place."""
        ...


#: Whether a bar is open that tells of all the work in it.
_covered: ContextVar[bool] = ContextVar("covered", default=False)


def note(text: str) -> None:
    """Print one line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int | None = None, *, covers: bool = False) -> Iterator[Advance]:
    """Yield ``advance(steps)``; show a bar with the time left once ``PATIENCE_S`` have passed.

    Args:
        description: what is being done, as the person would name it.
        total: how many steps make the whole; None if nobody can know.
        covers: whether it tells of all the work within, so that bars opened there are not shown.
    """
    if _covered.get():
        yield lambda steps, said=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    counted = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        *(counted if total is not None else (TimeElapsedColumn(),)),
        console=Console(file=sys.stderr),
        refresh_per_second=4,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task(description, total=total)
    patience = threading.Timer(PATIENCE_S, bar.start)
    patience.daemon = True
    patience.start()
    token = _covered.set(True) if covers else None
    try:
        yield lambda steps, said=None: bar.update(task, advance=steps, description=said)
    finally:
        if token is not None:
            _covered.reset(token)
        patience.cancel()
        patience.join()
        if bar.live.is_started:  # stopping a bar that was never shown prints an empty line
            bar.stop()


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield from ``items``, advancing a bar by one after each."""
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance(1)
