"""Benchmarks made of synthetic samples: no engine is run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from flabc.runtime.evaluate.perplexity import Perplexity
from flabc.runtime.measure.result import BenchResult, Sample, Side, Workload
from flabc.spec import LayerSpec, ModelSpec

ROUNDS, OUTPUT_TOKENS = 5, 64


def layer(heads: int = 9, kv: int = 3, width: int = 1536) -> LayerSpec:
    return LayerSpec(num_attention_heads=heads, num_key_value_heads=kv, intermediate_size=width)


def spec(layers: tuple[LayerSpec, ...], vocab_size: int) -> ModelSpec:
    """A llama in the shape of SmolLM2-135M."""
    return ModelSpec(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=576,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        flags={"attention_bias": False, "mlp_bias": False},
        layers=layers,
    )


def samples(seed: int, ttft_ms: float, tpot_ms: float) -> tuple[Sample, ...]:
    """Runs around known times, a little slower towards the end, with the odd straggler."""
    draw = np.random.default_rng(seed)
    slope = np.linspace(0.97, 1.03, OUTPUT_TOKENS - 1)
    return tuple(
        Sample(
            ttft_ms=ttft_ms * draw.lognormal(0, 0.03),
            token_ms=tuple((tpot_ms * draw.lognormal(0, 0.015) * slope * draw.lognormal(0, 0.04, slope.size)).tolist()),
        )
        for _ in range(2 * ROUNDS)
    )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of code, quickly read, with text on both sides of the split."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.py").write_text(
            "".join(f"def row_{n}_{k}(value):\n    return value * {k}\n" for k in range(40))
        )
    return folder


@pytest.fixture
def result() -> BenchResult:
    """Dense against a model with a smaller vocabulary, four layers without attention and narrower FFNs."""
    kept = tuple(layer(9 if i % 7 else 0, 3 if i % 7 else 0, 1536 - 64 * (i % 9)) for i in range(27))
    baseline = Side(
        engine="engines/dense",
        spec=spec((layer(),) * 30, 49152),
        bytes_on_disk=538_120_000,
        load_ms=512.0,
        peak_rss_mib=1210.0,
        warmup_runs=2,
        samples=samples(1, 180.0, 21.3),
        perplexity=Perplexity(nll_nats=2500.0, tokens=1000, bytes=4000, documents=3),
    )
    candidate = Side(
        engine="engines/pruned",
        spec=spec(kept, 32768),
        bytes_on_disk=401_300_000,
        load_ms=401.0,
        peak_rss_mib=935.0,
        warmup_runs=3,
        samples=samples(2, 131.0, 16.4),
        perplexity=Perplexity(nll_nats=2600.0, tokens=1100, bytes=4000, documents=3),
    )
    return BenchResult(
        created=datetime(2025, 11, 23, 16, 20, tzinfo=UTC),
        environment={
            "cpu": "AMD EPYC 7B13",
            "logical_cores": 2,
            "physical_cores": 1,
            "memory_gib": 15.6,
            "system": "Linux-6.1-x86_64",
            "load_average_1m": 0.42,
            "versions": {"python": "3.12.4", "onnxruntime": "1.31.0", "numpy": "2.3.1"},
        },
        workload=Workload(prompt_tokens=128, output_tokens=OUTPUT_TOKENS, rounds=ROUNDS, threads=2),
        baseline=baseline,
        candidate=candidate,
    )
