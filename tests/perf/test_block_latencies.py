"""The table of latencies: from times of narrowed engines to what each block takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flabc.compress import load
from flabc.compress.model import cut_layers
from flabc.compress.search.grid import genome_of
from flabc.compress.search.latencies import Latencies
from flabc.errors import ArtifactError, UsageError
from flabc.perf import block_latencies
from flabc.perf.making import write


def test_what_each_block_takes_is_found_from_the_times_of_whole_steps(tiny: Callable[[str], Path]) -> None:
    """From made-up costs to the times that they give, and back."""
    model = load.load(str(tiny("llama-tied")))
    first, layers = model.spec.layers[0], len(model.spec.layers)
    ffn = {
        size: 0.5 + 0.01 * size if size else 0.0 for kind, size in block_latencies.sizes_of(model, 4) if kind == "ffn"
    }
    ffn[first.intermediate_size] = 0.5 + 0.01 * first.intermediate_size
    heads = {size: 0.3 * size for size in range(first.num_key_value_heads + 1)}
    whole = 7.0 + layers * (ffn[first.intermediate_size] + heads[first.num_key_value_heads])
    steps: dict[tuple[str, int] | None, float] = {None: whole}
    for kind, size in block_latencies.sizes_of(model, 4):
        of, most = (ffn, first.intermediate_size) if kind == "ffn" else (heads, first.num_key_value_heads)
        steps[kind, size] = whole - (layers - 1) * (of[most] - of[size])
    table = block_latencies.table_of(model, steps, "made up")
    assert table.ffn == pytest.approx(ffn)
    assert table.heads == pytest.approx({size: heads[size] for size in table.heads})
    assert table.rest == pytest.approx(7.0)
    assert table.step_ms(genome_of(model.spec)) == pytest.approx(whole)


@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_all_layers_but_the_first_are_narrowed(tiny: Callable[[str], Path], kind: str) -> None:
    model = load.load(str(tiny("llama-tied")))
    for of, size in block_latencies.sizes_of(model, 4):
        if of == kind:
            first, *others = getattr(genome_of(block_latencies.narrow(model, kind, size).spec), kind)
            assert first == getattr(genome_of(model.spec), kind)[0]
            assert set(others) == {size}


def test_a_table_is_measured(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tiny("llama-tied"), tmp_path / "latencies.json"
    few = ["--precision", "fp32", "--widths", "2", "--prompt-tokens", "8", "--output-tokens", "4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["block_latencies.py", str(folder), "-o", str(out), *few])
    block_latencies.main()
    table, model = Latencies.read(out), load.load(str(folder))
    first = model.spec.layers[0]
    assert set(table.ffn) == {0, first.intermediate_size // 2, first.intermediate_size}
    assert {0, first.num_key_value_heads} <= set(table.heads)
    assert 0 < table.step_ms(genome_of(model.spec)) < 1000
    assert "fp32, batch 1 behind 8 tokens" in table.measured
    assert "a step takes" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]  # the engines are gone
    with pytest.raises(ArtifactError):
        block_latencies.main()


def test_a_model_of_one_layer_is_refused(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tmp_path / "one"
    write(cut_layers(load.load(str(tiny("llama-tied"))), [0]), one)
    monkeypatch.setattr(sys, "argv", ["block_latencies.py", str(one), "-o", str(tmp_path / "latencies.json")])
    with pytest.raises(UsageError, match=r"several layers.*Found: one"):
        block_latencies.main()
