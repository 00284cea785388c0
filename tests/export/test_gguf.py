"""GGUFs, judged by the gguf package's reader, by transformers' loader, and by how llama.cpp merges."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from flabc import api
from flabc.artifact import Artifact
from flabc.compress import checkpoint, load
from flabc.compress.location import locate
from flabc.compress.model import cut_channels
from flabc.errors import ArtifactError, EngineError, ModelError, ParityError, UnknownNameError
from flabc.export import gguf_writer, parity
from flabc.export.gguf_vocabulary import Vocabulary
from flabc.export.weights import CheckpointWeights
from flabc.pre_tokenizers import PRE_TOKENIZERS
from flabc.runtime.session import Session
from flabc.spec import ModelSpec

from ..conftest import stdlib_text, write_tiny

gguf = pytest.importorskip("gguf")

#: Tiny models that llama.cpp would load: heads as wide as the stream where its loader wants that, Gemma's own pattern.
FILLED = {"head_dim": 8}
SCALED = {"query_pre_attn_scalar": 16}
SIX = {"num_hidden_layers": 7, "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama-tied", {}),
    "llama-untied-biased": ("llama-untied-biased", {}),
    "llama3-rope": ("llama-scaled", {}),
    "linear-rope": ("llama-tied", LINEAR),
    "mistral": ("mistral-untied", {}),
    "qwen2-tied": ("qwen2-tied", FILLED),
    "qwen2-untied": ("qwen2-untied", FILLED),
    "qwen3": ("qwen3-tied", {}),
    "gemma2": ("gemma2-tied", SCALED),
    "gemma3": ("gemma3_text-tied", SCALED | SIX),
    "phi3": ("phi3-untied", FILLED),
    "starcoder2": ("starcoder2-tied", FILLED),
}

#: Those whose every setting transformers itself reads from a GGUF.
READ_WHOLE = ("llama-tied", "mistral", "qwen2-tied", "qwen2-untied", "phi3", "starcoder2")

Make = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folder of a model of ``WRITTEN``; made once."""

    @functools.cache
    def make(name: str) -> Path:
        variant, changes = WRITTEN[name]
        return write_tiny(tmp_path_factory.mktemp(name), variant, **changes)

    return make


@pytest.fixture(scope="session")
def exported(folder: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], api.Exported]:
    """Its GGUF in float32; made once."""

    @functools.cache
    def make(name: str) -> api.Exported:
        return api.export(folder(name), tmp_path_factory.mktemp("gguf") / name, target="gguf", precision="fp32")

    return make


def written(model: Path, file: Path, precision: str = "fp32") -> Path:
    """A GGUF without the proof."""
    config = load.complete_config(model)
    spec = ModelSpec.from_config(config)
    gguf_writer.write(model, spec, config, file, precision=precision, name="tiny")
    return file


def changed(model: Path, to: Path, **fields: Any) -> Path:
    """The model's folder with another config."""
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text()) | fields
    (to / "config.json").write_text(json.dumps(config))
    return to


def logits(ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(*arguments, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_every_family_comes_back_as_it_was(exported: Callable[[str], api.Exported], name: str) -> None:
    done = exported(name)
    assert done.parity["holds"]
    assert done.parity["max_relative"] < 1e-5
    assert done.parity["greedy_mismatches"] == 0
    manifest = Artifact.open(done.path, "gguf").manifest
    assert manifest.receipts["parity"] == done.parity
    assert list(manifest.files) == [gguf_writer.FILE]
    reader = gguf.GGUFReader(done.path / gguf_writer.FILE)
    assert ("output.weight" in {tensor.name for tensor in reader.tensors}) is not done.spec.tie_word_embeddings
    assert sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != "rope_freqs.weight") == (
        done.spec.num_parameters
    )


@pytest.mark.parametrize("name", READ_WHOLE)
def test_transformers_alone_reads_the_same_model(
    exported: Callable[[str], api.Exported], folder: Make, name: str
) -> None:
    ids = torch.arange(3, 23)[None]
    found = logits(ids, exported(name).path, gguf_file=gguf_writer.FILE)
    torch.testing.assert_close(found, logits(ids, folder(name)), atol=2e-5, rtol=1e-5)


def test_the_window_of_a_mistral_bounds_its_context(exported: Callable[[str], api.Exported]) -> None:
    fields = gguf.GGUFReader(exported("mistral").path / gguf_writer.FILE).fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.context_length"].contents() == 24


@pytest.mark.parametrize(("precision", "stored"), [(None, "F16"), ("bf16", "BF16"), ("int8", "Q8_0")])
def test_rounding_is_measured_apart_from_faults(
    folder: Make, tmp_path: Path, precision: str | None, stored: str
) -> None:
    done = api.export(folder("gemma2"), tmp_path / "out", target="gguf", precision=precision)
    assert done.precision == precision or done.precision == "fp16"
    assert done.parity["max_relative"] < 1e-5
    assert 1e-5 < done.parity["rounding"]["max_relative"] < done.parity["rounding"]["tolerance"]
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(done.path / gguf_writer.FILE).tensors}
    assert types["blk.0.attn_output.weight"] == stored
    assert types["blk.0.attn_q_norm.weight" if "blk.0.attn_q_norm.weight" in types else "output_norm.weight"] == "F32"
    assert types["token_embd.weight"] == ("F16" if precision == "int8" else stored)  # rows of 48 are no blocks of 32
    assert done.parity["stored"] == {name: list(types.values()).count(name) for name in set(types.values())}


def test_a_pruned_model_with_a_cut_vocabulary_comes_back(folder: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages = [
        {"stage": "vocab", "max_size": 640},
        {"stage": "layers", "count": 1, "sequences": 4},
        {"stage": "widths", "multiple_of": 8},
    ]
    calibration = {"sequences": 4, "sequence_length": 64}
    recipe.write_text(
        json.dumps({"name": "x", "target": {"params": 0.7}, "calibration": calibration, "stages": stages})
    )
    api.compress(str(folder("qwen2-tied")), recipe, tmp_path / "pruned")
    done = api.export(tmp_path / "pruned", tmp_path / "out", target="gguf")
    assert done.spec.vocab_size == 640
    assert done.spec.layers[0].intermediate_size < 80
    manifests = [Artifact.open(tmp_path / name).manifest for name in ("pruned", "out")]
    assert manifests[0].recipe == manifests[1].recipe
    assert manifests[1].receipts.keys() == {"stages", "layers", "quality", "parity"}
    ours, theirs = (
        Tokenizer.from_str(json.dumps(load.read_tokenizer(locate(str(place))).tokenizer))
        for place in (tmp_path / "pruned", tmp_path / "out" / gguf_writer.FILE)
    )
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (*stdlib_text()[:10], parity.ODD_TEXT, "<|im_start|>user\n1 + 1<|im_end|>"):
        assert ours.encode(text).ids == theirs.encode(text).ids
    again = api.inspect(str(tmp_path / "out" / gguf_writer.FILE))
    assert again.total_parameters == done.spec.num_parameters


def test_layers_that_differ_are_refused_before_any_work(folder: Make, tmp_path: Path) -> None:
    model = cut_channels(load.load(str(folder("llama-tied"))), {0: range(40)})
    (tmp_path / "uneven").mkdir()
    checkpoint.write(model, tmp_path / "uneven")
    (tmp_path / "uneven" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"differ in shape.*equal and whole layers.*onnx"):
        api.export(tmp_path / "uneven", tmp_path / "out", target="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variant", "changes", "problem"),
    [
        ("granite-tied", {}, "cannot write granite.*llama, mistral, qwen2.*starcoder2"),
        ("qwen2-tied", {}, "width of all query heads.*Expected: 48. Found: 96"),
        ("phi3-untied", {"head_dim": 8, "partial_rotary_factor": 0.5}, "share of a head.*Found: 0.5"),
        ("gemma2-tied", {}, "attention scores are scaled by. Expected: 16. Found: 12"),
        ("gemma2-tied", SCALED | {"final_logit_softcapping": None}, "which scores are bounded"),
        ("gemma3_text-tied", SCALED, "attend through a window"),
        ("gemma3_text-tied", SCALED | SIX | {"tie_word_embeddings": False}, "the output matrix"),
        ("qwen3-tied", {"attention_bias": True}, "no place for. Expected: none. Found: attention_bias"),
        ("starcoder2-tied", {"head_dim": 8, "use_bias": False}, "wants them. Expected: none. Found: use_bias"),
        ("starcoder2-tied", {"head_dim": 8, "hidden_act": "gelu"}, "activation. Expected: gelu_pytorch_tanh"),
        ("qwen3-tied", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'linear'"),
    ],
)
def test_what_llama_cpp_would_not_load_or_compute_is_refused(
    tmp_path: Path, variant: str, changes: dict[str, Any], problem: str
) -> None:
    model = write_tiny(tmp_path / "model", variant, **changes)
    with pytest.raises(ModelError, match=problem):
        api.export(model, tmp_path / "out", target="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_wrong_tensor_is_caught_whatever_the_rounding(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    true = CheckpointWeights.get

    def wrong(self: CheckpointWeights, role: str, layer: int | None = None) -> Any:
        tensor = true(self, role, layer)
        return tensor * 1.01 if (role, layer) == ("up", 1) else tensor

    monkeypatch.setattr(CheckpointWeights, "get", wrong)
    with pytest.raises(ParityError, match=r"does not say what the checkpoint says.*No folder was written"):
        api.export(folder("llama-tied"), tmp_path / "out", target="gguf", precision=precision)
    assert not list(tmp_path.iterdir())


def test_rows_in_the_wrong_order_are_caught(folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_writer, "_interleaved", lambda rows, _: rows)
    with pytest.raises(ParityError, match="does not say"):
        api.export(folder("llama-tied"), tmp_path / "out", target="gguf")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("starcoder2", "add_rope_freq_base", 20000.0),
        ("qwen2-tied", "add_rope_freq_base", 20000.0),
        ("linear-rope", "add_rope_scaling_factor", 2.0),
        ("gemma3", "add_rope_freq_base_swa", 20000.0),
        ("gemma3", "add_sliding_window", 8),
        ("gemma2", "add_final_logit_softcapping", 20.0),
        ("qwen3", "add_layer_norm_rms_eps", 1e-2),
    ],
)
def test_a_wrong_setting_is_caught(
    folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, field: str, value: float
) -> None:
    true = getattr(gguf.GGUFWriter, field)
    monkeypatch.setattr(gguf.GGUFWriter, field, lambda self, _: true(self, value))
    with pytest.raises(ParityError, match="does not say"):
        api.export(folder(name), tmp_path / "out", target="gguf")


def test_wrong_frequencies_are_caught(folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = gguf_writer._frequency_factors
    monkeypatch.setattr(gguf_writer, "_frequency_factors", lambda *given: np.ones_like(true(*given)))
    with pytest.raises(ParityError, match="does not say"):
        api.export(folder("llama3-rope"), tmp_path / "out", target="gguf")


def test_wrong_merges_are_caught(folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = gguf.GGUFWriter.add_token_merges
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda self, merges: true(self, merges[10:]))
    with pytest.raises(ParityError, match=r"tokenizer.*gives other ids"):
        api.export(folder("llama-tied"), tmp_path / "out", target="gguf")


def test_numbers_too_large_for_float16_are_named(folder: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = changed(folder("llama-tied"), tmp_path / "large")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.*float16 cannot hold.*Found: 1e\+05.*bf16"):
        api.export(model, tmp_path / "out", target="gguf")


def test_no_more_than_a_tensor_is_held(folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, given, most = CheckpointWeights.get, list[Any](), 0

    def watched(self: CheckpointWeights, role: str, layer: int | None = None) -> Any:
        nonlocal most
        most = max(most, sum(reference() is not None for reference in given))
        tensor = true(self, role, layer)
        given.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(CheckpointWeights, "get", watched)
    written(folder("llama-tied"), tmp_path / "model.gguf")
    assert len(given) == 29
    assert most == 0


def test_a_folder_for_llama_cpp_says_so_when_it_is_run(exported: Callable[[str], api.Exported]) -> None:
    path = exported("llama-tied").path
    for opens in (Session.open, lambda folder: api.evaluate(folder)):
        with pytest.raises(EngineError, match=r"is for llama\.cpp.*llama-cli -m"):
            opens(path)
    with pytest.raises(ArtifactError, match=r"Expected: kind 'engine'. Found: 'gguf'"):
        api.bench(path, path, path.parent / "report")


def test_other_targets_and_precisions_are_refused_by_name(folder: Make, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Known: gguf, onnx"):
        api.export(folder("llama-tied"), tmp_path / "out", target="gguff")
    with pytest.raises(UnknownNameError, match="Known: bf16, fp16, fp32, int8"):
        api.export(folder("llama-tied"), tmp_path / "out", target="gguf", precision="int4")
    with pytest.raises(UnknownNameError, match="Known: bf16, fp16, fp32"):
        api.export(folder("llama-tied"), tmp_path / "out", target="onnx-standard", precision="int8")


def test_the_command_line_writes_and_refuses(folder: Make, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from flabc.cli import main; main()"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "export", folder("llama-tied"), "--target", "gguf", "-o", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ", fp16; logits within" in done.stdout
    assert "rounding moved logits by up to 0.00" in done.stdout
    run = subprocess.run([*command, "run", out, "def"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "is for llama.cpp" in run.stderr


def trained(name: str) -> dict[str, Any]:
    """A byte-level tokenizer that splits as llama.cpp does under a name."""
    known = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE())
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": known.as_json()}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, **options)
    tokenizer.train_from_iterator([*stdlib_text(), "12 345 1999 it's don't 漢字漢字 naïve " * 50], trainer)
    trained: dict[str, Any] = json.loads(tokenizer.to_str())
    if known.ignore_merges:  # whole words that no merge makes
        trained["model"] |= {"ignore_merges": True, "merges": trained["model"]["merges"][:-60]}
    return trained


def sentence_piece(name: str) -> dict[str, Any]:
    """A BPE with byte fallback, laid out as these families' are."""
    characters = sorted({*"".join(stdlib_text()), "▁"} - {"\n", "\t", " "})
    special = ["<pad>", "</s>", "<s>", "<unk>", "<mask>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    lines = [line for text in stdlib_text() for line in text.splitlines()][:3000]
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=characters)
    )
    space = normalizers.Replace(" ", "▁")
    layouts: dict[str, tuple[Any, Any]] = {
        "phi3": (normalizers.Sequence([normalizers.Prepend("▁"), space]), None),
        "llama-tied": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        "gemma2": (space, pre_tokenizers.Split(" ", "merged_with_previous")),
    }
    normalizer, pre_tokenizer = layouts[name]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    content: dict[str, Any] = json.loads(tokenizer.to_str()) | {"normalizer": None, "pre_tokenizer": None}
    for key, part in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        if part is not None:
            content[key] = json.loads(part.__getstate__())
    content["added_tokens"] = content["added_tokens"][:5]
    return content


def with_tokenizer(name: str, to: Path, content: dict[str, Any], **special: str) -> Path:
    """A model of ``WRITTEN`` with another tokenizer."""
    variant, changes = WRITTEN[name]
    write_tiny(to, variant, **changes)
    config = json.loads((to / "config.json").read_text())
    size = Tokenizer.from_str(json.dumps(content)).get_vocab_size()
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {"vocab_size": size})).save_pretrained(to)
    (to / "tokenizer.json").write_text(json.dumps(content))
    (to / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return to


def same_ids(model: Path, file: Path, *texts: str) -> None:
    ours = Tokenizer.from_file(str(model / "tokenizer.json"))
    theirs = Tokenizer.from_str(json.dumps(load.read_tokenizer(locate(str(file))).tokenizer))
    for text in (*stdlib_text()[:10], parity.ODD_TEXT, *texts):
        assert theirs.encode(text).ids == ours.encode(text).ids


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_way_of_splitting_comes_back(tmp_path: Path, name: str) -> None:
    model = with_tokenizer("llama-tied", tmp_path / "model", trained(name), eos_token="<|im_end|>")
    file = written(model, tmp_path / "model.gguf")
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name
    same_ids(model, file, "<|im_start|>user\n12345<|im_end|>")


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi3"])
def test_sentence_piece_comes_back_and_merges_as_llama_cpp_does(tmp_path: Path, name: str) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    model = with_tokenizer(name, tmp_path / "model", sentence_piece(name), **special)
    api.export(model, tmp_path / "out", target="gguf")
    file = tmp_path / "out" / gguf_writer.FILE
    same_ids(model, file)
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is (name != "gemma2")
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:6] == [3, 3, 3, 2, 3, 6]
    vocabulary = Vocabulary.of(model, len(kinds))
    ours = Tokenizer.from_file(str(model / "tokenizer.json"))
    for text in (stdlib_text()[3][:400], parity.ODD_TEXT):
        assert merged_by_score(text, vocabulary) == ours.encode(text, add_special_tokens=False).ids


def merged_by_score(text: str, vocabulary: Vocabulary) -> list[int]:
    """As ``llm_tokenizer_spm`` of llama.cpp does it: of all neighbours that are a token, the best score first."""
    ids, scores = {token: index for index, token in enumerate(vocabulary.tokens)}, vocabulary.scores()
    parts = list(("▁" if vocabulary.prefix_space else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(ids.get(left + right), at) for at, (left, right) in enumerate(pairwise(parts))]
        best = max(((scores[index], -at) for index, at in pairs if index is not None), default=None)
        if best is None:
            break
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = [[part] if part in ids else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    return [ids[token] for part in spelled for token in part]


@pytest.mark.parametrize(("single", "adds"), [("<|im_start|> $A", (True, False)), ("$A <|im_end|>", (False, True))])
def test_what_is_put_around_a_text_comes_back(tmp_path: Path, single: str, adds: tuple[bool, bool]) -> None:
    content = trained("gpt-2")
    ids = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    model = with_tokenizer("llama-tied", tmp_path / "model", json.loads(tokenizer.to_str()), **special)
    assert Vocabulary.of(model, 700).adds == adds
    tokenizer.enable_padding(length=8)  # as the last training run may have left it
    tokenizer.save(str(model / "tokenizer.json"))
    assert Vocabulary.of(model, 700).adds == adds
    same_ids(model, written(model, tmp_path / "model.gguf"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <|im_start|>", special_tokens=ids)
    tokenizer.save(str(model / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"adds tokens that llama.cpp would not add.*Found: a <\|im_start\|>"):
        Vocabulary.of(model, 700)


def test_ids_without_a_token_are_marked_unused(folder: Make) -> None:
    vocabulary = Vocabulary.of(folder("llama-tied"), 703)
    assert vocabulary.tokens[-3:] == ("[PAD700]", "[PAD701]", "[PAD702]")
    assert [int(kind) for kind in vocabulary.kinds[-4:]] == [1, 5, 5, 5]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name for how.*gpt-2, smollm, qwen2.*Found: .*Whitespace"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "no name for how",
        ),
        ({"normalizer": {"type": "Lowercase"}}, "no name for how.*Found: .*Lowercase"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "Found: a tokenizer of kind WordLevel"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    folder: Make, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    model = changed(folder("llama-tied"), tmp_path / "model")
    content = json.loads((model / "tokenizer.json").read_text()) | change
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=problem):
        Vocabulary.of(model, 700)
