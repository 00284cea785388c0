"""Every family on every axis, against transformers' own model with the same things zeroed or taken out."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flabc.compress import checkpoint, load, vocab
from flabc.compress.layers import present
from flabc.compress.model import CausalLM, cut_channels, cut_heads, cut_layers, cut_sub_blocks, cut_vocab
from flabc.compress.walk import Walk
from flabc.errors import FlabcError
from flabc.families import FAMILIES

from ..conftest import write_tiny

#: One tiny model of every family, and Llama with scaled positions.
MODELS = (
    *("llama-untied-biased", "llama-scaled", "qwen2-tied", "qwen3-tied", "mistral-untied", "gemma2-tied"),
    *("gemma3_text-tied", "phi3-untied", "starcoder2-tied", "granite-tied"),
)

#: Longer than the windows of those that look through one.
TOKENS = torch.randint(3, 600, (2, 40), generator=torch.Generator().manual_seed(5))

ROWS = list(range(620))


def read(folder: Path) -> tuple[CausalLM, Any]:
    from transformers import AutoModelForCausalLM

    return load.load(str(folder)), AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(params=MODELS)
def both(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> tuple[CausalLM, Any]:
    """A model as flabc and as transformers read it."""
    return read(tiny(request.param))


@torch.no_grad()
def theirs_say(theirs: Any) -> Tensor:
    return theirs(TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)


def ours_say(model: CausalLM) -> Tensor:
    walk = Walk(model, TOKENS, torch.device("cpu"), torch.float32)
    variant = present(model.spec)
    return torch.cat([group[variant].log_probs for group in walk.readouts(walk.run([variant]))])


class Nothing(nn.Module):
    """Adds nothing to the residual stream."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        return (0 * hidden_states, None) if self.pair else 0 * hidden_states


def down(layer: Any) -> Any:
    return layer.mlp.c_proj if hasattr(layer.mlp, "c_proj") else layer.mlp.down_proj


def test_every_family_is_tried() -> None:
    assert {name.split("-")[0] for name in MODELS} == set(FAMILIES)


def test_the_walk_says_what_transformers_says(both: tuple[CausalLM, Any]) -> None:
    ours, theirs = both
    torch.testing.assert_close(ours_say(ours), theirs_say(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16_the_walk_says_what_transformers_says(tiny: Callable[[str], Path], name: str) -> None:
    """Far from the first token, where a rounded rotary frequency would show."""
    from transformers import AutoModelForCausalLM

    folder = tiny(name)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    tokens = torch.randint(3, 600, (1, 500), generator=torch.Generator().manual_seed(6))
    ours = load.load(str(folder))
    walk = Walk(ours, tokens, torch.device("cpu"), torch.bfloat16)
    variant = present(ours.spec)
    said = torch.cat([group[variant].log_probs for group in walk.readouts(walk.run([variant]))])
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    assert float((said - expected).abs().mean()) < 0.024
    frequencies = [
        b for backbone in walk.surround._backbones.values() for n, b in backbone.named_buffers() if "inv_freq" in n
    ]
    assert frequencies
    assert {buffer.dtype for buffer in frequencies} == {torch.float32}


def test_the_spec_counts_what_transformers_counts(both: tuple[CausalLM, Any]) -> None:
    ours, theirs = both
    assert ours.spec.num_parameters == theirs.num_parameters()
    assert sum(t.numel() for t in ours.weights.values()) == theirs.num_parameters()


def test_rows_that_stay_keep_their_logits(both: tuple[CausalLM, Any]) -> None:
    ours, theirs = both
    expected = theirs(TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1)[:, ROWS].log_softmax(-1)
    torch.testing.assert_close(ours_say(cut_vocab(ours, ROWS)), expected.detach(), atol=2e-5, rtol=1e-4)


def test_layers_are_taken_out(both: tuple[CausalLM, Any]) -> None:
    ours, theirs = both
    cut = copy.deepcopy(theirs)
    cut.model.layers = nn.ModuleList([theirs.model.layers[index] for index in (1, 2)])
    cut.config.num_hidden_layers = 2
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = cut.config.layer_types[1:]
    torch.testing.assert_close(ours_say(cut_layers(ours, [1, 2])), theirs_say(cut), atol=2e-5, rtol=1e-4)


def test_sub_blocks_are_taken_out(both: tuple[CausalLM, Any]) -> None:
    ours, theirs = both
    theirs.model.layers[0].self_attn = Nothing(pair=True)
    theirs.model.layers[2].mlp = Nothing(pair=False)
    cut = cut_sub_blocks(ours, attention=[0], ffn=[2])
    torch.testing.assert_close(ours_say(cut), theirs_say(theirs), atol=2e-5, rtol=1e-4)
    assert sum(t.numel() for t in cut.weights.values()) == cut.spec.num_parameters


def test_channels_are_cut_as_if_they_were_zero(both: tuple[CausalLM, Any]) -> None:
    ours, theirs = both
    keep = {0: list(range(0, 80, 2)), 2: list(range(5, 69))}
    for layer, kept in keep.items():
        lost = sorted(set(range(80)) - set(kept))
        down(theirs.model.layers[layer]).weight.data[:, lost] = 0
    torch.testing.assert_close(ours_say(cut_channels(ours, keep)), theirs_say(theirs), atol=2e-5, rtol=1e-4)


def test_kv_groups_are_cut_with_their_query_heads(both: tuple[CausalLM, Any]) -> None:
    ours, theirs = both
    groups = ours.spec.layers[0].num_key_value_heads
    size = ours.spec.layers[0].num_attention_heads // groups * ours.spec.head_dim
    keep = {0: [groups - 1], 1: [0]}
    for layer, (kept,) in keep.items():
        lost = [at for at in range(groups * size) if at // size != kept]
        theirs.model.layers[layer].self_attn.o_proj.weight.data[:, lost] = 0
    cut = cut_heads(ours, keep)
    torch.testing.assert_close(ours_say(cut), theirs_say(theirs), atol=2e-5, rtol=1e-4)
    assert [layer.num_key_value_heads for layer in cut.spec.layers] == [1, 1, groups]


#: Loads folders as a user would, without flabc, and answers with and without the cache, padded and not.
ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1] + "/tokens.pt")
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert "flabc" not in sys.modules
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logits = model.eval()(ids, use_cache=False).logits
        greedy = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        tokens = model.generate(ids, **greedy)
        plain = model.generate(ids, use_cache=False, **greedy)
        padded = torch.cat([torch.zeros(2, 5, dtype=int), ids], 1)
        mask = (torch.arange(padded.shape[1]) > 4).long().expand(2, -1)
        left = model.generate(padded, attention_mask=mask, **greedy)[:, 5:]
    torch.save({"logits": logits, "tokens": tokens, "plain": plain, "left": left}, folder + "/found.pt")
"""


def every_axis(model: CausalLM) -> dict[str, CausalLM]:
    """Uniform and uneven models, cut on every axis."""
    groups = model.spec.layers[0].num_key_value_heads
    fewer = vocab.apply(model, vocab.VocabPlan("", keep=tuple(ROWS)))
    even = cut_channels(cut_layers(fewer, [0, 2]), {0: range(40), 1: range(30, 70)})
    even = cut_heads(even, {0: [0], 1: [groups - 1]})
    uneven = cut_channels(cut_sub_blocks(model, attention=[0], ffn=[2]), {1: range(0, 80, 2)})
    return {"even": even, "uneven": cut_heads(uneven, {2: [groups - 1]})}


@pytest.fixture(scope="module")
def elsewhere(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[CausalLM, Path]]:
    """Every family, cut, saved, and loaded by transformers in one fresh process."""
    root = tmp_path_factory.mktemp("cut")
    torch.save(TOKENS, root / "tokens.pt")
    made = {}
    for name in MODELS:
        for shape, model in every_axis(load.load(str(tiny(name)))).items():
            folder = root / f"{name}-{shape}"
            folder.mkdir()
            checkpoint.write(model, folder)
            made[name, shape] = (model, folder)
    command = [sys.executable, "-c", ELSEWHERE, str(root), *(str(folder) for _, folder in made.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("shape", ["even", "uneven"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_computes_the_same(
    elsewhere: dict[tuple[str, str], tuple[CausalLM, Path]], name: str, shape: str
) -> None:
    model, folder = elsewhere[name, shape]
    found = torch.load(folder / "found.pt")
    logits = found["logits"][:, :-1].flatten(0, 1).log_softmax(-1)
    torch.testing.assert_close(ours_say(model), logits, atol=2e-5, rtol=1e-4)
    assert torch.equal(found["tokens"], found["plain"])
    assert torch.equal(found["tokens"], found["left"])
    assert (folder / "modeling_flabc.py").is_file() == (shape == "uneven")
    again = load.load(str(folder))
    assert again.spec == model.spec
    assert all(torch.equal(tensor, again.weights[key]) for key, tensor in model.weights.items())


LONGROPE = {
    "head_dim": 8,
    "num_key_value_heads": 6,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 2.0],
        "long_factor": [3.0, 4.0],
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize(
    ("variant", "changes", "cut"),
    [
        (
            "llama-tied",
            {"num_key_value_heads": 6},
            lambda model: cut_heads(model, {layer: range(1, 6) for layer in range(3)}),
        ),
        ("gemma3_text-tied", {"num_key_value_heads": 6}, lambda model: cut_heads(model, {1: range(1, 6)})),
        ("phi3-untied", LONGROPE, lambda model: cut_sub_blocks(model, attention=[0])),
    ],
    ids=["5 heads of 16 for 48 dimensions", "in one layer", "longrope without attention"],
)
def test_shapes_that_the_family_s_own_config_refuses(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], variant: str, changes: dict[str, Any], cut: Any
) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "dense").mkdir()
    model = load.load(str(write_tiny(tmp_path / "dense", variant, **changes)))
    before = copy.deepcopy(dict(model.config))
    model = cut(model)
    said = ours_say(model)
    (tmp_path / "cut").mkdir()
    checkpoint.write(model, tmp_path / "cut")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", trust_remote_code=True, attn_implementation="eager"
    ).eval()
    torch.testing.assert_close(said, theirs_say(theirs), atol=2e-5, rtol=1e-4)
    capfd.readouterr()
    assert load.load(str(tmp_path / "cut")).spec == model.spec
    assert "custom code" not in capfd.readouterr().out  # nobody is asked anything
    assert dict(model.config) == before  # transformers fills configs in place; ours is not theirs


@pytest.mark.parametrize(
    "config", [{"model_type": "gemma3"}, {"model_type": "mamba"}, {"model_type": "qwen2", "use_sliding_window": True}]
)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, config: dict[str, Any]) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlabcError, match=r"gemma3_text|Known: .*starcoder2|use_sliding_window"):
        load.load(str(tmp_path))
