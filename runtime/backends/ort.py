"""ONNX Runtime: engine folders, with one KV buffer per layer that is read and extended in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flabc.artifact import GRAPH, SCORING_GRAPH
from flabc.console import note
from flabc.errors import EngineError, UnknownNameError, require
from flabc.runtime.backend import ON_GPU, Ids, Limits, Logits
from flabc.spec import ModelSpec

from .device_memory import CudaMemory
from .ort_state import Array, DeviceState, HostState, State, cache_dtype

CUDA = "CUDAExecutionProvider"

#: What ``--provider`` can say, and what ONNX Runtime calls it, the first one first.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": (CUDA,),
    # What TensorRT does not take stays on the GPU.
    "tensorrt": ("TensorrtExecutionProvider", CUDA),
}


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> OrtBackend:
    """Open an engine folder.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        EngineError: if ONNX Runtime refuses the graph or does not have the provider asked for.
    """
    return OrtBackend(folder, spec, limits)


class OrtBackend:
    """An engine in ONNX Runtime. See ``Backend`` for the contract."""

    name = "onnxruntime"

    def __init__(self, folder: Path, spec: ModelSpec, limits: Limits) -> None:
        check_dtype(limits)
        self.spec = spec
        self.limits = limits
        self._folder = folder
        self._state = _opened(folder / GRAPH, spec, limits)
        self._lengths = np.zeros(0, np.int64)

    @cached_property
    def _scorer(self) -> Any:
        return open_graph(self._folder / SCORING_GRAPH, self.limits)

    def start(self, batch: int) -> None:
        """Forget all sequences and begin ``batch`` new ones."""
        self.limits.check_batch(batch)
        self._lengths = np.zeros(batch, np.int64)

    def extend(self, ids: Ids, counts: Ids, first: int = 0) -> Logits:
        """Append tokens to the sequences from ``first`` on; (B, S) and (B,) in, (B, V) out."""
        rows = slice(first, first + len(ids))
        if self._lengths[rows].any() and ids.shape[1] > 1 and len(ids) > 1:
            raise EngineError("ONNX Runtime extends a running batch by one token at a time.", found=str(ids.shape))
        logits = self._run(first, ids, self._lengths[rows] + counts)
        self._lengths[rows] += counts
        return logits

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running."""
        running = len(self._lengths)
        self.limits.check_batch(running + len(ids))
        logits = self._run(running, ids, counts)
        self._lengths = np.concatenate([self._lengths, counts])
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only; only rows that change their place are copied."""
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        self._lengths = self._lengths[list(rows)]
        if moves:
            self._state.move(moves, int(self._lengths.max()))

    def save(self, row: int, length: int) -> dict[str, Array]:
        """A copy, in the host's memory, of the keys and values of a sequence's first tokens."""
        return self._state.read(row, length)

    def restore(self, saved: Mapping[str, Array], length: int) -> None:
        """Let a sequence join that begins with the first tokens of one that was saved."""
        self.limits.check_batch(len(self._lengths) + 1)
        self._state.write(len(self._lengths), saved, length)
        self._lengths = np.append(self._lengths, length)

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        dtype = cache_dtype(self._scorer)
        for layer, shape in enumerate(self.spec.layers):
            empty = np.zeros((len(ids), shape.num_key_value_heads, 0, self.spec.head_dim), dtype)
            kinds = ("key", "value") if shape.has_attention else ()
            feeds |= {f"past_key_values.{layer}.{kind}": empty for kind in kinds}
        (logits,) = self._scorer.run(["logits"], feeds)
        scores: Logits = logits
        return scores

    def _run(self, first: int, ids: Ids, lengths: Ids) -> Logits:
        """Logits after the last tokens of the sequences from ``first`` on, which are then ``lengths`` long."""
        self.limits.check_length(int(lengths.max()))
        return self._state.run(first, ids, lengths)


def _opened(file: Path, spec: ModelSpec, limits: Limits) -> State:
    """A session on a graph with its cache where it computes; with CUDA graphs where the provider takes this one."""
    if limits.provider not in ON_GPU:
        return HostState(open_graph(file, limits), spec, limits)
    session, graphs = _captured(file, limits) if limits.provider == "cuda" else (open_graph(file, limits), False)
    return DeviceState(session, spec, limits, CudaMemory("gpu"), graphs=graphs)


def _captured(file: Path, limits: Limits) -> tuple[Any, bool]:
    """A session with CUDA graphs, or, which is said, without: not of every graph can one be captured."""
    try:
        return open_graph(file, limits, {"enable_cuda_graph": "1"}), True
    except EngineError as error:
        if "graph capture" not in str(error):
            raise
        note(f"without CUDA graphs, so decoding is slower: {' '.join(str(error).split())}")
        return open_graph(file, limits), False


def open_graph(file: Path, limits: Limits, cuda_options: Mapping[str, str] | None = None) -> Any:
    """An ONNX Runtime session on a graph.

    Args:
        file: the graph.
        limits: threads and provider.
        cuda_options: of the CUDA provider.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        EngineError: if ONNX Runtime refuses the graph or does not have the provider asked for.
        UnknownNameError: if there is no such provider.
    """
    runtime = require("onnxruntime", "cpu")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if limits.threads is not None:
        options.intra_op_num_threads = limits.threads
    providers = _providers(runtime.get_available_providers(), limits.provider)
    provider_options = [dict(cuda_options or {}) if name == CUDA else {} for name in providers]
    try:
        session = runtime.InferenceSession(str(file), options, providers, provider_options)
    except Exception as error:  # onnxruntime's exceptions share no public root
        lacks = "NOT_IMPLEMENTED" in str(error)
        fix = f"{providers[0]} lacks an operation in this precision: export the engine in fp32." if lacks else None
        raise EngineError(f"ONNX Runtime cannot open {file}: {error}", fix=fix) from error
    # A provider whose libraries do not load is dropped with no more than a warning.
    for wanted in providers:
        if wanted not in session.get_providers():
            raise _no_provider(wanted, session.get_providers())
    return session


def check_dtype(limits: Limits) -> None:
    """An engine computes in one precision only.

    Raises:
        EngineError: if another is asked for.
    """
    if limits.dtype != "float32":
        raise EngineError(
            "An engine computes in the precision that it was exported in.", expected="float32", found=limits.dtype
        )


def _providers(available: Sequence[str], asked: str) -> list[str]:
    """The execution providers to ask for; never fewer than the caller asked for."""
    if asked == "auto":
        asked = "cpu"
    if asked not in PROVIDERS:
        raise UnknownNameError("provider", asked, ["auto", *PROVIDERS])
    for wanted in PROVIDERS[asked]:
        if wanted not in available:
            raise _no_provider(wanted, available)
    return list(PROVIDERS[asked])


def _no_provider(wanted: str, found: Sequence[str]) -> EngineError:
    return EngineError(
        f"This ONNX Runtime has no working {wanted}.",
        expected=wanted,
        found=", ".join(found),
        fix="Run flabc doctor to see what this machine can do.",
    )
