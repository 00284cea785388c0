"""Weights in huge pages: what the kernel says of the memory, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from flabc.runtime import huge_pages
from flabc.runtime.backend import Limits, open_backend
from flabc.runtime.session import Session

MIB = 2**20


def in_huge_pages() -> int:
    """Bytes of this process's own memory in huge pages, as the kernel counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.mark.skipif(not huge_pages.allowed(), reason="this system gives no huge pages")
def test_what_is_in_memory_moves_into_huge_pages_and_stays_the_same() -> None:
    array = np.random.default_rng(0).integers(0, 2**60, 128 * MIB // 8)
    before, total = array.copy(), array.sum()
    if not huge_pages.gather(huge_pages.LEAST):
        pytest.skip("this kernel cannot gather")
    assert in_huge_pages() >= 2 * 120 * MIB
    assert array.sum() == total
    np.testing.assert_array_equal(array, before)


@pytest.mark.skipif(not huge_pages.allowed(), reason="this system gives no huge pages")
def test_memory_that_nobody_has_written_to_stays_unused() -> None:
    huge_pages.gather(huge_pages.LEAST)
    room = np.zeros(1024 * MIB // 8)
    before = psutil.Process().memory_info().rss
    huge_pages.gather(huge_pages.LEAST)
    assert psutil.Process().memory_info().rss - before < 64 * MIB
    assert room[-1] == 0


def test_small_models_and_systems_without_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "never read")
    assert huge_pages.gather(huge_pages.LEAST - 1) == 0
    for said, name in (("always madvise [never]\n", "never"), (None, "none")):
        monkeypatch.setattr(huge_pages, "SETTING", tmp_path / name)
        if said:
            (tmp_path / name).write_text(said)
        assert not huge_pages.allowed()
        assert huge_pages.gather(huge_pages.LEAST) == 0


def test_every_backend_gathers_by_the_size_of_its_weights(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(huge_pages, "gather", asked.append)
    spec = Session.open(tiny_engine).spec
    open_backend("onnxruntime", tiny_engine, spec, Limits())
    assert asked == [(tiny_engine / "model.onnx.data").stat().st_size] * 2
