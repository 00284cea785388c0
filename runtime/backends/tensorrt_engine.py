"""TensorRT: built engines, with the KV cache in the GPU's memory, written where it lies.

An engine has a profile for prompts and one for single tokens, each with a context of its own. A written cache has the
address of the cache that was given. NVIDIA, TensorRT documentation: "KV Cache", "Working with Dynamic Shapes",
"Refitting an Engine"; CUDA Python, ``cuda.bindings.runtime``. Tested over a stand-in alone: no GPU was at hand.

Letters in shape comments: B sequences, S new tokens, M places in the cache, H head_dim, V vocab_size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flabc.artifact import BUILD_PLAN, ENGINE, GRAPH, SCORING_ENGINE, SCORING_GRAPH
from flabc.errors import EngineError, require
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

from .device_memory import Array, Cache, CudaMemory, Memory, Room
from .fixed_cache import FixedCache
from .ort import check_dtype

#: The engine's profiles, as they were built.
PREFILL, DECODE = 0, 1

#: TensorRT's types by name, and numpy's. bfloat16, which numpy does not have, comes as its bits.
TYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": np.uint16,
    "INT32": np.int32,
    "INT64": np.int64,
}

#: What the address of a binding must be a multiple of.
ALIGNMENT = 256


class Bound:
    """An engine with a context for each of its profiles, and memory for what goes in and out beside the cache.

    Args:
        engine: an ``ICudaEngine``.
        memory: where it runs.
    """

    def __init__(self, engine: Any, memory: Memory) -> None:
        self._engine, self._memory = engine, memory
        names = [engine.get_tensor_name(at) for at in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        self._names = frozenset(names)
        self._contexts = [self._context(at) for at in range(engine.num_optimization_profiles)]
        self._room = Room(memory)

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._memory.stream):
            raise EngineError(f"TensorRT cannot make a context for profile {profile}.", fix="Free memory of the GPU.")
        return context

    def largest(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest shape of an input that a profile allows."""
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    def kind(self, name: str) -> type[np.generic]:
        """Numpy's type for a tensor."""
        return TYPES[self._engine.get_tensor_dtype(name).name]

    def run(
        self, profile: int, arrays: Mapping[str, Array], caches: Mapping[str, tuple[int, tuple[int, ...]]]
    ) -> Logits:
        """Run the engine once.

        Args:
            profile: which of its contexts.
            arrays: what goes in, by name; those that the engine does not ask for are left out.
            caches: address and shape of every layer's keys and values, by ``LAYER.key`` and ``LAYER.value``.

        Returns:
            the logits, (B, S, V) or (B, 1, V).
        """
        context = self._contexts[profile]
        for name, array in arrays.items():
            if name in self._names:
                given = np.ascontiguousarray(array, self.kind(name))
                address = self._room.at(name, given.nbytes)
                self._memory.upload(address, given)
                self._bind(context, name, address, given.shape)
        for cache, (address, shape) in caches.items():
            self._bind(context, f"past_key_values.{cache}", address, shape)
            self._bind(context, f"present.{cache}", address)  # written in place
        logits = np.empty(tuple(context.get_tensor_shape("logits")), self.kind("logits"))
        address = self._room.at("logits", logits.nbytes)
        self._bind(context, "logits", address)
        if not context.execute_async_v3(self._memory.stream):
            raise EngineError("TensorRT could not run the engine; its own message is above.")
        self._memory.download(address, logits)
        return _in_float32(logits)

    def _bind(self, context: Any, name: str, address: int, shape: tuple[int, ...] | None = None) -> None:
        if shape is not None and not context.set_input_shape(name, shape):
            raise EngineError(f"The engine does not take {name} of shape {shape}.")
        if address % ALIGNMENT or not context.set_tensor_address(name, address):
            raise EngineError(f"{name} cannot lie at the address {address:#x}.")


def _in_float32(logits: Array) -> Logits:
    """Float32 from what an engine gives; bfloat16's bits are the upper half of float32's."""
    if logits.dtype == np.uint16:
        return (logits.astype(np.uint32) << 16).view(np.float32)
    return logits.astype(np.float32, copy=False)


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> TensorRtBackend:
    """Open an engine folder.

    Raises:
        MissingExtraError: if TensorRT or cuda-bindings is not installed.
        EngineError: if the engine was not built, there is no GPU, or TensorRT refuses the engine.
    """
    check_dtype(limits)
    built = folder / ENGINE
    if not built.is_file():
        raise EngineError(
            f"{folder} holds a graph and a plan for TensorRT, but no engine: {ENGINE} has not been built.",
            fix="Run flabc export --target tensorrt on a machine with an NVIDIA GPU and pip install 'flabc[tensorrt]'.",
        )
    plan = json.loads((folder / BUILD_PLAN).read_text(encoding="utf-8"))
    memory = CudaMemory("tensorrt")
    loader = Loader(folder, plan["options"])
    return TensorRtBackend(spec, limits, memory, loader)


class Loader:
    """Reads built engines, and puts weights back into stripped ones.

    Args:
        folder: of the engines and their graphs.
        options: of the plan that they were built by.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._tensorrt = require("tensorrt", "tensorrt")
        self._folder, self._options = folder, options
        self._logger = self._tensorrt.Logger(self._tensorrt.Logger.WARNING)
        self._runtime = self._tensorrt.Runtime(self._logger)
        if options["version_compatible"]:
            self._runtime.engine_host_code_allowed = True  # such a plan carries its own lean runtime

    def load(self, engine: str, graph: str) -> Any:
        """An ``ICudaEngine``.

        Raises:
            EngineError: if TensorRT refuses it, or its weights.
        """
        loaded = self._runtime.deserialize_cuda_engine((self._folder / engine).read_bytes())
        if loaded is None:
            raise EngineError(
                f"TensorRT cannot load {self._folder / engine}; its own message is above.",
                fix="An engine runs on the kind of GPU and the version of TensorRT it was built with, unless it was "
                "exported with --hardware-compatible or --version-compatible.",
            )
        if self._options["strip_weights"]:
            self._refit(loaded, self._folder / graph)
        return loaded

    def _refit(self, engine: Any, graph: Path) -> None:
        refitter = self._tensorrt.Refitter(engine, self._logger)
        parser = self._tensorrt.OnnxParserRefitter(refitter, self._logger)
        # An engine without its weights runs and says nothing but noughts.
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            raise EngineError(f"TensorRT cannot put the weights of {graph} into the engine.")


class Engines(Protocol):
    """What opens built engines, as ``Loader`` does."""

    def load(self, engine: str, graph: str) -> Any:
        """The ``ICudaEngine`` of that name, with the weights of a graph."""
        ...


class TensorRtBackend(FixedCache):
    """A built engine. See ``Backend`` for the contract.

    Args:
        spec: the model's shapes.
        limits: how much may be held; never longer than the engine's cache.
        memory: where it runs.
        engines: opens the engines.

    Raises:
        EngineError: if the engine was built for fewer sequences.
    """

    name = "tensorrt"

    def __init__(self, spec: ModelSpec, limits: Limits, memory: Memory, engines: Engines) -> None:
        self.spec, self._memory, self._engines = spec, memory, engines
        self._bound = Bound(engines.load(ENGINE, GRAPH), memory)
        batch, max_input = self._bound.largest("input_ids", PREFILL)
        if limits.max_batch > batch:
            raise EngineError(
                f"Room for {limits.max_batch} sequences was asked for.",
                expected=f"at most {batch}, for which the engine was built",
                fix="Ask for fewer, or export with a larger --max-batch.",
            )
        places = _places(self._bound, limits.max_length)
        super().__init__(replace(limits, max_length=min(limits.max_length, places)), places, max_input)
        self._cache = self._new_cache(self._bound, limits.max_batch, places)

    def _new_cache(self, bound: Bound, rows: int, places: int) -> Cache:
        names = [name for name in bound.inputs if name.startswith("past_key_values.")]
        itemsize = np.dtype(bound.kind(names[0])).itemsize if names else 0
        return Cache(self.spec, self._memory, rows, places, itemsize)

    def _step(self, first: int, ids: Ids, counts: Ids, begin: Ids) -> Logits:
        profile = DECODE if ids.shape[1] == 1 else PREFILL
        arrays = {"input_ids": ids, "write_indices": begin, "token_counts": counts}
        return self._bound.run(profile, arrays, self._cache.rows(first, len(ids)))[:, -1]

    def save(self, row: int, length: int) -> dict[str, Array]:
        """A copy, in the host's memory, of the keys and values of a sequence's first tokens."""
        return self._cache.read(row, length)

    def _put(self, row: int, saved: Mapping[str, Array], length: int) -> None:
        self._cache.write(row, saved, length)

    def _move(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        self._cache.move(moves)

    @cached_property
    def _scorer(self) -> tuple[Bound, Cache]:
        bound = Bound(self._engines.load(SCORING_ENGINE, SCORING_GRAPH), self._memory)
        return bound, self._new_cache(bound, 1, self._places)

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V), one sequence at a time."""
        self.limits.check_length(ids.shape[1])
        bound, cache = self._scorer
        begin = np.zeros(1, np.int64)
        counts = np.array([ids.shape[1]])
        rows = (
            bound.run(0, {"input_ids": row[None], "write_indices": begin, "token_counts": counts}, cache.rows(0, 1))
            for row in ids
        )
        return np.concatenate(list(rows))


def _places(bound: Bound, wanted: int) -> int:
    """How long the engine's cache is; as long as wanted if it has none."""
    caches = [name for name in bound.inputs if name.startswith("past_key_values.")]
    return bound.largest(caches[0], PREFILL)[2] if caches else wanted
