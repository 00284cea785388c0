"""ONNX Runtime: engine folders, with one KV buffer per layer that is read and extended in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flabc.artifact import GRAPH, SCORING_GRAPH
from flabc.errors import EngineError, UnknownNameError, require
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

Array = npt.NDArray[Any]

#: What ``--provider`` can say, and what ONNX Runtime calls it, the first one first.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    # What TensorRT does not take stays on the GPU.
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
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
        self._ort = require("onnxruntime", "cpu")
        self._folder = folder
        self._session = open_graph(folder / GRAPH, limits)
        # One buffer per layer and kind for the longest sequence: bound as past and as present, so that
        # GroupQueryAttention appends in place instead of copying the whole cache at every token.
        self._dtype = cache_dtype(self._session)
        self._cache = new_cache(spec, limits.max_batch, limits.max_length, self._dtype)
        self._bindings: dict[tuple[int, int], Any] = {}  # by first row and end
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
        logits = self._run(self._bind(first, first + len(ids)), ids, self._lengths[rows] + counts)
        self._lengths[rows] += counts
        return logits

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running."""
        running, together = len(self._lengths), len(self._lengths) + len(ids)
        self.limits.check_batch(together)
        logits = self._run(self._bind(running, together), ids, counts)
        self._lengths = np.concatenate([self._lengths, counts])
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only; only rows that change their place are copied."""
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        self._lengths = self._lengths[list(rows)]
        if moves:
            to, source = (list(places) for places in zip(*moves, strict=True))
            used = int(self._lengths.max())
            for buffer in self._cache.values():
                buffer[to, :, :used] = buffer[source, :, :used]

    def save(self, row: int, length: int) -> dict[str, Array]:
        """A copy of the keys and values of a sequence's first tokens, (KV heads, length, head_dim) each."""
        return save_row(self._cache, row, length)

    def restore(self, saved: Mapping[str, Array], length: int) -> None:
        """Let a sequence join that begins with the first tokens of one that was saved."""
        self.limits.check_batch(len(self._lengths) + 1)
        restore_row(self._cache, len(self._lengths), saved, length)
        self._lengths = np.append(self._lengths, length)

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for layer, shape in enumerate(self.spec.layers):
            empty = np.zeros((len(ids), shape.num_key_value_heads, 0, self.spec.head_dim), self._dtype)
            kinds = ("key", "value") if shape.has_attention else ()
            feeds |= {f"past_key_values.{layer}.{kind}": empty for kind in kinds}
        (logits,) = self._scorer.run(["logits"], feeds)
        scores: Logits = logits
        return scores

    def _bind(self, first: int, end: int) -> Any:
        """A binding in which the sequences from ``first`` up to ``end`` read and extend their cache."""
        if (first, end) not in self._bindings:
            self._bindings[first, end] = self._new_binding(first, end)
        return self._bindings[first, end]

    def _new_binding(self, first: int, end: int) -> Any:
        binding = self._session.io_binding()
        for name, buffer in self._cache.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(buffer[first:end])
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits", "cpu")
        return binding

    def _run(self, binding: Any, ids: Ids, lengths: Ids) -> Logits:
        """Logits after the last tokens of the bound sequences, which are then ``lengths`` long."""
        longest = int(lengths.max())
        self.limits.check_length(longest)
        mask = (np.arange(longest) < lengths[:, None]).astype(np.int64)  # (B, total)
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", mask)
        self._session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[self._logits_at].numpy()
        return logits[:, -1].copy()  # the next run writes to the same memory

    @cached_property
    def _logits_at(self) -> int:
        """Where the binding lists the logits: it orders outputs as they were bound."""
        return len(self._cache)


def cache_dtype(session: Any) -> npt.DTypeLike:
    """What keys and values are in a graph: what it computes in.

    Raises:
        EngineError: if that is bfloat16, which numpy does not have.
    """
    kinds = {given.type for given in session.get_inputs() if given.name.startswith("past_key_values")}
    if "tensor(bfloat16)" in kinds:
        raise EngineError(
            "An engine that computes in bfloat16 is run by TensorRT or onnxruntime-genai, not here.",
            expected="keys and values in float32 or float16",
            found="bfloat16",
            fix="Export it with --precision fp16, or for tensorrt.",
        )
    return np.float16 if kinds == {"tensor(float16)"} else np.float32


def new_cache(spec: ModelSpec, batch: int, length: int, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Keys and values of every layer that attends, (batch, KV heads, length, head_dim) each."""
    return {
        f"{layer}.{kind}": np.zeros((batch, shape.num_key_value_heads, length, spec.head_dim), dtype)
        for layer, shape in enumerate(spec.layers)
        if shape.has_attention
        for kind in ("key", "value")
    }


def save_row(cache: Mapping[str, Array], row: int, length: int) -> dict[str, Array]:
    """A copy of one row's first ``length`` places."""
    return {name: buffer[row, :, :length].copy() for name, buffer in cache.items()}


def restore_row(cache: Mapping[str, Array], row: int, saved: Mapping[str, Array], length: int) -> None:
    """Write the first ``length`` places of a copy to a row."""
    for name, buffer in cache.items():
        buffer[row, :, :length] = saved[name][:, :length]


def open_graph(file: Path, limits: Limits) -> Any:
    """An ONNX Runtime session on a graph.

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
    try:
        session = runtime.InferenceSession(str(file), options, providers=providers)
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
