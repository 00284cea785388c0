"""Models to test on: tiny random ones of every family, and SmolLM2-135M for the whole chain."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from flabc import api
from flabc.compress.data import corpus

# A busy machine must not look like a slow function.
hypothesis.settings.register_profile("flabc", deadline=None)
hypothesis.settings.load_profile("flabc")

# Started in the background, this process ignores Ctrl-C, and so would those that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Shapes small enough for milliseconds, uneven enough to catch swapped axes.
TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}

#: Layers that look through a window and one that does not.
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

#: Llama 3.1's positions, scaled beyond a short original length.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

#: Positions scaled by YaRN, and such as turn half of every head.
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
HALF_TURNED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

#: Variants: family, and what differs from ``TINY``.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-untied-biased": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "mistral-untied": ("mistral", {"tie_word_embeddings": False, "sliding_window": 24}),
    "gemma2-tied": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 16, "query_pre_attn_scalar": 12}),
    "gemma3_text-tied": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 16, "layer_types": MIXED}),
    "phi3-untied": ("phi3", {"tie_word_embeddings": False, "num_key_value_heads": 3}),
    "starcoder2-tied": ("starcoder2", {"tie_word_embeddings": True, "norm_epsilon": 1e-5}),
    "granite-tied": (
        "granite",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "llama-scaled": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("llama", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "phi3-partial": ("phi3", {"tie_word_embeddings": False, "head_dim": 32, "rope_parameters": HALF_TURNED}),
}

#: The two most common families, tied and untied, with biases and without: enough where the family does not matter.
COMMON = tuple(VARIANTS)[:4]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def stdlib_text() -> tuple[str, ...]:
    """A little Python text."""
    return tuple(document.text for document in corpus.load("python-stdlib", "calibration")[:40])


def train_tokenizer(vocab_size: int = 700) -> Any:
    """A byte-level BPE with special tokens, trained by the tokenizers library, as transformers wraps it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def write_tiny(folder: Path, variant: str, **changes: Any) -> Path:
    """A tiny random model with a trained tokenizer, saved by transformers itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, differences = VARIANTS[variant]
    tokenizer = train_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**TINY, **ids, **differences, **changes})
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by the name of its variant; made once."""

    @functools.cache
    def make(variant: str) -> Path:
        return write_tiny(tmp_path_factory.mktemp(variant), variant)

    return make


@pytest.fixture
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with fewer positions than an engine's proof needs."""
    return write_tiny(tmp_path_factory.mktemp("short"), "llama-tied", max_position_embeddings=64)


@pytest.fixture(params=COMMON)
def any_tiny(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    """Every tiny model in turn."""
    return tiny(request.param)


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that cuts all three axes of a tiny model in a second."""
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe = {
        "name": "tiny",
        "target": {"params": 0.7},
        "calibration": {"sequences": 4, "sequence_length": 64},
        "stages": [
            {"stage": "vocab", "max_size": 640},
            {"stage": "layers", "count": 1, "sequences": 4},
            {"stage": "widths", "multiple_of": 8},
        ],
    }
    file.write_text(json.dumps(recipe), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny: Callable[[str], Path], tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, cut."""
    out = tmp_path_factory.mktemp("tiny") / "pruned"
    api.compress(str(tiny("qwen2-tied")), tiny_recipe, out)
    return out


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint: Path) -> Path:
    """The engine of ``tiny_checkpoint``."""
    out = tiny_checkpoint.parent / "engine"
    api.export(tiny_checkpoint, out)
    return out


@pytest.fixture(scope="session")
def tiny_standard_engine(tiny_checkpoint: Path) -> Path:
    """The engine of ``tiny_checkpoint`` in the standard's operators."""
    out = tiny_checkpoint.parent / "standard-engine"
    api.export(tiny_checkpoint, out, target="onnx-standard")
    return out


@pytest.fixture(scope="session")
def tiny_openvino_engine(tiny_checkpoint: Path) -> Path:
    """The engine of ``tiny_checkpoint`` for OpenVINO."""
    out = tiny_checkpoint.parent / "openvino-engine"
    api.export(tiny_checkpoint, out, target="openvino")
    return out


@pytest.fixture(scope="session")
def tiny_dense_engine(tiny: Callable[[str], Path], tiny_checkpoint: Path) -> Path:
    """The engine of the model that ``tiny_checkpoint`` was cut from."""
    out = tiny_checkpoint.parent / "dense-engine"
    api.export(tiny("qwen2-tied"), out)
    return out


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only wait for each other on tiny models."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
