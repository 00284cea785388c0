"""Peers on the same machine: what measuring them leaves behind, and the table of the README."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from flabc.frozen import Frozen
from flabc.runtime.measure.result import Roofline, Sample

from .table import interval_text, middle_of, ratio_of, significant, times

HEAD = (
    "| precision | batch | engine | prefill tok/s | decode tok/s | prefill, of dense | decode, of dense "
    "| decode, of bandwidth | same tokens |",
    "| :--- | ---: | :--- | ---: | ---: | ---: | ---: | ---: | ---: |",
)


class PeerSide(Frozen):
    """One engine in one cell.

    Args:
        name: of the peer, or of our engine.
        role: what it is.
        detail: what is computed in what, in words.
        versions: of the libraries in its environment.
        bytes_per_token: weights that an output token reads; of a peer at the nominal size of its precision.
        samples: its runs; none if there is an error.
        same_tokens: how many greedy tokens, from the first on, are those of our dense engine.
        error: why there are no samples.
    """

    name: str
    role: Literal["dense", "pruned", "peer"]
    detail: str = ""
    versions: dict[str, str] = Field({})
    bytes_per_token: int | None = None
    samples: tuple[Sample, ...] = ()
    same_tokens: int | None = None
    error: str | None = None


class PeerCell(Frozen):
    """All engines of one precision at one batch, measured in turns; ``asked`` is all that it depends on."""

    asked: dict[str, Any]
    precision: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    threads: int
    sides: tuple[PeerSide, ...]
    foreign_cores: tuple[float, ...] = ()

    @property
    def dense(self) -> PeerSide | None:
        """Our dense engine, if it was measured."""
        return next((side for side in self.sides if side.role == "dense" and side.samples), None)


class PeersResult(Frozen):
    """All cells, and the machine."""

    model: str
    environment: dict[str, Any]
    roofline: Roofline
    cells: tuple[PeerCell, ...] = ()


def as_markdown(result: PeersResult) -> str:
    """The table, and below it how ours compare with the best peer of the same precision."""
    rows = [_row(result, cell, side) for cell in result.cells for side in cell.sides]
    errors = {f"- {side.name}, {cell.precision}: {side.error}": None for cell in result.cells for side in _failed(cell)}
    best = [line for cell in result.cells for line in against_best(cell)]
    machine, (cell, *_) = result.environment, result.cells
    most = max((cores for each in result.cells for cores in each.foreign_cores), default=0.0)
    where = (
        f"{result.model} on {machine['cpu']}, {cell.threads} threads: prompt {cell.prompt_tokens} tokens, "
        f"{cell.output_tokens} produced; medians of {max(len(side.samples) for side in cell.sides)} runs in turns, "
        f"{_openings(cell)}, ratios with their 95 % interval; others used at most {most:.2f} cores in a round."
    )
    return "\n\n".join(part for part in ("\n".join([*HEAD, *rows]), "\n".join(best), "\n".join(errors), where) if part)


def _openings(cell: PeerCell) -> str:
    count = len({sample.opening for side in cell.sides for sample in side.samples})
    return f"every engine opened {count} times" if count > 1 else "every engine opened once"


def against_best(cell: PeerCell) -> Iterator[str]:
    """For each of our engines, how many times as fast as the best peer it is in both phases."""
    peers = [side for side in cell.sides if side.role == "peer" and side.samples]
    for side in cell.sides if peers else ():
        if side.role != "peer" and side.samples:
            phases = [_phase(name, of, side, peers) for name, of in PHASES.items()]
            yield f"- {cell.precision}, batch {cell.batch}, {side.name}: {'; '.join(phases)}."


def _prefill(sample: Sample) -> float:
    return sample.ttft_ms


def _decode(sample: Sample) -> float:
    return sample.tpot_ms


PHASES: dict[str, Callable[[Sample], float]] = {"prefill": _prefill, "decode": _decode}


def _phase(name: str, of: Callable[[Sample], float], side: PeerSide, peers: Sequence[PeerSide]) -> str:
    best = min(peers, key=lambda peer: middle_of(of, peer.samples))
    return f"{name} {_ratio(best, side, of)} as fast as {best.name}"


def _ratio(slow: PeerSide, fast: PeerSide, of: Callable[[Sample], float]) -> str:
    """How many times as fast ``fast`` is, with the interval."""
    ratio, interval = ratio_of(of, slow.samples, fast.samples)
    return f"{times(ratio)} ({interval_text(interval)})"


def _row(result: PeersResult, cell: PeerCell, side: PeerSide) -> str:
    if not side.samples:
        figures = ["failed", *["-"] * 5]
    else:
        dense = cell.dense
        ratios = [_ratio(dense, side, of) if dense and dense is not side else "-" for of in PHASES.values()]
        same = "-" if side.same_tokens is None else f"{side.same_tokens}/{cell.output_tokens}"
        rates = [
            significant(1000 * cell.batch * tokens / middle_of(of, side.samples), 3)
            for tokens, of in ((cell.prompt_tokens, _prefill), (1, _decode))
        ]
        figures = [*rates, *ratios, _share(result.roofline, side), same]
    return f"| {cell.precision} | {cell.batch} | {side.name} | {' | '.join(figures)} |"


def _share(roofline: Roofline, side: PeerSide) -> str:
    """The least time that reading the weights takes, over the time that a step took."""
    if side.bytes_per_token is None:
        return "-"
    least_ms = 1000 * side.bytes_per_token / 2**30 / roofline.bandwidth_gib_s
    return f"{least_ms / middle_of(_decode, side.samples):.0%}"


def _failed(cell: PeerCell) -> list[PeerSide]:
    return [side for side in cell.sides if side.error is not None]
