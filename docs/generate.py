"""Writes what is generated from the code: the command-line reference and the JSON schemas.

``make docs`` runs it; a test compares its output with what is committed.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from flabc.cli import PLANNED, cli
from flabc.perf import table
from flabc.project import Project
from flabc.recipe import Recipe
from flabc.runtime.measure.result import BenchResult

ROOT = Path(__file__).resolve().parent.parent


def generated() -> dict[Path, str]:
    """Every generated file and its content."""
    return {
        ROOT / "docs" / "cli.md": reference(),
        ROOT / "README.md": readme(),
        ROOT / "recipes" / "recipe.schema.json": json.dumps(Recipe.model_json_schema(), indent=2) + "\n",
        ROOT / "recipes" / "flabc.schema.json": json.dumps(Project.model_json_schema(), indent=2) + "\n",
    }


def readme() -> str:
    """The README with its table of results, from the committed measurement."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    file = ROOT / "perf" / "results" / "smollm2-135m-flab-22.json"
    result = BenchResult.model_validate_json(file.read_text(encoding="utf-8"))
    machine, work = result.environment, result.workload
    where = (
        f"Measured on {machine['cpu']}, {machine['logical_cores']} cores: prompt {work.prompt_tokens} tokens, "
        f"{work.output_tokens} produced, {len(result.baseline.samples)} runs a side; medians, with the 95 % interval "
        "of the ratio."
    )
    before, _, rest = text.partition("<!-- begin results -->")
    after = rest.partition("<!-- end results -->")[2]
    content = f"{table.as_markdown(table.rows(result))}\n\n{where}"
    return f"{before}<!-- begin results -->\n{content}\n<!-- end results -->{after}"


def reference() -> str:
    """The help of every command, as Markdown."""
    parent = click.Context(cli, info_name="flabc", terminal_width=100)
    pages = [
        "# The command line",
        "",
        "Every command takes `--json`; data goes to stdout, progress to stderr.",
        "",
    ]
    for name in cli.list_commands(parent):
        if name not in PLANNED:
            command = cli.commands[name]
            text = command.get_help(click.Context(command, info_name=name, parent=parent, terminal_width=100))
            pages += [f"## flabc {name}", "", "```text", text.rstrip(), "```", ""]
    pages += [
        "## Not in this version",
        "",
        "These names are settled and answer that they are still to come:",
        "",
    ]
    pages += [f"- `flabc {name}`: {purpose}" for name, purpose in PLANNED.items()]
    return "\n".join(pages) + "\n"


if __name__ == "__main__":
    for file, content in generated().items():
        file.write_text(content, encoding="utf-8")
        print(file.relative_to(ROOT))
