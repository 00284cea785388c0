"""What a cut would buy on this machine before anything is pruned: a shape and its cut, random weights. Imports torch.

A GPU is taken where torch sees one, and computes in bfloat16; a processor computes in float32. The result says which.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flabc.console import progress
from flabc.errors import ModelError
from flabc.runtime.backends.decoder_parts import fault_of_fusing
from flabc.runtime.backends.decoder_weights import gathered, random_source, stored_source
from flabc.runtime.backends.static_torch import rotary_of
from flabc.spec import ModelSpec

from .decoding import SHARE, How, Model, layers_that_fit, load_model, measure_sides
from .device import device_environment, free_bytes, measure_device
from .result import Workload
from .shape_result import DeviceRoofline, ShapeResult
from .shapes import cut_named, cut_shape, shape_named


@dataclass(frozen=True)
class Machine:
    """Where shapes are measured, how, and what it can do; ``not_fused`` says why nothing is compiled."""

    device: torch.device
    dtype: torch.dtype
    how: How
    not_fused: str | None
    roofline: DeviceRoofline
    environment: dict[str, Any]


@dataclass(eq=False)
class Pair:
    """A shape and its cut, both on one device; the names are those that results carry."""

    shape: str
    cut: str
    dense: Model
    pruned: Model


def find_machine(dtype: torch.dtype | None = None, *, graphs: bool = True, fused: bool = True) -> Machine:
    """The GPU if torch sees one, else the processor, measured.

    Args:
        dtype: what to compute in; by default bfloat16 on a GPU, else float32.
        graphs: whether a GPU runs CUDA graphs; a processor has none.
        fused: whether small kernels are compiled into few on a GPU, where that works.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    gpu = device.type == "cuda"
    not_fused = (fault_of_fusing(device) if gpu else "a processor starts kernels at once") if fused else "not asked for"
    return Machine(
        device=device,
        dtype=dtype,
        how=How(graphs=graphs and gpu, fused=not_fused is None),
        not_fused=not_fused,
        roofline=measure_device(device, dtype),
        environment=device_environment(device),
    )


def make_pair(machine: Machine, shape: str, cut: str, *, layers: int | None = None, cache_share: float = 0.2) -> Pair:
    """Both shapes with random weights, whole or as many layers as fit.

    Args:
        machine: where.
        shape: a name of ``SHAPES``.
        cut: a name of ``CUTS``, or a share of the parameters.
        layers: of the dense model, at most; by default as many as fit.
        cache_share: of the memory that both may take, what is left for their caches.

    Raises:
        UnknownNameError: if shape or cut has no such name.
        UsageError: if the shape cannot be cut so.
        EngineError: if not even a layer of each fits.
    """
    dense = shape_named(shape)
    pruned = cut_shape(dense, cut_named(cut))
    room = SHARE * (1 - cache_share) * free_bytes(machine.device)
    most = layers_that_fit(dense, pruned, room, machine.dtype.itemsize)
    if layers is not None and layers < most[0]:
        most = layers, max(round(layers * len(pruned.layers) / len(dense.layers)), 1)
    source = random_source(machine.dtype, machine.device)
    return Pair(
        shape, cut, *(load_model(spec, count, source) for spec, count in zip((dense, pruned), most, strict=True))
    )


def stored_pair(machine: Machine, folder: Path, cut: str, pruned: Path | None = None) -> Pair:
    """A real model, and a real pruned one, or what a cut would leave of the model with random weights.

    Args:
        machine: where.
        folder: a Hugging Face folder.
        cut: a name of ``CUTS`` or a share, if there is no pruned one; else how results call it.
        pruned: another.

    Raises:
        FlabcError: as ``make_pair``; or if a folder cannot be read.
    """
    dense = _stored_model(machine, folder)
    if pruned is not None:
        return Pair(folder.name, cut, dense, _stored_model(machine, pruned))
    shape = cut_shape(dense.spec, cut_named(cut))
    return Pair(
        folder.name,
        cut,
        dense,
        load_model(shape, len(shape.layers), random_source(machine.dtype, machine.device), dense.rotary),
    )


def _stored_model(machine: Machine, folder: Path) -> Model:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} is no model.", expected="a Hugging Face folder with config.json")
    spec = ModelSpec.from_config(json.loads(config.read_text(encoding="utf-8")))
    weights = gathered(spec, stored_source(folder, machine.dtype, machine.device))
    return Model(spec, spec, weights, origin=folder.name, rotary=rotary_of(folder, spec))


def measure_pair(
    machine: Machine,
    pair: Pair,
    workload: Workload,
    *,
    energy: bool = True,
    advance: Callable[[int], None] | None = None,
) -> ShapeResult:
    """Measure a pair in turns.

    Args:
        machine: where.
        pair: what.
        workload: what each run does.
        energy: whether the machine's counter is read.
        advance: is told after each of the four runs of a round.

    Raises:
        EngineError: if the workload does not fit into memory.
    """
    told = advance or (lambda _: None)
    dense, pruned = measure_sides(pair.dense, pair.pruned, workload, machine.how, energy=energy, advance=told)
    return ShapeResult(
        shape=pair.shape,
        cut=pair.cut,
        device=str(machine.device),
        dtype=machine.roofline.dtype,
        graphs=machine.how.graphs,
        fused=machine.how.fused,
        not_fused=machine.not_fused,
        workload=workload,
        environment=machine.environment,
        roofline=machine.roofline,
        dense=dense,
        pruned=pruned,
    )


def bench_shape(shape: str, cut: str, workload: Workload) -> ShapeResult:
    """A shape against its cut on this machine.

    Raises:
        UnknownNameError: if shape or cut has no such name.
        UsageError: if the shape cannot be cut so.
        EngineError: if it does not fit into memory.
    """
    cut_shape(shape_named(shape), cut_named(cut))  # names that are wrong are told before anything is measured
    if workload.threads is not None:
        torch.set_num_threads(workload.threads)
    machine = find_machine()
    pair = make_pair(machine, shape, cut)
    with progress(f"measuring {shape} and {cut}", 4 * workload.rounds) as advance:
        return measure_pair(machine, pair, workload, advance=advance)
