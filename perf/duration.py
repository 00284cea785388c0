"""Durations as people write them."""

from __future__ import annotations

import re

#: Seconds of each unit.
UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """A time such as 90s, 10m or 1h.

    Raises:
        ValueError: if it is written otherwise.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None:
        raise ValueError(f"{text!r} is no time; expected a number and s, m or h, e.g. 10m")
    return float(found[1]) * UNITS[found[2]]
