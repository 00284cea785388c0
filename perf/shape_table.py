"""What a cut would buy, as a table for the terminal, and the sentences that belong to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flabc.runtime.measure.shape_result import ShapeResult

from .table import quantity

if TYPE_CHECKING:
    from rich.table import Table


def lines(result: ShapeResult) -> list[tuple[str, str, str, str]]:
    """Metric, dense, pruned and what was gained; times are those of whole models."""
    found = result.figures()
    dense, pruned = result.dense, result.pruned
    rows = [
        ("parameters", "parameters", dense.spec.num_parameters, pruned.spec.num_parameters, None),
        ("bytes read per token's step", "bytes", dense.bytes_per_step, pruned.bytes_per_step, found.bytes_ratio),
        ("time to first token", "ms", *found.ttft_ms, found.ttft_speedup),
        ("time per output token", "ms", *found.tpot_ms, found.tpot_speedup),
        ("tokens per second", "tok/s", *found.tokens_per_s, None),
    ]
    table = [
        (name, quantity(before, unit), quantity(after, unit), "" if gained is None else f"{gained:.2f}x")
        for name, unit, before, after, gained in rows
    ]
    before, after = found.decode_roofline
    table.append(("of the memory's bandwidth", f"{before:.0%}", f"{after:.0%}", ""))
    joules, peaks = found.joules_per_token, found.peak_mib
    if joules[0] is not None and joules[1] is not None:
        table.append(("energy per token", quantity(joules[0], "J"), quantity(joules[1], "J"), ""))
    if peaks[0] is not None and peaks[1] is not None and not found.extrapolated:
        table.append(("peak device memory", f"{peaks[0]:,.0f} MiB", f"{peaks[1]:,.0f} MiB", ""))
    return table


def as_rich(result: ShapeResult) -> Table:
    """The table for the terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(f"{result.shape}, {result.cut}")
    for name in ("dense", "pruned", "gained"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in lines(result):
        shown.add_row(*row)
    return shown


def notes(result: ShapeResult) -> list[str]:
    """Where and how it was measured, and what to know of it."""
    found, work = result.figures(), result.workload
    machine = result.environment.get("gpu", result.environment["cpu"])
    how = ["random weights, which say nothing of quality", "CUDA graphs" if result.graphs else "no CUDA graphs"]
    said = [
        f"Measured on {machine} in {result.dtype} by torch ({', '.join(how)}): prompt {work.prompt_tokens} tokens, "
        f"batch {work.batch}, {work.output_tokens} produced, {2 * work.rounds} runs a side; medians.",
        f"{found.conversion:.0%} of what the bytes allow became speed.",
    ]
    parts = [
        f"{side.extent.measured_layers} of {side.extent.layers} layers"
        for side in (result.dense, result.pruned)
        if side.extent.extrapolated
    ]
    if parts:
        said.append(f"Extrapolated: {' and '.join(parts)} were measured; times are calculated from them by bytes.")
    if result.dense.energy.missing:
        said.append(f"No energy: {result.dense.energy.missing}.")
    return said
