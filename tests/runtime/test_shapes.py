"""Shapes by name, against transformers' own count of parameters; cuts of them; and what is said of both measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from flabc import api
from flabc.cli import cli
from flabc.errors import EngineError, UnknownNameError, UsageError
from flabc.perf import shape_table
from flabc.runtime.measure import shape_bench
from flabc.runtime.measure.decoding import Run, layers_that_fit, prompt_flops, step_bytes
from flabc.runtime.measure.device import clock_of
from flabc.runtime.measure.result import Workload
from flabc.runtime.measure.shape_result import ShapeResult
from flabc.runtime.measure.shapes import CUTS, SHAPES, Cut, cut_named, cut_shape, layer_bytes, shape_named, sliced

SMALL = Workload(prompt_tokens=6, batch=2, output_tokens=4, rounds=1, threads=1)

#: What the publishers say of their models, in parameters.
PUBLISHED = {"qwen2.5-coder-1.5b": 1.54e9, "qwen2.5-coder-7b": 7.61e9, "codellama-7b": 6.74e9, "llama-2-70b": 69e9}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_that_transformers_makes(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    assert shape_named(name).num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape_named(name).num_parameters == pytest.approx(PUBLISHED.get(name, model.num_parameters()), rel=0.01)


@pytest.mark.parametrize(
    ("shape", "cut", "billions"),
    [
        ("llama-2-70b", "self-pruner-49b", 48.3),
        ("llama-2-70b", "self-pruner-49b-uneven", 48.3),
        ("llama-2-70b", "self-pruner-35b", 34.5),
        ("llama-2-70b", "self-pruner-35b-uneven", 34.5),
        ("qwen2.5-coder-7b", "flab-22", 5.94),
        ("codellama-7b", "flab-22", 5.26),
        ("codellama-7b", "flab-50", 3.37),
    ],
)
def test_a_cut_leaves_what_it_says(shape: str, cut: str, billions: float) -> None:
    dense, pruned = shape_named(shape), cut_shape(shape_named(shape), CUTS[cut])
    assert pruned.num_parameters / dense.num_parameters == pytest.approx(1 - CUTS[cut].share, abs=0.005)
    assert pruned.num_parameters == pytest.approx(billions * 1e9, rel=0.005)
    assert pruned.is_uniform == ("uneven" not in cut)
    assert all(layer.intermediate_size % 128 == 0 for layer in pruned.layers)
    if cut.startswith("flab"):
        assert len(pruned.layers) == len(dense.layers)
        assert pruned.layers[0].num_attention_heads == dense.layers[0].num_attention_heads


def test_what_cannot_be_cut_or_is_unknown_is_told() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'llama-2-70b'"):
        shape_named("lama-2-70b")
    with pytest.raises(UnknownNameError, match="Did you mean 'self-pruner-49b'"):
        cut_named("selfpruner-49b")
    with pytest.raises(UsageError, match="between 0 and 1"):
        cut_named("30")
    with pytest.raises(UsageError, match=r"cannot be cut so.*Found: 0\.1 M"):
        cut_shape(shape_named("tiny"), Cut(share=0.9))


def test_slices_are_spread_and_fit() -> None:
    spec = cut_shape(shape_named("llama-2-70b"), CUTS["self-pruner-35b-uneven"])
    part = sliced(spec, 8)
    assert len(part.layers) == 8
    assert layer_bytes(spec, 2) / layer_bytes(part, 2) == pytest.approx(10, rel=0.02)  # representative
    dense = shape_named("llama-2-70b")
    counts = layers_that_fit(dense, spec, 60 * 2**30, 2)
    assert (
        2 * sum(sliced(each, count).num_parameters for each, count in zip((dense, spec), counts, strict=True))
        < 60 * 2**30
    )
    assert layers_that_fit(dense, spec, 10**12, 2) == (80, 80)
    with pytest.raises(EngineError, match=r"Not one layer.*Found: 1\.0 GiB"):
        layers_that_fit(dense, spec, 2**30, 2)


@pytest.fixture(scope="module")
def machine() -> shape_bench.Machine:
    torch.set_num_threads(1)
    return shape_bench.find_machine()


def test_a_slice_stands_for_the_whole(machine: shape_bench.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 ms for what is outside the layers and 2 ms for each of them, the whole is told exactly."""
    pair = shape_bench.make_pair(machine, "tiny", "self-pruner-35b", layers=2)
    true = Run.sample

    def sample(self: Run) -> Any:
        ms = 1.0 + 2.0 * len(self.decoder.weights.layers)
        measured = true(self)
        return measured.model_copy(update={"ttft_ms": 3 * ms, "token_ms": (ms,) * len(measured.token_ms)})

    monkeypatch.setattr(Run, "sample", sample)
    result = shape_bench.measure_pair(machine, pair, SMALL, energy=False)
    assert (result.dense.extent.measured_layers, result.dense.extent.layers) == (2, 4)
    assert result.dense.tpot_ms == pytest.approx(9.0)
    assert result.dense.ttft_ms == pytest.approx(27.0)
    figures = result.figures()
    assert figures.extrapolated
    assert figures.joules_per_token == (None, None)
    assert figures.conversion == pytest.approx(figures.tpot_speedup / figures.bytes_ratio)
    assert "Extrapolated: 2 of 4 layers and 2 of 4 layers" in " ".join(shape_table.notes(result))


def test_bytes_and_operations_are_those_of_the_whole(machine: shape_bench.Machine) -> None:
    pair = shape_bench.make_pair(machine, "tiny", "0.3", layers=1)
    spec = shape_named("tiny")
    read = 4 * (spec.num_parameters - spec.vocab_size * spec.hidden_size)
    assert step_bytes(pair.dense, SMALL) == read + 2 * (6 + 2) * spec.kv_bytes_per_token(4)
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["tiny"]))
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 6, dtype=torch.long), logits_to_keep=1)
    assert prompt_flops(spec, SMALL) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_result_is_read_back_and_told(machine: shape_bench.Machine) -> None:
    pair = shape_bench.make_pair(machine, "tiny", "self-pruner-49b-uneven")
    result = shape_bench.measure_pair(machine, pair, SMALL, energy=False)
    assert ShapeResult.model_validate_json(result.model_dump_json()) == result
    assert not result.figures().extrapolated
    assert len(result.dense.samples) == 2 * SMALL.rounds
    assert result.pruned.spec.layers[0] != result.pruned.spec.layers[-1]
    names = [row[0] for row in shape_table.lines(result)]
    assert "peak device memory" not in names or torch.cuda.is_available()
    assert result.figures().tpot_ms[0] == np.median([sample.tpot_ms for sample in result.dense.samples])


def test_a_host_clock_counts_what_lies_between() -> None:
    clock = clock_of(torch.device("cpu"))
    for _ in range(3):
        clock.mark()
    assert len(clock.gaps_ms()) == 2
    assert all(gap >= 0 for gap in clock.gaps_ms())


def test_the_command_says_what_a_cut_would_buy(tmp_path: Path) -> None:
    out = tmp_path / "shape"
    small = ["--prompt-tokens", "4", "--output-tokens", "3", "--rounds", "1", "--threads", "1"]
    done = CliRunner().invoke(cli, ["bench", "--shape", "tiny", "--cut", "0.3", "--json", "-o", str(out), *small])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["figures"]["bytes_ratio"] > 1.3
    written = ShapeResult.model_validate_json((out / "shape.json").read_text(encoding="utf-8"))
    assert written.figures().model_dump(mode="json") == found["figures"]
    with pytest.raises(UsageError, match="--shape stands alone"):
        CliRunner().invoke(cli, ["bench", "engine", "--shape", "tiny"], catch_exceptions=False)
    with pytest.raises(UnknownNameError, match="Did you mean 'tiny'"):
        api.bench_shape("tinny", "0.3")
