"""What TensorRT is to build, as a value: options, the shapes of every input, and the same as a trtexec line.

Two engines are built of an ONNX folder: one that serves, with an optimisation profile for prompts and one for single
tokens, and one that gives logits at every position. NVIDIA, TensorRT documentation: "Working with Dynamic Shapes",
"Engine Compatibility", "Refitting an Engine", "Command-Line Programs".

Letters in shape comments: B sequences, S new tokens, M places in the cache, H head_dim.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from flabc.artifact import BUILD_PLAN, ENGINE, GRAPH, SCORING_ENGINE, SCORING_GRAPH
from flabc.errors import ModelError, UsageError
from flabc.frozen import Frozen
from flabc.spec import ModelSpec

from .dialects.operations import cache_names
from .dialects.standard import TOKEN_COUNTS, WRITE_INDICES

#: The same build as commands of TensorRT's own tool.
SCRIPT = "build.sh"

#: The cache is a multiple of so many places long: then every row of it begins at an address that TensorRT accepts
#: (aligned to 256 bytes), whatever the number of heads.
PLACES_STEP = 64

#: Precisions that TensorRT computes in, the best first; which of them can be exported is the dialect's business.
PRECISIONS = ("fp16", "bf16", "fp32")


class BuildOptions(Frozen):
    """What can be asked of TensorRT."""

    max_batch: int = Field(8, ge=1, description="Sequences at once.")
    max_input: int = Field(
        512, ge=1, description="Tokens of one sequence that are read at once; longer prompts go in pieces."
    )
    max_length: int | None = Field(None, ge=1, description="Tokens of one sequence, prompt and answer together.")
    timing_cache: str | None = Field(None, description="A file of kernel timings, read before and extended after.")
    version_compatible: bool = Field(False, description="Whether later versions of TensorRT load the engine.")
    hardware_compatible: bool = Field(False, description="Whether every GPU from Ampere on runs it.")
    strip_weights: bool = Field(False, description="Whether weights stay in the ONNX file and are put in on opening.")


class Shapes(Frozen):
    """The least, the best and the largest shape of an input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class Profile(Frozen):
    """An optimisation profile: the shapes of every input of a graph."""

    name: str
    shapes: dict[str, Shapes]


class EnginePlan(Frozen):
    """One engine of the folder."""

    graph: str
    engine: str
    profiles: tuple[Profile, ...]


class BuildPlan(Frozen):
    """The content of ``build_plan.json``; ``options.max_length`` is settled in it."""

    precision: str
    strongly_typed: Literal[True] = True
    decomposable_attention: Literal[True] = True
    options: BuildOptions
    engines: tuple[EnginePlan, ...]

    @property
    def max_length(self) -> int:
        """How long the cache is."""
        if self.options.max_length is None:
            raise ValueError("A plan has a length.")
        return self.options.max_length

    def commands(self) -> list[str]:
        """A trtexec line for each engine, to be run in the folder."""
        return [shlex.join(_trtexec(engine, self.options)) for engine in self.engines]

    def write(self, folder: Path) -> None:
        """Write the plan, and the same build as a shell script, into a folder."""
        (folder / BUILD_PLAN).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        lines = [
            "#!/bin/sh",
            "# Builds the engines of this folder with TensorRT's own tool.",
            "set -e",
            'cd "$(dirname "$0")"',
        ]
        (folder / SCRIPT).write_text("\n".join([*lines, *self.commands()]) + "\n", encoding="utf-8")


def plan(spec: ModelSpec, precision: str, options: BuildOptions, *, least_length: int = 1) -> BuildPlan:
    """The build of a model's two engines.

    Args:
        spec: the model's shapes.
        precision: of the graphs.
        options: what was asked; without ``max_length`` as long as the model's positions allow, 2,048 at most.
        least_length: what the proof needs.

    Raises:
        UsageError: if the lengths do not fit the model or each other.
        ModelError: if the model has too few positions for any cache.
    """
    length = options.max_length or min(2048, spec.max_position_embeddings) // PLACES_STEP * PLACES_STEP
    if options.max_length is None and length < least_length:
        raise ModelError(
            "The model has too few positions for an engine that can be checked.",
            expected=f"at least {_rounded(least_length)}",
            found=str(spec.max_position_embeddings),
        )
    if length % PLACES_STEP or length < least_length or length > spec.max_position_embeddings:
        raise UsageError(
            f"--max-length {length} does not fit.",
            expected=f"a multiple of {PLACES_STEP} from {_rounded(least_length)} to {spec.max_position_embeddings}",
        )
    new = options.max_input if "max_input" in options.model_fields_set else min(options.max_input, length)
    if new > length:
        raise UsageError(f"--max-input {new} is longer than a sequence.", expected=f"at most {length}")
    settled = options.model_copy(update={"max_length": length, "max_input": new})
    return BuildPlan(precision=precision, options=settled, engines=_engines(spec, settled, length))


def _rounded(length: int) -> int:
    return -(-length // PLACES_STEP) * PLACES_STEP


def _engines(spec: ModelSpec, options: BuildOptions, length: int) -> tuple[EnginePlan, ...]:
    batch, new = options.max_batch, options.max_input
    prefill = _profile("prefill", spec, length, batches=(1, 1, batch), new=(1, new, new))
    decode = _profile("decode", spec, length, batches=(1, batch, batch), new=(1, 1, 1))
    score = _profile("score", spec, length, batches=(1, 1, 1), new=(1, new, length), counted=False)
    return (
        EnginePlan(graph=GRAPH, engine=ENGINE, profiles=(prefill, decode)),
        EnginePlan(graph=SCORING_GRAPH, engine=SCORING_ENGINE, profiles=(score,)),
    )


def _profile(
    name: str,
    spec: ModelSpec,
    length: int,
    batches: tuple[int, int, int],
    new: tuple[int, int, int],
    *,
    counted: bool = True,
) -> Profile:
    """The shapes of all inputs, from the least, best and largest B and S; ``counted`` if a last token is picked."""
    shapes = {"input_ids": _shapes(zip(batches, new, strict=True))}
    for numbers in (WRITE_INDICES, TOKEN_COUNTS) if counted else (WRITE_INDICES,):
        shapes[numbers] = _shapes((b,) for b in batches)
    for cache in cache_names(spec):
        heads = spec.layers[int(cache.split(".")[0])].num_key_value_heads
        shapes[f"past_key_values.{cache}"] = _shapes((b, heads, length, spec.head_dim) for b in batches)
    return Profile(name=name, shapes=shapes)


def _shapes(three: Iterable[tuple[int, ...]]) -> Shapes:
    least, best, largest = three
    return Shapes(min=least, opt=best, max=largest)


def _trtexec(engine: EnginePlan, options: BuildOptions) -> list[str]:
    """The arguments by which trtexec builds an engine as ``tensorrt_engine`` does."""
    words = ["trtexec", f"--onnx={engine.graph}", f"--saveEngine={engine.engine}", "--stronglyTyped", "--noTF32"]
    words += ["--decomposableAttentions=*", "--skipInference"]
    for index, profile in enumerate(engine.profiles):
        words.append(f"--profile={index}")
        for bound in ("min", "opt", "max"):
            sizes = ((name, getattr(shapes, bound)) for name, shapes in profile.shapes.items())
            words.append(f"--{bound}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, size))}" for name, size in sizes))
    words += [f"--timingCacheFile={options.timing_cache}"] if options.timing_cache else []
    words += ["--versionCompatible"] if options.version_compatible else []
    words += ["--hardwareCompatibilityLevel=ampere+"] if options.hardware_compatible else []
    return words + (["--stripWeights"] if options.strip_weights else [])
