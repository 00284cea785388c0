"""flabc: cut a code language model, prove what it cost, and ship the engine.

The functions behind the command line are in ``flabc.api``; the names below are the types that they take and give.
Importing this package imports neither torch nor onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flabc.artifact import Artifact as Artifact
    from flabc.artifact import Manifest as Manifest
    from flabc.errors import FlabcError as FlabcError
    from flabc.recipe import Recipe as Recipe
    from flabc.runtime.session import Session as Session
    from flabc.spec import LayerSpec as LayerSpec
    from flabc.spec import ModelSpec as ModelSpec

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "flabc.artifact",
    "FlabcError": "flabc.errors",
    "LayerSpec": "flabc.spec",
    "Manifest": "flabc.artifact",
    "ModelSpec": "flabc.spec",
    "Recipe": "flabc.recipe",
    "Session": "flabc.runtime.session",
}

__all__ = ["Artifact", "FlabcError", "LayerSpec", "Manifest", "ModelSpec", "Recipe", "Session", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that ``flabc --help`` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'flabc' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
