"""``flabc bench``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from flabc.errors import UsageError

from .parameters import AT_LEAST_ONE, CORPUS, FORCE, RATES, Duration, Numbers, emit, json_option

if TYPE_CHECKING:
    from flabc.runtime.measure.shape_result import ShapeResult


def _of_suite(context: click.Context, _: click.Parameter, name: str | None) -> None:
    """Let a suite say what holds where no option does."""
    if name is not None:
        from flabc.perf import suite

        context.default_map = suite.load(name).options()


@click.command()
@click.argument("engine", required=False)
@click.option("--baseline", type=click.Path(), help="The engine to compare with.")
@click.option("-o", "--output", type=click.Path(), help="The report folder to write.")
@click.option(
    "--suite",
    callback=_of_suite,
    is_eager=True,
    expose_value=False,
    help="What to measure, by purpose: a name below or a YAML file. Options beside it win.",
)
@click.option(
    "--prompt-tokens",
    type=Numbers(),
    default="128",
    show_default=True,
    help="Tokens of each prompt; or several, 128,512.",
)
@click.option("--batch", type=Numbers(), default="1", show_default=True, help="Sequences at once; or several, 1,8.")
@click.option(
    "--output-tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens that each run produces."
)
@click.option(
    "--openings",
    type=AT_LEAST_ONE,
    help="How often both engines are opened: two processes of one engine need not be equally fast.  [default: 5, or as "
    "often as --budget allows]",
)
@click.option("--budget", type=Duration(), help="Do not open them once more if it would end later than this, e.g. 5m.")
@click.option(
    "--rounds",
    type=AT_LEAST_ONE,
    default=3,
    show_default=True,
    help="Rounds of dense, pruned, pruned, dense in each opening.",
)
@click.option("--concurrency", type=Numbers(), help="Also a load of so many clients that never pause; or several, 1,4.")
@click.option(
    "--arrival-rate",
    type=RATES,
    help="Also a load of so many requests per second; or several, 0.5,1,2.",
)
@click.option(
    "--requests", type=click.IntRange(2), default=32, show_default=True, help="Requests that a run under load counts."
)
@click.option(
    "--max-batch", type=AT_LEAST_ONE, default=16, show_default=True, help="Sequences that run at once under load."
)
@click.option("--threads", type=AT_LEAST_ONE, help="Threads for the computation.")
@click.option("--provider", default="auto", show_default=True, help="Where to run: cpu, cuda or tensorrt.")
@click.option(
    "--grid-intensity",
    type=click.FloatRange(0, min_open=True),
    help="Grams of CO2 a kWh costs here: the report estimates them where energy can be read.",
)
@click.option("--shape", help="Instead of ENGINE: random weights of a published model's shape, e.g. llama-2-70b.")
@click.option("--cut", help="With --shape: the share of parameters that goes, or a cut's name.  [default: 0.22]")
@CORPUS
@FORCE
@json_option
def bench(
    engine: str | None,
    baseline: str | None,
    output: str | None,
    prompt_tokens: Sequence[int],
    batch: Sequence[int],
    concurrency: Sequence[int] | None,
    arrival_rate: Sequence[float] | None,
    requests: int,
    max_batch: int,
    openings: int | None,
    budget: float | None,
    grid_intensity: float | None,
    shape: str | None,
    cut: str | None,
    corpus: str,
    force: bool,
    as_json: bool,
    **work: Any,
) -> None:
    """Measure ENGINE beside a baseline and write a report.

    Several lengths or batches are a sweep: the first of each is measured in full, then every combination. A suite
    stands for a purpose: completion, chat, serving, or quick, to see whether anything is faster at all.

    With --concurrency and --arrival-rate requests come while others run, over the scheduler that serves: end-to-end
    latency and requests per second, for clients that ask again as soon as they are answered, and for requests that
    come at random times, whose latency counts from then.

    With --shape nothing is pruned or read: what would this cut buy on this machine? Random weights of the shapes
    are decoded by torch, on a GPU if there is one; too large ones by some of their layers, which the table says.

    \b
    flabc bench engine --baseline dense-engine -o report
    flabc bench engine --baseline dense-engine --suite completion --budget 10m -o completion
    flabc bench engine --baseline dense-engine --batch 1,4,16 --prompt-tokens 128,1024 -o sweep
    flabc bench engine --baseline dense-engine --concurrency 1,4,16 --arrival-rate 0.5,1,2 -o load
    flabc bench --shape llama-2-70b --cut 0.3 --rounds 1
    """
    from flabc import api
    from flabc.project import settle
    from flabc.runtime.measure.result import LoadPlan, Workload

    first, *sweep = (Workload(prompt_tokens=length, batch=size, **work) for length in prompt_tokens for size in batch)
    loads: dict[str, Any] = {"concurrency": concurrency or (), "arrival_rate": arrival_rate or ()}
    loaded = bool(concurrency or arrival_rate)
    if shape is not None or cut is not None:
        given = click.get_current_context().get_parameter_source
        for option in ("suite", "provider", "corpus", "grid_intensity", "requests", "max_batch", "openings", "budget"):
            if given(option) is ParameterSource.COMMANDLINE:
                raise UsageError(f"--{option.replace('_', '-')} says nothing of a shape.", fix="Leave it away.")
        if shape is None or engine or baseline or sweep or loaded:
            raise UsageError(
                "--shape stands alone: with --cut, one length, one batch, no load, and no ENGINE or --baseline."
            )
        measured = api.bench_shape(shape, cut or "0.22", workload=first, output=output, force=force)
        data = measured.model_dump(mode="json") | {"figures": measured.figures().model_dump(mode="json")}
        emit(as_json, data, lambda: _show_shape(measured))
        return
    done = api.bench(
        settle(engine, "engine", "ENGINE"),
        settle(baseline, "baseline", "--baseline"),
        settle(output, "report", "report folder (-o)"),
        workload=first,
        sweep=sweep,
        load=LoadPlan(requests=requests, max_batch=max_batch, **loads) if loaded else None,
        openings=openings,
        budget_s=budget,
        corpus=corpus,
        grid_g_per_kwh=grid_intensity,
        force=force,
    )

    def show() -> None:
        from rich.console import Console

        from flabc.perf import load_table, table

        Console().print(table.as_rich(table.rows(api.read_bench(done.path))))
        if done.load:
            Console().print(load_table.as_rich(done.load))
        click.echo(f"report: {done.html.absolute()}")

    emit(as_json, done, show)


def _show_shape(measured: ShapeResult) -> None:
    from rich.console import Console

    from flabc.perf import shape_table

    Console().print(shape_table.as_rich(measured))
    for line in shape_table.notes(measured):
        click.echo(line)
