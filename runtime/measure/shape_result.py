"""What measuring shapes leaves behind: raw samples of both sides, and what follows from them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from flabc.frozen import Frozen
from flabc.spec import ModelSpec

from .result import Energy, Sample, Workload

SCHEMA_VERSION = 1


class DeviceRoofline(Frozen):
    """What a device can do at best, as torch reaches it.

    Args:
        bandwidth_gib_s: bytes read and written per second by a large copy, GiB/s.
        gflops: operations of large products per second in ``dtype``, two to a multiply-add, 1e9/s.
        dtype: as torch calls it.
    """

    bandwidth_gib_s: float
    gflops: float
    dtype: str


class Extent(Frozen):
    """How much of a model was measured. Of a slice, times are those of the whole by calculation.

    The layers' time, which is that of the slice less that of a model without layers, is multiplied by ``factor``, the
    bytes of all layers over those of the slice.
    """

    measured_layers: int
    layers: int
    factor: float

    @property
    def extrapolated(self) -> bool:
        """Whether a part was measured and the whole calculated."""
        return self.measured_layers < self.layers


class ShapeSide(Frozen):
    """One of two shapes.

    Args:
        spec: its shapes, whole.
        weights: ``random``, or the folder that they were read from.
        extent: how much of it was measured.
        samples: runs of what was measured.
        outside: runs of the model without its layers; none if all were measured.
        bytes_per_step: weights, and the keys and values in the middle of decoding, that a step of the whole reads.
        prompt_flops: operations that the prompts of the whole take.
        peak_mib: most device memory that what was measured held, weights, cache and graphs together; None on a
            processor.
        energy: of what was measured, so of the slice where it is one.
        attentions: which way of attending to the cache was the fastest for each graph, by rows and reach.
    """

    spec: ModelSpec
    weights: str
    extent: Extent
    samples: tuple[Sample, ...]
    outside: tuple[Sample, ...] = ()
    bytes_per_step: int
    prompt_flops: int
    peak_mib: float | None = None
    energy: Energy
    attentions: dict[str, str] = Field(default_factory=dict)

    @property
    def ttft_ms(self) -> float:
        """Median time to the first tokens of all prompts, of the whole model."""
        return self._whole([run.ttft_ms for run in self.samples], [run.ttft_ms for run in self.outside])

    @property
    def tpot_ms(self) -> float:
        """Median time of a step, of the whole model."""
        return self._whole([run.tpot_ms for run in self.samples], [run.tpot_ms for run in self.outside])

    def _whole(self, measured: list[float], outside: list[float]) -> float:
        if not self.extent.extrapolated:
            return float(np.median(measured))
        rest = float(np.median(outside))
        return rest + (float(np.median(measured)) - rest) * self.extent.factor


class ShapeFigures(Frozen):
    """What follows from a cell: speed-ups are dense over pruned, of whole models.

    Args:
        extrapolated: whether the models were too large and slices of them measured.
        bytes_ratio: bytes that a step of the dense model reads over those of the pruned one.
        conversion: the decoding speed-up over that ratio: 1 if every byte saved became time saved.
        decode_roofline, prompt_roofline: shares of the device's bandwidth and arithmetic that were reached, dense and
            pruned.
        tokens_per_s: of all sequences together while decoding, dense and pruned.
        joules_per_token: dense and pruned; None where nothing was read, or a slice was measured.
    """

    extrapolated: bool
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]
    tokens_per_s: tuple[float, float]
    ttft_speedup: float
    tpot_speedup: float
    bytes_ratio: float
    conversion: float
    decode_roofline: tuple[float, float]
    prompt_roofline: tuple[float, float]
    peak_mib: tuple[float | None, float | None]
    joules_per_token: tuple[float | None, float | None]


class ShapeResult(Frozen):
    """Two shapes measured in turns, at one length of prompts and one batch.

    ``graphs`` says whether steps were CUDA graphs; ``fused`` whether small kernels were compiled into few, and
    ``not_fused`` why not.
    """

    schema_version: int = SCHEMA_VERSION
    shape: str
    cut: str
    device: str
    dtype: str
    graphs: bool
    fused: bool
    not_fused: str | None = None
    workload: Workload
    environment: dict[str, Any]
    roofline: DeviceRoofline
    dense: ShapeSide
    pruned: ShapeSide

    def figures(self) -> ShapeFigures:
        """Medians, ratios and shares."""
        sides = self.dense, self.pruned
        tpot, ttft = (side.tpot_ms for side in sides), (side.ttft_ms for side in sides)
        (dense_tpot, pruned_tpot), (dense_ttft, pruned_ttft) = tpot, ttft
        extrapolated = any(side.extent.extrapolated for side in sides)
        bytes_ratio = self.dense.bytes_per_step / self.pruned.bytes_per_step
        return ShapeFigures(
            extrapolated=extrapolated,
            ttft_ms=(dense_ttft, pruned_ttft),
            tpot_ms=(dense_tpot, pruned_tpot),
            tokens_per_s=(1000 * self.workload.batch / dense_tpot, 1000 * self.workload.batch / pruned_tpot),
            ttft_speedup=dense_ttft / pruned_ttft,
            tpot_speedup=dense_tpot / pruned_tpot,
            bytes_ratio=bytes_ratio,
            conversion=dense_tpot / pruned_tpot / bytes_ratio,
            decode_roofline=(self._reached(self.dense)[0], self._reached(self.pruned)[0]),
            prompt_roofline=(self._reached(self.dense)[1], self._reached(self.pruned)[1]),
            peak_mib=(self.dense.peak_mib, self.pruned.peak_mib),
            joules_per_token=(None, None)
            if extrapolated
            else (self.dense.energy.joules_per_token, self.pruned.energy.joules_per_token),
        )

    def _reached(self, side: ShapeSide) -> tuple[float, float]:
        """Shares of the device's bandwidth in decoding, and of its arithmetic in prompts."""
        read_ms = 1000 * side.bytes_per_step / 2**30 / self.roofline.bandwidth_gib_s
        multiply_ms = 1000 * side.prompt_flops / 1e9 / self.roofline.gflops
        return read_ms / side.tpot_ms, multiply_ms / side.ttft_ms
