"""Sums over the logits of a large vocabulary.

A row of 150,000 tokens takes 600 KB, and a window has hundreds of rows: taken whole, each step of a softmax would fetch
them from memory anew. So whoever goes through logits does it by ``pieces``, which stay in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flabc.runtime.backend import Logits

#: Numbers looked at together: 2 MB of them, and a few times as much that is made of them.
_TOGETHER = 1 << 19


def pieces(logits: Logits) -> Iterator[slice]:
    """Slices of the positions of logits (S, V), in order, at least one position each."""
    positions, tokens = logits.shape
    step = max(1, _TOGETHER // tokens)
    for at in range(0, positions, step):
        yield slice(at, at + step)


def log_sum(logits: Logits) -> Logits:
    """Log sum exp over tokens, (S, V) in, (S,) out."""
    peak = logits.max(-1)
    total: Logits = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
    return total
