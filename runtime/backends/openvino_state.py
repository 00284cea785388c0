"""OpenVINO: engines of ``--target openvino``, with keys and values as the runtime's own state.

The state of an infer request grows with all rows of a batch alike. So sequences that run apart for a while, such as a
prompt that is read in pieces while others answer, have a request of their own, and are copied together when they are
first run together. Rows share their places; which of them a row uses is told by a mask.

Letters in shape comments: B sequences, S new tokens, T places, V vocab_size, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flabc.artifact import ACTIVATIONS_NOTE, GRAPH, SCORING_GRAPH
from flabc.errors import EngineError, UnknownNameError, require
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

from .ort import PROVIDERS, check_dtype

Array = npt.NDArray[Any]

#: OpenVINO's name for the processor.
DEVICE = "CPU"

#: Where OpenVINO keeps a graph's note of what its matrices are multiplied with.
NOTE = ["framework", ACTIVATIONS_NOTE]

#: By that note: how many activations share a scale when they are rounded, "0" for not at all and the largest number
#: for all of a token's; and whether all else is computed in bfloat16 where the processor has units for it. With blocks
#: it is not: OpenVINO rounds these in its kernels for float32 alone.
ROUNDED = {None: ("0", False), "blocks": ("32", False), "tokens": (str(2**64 - 1), True), "full": ("0", True)}

#: How the graph names a layer's keys or values before and after a step.
BEFORE, AFTER = "past_key_values.", "present."


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> OpenVinoBackend:
    """Open an engine folder.

    Raises:
        MissingExtraError: if openvino is not installed.
        EngineError: if OpenVINO refuses the graph, or something else than the processor is asked for.
        UnknownNameError: if there is no such provider.
    """
    return OpenVinoBackend(folder, spec, limits)


@dataclass
class Segment:
    """Sequences that run together.

    Args:
        request: holds their keys and values.
        used: which places each row uses, (B, T).
    """

    request: Any
    used: npt.NDArray[np.bool_]

    @property
    def lengths(self) -> Ids:
        """Tokens of each row, (B,)."""
        lengths: Ids = self.used.sum(1)
        return lengths


#: A row of a segment.
Place = tuple[Segment, int]


class OpenVinoBackend:
    """An engine in OpenVINO. See ``Backend`` for the contract."""

    name = "openvino"

    def __init__(self, folder: Path, spec: ModelSpec, limits: Limits) -> None:
        check_dtype(limits)
        _check_provider(limits.provider)
        self.spec, self.limits, self._folder = spec, limits, folder
        self._attends = any(layer.has_attention for layer in spec.layers)  # else no graph asks for rows of the past
        self._openvino = require("openvino", "openvino")
        self._model = self._compiled(folder / GRAPH)
        self._free: list[Any] = []
        self._segments: list[Segment] = []
        self.join(np.zeros((1, 1), np.int64), np.array([1]))  # OpenVINO packs weights when they are first multiplied
        self.start(0)

    @cached_property
    def _scorer(self) -> Any:
        return self._compiled(self._folder / SCORING_GRAPH).create_infer_request()

    def _compiled(self, file: Path) -> Any:
        core = self._openvino.Core()
        try:
            model = with_state(self._openvino, core.read_model(str(file)))
            self.settings = _settings(core, model, self.limits.threads)
            return core.compile_model(model, DEVICE, self.settings)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot open {file}: {error}") from error

    def start(self, batch: int) -> None:
        """Forget all sequences and begin ``batch`` new ones."""
        self.limits.check_batch(batch)
        self._release(self._segments)
        self._segments = [self._segment(np.zeros((batch, 0), bool))] if batch else []

    def extend(self, ids: Ids, counts: Ids, first: int = 0) -> Logits:
        """Append tokens to the sequences from ``first`` on; (B, S) and (B,) in, (B, V) out."""
        return self._run(self._together(first, first + len(ids)), ids, counts)

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running."""
        self.limits.check_batch(self._running + len(ids))
        self._segments.append(self._segment(np.zeros((len(ids), 0), bool)))
        return self._run(self._segments[-1], ids, counts)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only."""
        places = list(self._places())
        if list(rows) != list(range(len(places))):
            self._replace(0, len(self._segments), [places[row] for row in rows])

    def save(self, row: int, length: int) -> dict[str, Array]:
        """A copy of the keys and values of a sequence's first tokens, (KV heads, length, H) each."""
        segment, at = list(self._places())[row]
        places = np.flatnonzero(segment.used[at])[:length]
        return {name: held[at][:, places] for name, held in _held(segment.request).items()}

    def restore(self, saved: Mapping[str, Array], length: int) -> None:
        """Let a sequence join that begins with the first tokens of one that was saved."""
        self.limits.check_batch(self._running + 1)
        segment = self._segment(np.ones((1, length), bool))
        self._hold(segment.request, {name: array[None, :, :length] for name, array in saved.items()})
        self._segments.append(segment)

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        self._scorer.reset_state()
        return self._infer(self._scorer, ids, np.ones(ids.shape, bool))

    @property
    def _running(self) -> int:
        return sum(len(segment.used) for segment in self._segments)

    def _places(self) -> Iterator[Place]:
        """Where each running sequence is, in order."""
        return ((segment, row) for segment in self._segments for row in range(len(segment.used)))

    def _run(self, segment: Segment, ids: Ids, counts: Ids) -> Logits:
        """Append tokens to all rows of a segment; logits after each row's last, (B, V)."""
        self.limits.check_length(int((segment.lengths + counts).max()))
        used = np.concatenate([segment.used, np.arange(ids.shape[1]) < counts[:, None]], axis=1)
        logits = self._infer(segment.request, ids, used)
        segment.used = used
        return logits[:, -1]

    def _infer(self, request: Any, ids: Ids, used: npt.NDArray[np.bool_]) -> Logits:
        feeds = {"input_ids": ids, "attention_mask": used.astype(np.int64)}
        if self._attends:
            feeds["beam_idx"] = np.arange(len(ids), dtype=np.int32)
        logits: Logits = request.infer(feeds)["logits"]
        return logits

    def _together(self, first: int, end: int) -> Segment:
        """The sequences from ``first`` up to ``end`` as one segment, made of those that they are in."""
        begins = np.cumsum([0, *(len(segment.used) for segment in self._segments)]).tolist()
        parts = enumerate(pairwise(begins))
        touched = [at for at, (begin, stop) in parts if begin < end and stop > first]
        low, high = touched[0], touched[-1] + 1
        if (begins[low], begins[high], high - low) == (first, end, 1):
            return self._segments[low]
        places = list(self._places())
        rows = [places[begin:stop] for begin, stop in ((begins[low], first), (first, end), (end, begins[high]))]
        made = self._replace(low, high, *rows)
        return made[1 if rows[0] else 0]

    def _replace(self, low: int, high: int, *parts: Sequence[Place]) -> list[Segment]:
        """Put segments of these rows in the place of some; rows then use their first places."""
        held = {id(segment): _held(segment.request) for segment in self._segments[low:high] if segment.used.size}
        made = [self._copied(part, held) for part in parts if part]
        self._release(self._segments[low:high])
        self._segments[low:high] = made
        return made

    def _copied(self, rows: Sequence[Place], held: Mapping[int, Mapping[str, Array]]) -> Segment:
        lengths = np.array([segment.lengths[row] for segment, row in rows])
        made = self._segment(np.arange(lengths.max()) < lengths[:, None])
        names = {name for states in held.values() for name in states}
        arrays = dict[str, Array]()
        for name in names if lengths.any() else ():
            heads, size = next(states[name].shape[1::2] for states in held.values())
            arrays[name] = np.zeros((len(rows), heads, lengths.max(), size), np.float32)
            for to, (segment, row) in enumerate(rows):
                if lengths[to]:
                    arrays[name][to, :, : lengths[to]] = held[id(segment)][name][row][:, segment.used[row]]
        self._hold(made.request, arrays)
        return made

    def _segment(self, used: npt.NDArray[np.bool_]) -> Segment:
        """A segment on a request without state."""
        return Segment(self._free.pop() if self._free else self._model.create_infer_request(), used)

    def _release(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            segment.request.reset_state()
            self._free.append(segment.request)

    def _hold(self, request: Any, arrays: Mapping[str, Array]) -> None:
        """Give a request keys and values, (B, KV heads, T, H) each."""
        for state in request.query_state():
            if state.name in arrays:
                state.state = self._openvino.Tensor(np.ascontiguousarray(arrays[state.name]))


def _check_provider(asked: str) -> None:
    if asked not in ("auto", *PROVIDERS):
        raise UnknownNameError("provider", asked, ["auto", *PROVIDERS])
    if asked not in ("auto", "cpu"):
        fix = "Export the engine for onnx: ONNX Runtime has that provider."
        raise EngineError(f"OpenVINO does not run on {asked.upper()} here.", expected="auto or cpu", fix=fix)


def _held(request: Any) -> dict[str, Array]:
    """Copies of the keys and values in a request, (B, KV heads, T, H) each."""
    return {state.name: np.array(state.state.data, np.float32) for state in request.query_state()}


def with_state(openvino: Any, model: Any) -> Any:
    """A graph whose keys and values stay in the request, instead of going in and coming out.

    Without sequences a state is empty: of as many rows as there are ids, and no places. OpenVINO's documentation,
    "Obtaining a stateful model".
    """
    ops = openvino.opset13
    rows = ops.gather(ops.shape_of(model.input("input_ids"), "i64"), np.array([0]), np.array(0))
    results = {name: each for each in model.results for name in each.output(0).names}
    for given in list(model.inputs):
        name = given.any_name
        if not name.startswith(BEFORE):
            continue
        shape = given.partial_shape
        empty = ops.concat([rows, np.array([shape[1].get_length(), 0, shape[3].get_length()])], 0)
        info = openvino.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = shape, given.element_type, name.removeprefix(BEFORE)
        variable = openvino.op.util.Variable(info)
        nothing = ops.broadcast(ops.constant(np.float32(0)), empty)
        before = openvino.opset6.read_value(nothing, variable)
        parameter = given.get_node()
        parameter.output(0).replace(before.output(0))
        result = results[name.replace(BEFORE, AFTER)]
        after = openvino.opset6.assign(result.input_value(0).get_node(), variable)
        model.remove_result(result)
        model.add_sinks([after])
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


def _settings(core: Any, model: Any, threads: int | None) -> dict[str, Any]:
    """How to compute: in float32, or as the graph says of its matrices of whole numbers."""
    noted = model.get_rt_info(NOTE).astype(str) if model.has_rt_info(NOTE) else None
    share, halved = ROUNDED[noted]
    wide = not halved or "BF16" not in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    kind = "f32" if wide else "bf16"
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": kind, "KV_CACHE_PRECISION": kind}
    settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = share
    return settings | ({"INFERENCE_NUM_THREADS": threads} if threads is not None else {})
