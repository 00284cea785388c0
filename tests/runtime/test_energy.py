"""Energy by counters that are files, as Linux shows them, and by a GPU's library that is not here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from flabc.runtime.measure.energy import WINDOW_S, Nvml, Rapl, find_counter, measure_energy


def zone(folder: Path, name: str, microjoules: int, most: int = 10**12, domain: str = "package-0") -> Path:
    (folder / name).mkdir()
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "name").write_text(f"{domain}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / name


def test_packages_are_summed_and_their_parts_are_not(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 2_000_000), zone(tmp_path, "intel-rapl:1", 3_000_000)
    zone(tmp_path, "intel-rapl:0:0", 1_500_000)  # the cores of package 0
    zone(tmp_path, "intel-rapl:2", 9_000_000, domain="psys")  # the whole machine, the packages among it
    counter = find_counter(powercap=tmp_path)
    assert isinstance(counter, Rapl)
    assert counter.joules() == pytest.approx(5)


def test_a_counter_that_begins_anew_goes_on(tmp_path: Path) -> None:
    at = zone(tmp_path, "intel-rapl:0", 9_000_000, most=10_000_000)
    counter = find_counter(powercap=tmp_path)
    assert not isinstance(counter, str)
    assert counter.joules() == pytest.approx(9)
    (at / "energy_uj").write_text("1000000")
    assert counter.joules() == pytest.approx(11)
    assert counter.joules() == pytest.approx(11)


def test_without_a_counter_the_reason_is_told(tmp_path: Path) -> None:
    assert "no energy counter" in str(find_counter(powercap=tmp_path))
    (tmp_path / "intel-rapl:0").mkdir()
    assert "RAPL cannot be read" in str(find_counter(powercap=tmp_path))


def test_a_gpu_is_read_by_nvml_or_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert str(find_counter(on_gpu=True)).startswith("NVML cannot be read")
    library = ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})  # type: ignore[attr-defined]
    library.nvmlInit = lambda: None  # type: ignore[attr-defined]
    library.nvmlDeviceGetHandleByIndex = lambda index: ("device", index)  # type: ignore[attr-defined]
    library.nvmlDeviceGetTotalEnergyConsumption = lambda device: 1500 if device == ("device", 0) else 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    counter = find_counter(on_gpu=True)
    assert isinstance(counter, Nvml)
    assert counter.joules() == 1.5

    def no_driver() -> None:
        raise library.NVMLError("Driver Not Loaded")

    library.nvmlInit = no_driver  # type: ignore[attr-defined]
    assert find_counter(on_gpu=True) == "NVML cannot be read: Driver Not Loaded"


class Machine:
    """Uses 10 W when idle and 35 W when at work; its clock moves when it rests or works."""

    name = "test"

    def __init__(self) -> None:
        self.now, self.used = 0.0, 0.0

    def joules(self) -> float:
        return self.used

    def spend(self, seconds: float, watts: float) -> None:
        self.now, self.used = self.now + seconds, self.used + seconds * watts


def test_idle_power_is_taken_off() -> None:
    machine = Machine()

    def work() -> int:
        machine.spend(0.3, 35)
        return 6

    found = measure_energy(machine, work, clock=lambda: machine.now, rest=lambda seconds: machine.spend(seconds, 10))
    assert found.idle_w == pytest.approx(10)
    assert found.joules_per_token == pytest.approx(0.3 * 25 / 6)
    assert found.window_s is not None
    assert found.window_s >= WINDOW_S
    assert (found.counter, found.tokens, found.missing) == ("test", 42, None)
