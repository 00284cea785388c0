"""A benchmark as one HTML file that can be mailed, and as Markdown for a pull request.

The HTML loads nothing: plots are inline SVG whose colours are CSS variables, so that one drawing serves light
and dark. Its look lives in ``report.html.jinja``. Drawing needs matplotlib, the extra ``report``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from flabc.runtime.measure.result import BenchResult, Cell, Energy, Sample, Side

from . import load_table
from .estimates import median, percentiles
from .plots import plots, svg
from .table import (
    Row,
    as_markdown,
    cells,
    conversion,
    interval_text,
    middle_of,
    quantity,
    ratio_of,
    rows,
    significant,
    times,
)

TITLE = "Dense against pruned"

#: What the summary says of a metric that fell, and of one that rose. Restatements are absent.
HEADLINES = {
    "parameters": ("fewer parameters", "more parameters"),
    "bytes_on_disk": ("fewer bytes on disk", "more bytes on disk"),
    "ttft_ms": ("less time to first token", "more time to first token"),
    "tpot_ms": ("less time per output token", "more time per output token"),
    "peak_memory_mib": ("less peak memory", "more peak memory"),
    "perplexity": ("lower perplexity on held-out text", "higher perplexity on held-out text"),
}


def write_html(result: BenchResult, file: Path, title: str = TITLE) -> None:
    """Write the report as one self-contained HTML file.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    import jinja2
    from markupsafe import Markup

    source = resources.files("flabc.perf").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    table = rows(result)
    text = page.from_string(source).render(
        title=title,
        result=result,
        summary=_unbroken(summary(table)),
        rows=table,
        plots=[(plot, Markup(svg(plot))) for plot in plots(result)],
        sides={"dense": result.baseline, "pruned": result.candidate},
        spreads=list(spreads(result)),
        sweep=sweep(result),
        load=load_table.rows(result),
        load_note=load_table.note(result.load.plan) if result.load else "",
        facts=facts(result),
        quantity=quantity,
        times=times,
        interval_text=interval_text,
    )
    file.write_text(text, encoding="utf-8")


def write_markdown(result: BenchResult, file: Path, title: str = TITLE) -> None:
    """Write the summary, the table, the workload and the environment as Markdown."""
    table = rows(result)
    parts = [f"# {_prose(title)}\n", summary(table) + "\n", as_markdown(table)]
    if swept := sweep(result):
        parts += ["## Sweep\n", _markdown(swept)]
    if result.load is not None:
        parts += ["## Under load\n", _markdown(load_table.rows(result)), load_table.note(result.load.plan) + "\n"]
    for heading, pairs in facts(result).items():
        parts.append(f"## {heading}\n")
        parts.append("".join(f"- {_prose(name)}: {_code(value)}\n" for name, value in pairs.items()))
    file.write_text("\n".join(parts), encoding="utf-8")


def _markdown(table: Sequence[Mapping[str, str]]) -> str:
    lines = [list(table[0]), ["---:"] * len(table[0]), *(list(row.values()) for row in table)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def summary(table: Sequence[Row]) -> str:
    """What got smaller or faster and what it cost, in one paragraph of plain words."""
    said = {
        verdict: [_phrase(row) for row in table if row.key in HEADLINES and row.verdict == verdict]
        for verdict in ("better", "worse")
    }
    gained, paid = said["better"], said["worse"]
    unclear = [row.label for row in table if row.key in HEADLINES and row.verdict == "even"]
    text = f"The pruned model has {_listed(gained)}." if gained else "The pruned model gained nothing measurable."
    text += f" The cost: {_listed(paid)}." if paid else ""
    text += f" No clear change in {_listed(unclear)}." if unclear else ""
    if not any(row.key == "perplexity" for row in table):
        text += " What it cost in quality was not measured."
    return text


def facts(result: BenchResult) -> dict[str, dict[str, str]]:
    """What a reader needs to repeat the measurement: engines, workload and environment, by heading."""
    work = result.workload
    engines = {"dense": _engine(result.baseline), "pruned": _engine(result.candidate)}
    workload = {
        "prompt tokens": str(work.prompt_tokens),
        "batch": f"{work.batch}, times are of all sequences at once" if work.batch > 1 else "1",
        "output tokens": str(work.output_tokens),
        "openings": f"{result.openings}, both engines anew; intervals are over how these differ"
        if result.openings > 1
        else "1; another process of an engine may be faster or slower, which the intervals do not hold",
        "rounds": f"{work.rounds} in each opening: dense, pruned, pruned, dense",
        "threads": "the runtime's choice" if work.threads is None else str(work.threads),
        "warm-up runs": f"{result.baseline.warmup_runs} dense, {result.candidate.warmup_runs} pruned",
        "held-out text": _heldout(result.baseline),
        "measured": result.created.isoformat(),
    }
    limits = dict(_limits(result))
    return {"Engines": engines, "Workload": workload, "Limits": limits, "Environment": _flat(result.environment)}


def _limits(result: BenchResult) -> Iterator[tuple[str, str]]:
    """What the machine can do, what was made of it, and what else it did meanwhile."""
    if result.roofline is not None:
        yield "memory bandwidth", f"{result.roofline.bandwidth_gib_s:.1f} GiB/s, all cores reading"
        yield "arithmetic", f"{result.roofline.gflops:.0f} GFLOP/s in float32, numpy's BLAS on all cores"
    converted = conversion(result)
    if converted is not None:
        yield "saved bytes that became saved time", f"{converted:.0%} (speed-up of decode over the ratio of bytes read)"
    if result.foreign_cores:
        most = max(result.foreign_cores)
        yield "others' use of the machine", f"{median(result.foreign_cores):.2f} cores, at most {most:.2f} in a round"
    for name, side in (("dense", result.baseline), ("pruned", result.candidate)):
        if side.energy is not None:
            yield f"energy, {name}", _energy(side.energy)


def _energy(energy: Energy) -> str:
    if energy.joules_per_token is None:
        return f"not measured: {energy.missing}"
    return (
        f"{energy.joules_per_token:.3g} J per output token by {energy.counter} over {energy.window_s:.1f} s, "
        f"{energy.idle_w:.1f} W of idle power taken off"
    )


def sweep(result: BenchResult) -> list[dict[str, str]]:
    """A row for each length of prompts and batch: tokens per second of both sides, and their ratios."""
    return [_cell(cell, result.workload.output_tokens) for cell in cells(result)] if result.sweep else []


def _cell(cell: Cell, output_tokens: int) -> dict[str, str]:
    sides = cell.baseline, cell.candidate
    row = {"prompt": str(cell.prompt_tokens), "batch": str(cell.batch)}
    phases: dict[str, tuple[int, Callable[[Sample], float]]] = {
        "prefill": (cell.prompt_tokens, lambda sample: sample.ttft_ms),
        "decode": (1, lambda sample: sample.tpot_ms),
    }
    for name, (tokens, metric) in phases.items():
        for side, samples in zip(("dense", "pruned"), sides, strict=True):
            middle = middle_of(metric, samples)
            row[f"{name} tok/s, {side}"] = significant(1000 * cell.batch * tokens / middle, 3)
        ratio, interval = ratio_of(metric, *sides)
        row[f"{name}, times as fast"] = f"{times(ratio)} ({interval_text(interval)})"
    return row


def spreads(result: BenchResult) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield metric, side, and p50, p90, p95 and p99 in ms; token times are pooled over all runs."""
    for name, side in (("dense", result.baseline), ("pruned", result.candidate)):
        if side.samples:
            yield "time to first token", name, percentiles([sample.ttft_ms for sample in side.samples])
    for name, side in (("dense", result.baseline), ("pruned", result.candidate)):
        pooled = [ms for sample in side.samples for ms in sample.token_ms]
        if pooled:
            yield "each later token", name, percentiles(pooled)


def _phrase(row: Row) -> str:
    fell, rose = HEADLINES[row.key]
    change = f"{100 * abs(row.ratio - 1):.1f}"
    values = f"{quantity(row.dense, row.unit)} → {quantity(row.pruned, row.unit)}"
    return f"{change} % {fell if row.ratio < 1 else rose} ({values})"


def _listed(phrases: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *most, last = phrases
    return f"{', '.join(most)} and {last}" if most else last


def _engine(side: Side) -> str:
    opened = quantity(side.load_ms, "ms")
    return f"{side.engine} ({side.spec.family}, {len(side.spec.layers)} layers, opened in {opened})"


def _heldout(side: Side) -> str:
    scored = side.perplexity
    if scored is None:
        return "none scored"
    return f"{scored.documents} documents, {scored.bytes:,} bytes, {scored.tokens:,} dense tokens"


def _flat(facts: Mapping[str, Any]) -> dict[str, str]:
    """Nested mappings as one level, ``versions numpy``."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= {f"{name} {inner}": text for inner, text in _flat(value).items()}
        elif value is not None:  # what the system does not tell
            flat[name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return {name.replace("_", " "): value for name, value in flat.items()}


def _unbroken(text: str) -> str:
    """The same text, with no line break between a number and its unit or around an arrow."""
    return re.sub(r" (?=(?:%|→|ms|[kMG]i?B?|B)(?!\w))|(?<=→) ", "\N{NO-BREAK SPACE}", text)


def _prose(text: str) -> str:
    """Foreign text inside Markdown: one line, and no markup of its own."""
    return re.sub(r"([\\`*_\[\]#|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _code(text: str) -> str:
    """Foreign text as a Markdown code span, whose fence is longer than any run of backticks in it."""
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"
