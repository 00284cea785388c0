"""Backend: what runs a model over a batch, with its own KV cache.

One file per backend under ``backends/``; to add one, write it and list it in ``BACKENDS``.

Letters in shape comments: B sequences, S new tokens, V vocab_size.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flabc.errors import EngineError, UnknownNameError
from flabc.spec import ModelSpec

from . import huge_pages

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Limits:
    """How much a backend may hold.

    Args:
        max_batch: sequences at once.
        max_length: tokens of one sequence, prompt and answer together.
        threads: threads for the computation; None leaves the choice to the backend.
        provider: where to run: ``auto``, ``cpu``, ``cuda`` or, in ONNX Runtime, ``tensorrt``.
        dtype: what to compute in, if the backend has a choice: ``float32``, ``bfloat16`` or ``float16``.
    """

    max_batch: int = 1
    max_length: int = 2048
    threads: int | None = None
    provider: str = "auto"
    dtype: str = "float32"

    def check_batch(self, batch: int) -> None:
        """Refuse more sequences than there is room for.

        Raises:
            EngineError: with both numbers.
        """
        if batch > self.max_batch:
            raise EngineError(f"A batch of {batch} was asked for.", expected=f"at most {self.max_batch}")

    def check_length(self, length: int) -> None:
        """Refuse sequences longer than there is room for.

        Raises:
            EngineError: with both numbers.
        """
        if length > self.max_length:
            raise EngineError(
                f"The sequence would grow to {length} tokens.",
                expected=f"at most {self.max_length}",
                fix="Open the engine with a larger --max-length.",
            )


class Backend(Protocol):
    """A model with a KV cache for a batch of sequences."""

    name: str
    spec: ModelSpec
    limits: Limits

    def start(self, batch: int) -> None:
        """Forget all sequences and begin ``batch`` new ones.

        Raises:
            EngineError: if they are more than ``limits.max_batch``.
        """
        ...

    def extend(self, ids: Ids, counts: Ids, first: int = 0) -> Logits:
        """Append tokens to B sequences and say what comes next.

        Args:
            ids: (B, S); row b's first ``counts[b]`` tokens are real, the rest is padding.
            counts: (B,), between 1 and S.
            first: which of the running sequences is row 0; the rows are those from there on.

        Returns:
            logits after each row's last real token, (B, V).

        Raises:
            EngineError: if the sequences would grow longer than ``limits.max_length``.
        """
        ...

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running; as ``extend`` for them alone.

        Raises:
            EngineError: if there would be more than ``limits.max_batch``, or one is too long.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these of the running sequences only, in this order."""
        ...

    def save(self, row: int, length: int) -> Mapping[str, Any]:
        """A copy of the keys and values of a running sequence's first ``length`` tokens."""
        ...

    def restore(self, saved: Mapping[str, Any], length: int) -> None:
        """Let a sequence join that begins with the first ``length`` tokens of one that was saved.

        Raises:
            EngineError: if there would be more than ``limits.max_batch``.
        """
        ...

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V); leaves the cache alone."""
        ...


#: The backends by name, as ``module:function``; the function takes a folder, its spec and limits.
BACKENDS = {
    "onnxruntime": "flabc.runtime.backends.ort:open_backend",
    "onnxruntime-static": "flabc.runtime.backends.static_cache:open_backend",
    "openvino": "flabc.runtime.backends.openvino_state:open_backend",
    "tensorrt": "flabc.runtime.backends.tensorrt_engine:open_backend",
    "torch": "flabc.runtime.backends.reference:open_backend",
    "torch-static": "flabc.runtime.backends.static_torch:open_backend",
}

#: Which backend runs an engine that was exported to a target.
RUNS = {
    "onnx": "onnxruntime",
    "onnx-standard": "onnxruntime-static",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
}


#: Providers that compute on a GPU, and backends that can do nothing else.
ON_GPU = ("cuda", "tensorrt")

#: Files of weights.
WEIGHTS = ("*.data", "*.safetensors")


def on_gpu(backend: str, provider: str) -> bool:
    """Whether a backend computes on a GPU: then the processor's bandwidth, arithmetic and energy say nothing of it."""
    return backend in ON_GPU or provider in ON_GPU


def open_backend(name: str, folder: Path, spec: ModelSpec, limits: Limits) -> Backend:
    """Open a folder with the backend of that name.

    Raises:
        UnknownNameError: if no backend has the name.
        MissingExtraError: if what it needs is not installed.
        EngineError: if the folder cannot be run.
    """
    if name not in BACKENDS:
        raise UnknownNameError("backend", name, BACKENDS)
    module, function = BACKENDS[name].split(":")
    opened: Any = getattr(importlib.import_module(module), function)(folder, spec, limits)
    huge_pages.gather(sum(file.stat().st_size for kind in WEIGHTS for file in folder.glob(kind)))
    backend: Backend = opened
    return backend
