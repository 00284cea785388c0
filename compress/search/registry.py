"""The operators by their names."""

from __future__ import annotations

from .llm import llm
from .operators import Operator, evolution, global_, ramp, random, uniform

#: By their names on the command line.
OPERATORS: dict[str, Operator] = {
    "evolution": evolution,
    "global": global_,
    "llm": llm,
    "ramp": ramp,
    "random": random,
    "uniform": uniform,
}
