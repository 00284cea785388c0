"""The model card, read by huggingface_hub, and the picture, read as XML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flabc import api
from flabc.compress import checkpoint, load
from flabc.compress.card import COLOURS, write
from flabc.compress.model import CausalLM, cut_heads, cut_layers, cut_sub_blocks
from flabc.families import Part

from ..conftest import write_tiny


@pytest.fixture(scope="module")
def made(tiny: Callable[[str], Path], tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> api.Compressed:
    return api.compress(str(tiny("llama-tied")), tiny_recipe, tmp_path_factory.mktemp("card") / "out")


def test_a_hub_reads_the_card(made: api.Compressed) -> None:
    from huggingface_hub import ModelCard

    assert made.path is not None
    card = ModelCard.load(made.path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model
    assert "flabc" in card.data.tags
    for stage in made.stages:
        assert stage["summary"] in card.text
    assert f"| {made.dense.num_parameters:,} | {made.spec.num_parameters:,} |" in card.text
    assert str(made.quality["heldout_bits_per_byte"]["pruned"]) in card.text
    assert "trust_remote_code" not in card.text


def bars(folder: Path, colour: str) -> list[float]:
    root = ElementTree.parse(folder / "shape.svg").getroot()
    rects = root.iter("{http://www.w3.org/2000/svg}rect")
    return [float(rect.attrib["height"]) for rect in rects if rect.attrib["fill"] == colour]


def write_both(folder: Path, dense: CausalLM, cut: CausalLM) -> None:
    """The checkpoint of a model that was cut by hand, and its card."""
    checkpoint.write(cut, folder)
    write(
        folder,
        dense.spec,
        cut.spec,
        origin=cut.layer_origin,
        source="some/model",
        recipe={"name": "by hand", "description": ""},
        stages=[],
        quality=None,
    )


def test_the_picture_shows_what_is_left_of_each_layer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = load.load(str(tiny("llama-tied")))
    cut = cut_layers(cut_sub_blocks(model, attention=[2]), [0, 2])
    write_both(tmp_path, model, cut)
    for part, (pale, full) in COLOURS.items():
        before, after = bars(tmp_path, pale), bars(tmp_path, full)
        assert len(before) == len(after) == 3
        assert all(before)
        expected = [True, False, part is Part.FFN]
        assert [height > 0 for height in after] == expected
        assert after[0] == before[0]
    text = (tmp_path / "README.md").read_text()
    assert "trust_remote_code=True" in text
    assert "model," in text.splitlines()[6]


def test_the_card_says_so_where_only_an_own_module_builds_the_shapes(tmp_path: Path) -> None:
    """Llama's config refuses heads that do not divide hidden_size, though all layers are equal."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12}
    dense = load.load(str(write_tiny(tmp_path / "dense", "llama-tied", **heads)))
    for keep in (6, 5):
        folder = tmp_path / str(keep)
        folder.mkdir()
        cut = cut_heads(dense, {layer: range(keep) for layer in range(3)})
        assert cut.spec.is_uniform
        write_both(folder, dense, cut)
        assert ("trust_remote_code=True" in (folder / "README.md").read_text()) == (keep == 5)
