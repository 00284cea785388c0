"""flabc.yaml: a project's model, recipe and folders, so that commands run beside it need no arguments."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from flabc.errors import ArtifactError, UsageError
from flabc.frozen import Frozen, read_yaml, validated

FILE = "flabc.yaml"
SCHEMA_FILE = ".flabc.schema.json"

_TEMPLATE = """\
# yaml-language-server: $schema=./{schema}
# What flabc does in this folder: run  flabc compress && flabc export && flabc bench

# A Hugging Face folder, a hub id, a GGUF file, or a built-in alias.
model: {model}

# A shipped recipe (flabc recipes lists them) or a file of your own.
recipe: {recipe}

# The folders that the commands fill, relative to this file.
checkpoint: pruned
engine: engine
baseline: dense-engine   # the dense model's engine, for comparison
report: report

# What flabc export makes: onnx in fp32, or gguf (fp16, fp32, bf16, int8) for llama.cpp.
target: onnx
precision: fp32

# Picks the calibration text.
seed: 0
"""


class Project(Frozen):
    """The content of ``flabc.yaml``."""

    model: str = Field(description="A Hugging Face folder, a hub id, a GGUF file, or a built-in alias.")
    recipe: str = Field("flab-22", description="A shipped recipe, or the path of a recipe file.")
    checkpoint: str = Field("pruned", description="Folder of the pruned checkpoint.")
    engine: str = Field("engine", description="Folder of the pruned engine.")
    baseline: str = Field("dense-engine", description="Folder of the dense engine, for comparison.")
    report: str = Field("report", description="Folder of the benchmark report.")
    target: str = Field("onnx", description="What flabc export makes.")
    precision: str | None = Field(None, description="The precision of the engine; by default the target's first.")
    seed: int = Field(0, description="Picks the calibration text.")


def find(folder: Path = Path()) -> Project | None:
    """The project of a folder, or None if it has no ``flabc.yaml``.

    Raises:
        RecipeError: if the file does not validate; every wrong field is named.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    return validated(Project, read_yaml(file), str(file))


def need(what: str) -> Project:
    """The project of the working folder, for a command that was not given ``what``.

    Raises:
        UsageError: if there is none.
    """
    project = find()
    if project is None:
        raise UsageError(f"No {what} was given, and there is no {FILE} here.", fix="Give it, or run flabc init first.")
    return project


def settle(value: str | None, field: str, what: str) -> str:
    """A command's argument as it was given, else the project's field.

    Raises:
        UsageError: naming ``what`` is missing, if there is no project either.
    """
    return value if value is not None else str(getattr(need(what), field))


def init(folder: Path, model: str, recipe: str, *, force: bool = False) -> Path:
    """Write a commented ``flabc.yaml`` and the schema by which editors complete and check it.

    Raises:
        ArtifactError: if there is a ``flabc.yaml`` already and ``force`` is not given.
    """
    file = folder / FILE
    if file.exists() and not force:
        raise ArtifactError(f"{file} exists.", fix="Edit it, or pass --force to write it anew.")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(_TEMPLATE.format(model=model, recipe=recipe, schema=SCHEMA_FILE), encoding="utf-8")
    schema = json.dumps(Project.model_json_schema(), indent=2)
    (folder / SCHEMA_FILE).write_text(schema + "\n", encoding="utf-8")
    return file
