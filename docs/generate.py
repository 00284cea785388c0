"""Writes what is generated from the code: the command-line reference and the JSON schemas.

``make docs`` runs it; a test compares its output with what is committed.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import click

from flabc.cli import cli
from flabc.perf import (
    axes,
    evaluation,
    figures,
    gate_trials,
    methods,
    mined_samples,
    peer_table,
    population_speed,
    table,
)
from flabc.perf.comparison import EvalRow
from flabc.perf.evaluation import EvalResult
from flabc.perf.peer_table import PeersResult
from flabc.project import Project
from flabc.recipe import Recipe
from flabc.runtime.evaluate.task import TASKS
from flabc.runtime.measure.result import BenchResult

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"

#: Whose quality the README shows: results by name, and how the table is introduced.
QUALITY = {
    "smollm2-135m-flab-22": "SmolLM2-135M-Instruct, `flab-22`",
    "qwen2.5-coder-0.5b-flab-22": "Qwen2.5-Coder-0.5B-Instruct, `flab-22`",
}


#: The model that is asked in torch and in its engine.
PARITY = "qwen2.5-coder-0.5b"


def generated() -> dict[Path, str]:
    """Every generated file and its content."""
    return {
        ROOT / "docs" / "cli.md": reference(),
        ROOT / "README.md": readme(),
        ROOT / "docs" / "serving.md": serving(),
        ROOT / "docs" / "gating.md": gating(),
        ROOT / "docs" / "mined-tasks.md": mined_tasks(),
        ROOT / "recipes" / "recipe.schema.json": json.dumps(Recipe.model_json_schema(), indent=2) + "\n",
        ROOT / "recipes" / "flabc.schema.json": json.dumps(Project.model_json_schema(), indent=2) + "\n",
    }


def serving() -> str:
    """The page about serving with what was measured of it."""
    whats = ("throughput", "soak", "first-token", "overhead", "mixed-pruned", "mixed-dense")
    found = {what: json.loads((RESULTS / f"serving-{what}.json").read_text(encoding="utf-8")) for what in whats}
    fuzz = json.loads((RESULTS / "server-fuzz.json").read_text(encoding="utf-8"))
    rates = {clients: median(each) for clients, each in found["throughput"]["tokens_per_s"].items()}
    soak, memory = found["soak"], list(fuzz["rss_mib"].values())
    said = " and ".join(f"{count:,} times {status}" for status, count in soak["statuses"].items())
    opened = " to ".join(f"{bound(found['first-token']['open_to_first_token_s']):.1f}" for bound in (min, max))
    lines = [
        f"- One client gets {rates['1']:.1f} tokens/s, sixteen together {rates['16']:.1f}, "
        f"{found['throughput']['ratio_of_medians']:.1f} times as many (in turns on one server).",
        f"- {soak['minutes']:.0f} minutes of {soak['clients']} clients without a pause, for {soak['max_batch']} places "
        f"and a queue of {soak['max_queue']}: {said};",
        f"  {soak['answers_cut_off']} answers shorter than asked for, never more than {soak['most_at_once']:.0f} "
        f"requests inside, resident memory {soak['rss_mib']['ratio'] - 1:+.1%}.",
        f"- {found['mixed-pruned']['requests']} requests of all kinds, sixteen at a time, on the demo's engines in "
        f"float32: {found['mixed-pruned']['answered_as_alone']} are answered as alone by the pruned one, "
        f"{found['mixed-dense']['answered_as_alone']} by the dense one.",
        f"- From opening the engine to its first token: {opened} s.",
        f"- {fuzz['requests']:,} requests that schemathesis made of the OpenAPI document, right and wrong ones, on a "
        "tiny engine: no 5xx, none hung;",
        f"  resident memory {memory[0]:.0f} MiB before, {memory[len(memory) // 5]:.0f} after a fifth of them, "
        f"{memory[-1]:.0f} at the end, and {fuzz['rss_mib_again'][-1]:.0f} after "
        f"{len(fuzz['rss_mib_again']) - 1} times a tenth of them again.",
        "",
        "| A step of | takes | of which Python |",
        "| --- | ---: | ---: |",
    ]
    for step, row in found["overhead"]["steps"].items():
        lines.append(f"| {step} | {row['step_ms']:.0f} ms | {row['python_share']:.1%} |")
    return between((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), "measured", "\n".join(lines))


def gating() -> str:
    """The page about the gate with how often it was wrong."""
    found = json.loads(gate_trials.RESULTS.read_text(encoding="utf-8"))
    return between((ROOT / "docs" / "gating.md").read_text(encoding="utf-8"), "trials", gate_trials.as_markdown(found))


def readme() -> str:
    """The README with its table of results, from the committed measurement."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    file = RESULTS / "smollm2-135m-flab-22.json"
    result = BenchResult.model_validate_json(file.read_text(encoding="utf-8"))
    machine, work = result.environment, result.workload
    opened = "once" if result.openings == 1 else f"{result.openings} times"
    where = (
        f"Measured on {machine['cpu']}, {machine['logical_cores']} cores: prompt {work.prompt_tokens} tokens, "
        f"{work.output_tokens} produced, {len(result.baseline.samples)} runs a side, each engine opened {opened}; "
        f"{'medians' if result.openings == 1 else 'means of their medians'}, with the 95 % interval of the ratio."
    )
    text = between(text, "results", f"{table.as_markdown(table.rows(result))}\n\n{where}")
    text = between(between(text, "quality", quality()), "parity", parity())
    text = between(text, "peers", peers())
    text = between(between(text, "axes", where_to_cut()), "methods", against_each_other())
    return between(text, "speed", speed_of_compressing())


def mined_tasks() -> str:
    """What mining yields, and samples of it."""
    counts = json.loads((RESULTS / "mining.json").read_text(encoding="utf-8"))
    return mined_samples.as_markdown(json.loads(mined_samples.SAMPLES.read_text(encoding="utf-8")), counts)


def speed_of_compressing() -> str:
    """What makes compressing fast, as it was measured."""
    walk = json.loads((RESULTS / "walk.json").read_text(encoding="utf-8"))
    left_out, offspring = walk["cases"].values()
    population = json.loads((RESULTS / "population.json").read_text(encoding="utf-8"))
    counted = json.loads((RESULTS / "vocabulary-speed.json").read_text(encoding="utf-8"))["tokenizers"]
    counting = " and ".join(
        f"{row['counting_s']:.0f} s ({name}, {row['vocab_size']:,} tokens)" for name, row in counted.items()
    )
    return (
        f"One walk over all variants of {walk['model']} with a layer left out takes {left_out['ratio']:.1f} times less "
        f"than a forward pass for\neach, 32 offspring of one parent {offspring['ratio']:.1f} times less "
        f"(`perf/walk_speed.py`). The tokens of 100 MB of text are counted in\n{counting} "
        f"(`perf/vocabulary_speed.py`).\n\n{population_speed.as_text(population)}"
    )


def peers() -> str:
    """Other engines on the same machine, once they have been measured."""
    file = RESULTS / "peers.json"
    if not file.is_file():
        return "**Figures are still to come**: none have been measured on an idle machine yet."
    return peer_table.as_markdown(PeersResult.model_validate_json(file.read_text(encoding="utf-8")))


def against_each_other() -> str:
    """Pruning methods on the real code model, as far as they have been measured."""
    file = RESULTS / f"{PARITY}.methods.json"
    return methods.as_markdown(json.loads(file.read_text(encoding="utf-8"))["cells"])


def where_to_cut() -> str:
    """What rows and channels of the real code model cost."""
    return axes.as_markdown(json.loads((RESULTS / f"{PARITY}.axes.json").read_text(encoding="utf-8")))


def parity() -> str:
    """What exporting alone costs on a real code model."""
    file = RESULTS / f"{PARITY}.torch.json"
    result = EvalResult.model_validate_json(file.read_text(encoding="utf-8"))
    (row,) = result.rows
    assert row.baseline is not None
    torch_right, engine_right = (round(side.value * side.n) for side in (row.baseline, row.target))
    return (
        f"Engine and torch say the same: dense {PARITY} passes {torch_right} of HumanEval's {row.target.n} problems "
        f"in float32 torch\nand {engine_right} in its float32 engine, {row.gained} gained and {row.lost} lost "
        f"(raw completion; `perf/results/{file.name}`)."
    )


def quality() -> str:
    """What evaluations say, a table for each model."""
    parts = []
    for name, title in QUALITY.items():
        files = [RESULTS / f"{name}.{task}.json" for task in figures.TASKS]
        found = [EvalResult.model_validate_json(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
        if found:
            parts += [f"{title}:", evaluation.table([row for result in found for row in named(result)])]
    return "\n\n".join(parts)


def named(result: EvalResult) -> list[EvalRow]:
    """The rows of a task that generates, with its name: elsewhere it stands in the title."""
    name = result.options.name
    return [row.model_copy(update={"metric": f"{name} {row.metric}"} if name in TASKS else {}) for row in result.rows]


def between(text: str, mark: str, content: str) -> str:
    """The text with other content between two marks."""
    before, _, rest = text.partition(f"<!-- begin {mark} -->")
    after = rest.partition(f"<!-- end {mark} -->")[2]
    return f"{before}<!-- begin {mark} -->\n{content}\n<!-- end {mark} -->{after}"


def _pages(command: click.Command, name: str, parent: click.Context) -> list[str]:
    """The help of a command, and of those that it holds."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=100)
    pages = [f"## {context.command_path}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            pages += _pages(command.commands[inner], inner, context)
    return pages


def reference() -> str:
    """The help of every command, as Markdown."""
    # With the group's settings, as it is run: else the options for help depend on who asked before.
    parent = click.Context(cli, info_name="flabc", terminal_width=100, **cli.context_settings)
    pages = [
        "# The command line",
        "",
        "Every command takes `--json`; data goes to stdout, progress to stderr.",
        "",
    ]
    for name in cli.list_commands(parent):
        pages += _pages(cli.commands[name], name, parent)
    return "\n".join(pages) + "\n"


if __name__ == "__main__":
    for file, content in generated().items():
        file.write_text(content, encoding="utf-8")
        print(file.relative_to(ROOT))
