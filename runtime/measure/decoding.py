"""Two shapes decoded in turns on one device: time to the first token, time per token, memory, energy. Imports torch.

All weights, and the tokens between steps, stay on the device; what is measured is what the device takes. A server adds
its own work to that.

Letters in shape comments: B sequences, S tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flabc.errors import EngineError
from flabc.runtime.backends.decoder_parts import Rotary
from flabc.runtime.backends.decoder_weights import DecoderWeights, Source, bytes_read, gathered
from flabc.runtime.backends.static_decoder import StaticDecoder
from flabc.spec import ModelSpec

from .device import clock_of, free_bytes, wait_for
from .energy import find_counter, measure_energy
from .process import MAX_WARMUPS, STEADY
from .result import Energy, Sample, Workload
from .shape_result import Extent, ShapeSide
from .shapes import layer_bytes, sliced

#: Tokens of prompts that go through the layers at once: more bring no speed, and their activations take gigabytes.
PASS_TOKENS = 16384

#: Of the memory that is free, what weights and caches may take; the rest is for activations and graphs.
SHARE = 0.8


@dataclass(eq=False)
class Model:
    """A shape on a device.

    Args:
        spec: its shapes, whole.
        part: those that are measured: the whole, or some of its layers.
        weights: of the part.
        origin: ``random``, or where they were read.
        rotary: its positions, if they are not plain.
    """

    spec: ModelSpec
    part: ModelSpec
    weights: DecoderWeights
    origin: str = "random"
    rotary: Rotary | None = None

    @property
    def extent(self) -> Extent:
        """How much of it is here."""
        return Extent(
            measured_layers=len(self.part.layers),
            layers=len(self.spec.layers),
            factor=layer_bytes(self.spec, 1) / layer_bytes(self.part, 1),
        )


def load_model(spec: ModelSpec, layers: int, source: Source, rotary: Rotary | None = None) -> Model:
    """Put as many of a shape's layers as are asked for on the device of a source of random weights."""
    part = spec if layers >= len(spec.layers) else sliced(spec, layers)
    return Model(spec, part, gathered(part, source), rotary=rotary)


def layers_that_fit(dense: ModelSpec, pruned: ModelSpec, room: float, bytes_per_value: int) -> tuple[int, int]:
    """How many layers of both shapes fit into so many bytes together, the same share of each.

    Raises:
        EngineError: if not even one of each does.
    """
    outside = [bytes_per_value * spec.num_parameters - layer_bytes(spec, bytes_per_value) for spec in (dense, pruned)]
    inside = [layer_bytes(spec, bytes_per_value) for spec in (dense, pruned)]
    share = min((room - sum(outside)) / sum(inside), 1.0)
    counts = int(share * len(dense.layers)), int(share * len(pruned.layers))
    if min(counts) < 1:
        need = sum(outside) + sum(size / len(spec.layers) for size, spec in zip(inside, (dense, pruned), strict=True))
        raise EngineError(
            "Not one layer of each model fits into memory beside the other.",
            expected=f"{need / 2**30:.1f} GiB for weights",
            found=f"{room / 2**30:.1f} GiB",
        )
    return counts


def cache_bytes(model: Model, workload: Workload) -> int:
    """Bytes of the KV cache that a workload needs."""
    places = workload.prompt_tokens + workload.output_tokens
    return workload.batch * places * model.part.kv_bytes_per_token(model.weights.head.element_size())


def check_room(dense: Model, pruned: Model, workload: Workload) -> None:
    """Refuse a workload whose caches and activations do not fit beside the weights.

    Raises:
        EngineError: with both sizes.
    """
    size, device = dense.weights.head.element_size(), dense.weights.head.device
    widest = max(2 * layer.intermediate_size for layer in dense.part.layers) + 8 * dense.spec.hidden_size
    at_once = min(workload.batch * workload.prompt_tokens, max(PASS_TOKENS, workload.prompt_tokens))
    need = sum(cache_bytes(model, workload) for model in (dense, pruned)) + 2 * at_once * widest * size
    need += 2 * workload.batch * dense.spec.vocab_size * size
    room = free_bytes(device)
    if need > room:
        raise EngineError(
            f"A batch of {workload.batch} with prompts of {workload.prompt_tokens} does not fit beside the weights.",
            expected=f"{need / 2**30:.1f} GiB",
            found=f"{room / 2**30:.1f} GiB free",
        )


@dataclass(frozen=True)
class How:
    """Whether steps are CUDA graphs, and whether what is computed number by number is compiled."""

    graphs: bool
    fused: bool


class Run:
    """A model with the cache for a workload, ready to be timed."""

    def __init__(self, model: Model, workload: Workload, how: How, *, outside: bool = False) -> None:
        weights = replace(model.weights, layers=()) if outside else model.weights
        self.device, self.workload = weights.head.device, workload
        self._before = self._allocated()
        places = workload.prompt_tokens + workload.output_tokens
        self.decoder = StaticDecoder(
            model.part,
            weights,
            workload.batch,
            places,
            graphs=how.graphs,
            graph_prompts=how.graphs,
            fused=how.fused,
            rotary=model.rotary,
        )
        draw = torch.Generator().manual_seed(0)
        shape = (workload.batch, workload.prompt_tokens)
        self._ids = torch.randint(0, model.spec.vocab_size, shape, generator=draw).to(self.device)

    def sample(self) -> Sample:
        """One run: prompts, then a token after another for all rows at once."""
        whole, rows, length = clock_of(self.device), len(self._ids), self._ids.shape[1]
        whole.mark()
        token = self._prompts().argmax(-1, keepdim=True)  # (B, 1)
        self.decoder.begin(token, torch.full_like(token, length))
        whole.mark()
        ttft_ms = whole.gaps_ms()[0]  # waits: a user sees the first token before the second is begun
        steps = clock_of(self.device)
        steps.mark()
        for step in range(1, self.workload.output_tokens):
            self.decoder.next(rows, length + step)
            steps.mark()
        return Sample(ttft_ms=ttft_ms, token_ms=steps.gaps_ms())

    def _prompts(self) -> Tensor:
        """Logits behind all prompts, (B, V), as many rows at once as are worth it."""
        rows, length = self._ids.shape
        at_once = max(PASS_TOKENS // length, 1)
        last = torch.full((rows,), length - 1, device=self.device)
        if rows <= at_once:
            return self.decoder.prompt(self._ids, last)
        pieces = range(0, rows, at_once)
        return torch.cat(
            [self.decoder.prompt(self._ids[at : at + at_once], last[at : at + at_once], at) for at in pieces]
        )

    def warm_up(self) -> float | None:
        """Run until two runs take about as long, graphs are captured; the most device memory that it took, MiB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        before = self.sample().total_ms
        for _ in range(MAX_WARMUPS):
            now = self.sample().total_ms
            if abs(now - before) <= STEADY * before:
                break
            before = now
        if self.device.type != "cuda":
            return None
        weights = self.decoder.weights
        looked_up = 0 if weights.embedding is weights.head else weights.embedding.nbytes
        return (torch.cuda.max_memory_allocated(self.device) - self._before + bytes_read(weights) + looked_up) / 2**20

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def energy(self) -> Energy:
        """Joules per output token, prompts included, of all that the workload makes."""
        counter = find_counter(on_gpu=self.device.type == "cuda")
        if isinstance(counter, str):
            return Energy(missing=counter)

        def work() -> int:
            self.sample()
            wait_for(self.device)
            return self.workload.batch * self.workload.output_tokens

        return measure_energy(counter, work)


@torch.inference_mode()
def measure_sides(
    dense: Model, pruned: Model, workload: Workload, how: How, *, energy: bool, advance: Callable[[int], None]
) -> tuple[ShapeSide, ShapeSide]:
    """Measure both in rounds of dense, pruned, pruned, dense.

    Args:
        dense: what is compared with.
        pruned: the shape in question, on the same device.
        workload: what each run does.
        how: the decoder computes.
        energy: whether the machine's counter is read, which takes four seconds a side.
        advance: is told after each run.

    Raises:
        EngineError: if the workload does not fit into memory.
    """
    check_room(dense, pruned, workload)
    models = (dense, pruned)
    runs, peaks = [], []
    for model in models:
        runs.append(Run(model, workload, how))
        peaks.append(runs[-1].warm_up())
    bare = [Run(model, workload, how, outside=True) if model.extent.extrapolated else None for model in models]
    for each in bare:
        if each is not None:
            each.warm_up()
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    outside: tuple[list[Sample], list[Sample]] = ([], [])
    for _ in range(workload.rounds):
        for side in (0, 1, 1, 0):
            samples[side].append(runs[side].sample())
            rest = bare[side]
            if rest is not None:
                outside[side].append(rest.sample())
            advance(1)
    unread = Energy(missing="it was not asked for")
    sides = [
        ShapeSide(
            spec=model.spec,
            weights=model.origin,
            extent=model.extent,
            samples=tuple(samples[at]),
            outside=tuple(outside[at]),
            bytes_per_step=step_bytes(model, workload),
            prompt_flops=prompt_flops(model.spec, workload),
            peak_mib=peaks[at],
            energy=runs[at].energy() if energy else unread,
            attentions=runs[at].decoder.attentions,
        )
        for at, model in enumerate(models)
    ]
    return sides[0], sides[1]


def step_bytes(model: Model, workload: Workload) -> int:
    """Bytes that a step of the whole model reads in the middle of decoding."""
    size = model.weights.head.element_size()
    looked_up = 0 if model.spec.tie_word_embeddings else model.spec.vocab_size * model.spec.hidden_size
    held = workload.batch * (workload.prompt_tokens + workload.output_tokens // 2)
    return size * (model.spec.num_parameters - looked_up) + held * model.spec.kv_bytes_per_token(size)


def prompt_flops(spec: ModelSpec, workload: Workload) -> int:
    """Operations that the prompts of a batch take: the output matrix multiplies each one's last token only."""
    tokens = workload.batch * workload.prompt_tokens
    head = 2 * spec.vocab_size * spec.hidden_size
    return tokens * spec.flops_per_token(workload.prompt_tokens // 2) - (tokens - workload.batch) * head
