"""How long blocks of each width take on this machine: the table for ``flabc search --latencies``.

    python perf/block_latencies.py qwen2.5-coder-0.5b.gguf --tie --precision int8 -o latencies.json

Engines of the model, each with all layers but the first narrowed alike, are timed in turns. What the whole model takes
longer than one of them, shared among the narrowed layers, is what their units cost: so what a step takes besides its
blocks, and what operators take in each other's company, is in the measurement as it is where the model serves.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from flabc import api, artifact
from flabc.compress import load
from flabc.compress.data import corpus
from flabc.compress.model import CausalLM, cut_channels, cut_heads, cut_sub_blocks
from flabc.compress.search.latencies import Latencies
from flabc.errors import UsageError
from flabc.perf.making import write
from flabc.runtime.measure.environment import cpu_name
from flabc.runtime.measure.race import race
from flabc.runtime.measure.result import Workload

#: A kind of unit, and how many are left of it.
Narrowed = tuple[str, int]


def main() -> None:
    """Make the engines, time them, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--precision", default="int8", help="as for `flabc export`")
    parser.add_argument("--widths", type=int, default=4, help="of each kind, below the whole")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    artifact.check_free(asked.output, force=False)
    model = load.load(asked.model, tie=asked.tie)
    if len(model.spec.layers) < 2:
        raise UsageError(
            "A layer's time is told from the model's with the others narrowed.", expected="several layers", found="one"
        )
    workload = Workload(
        prompt_tokens=asked.prompt_tokens,
        output_tokens=asked.output_tokens,
        batch=asked.batch,
        rounds=asked.rounds,
    )
    with tempfile.TemporaryDirectory(prefix="flabc-", dir=asked.output.absolute().parent) as work:
        steps = time_steps(model, sizes_of(model, asked.widths), asked.precision, workload, Path(work))
    cpu = cpu_name()
    said = f"{model.source.name}, {asked.precision}, batch {asked.batch} behind {asked.prompt_tokens} tokens, {cpu}"
    table = table_of(model, steps, said)
    artifact.write_whole(asked.output, table.model_dump_json(indent=1) + "\n")
    print(f"{said}: a step takes {steps[None]:.2f} ms, {table.rest:.2f} of it beside the blocks; wrote {asked.output}")


def sizes_of(model: CausalLM, widths: int) -> list[Narrowed]:
    """What is measured below the whole: so many numbers of units of each kind, evenly spread, none among them."""
    first = model.spec.layers[0]
    wholes = {"ffn": first.intermediate_size, "heads": first.num_key_value_heads}
    return [
        (kind, size)
        for kind, whole in wholes.items()
        for size in sorted({at * whole // widths for at in range(widths)})
    ]


def time_steps(
    model: CausalLM, sizes: list[Narrowed], precision: str, workload: Workload, work: Path
) -> dict[Narrowed | None, float]:
    """The median time of a step in milliseconds: of the whole model (None), and with layers narrowed to each size."""
    variants: list[Narrowed | None] = [None, *sizes]
    engines = []
    for number, narrowed in enumerate(variants):
        checkpoint, engine = work / f"model-{number}", work / f"engine-{number}"
        write(model if narrowed is None else narrow(model, *narrowed), checkpoint)
        api.export(checkpoint, engine, precision=precision)
        shutil.rmtree(checkpoint)  # of each size one would be a disk full
        engines.append(engine)
    texts = corpus.prompts("python-stdlib", workload.prompt_tokens, 8)
    samples = race(engines, workload, texts)
    return {at: median(each.tpot_ms for each in runs) for at, runs in zip(variants, samples, strict=True)}


def narrow(model: CausalLM, kind: str, size: int) -> CausalLM:
    """The model with the first units of each layer but the first, or none of them: which ones makes no difference."""
    layers = range(1, len(model.spec.layers))
    if size == 0:
        return cut_sub_blocks(model, **{"ffn" if kind == "ffn" else "attention": layers})
    cut = cut_channels if kind == "ffn" else cut_heads
    return cut(model, {layer: range(size) for layer in layers})


def table_of(model: CausalLM, steps: Mapping[Narrowed | None, float], measured: str) -> Latencies:
    """The table, from the time of a step with the layers narrowed to each size, none among them.

    A block is never said to take less than nothing: noise can make a narrower one slower.
    """
    layers, first = len(model.spec.layers), model.spec.layers[0]
    kinds: dict[str, dict[int, float]] = {}
    for kind, whole in (("ffn", first.intermediate_size), ("heads", first.num_key_value_heads)):
        at_nothing = steps[kind, 0]
        each = {size: (took - at_nothing) / (layers - 1) for (of, size), took in _measured(steps) if of == kind}
        each[whole] = (steps[None] - at_nothing) / (layers - 1)
        kinds[kind] = {size: max(0.0, took) for size, took in each.items()}
    blocks = layers * (kinds["ffn"][first.intermediate_size] + kinds["heads"][first.num_key_value_heads])
    return Latencies(measured=measured, ffn=kinds["ffn"], heads=kinds["heads"], rest=max(0.0, steps[None] - blocks))


def _measured(steps: Mapping[Narrowed | None, float]) -> list[tuple[Narrowed, float]]:
    return [(narrowed, took) for narrowed, took in steps.items() if narrowed is not None]


if __name__ == "__main__":
    main()
