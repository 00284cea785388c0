"""What a person at the terminal sees while work goes on: progress and notes, always on stderr.

Stdout belongs to data. A bar appears only for work that has already taken two seconds.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

#: Work shorter than this many seconds gets no bar.
PATIENCE_S = 2.0

Advance = Callable[[int], None]


def note(text: str) -> None:
    """Print one line for the person, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Advance]:
    """Yield ``advance(steps)``; show a bar with the time left once ``PATIENCE_S`` have passed.

    Args:
        description: what is being done, as the person would name it.
        total: how many steps make the whole; None if nobody can know.
    """
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
    try:
        yield lambda steps: bar.advance(task, steps)
    finally:
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
