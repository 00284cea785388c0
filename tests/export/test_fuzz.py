"""Random models of random shapes: whatever is cut, both dialects say what transformers' modules say."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flabc.compress import checkpoint, load
from flabc.compress.layers import present
from flabc.compress.model import CausalLM, cut_channels, cut_heads, cut_layers, cut_sub_blocks, cut_vocab
from flabc.compress.walk import Walk
from flabc.export import engine
from flabc.runtime.backend import RUNS, Limits, open_backend

from ..conftest import VARIANTS

IDS = np.random.default_rng(8).integers(3, 256, (2, 30))


@st.composite
def cuts(draw: st.DrawFn) -> dict[str, Any]:
    """What is left of a tiny model of three layers; at least one sub-block somewhere."""
    keep = sorted(draw(st.sets(st.integers(0, 2), min_size=1)))
    layers = range(len(keep))
    attention = draw(st.sets(st.sampled_from(layers)))
    ffn = draw(st.sets(st.sampled_from(layers)))
    if len(attention) == len(ffn) == len(keep):
        ffn = set()
    widths = {at: draw(st.integers(1, 80)) for at in draw(st.sets(st.sampled_from(layers))) if at not in ffn}
    heads = draw(st.sets(st.sampled_from(layers))) - attention
    rows = draw(st.integers(256, 700))
    return {"keep": keep, "attention": attention, "ffn": ffn, "widths": widths, "heads": heads, "rows": rows}


def applied(model: CausalLM, keep: Any, attention: Any, ffn: Any, widths: Any, heads: Any, rows: int) -> CausalLM:
    cut = cut_layers(cut_vocab(model, range(rows)), keep)
    groups = cut.spec.layers[0].num_key_value_heads
    cut = cut_heads(cut, {layer: [layer % groups] for layer in heads})
    return cut_sub_blocks(cut_channels(cut, {at: range(size) for at, size in widths.items()}), attention, ffn)


def walked(model: CausalLM) -> torch.Tensor:
    walk = Walk(model, torch.from_numpy(IDS), torch.device("cpu"), torch.float32)
    variant = present(model.spec)
    return torch.cat([group[variant].log_probs for group in walk.readouts(walk.run([variant]))])


@pytest.mark.parametrize("target", engine.DIALECTS)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(VARIANTS)), cut=cuts())
def test_whatever_is_cut_the_engine_says_the_same(
    tiny: Callable[[str], Path], target: str, name: str, cut: dict[str, Any]
) -> None:
    model = applied(load.load(str(tiny(name))), **cut)
    with tempfile.TemporaryDirectory() as work:
        folder, out = Path(work) / "model", Path(work) / "engine"
        folder.mkdir()
        out.mkdir()
        checkpoint.write(model, folder)
        engine.write(folder, model.spec, out, target)
        backend = open_backend(RUNS[target], out, model.spec, Limits(max_batch=2, max_length=32, threads=1))
        backend.start(2)
        steps = [backend.extend(IDS[:, :20], np.array([20, 20]))]
        steps += [backend.extend(IDS[:, at : at + 1], np.array([1, 1])) for at in range(20, 29)]
    found = torch.log_softmax(torch.from_numpy(np.stack(steps, 1)), -1)  # (2, 10, V)
    expected = walked(model).view(2, 29, -1)[:, 19:]
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)
