"""What the tests of compress share: tiny models as flabc and as transformers read them, and a small corpus."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flabc.compress import load
from flabc.compress.config import Calibration
from flabc.compress.data import corpus
from flabc.compress.model import CausalLM, TokenizerFiles
from flabc.compress.stage import Context

#: Documents longer than this make the tests slow and prove nothing more.
LONGEST = 12_000


@functools.cache
def documents(split: corpus.Split) -> tuple[corpus.Document, ...]:
    """A few short texts of one side of the standard library."""
    short = [d for d in corpus.load("python-stdlib", split) if 1600 < len(d.text) < LONGEST]
    return tuple(short[:24])


def read(folder: Path) -> tuple[CausalLM, Any]:
    """A model as flabc reads it, and as transformers does; the latter is the caller's to change."""
    return load.load(str(folder)), transformers_model(str(folder))


def transformers_model(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on tiny models, and for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pair(any_tiny: Path) -> tuple[CausalLM, Any]:
    """Every tiny model in turn, as flabc and as transformers read it."""
    return read(any_tiny)


@pytest.fixture
def one_pair(tiny: Callable[[str], Path]) -> tuple[CausalLM, Any]:
    """One tiny model, as flabc and as transformers read it."""
    return read(tiny("qwen2-untied"))


@pytest.fixture(scope="session")
def tied(tiny: Callable[[str], Path]) -> CausalLM:
    """A tiny model with a tied output matrix."""
    return load.load(str(tiny("qwen2-tied")))


@pytest.fixture(scope="session")
def untied(tiny: Callable[[str], Path]) -> CausalLM:
    """A tiny model with its own output matrix."""
    return load.load(str(tiny("llama-untied-biased")))


@pytest.fixture(scope="session")
def make_context() -> Callable[..., Context]:
    """A context over a small corpus; ``keep`` is the fraction of the parameters to be left. Text alone, if not told."""

    def make(
        model: CausalLM, *, keep: float | None = None, sequences: int = 6, length: int = 48, first_tokens: float = 0.0
    ) -> Context:
        return Context(
            dense=model,
            calibration=Calibration(sequences=sequences, sequence_length=length, first_tokens=first_tokens),
            documents=documents("calibration"),
            heldout=documents("heldout"),
            target_parameters=round(model.spec.num_parameters * keep) if keep is not None else None,
            device=torch.device("cpu"),
            dtype=torch.float32,
            seed=3,
        )

    return make


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python files with text on both sides of the split."""
    folder = tmp_path_factory.mktemp("corpus")
    for side in ("calibration", "heldout"):
        for document in documents(side):  # type: ignore[arg-type]
            (folder / f"{side}-{document.name.replace('/', '-')}").write_text(document.text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def byte_level(tiny: Callable[[str], Path]) -> TokenizerFiles:
    """A trained byte-level BPE without a normaliser: it gives every text back."""
    return load.load(str(tiny("llama-tied"))).tokenizer


@pytest.fixture(scope="session")
def with_added(byte_level: TokenizerFiles) -> TokenizerFiles:
    """The same as Qwen2.5 and Llama 3 lay theirs out: added tokens behind the model's own vocabulary.

    Its post-processor puts a special token before every text, and its file carries padding and truncation.
    """
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer.from_str(json.dumps(byte_level.tokenizer))
    tokenizer.add_special_tokens([AddedToken("<|fim|>", special=True, normalized=False)])
    tokenizer.add_tokens(["<tool>"])
    template = {"single": "<|im_start|> $A <|fim|>", "special_tokens": [("<|im_start|>", 1), ("<|fim|>", 700)]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    tokenizer.enable_padding(pad_id=700, pad_token="<|fim|>")
    tokenizer.enable_truncation(1000)
    return replace(byte_level, tokenizer=json.loads(tokenizer.to_str()))


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    """Python files that the tokenizers have seen nothing of."""
    return tuple(document.text for document in documents("heldout"))


@pytest.fixture(scope="session")
def smollm() -> CausalLM:
    """SmolLM2-135M as flabc reads it."""
    pytest.importorskip("gguf")
    return load.load("smollm2-135m")


@torch.no_grad()
def received(theirs: Any, modules: Sequence[torch.nn.Module], tokens: torch.Tensor) -> list[torch.Tensor]:
    """What transformers hands to each of these modules, in the order in which they run."""
    caught: list[torch.Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for module in modules]
    theirs(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return caught
