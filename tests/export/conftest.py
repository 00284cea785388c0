"""Every family, and engines of a shape that no Hugging Face config can say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flabc.compress import checkpoint, load
from flabc.compress.model import CausalLM, cut_channels, cut_heads, cut_sub_blocks
from flabc.export import engine

from ..conftest import VARIANTS


def made_uneven(model: CausalLM) -> CausalLM:
    """Other widths in every layer, other heads in the first, no attention in the second, no FFN in the third."""
    groups = model.spec.layers[0].num_key_value_heads
    cut = cut_heads(cut_channels(model, {0: range(0, 80, 2), 1: range(24)}), {0: [groups - 1]})
    return cut_sub_blocks(cut, attention=[1], ffn=[2])


@pytest.fixture(params=VARIANTS)
def every_tiny(request: pytest.FixtureRequest, tiny: Callable[[str], Path]) -> Path:
    """A tiny random model of every family in turn."""
    return tiny(request.param)


@pytest.fixture(params=engine.DIALECTS)
def target(request: pytest.FixtureRequest) -> str:
    """Every target in turn."""
    return str(request.param)


@pytest.fixture(params=[name for name, precisions in engine.PRECISIONS.items() if "fp16" in precisions])
def half_target(request: pytest.FixtureRequest) -> str:
    """Every target in turn that computes in half precision."""
    return str(request.param)


@pytest.fixture
def uneven(every_tiny: Path, tmp_path: Path) -> tuple[CausalLM, Path]:
    """Every tiny model in turn with uneven layers, and its checkpoint."""
    model, folder = made_uneven(load.load(str(every_tiny))), tmp_path / "uneven"
    folder.mkdir()
    checkpoint.write(model, folder)
    return model, folder
