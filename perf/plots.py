"""The drawings of a benchmark's report, as inline SVG whose colours are CSS variables: one serves light and dark.

Needs matplotlib, the extra ``report``.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

from flabc.errors import require
from flabc.runtime.measure.result import BenchResult, Cell, Sample, Side
from flabc.spec import ModelSpec

from .estimates import median, percentile
from .load_table import LoadFigures, figures
from .table import cells, quantity, scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Stand-ins for colours: matplotlib draws with them, then each becomes the CSS variable of its name.
INKS = {
    name: f"#0000{number:02x}"
    for number, name in enumerate(
        (
            "ink",
            "muted",
            "grid",
            "page",
            "faint",
            "dense",
            "pruned",
            "embedding",
            "attention",
            "ffn",
            "norm",
            "head",
        ),
        1,
    )
}

#: A component below this share of both models would be thinner than a line.
VISIBLE_SHARE = 0.002


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Args:
        name: unique in the document; prefixes the ids inside the SVG.
        title: its heading.
        caption: how to read it.
        spoken: the same facts in words, for those who do not see it.
        draw: puts it on axes.
        height: of the drawing in inches; all are 4.4 inches wide.
    """

    name: str
    title: str
    caption: str
    spoken: str
    draw: Callable[[Axes], None]
    height: float = 2.4


def plots(result: BenchResult) -> list[Plot]:
    """Every drawing that the samples allow, in the order of the report."""
    dense, pruned = result.baseline, result.candidate
    drawn = list(_distributions(dense, pruned))
    if _paces(dense.samples) and _paces(pruned.samples):
        drawn.append(_over_position(dense.samples, pruned.samples))
    if len({cell.batch for cell in _batches(result)}) > 1:
        drawn.append(_over_batch(_batches(result)))
    drawn += _over_load(figures(result))
    return [*drawn, _by_component(dense.spec, pruned.spec), *_shapes(dense.spec, pruned.spec)]


def svg(plot: Plot) -> str:
    """Draw a plot as an ``<svg>`` element for an HTML page: no size, no fixed colour, no foreign id.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    settings = {"svg.fonttype": "none", "svg.hashsalt": plot.name, "font.size": 9, "path.simplify": False}
    with require("matplotlib", "report").rc_context(settings):
        figure = require("matplotlib.figure", "report").Figure(figsize=(4.4, plot.height), layout="constrained")
        axes = figure.subplots()
        _bare(axes)
        plot.draw(axes)
        drawn = StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return _embedded(drawn.getvalue(), plot)


def _embedded(text: str, plot: Plot) -> str:
    """Make matplotlib's SVG file part of a page."""
    box = re.search(r'viewBox="([^"]+)"', text)
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{plot.name}-", body)  # ids are the whole page's
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", body)  # matplotlib's own font: a reader may lack it
    for name, ink in INKS.items():
        body = body.replace(ink, f"var(--{name})")
    label = html.escape(f"{plot.title}. {plot.spoken}")
    return f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{label}">{body}'


def _bare(axes: Axes) -> None:
    """Take away all that is not data: the frame, the ticks, strong colours."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INKS["muted"], labelsize=9)
    axes.xaxis.label.set_color(INKS["muted"])
    axes.yaxis.label.set_color(INKS["muted"])
    axes.set_axisbelow(True)


def _distributions(dense: Side, pruned: Side) -> Iterator[Plot]:
    metrics: list[tuple[str, str, Callable[[Sample], float]]] = [
        ("ttft", "Time to first token", lambda sample: sample.ttft_ms),
        ("tpot", "Time per output token", lambda sample: sample.tpot_ms),
    ]
    for name, title, metric in metrics:
        if name == "tpot" and not (_paces(dense.samples) and _paces(pruned.samples)):
            continue
        both = [[metric(sample) for sample in side.samples] for side in (dense, pruned)]
        if all(both):
            yield _distribution(name, title, *both)


def _distribution(name: str, title: str, dense: Sequence[float], pruned: Sequence[float]) -> Plot:
    spoken = "; ".join(
        f"{side}: median {quantity(median(ms), 'ms')} of {len(ms)} runs, {min(ms):.1f} to {max(ms):.1f} ms"
        for side, ms in (("dense", dense), ("pruned", pruned))
    )

    def draw(axes: Axes) -> None:
        for center, side, ms in ((1, "dense", dense), (0, "pruned", pruned)):
            # From top to bottom in the order of the runs, so that drift shows as a slope.
            lanes = [center + 0.22 - 0.44 * index / max(1, len(ms) - 1) for index in range(len(ms))]
            axes.scatter(ms, lanes, s=20, color=INKS[side], alpha=0.9, linewidths=0)
            middle = median(ms)
            axes.plot([middle, middle], [center - 0.32, center + 0.32], color=INKS["ink"], linewidth=1.6)
            axes.text(middle, center + 0.36, quantity(middle, "ms"), ha="center", va="bottom", color=INKS["ink"])
        axes.set_ylim(-0.5, 1.62)
        axes.set_yticks([1, 0], ["dense", "pruned"], color=INKS["ink"])
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", color=INKS["grid"], linewidth=0.8)
        axes.set_xlabel("ms")

    return Plot(name, title, "Each dot is a run, the first one on top; the line is the median.", spoken, draw)


def _over_position(dense: Sequence[Sample], pruned: Sequence[Sample]) -> Plot:
    curves = {"dense": _paces(dense), "pruned": _paces(pruned)}
    spoken = "; ".join(
        f"{side}: {quantity(ms[0][1], 'ms')} for token 2, {quantity(ms[-1][1], 'ms')} for token {len(ms) + 1}"
        for side, ms in curves.items()
    )

    def draw(axes: Axes) -> None:
        for side, curve in curves.items():
            low, middle, high = zip(*curve, strict=True)
            tokens = range(2, len(curve) + 2)  # the first token's time is the TTFT
            axes.fill_between(tokens, low, high, color=INKS[side], alpha=0.18, linewidth=0)
            axes.plot(tokens, middle, color=INKS[side], linewidth=1.8)
        axes.set_ylim(0, 1.15 * max(high for curve in curves.values() for _, _, high in curve))
        axes.margins(x=0.01)
        axes.grid(axis="y", color=INKS["grid"], linewidth=0.8)
        axes.set_xlabel("output token")
        axes.set_ylabel("ms")

    caption = "The line is the median over runs, the band reaches from p10 to p90. A slope is the price of context."
    return Plot("position", "Time per token over the run", caption, spoken, draw)


def _paces(samples: Sequence[Sample]) -> list[tuple[float, float, float]]:
    """p10, median and p90 in ms of each token after the first, over runs."""
    columns = zip(*(sample.token_ms for sample in samples), strict=False)
    return [(percentile(ms, 10), median(ms), percentile(ms, 90)) for ms in columns]


def _batches(result: BenchResult) -> list[Cell]:
    """The cells at the first length of prompts, by batch."""
    return sorted(
        (cell for cell in cells(result) if cell.prompt_tokens == result.workload.prompt_tokens),
        key=lambda cell: cell.batch,
    )


def _over_batch(swept: Sequence[Cell]) -> Plot:
    sides = {"dense": [cell.baseline for cell in swept], "pruned": [cell.candidate for cell in swept]}
    batches = [cell.batch for cell in swept]
    rates = {
        side: [1000 * size / median([s.tpot_ms for s in runs]) for size, runs in zip(batches, found, strict=True)]
        for side, found in sides.items()
    }
    spoken = "; ".join(
        f"{side}: "
        + ", ".join(f"{rate:.0f} tokens per second at {size}" for size, rate in zip(batches, at, strict=True))
        for side, at in rates.items()
    )

    def draw(axes: Axes) -> None:
        for side, at in rates.items():
            axes.plot(batches, at, color=INKS[side], linewidth=1.8, marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(size) for size in batches])
        axes.set_ylim(0, 1.1 * max(max(at) for at in rates.values()))
        axes.grid(axis="y", color=INKS["grid"], linewidth=0.8)
        axes.set_xlabel("batch")
        axes.set_ylabel("tokens/s")

    return Plot("batch", "Decode by batch", "Tokens per second of all sequences together, medians.", spoken, draw)


def _over_load(measured: Sequence[LoadFigures]) -> Iterator[Plot]:
    """Latency over arrival rates and over clients, where there are several of them."""
    rates = sorted((each for each in measured if each.arrival_rate), key=lambda each: each.arrival_rate or 0)
    clients = sorted((each for each in measured if each.concurrency), key=lambda each: each.concurrency or 0)
    if len({each.arrival_rate for each in rates}) > 1:
        at = [(each.arrival_rate or 0, each) for each in rates]
        yield _latency("rate", "Latency by arrival rate", "requests per second that come", at)
    if len({each.concurrency for each in clients}) > 1:
        at = [(each.concurrency or 0, each) for each in clients]
        yield _latency("clients", "Latency by clients", "clients", at)


def _latency(name: str, title: str, unit: str, at: Sequence[tuple[float, LoadFigures]]) -> Plot:
    sides = {side: [(x, each.latency_ms) for x, each in at if each.side == side] for side in ("dense", "pruned")}
    spoken = "; ".join(
        f"{side}: " + ", ".join(f"{quantity(ms['p50'], 'ms')} at {x:g}" for x, ms in curve)
        for side, curve in sides.items()
    )

    def draw(axes: Axes) -> None:
        for side, curve in sides.items():
            for quantile, line in (("p50", "-"), ("p95", ":")):
                seconds = [ms[quantile] / 1000 for _, ms in curve]
                xs = [x for x, _ in curve]
                axes.plot(xs, seconds, line, color=INKS[side], linewidth=1.8, marker="o", markersize=4)
        axes.set_ylim(0, 1.1 * max(ms["p95"] for curve in sides.values() for _, ms in curve) / 1000)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color=INKS["grid"], linewidth=0.8)
        axes.set_xlabel(unit)
        axes.set_ylabel("s")

    return Plot(name, title, "From the arrival to the last token; lines are medians, dotted ones p95.", spoken, draw)


def _by_component(dense: ModelSpec, pruned: ModelSpec) -> Plot:
    counts = {"dense": _components(dense), "pruned": _components(pruned)}
    whole = max(sum(parts.values()) for parts in counts.values())
    names = [name for name in counts["dense"] if any(parts[name] > VISIBLE_SHARE * whole for parts in counts.values())]
    spoken = "; ".join(
        f"{side}: " + ", ".join(f"{name} {scaled(parts[name], 3)}" for name in names) for side, parts in counts.items()
    )

    def draw(axes: Axes) -> None:
        for y, parts in zip((1, 0), counts.values(), strict=True):
            left = 0
            for name in names:
                width = parts[name]
                axes.barh(y, width, left=left, height=0.62, color=INKS[name], edgecolor=INKS["page"], linewidth=1.5)
                if width > 0.11 * whole:
                    label = f"{name}\n" * (width > 0.19 * whole) + scaled(width, 3)
                    axes.text(left + width / 2, y, label, ha="center", va="center", color=INKS["ink"], fontsize=8)
                left += width
            axes.text(left + 0.012 * whole, y, scaled(left, 4), va="center", color=INKS["ink"])
        axes.set_xlim(0, 1.17 * whole)
        axes.set_ylim(-0.5, 1.5)
        axes.set_yticks([1, 0], ["dense", "pruned"], color=INKS["ink"])
        axes.set_xticks([])

    return Plot("components", "Parameters by component", _components_caption(names), spoken, draw)


def _components(spec: ModelSpec) -> dict[str, int]:
    return {part.value: count for part, count in spec.parameters().items()}


def _components_caption(names: Sequence[str]) -> str:
    tied = "" if "head" in names else " The output matrix is tied to the embedding and counted there."
    return f"From left to right: {', '.join(names)}.{tied}"


def _shapes(dense: ModelSpec, pruned: ModelSpec) -> Iterator[Plot]:
    widths = ([layer.intermediate_size for layer in spec.layers] for spec in (dense, pruned))
    heads = ([layer.num_attention_heads for layer in spec.layers] for spec in (dense, pruned))
    caption = _shape_caption(dense, pruned)
    yield _shape("ffn", "FFN width per layer", "intermediate_size", caption, *widths)
    yield _shape("heads", "Attention heads per layer", "num_attention_heads", caption, *heads)


def _shape(name: str, title: str, unit: str, caption: str, before: Sequence[int], after: Sequence[int]) -> Plot:
    spoken = f"dense: {_spoken_sizes(before)}; pruned: {_spoken_sizes(after)}"

    def draw(axes: Axes) -> None:
        axes.bar(range(len(before)), before, width=0.9, color=INKS["faint"], linewidth=0)
        axes.bar(range(len(after)), after, width=0.5, color=INKS["pruned"], linewidth=0)
        axes.grid(axis="y", color=INKS["grid"], linewidth=0.8)
        axes.locator_params(axis="both", integer=True)
        axes.set_ylim(0, 1.06 * max(*before, *after, 1))
        axes.margins(x=0.01)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)

    return Plot(f"shape-{name}", title, caption, spoken, draw)


def _shape_caption(dense: ModelSpec, pruned: ModelSpec) -> str:
    before, after = len(dense.layers), len(pruned.layers)
    caption = "Where a bar is missing, the sub-block is gone."
    if before != after:
        caption += f" {after} layers instead of {before}: those left are counted anew."
    return caption


def _spoken_sizes(sizes: Sequence[int]) -> str:
    return (
        f"{len(sizes)} layers of {min(sizes)} to {max(sizes)}"
        if len(set(sizes)) > 1
        else f"{len(sizes)} layers of {sizes[0]}"
    )
