"""The GPU suite at work: cell after cell within a budget, everything written down after each."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from flabc import artifact
from flabc.console import note
from flabc.errors import EngineError, FlabcError, MissingExtraError, UsageError
from flabc.frozen import Frozen
from flabc.runtime.measure.decoding import How
from flabc.runtime.measure.device import free_bytes
from flabc.runtime.measure.shape_bench import Machine, Pair, find_machine, make_pair, measure_pair, stored_pair
from flabc.runtime.measure.shape_result import SCHEMA_VERSION, DeviceRoofline, ShapeFigures, ShapeResult
from flabc.spec import ModelSpec

from .gpu_check import check_decoder
from .gpu_plan import Budget, Cell, chosen, foretold_s, planned, specs_of

SUITE, CELLS, ENGINES = "suite.json", "cells", "engines.json"


class CellState(Frozen):
    """What became of a cell."""

    name: str
    status: Literal["measured", "skipped", "failed", "waiting"] = "waiting"
    reason: str | None = None
    figures: ShapeFigures | None = None


class SuiteState(Frozen):
    """The folder's table of contents."""

    schema_version: int = SCHEMA_VERSION
    created: datetime
    environment: dict[str, Any]
    roofline: DeviceRoofline
    check: dict[str, Any]
    budget_s: float
    cells: tuple[CellState, ...] = ()
    engines: str | None = None
    drawings: str | None = None


class Suite:
    """A run of the suite.

    Args:
        folder: of the results.
        asked: the options of ``gpu_suite.py``.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        self._folder, self._asked = folder, asked
        self._budget = Budget(asked["budget"])
        self._energy = not asked["no_energy"]
        self._loaded: tuple[tuple[str, str], Pair] | None = None

    def run(self) -> int:
        """Measure all that the budget holds; how many cells failed.

        Raises:
            UsageError: if there is no GPU and ``--cpu`` was not given.
            ParityError: if the decoder does not say what transformers says.
            EngineError: if the folder holds results of another machine.
        """
        began = time.monotonic()
        cells = self._cells()
        machine = self._machine()
        check = check_decoder(machine.device, graphs=machine.how.graphs, fused=machine.how.fused)
        now = datetime.now(UTC).replace(microsecond=0)
        state = SuiteState(
            created=now,
            environment=machine.environment,
            roofline=machine.roofline,
            check=check,
            budget_s=self._budget.left_s,
            cells=tuple(CellState(name=cell.name) for cell in cells),
        )
        self._same_machine(machine)
        if machine.not_fused:
            note(f"small kernels are not fused: {machine.not_fused}")
        self._budget.spend(time.monotonic() - began)
        for at, cell in enumerate(cells):
            done = self._cell(machine, cell)
            said = f": {done.reason}" if done.reason else ""
            note(f"{cell.name}: {done.status}{said or _told(done)}")
            state = state.model_copy(update={"cells": (*state.cells[:at], done, *state.cells[at + 1 :])})
            self._write(SUITE, state)
        if self._asked["engine"] is not None:
            state = state.model_copy(update={"engines": self._engines(machine)})
            note(f"engines: {state.engines}")
        state = state.model_copy(update={"drawings": self._draw()})
        self._write(SUITE, state)
        return sum(cell.status == "failed" for cell in state.cells)

    def _machine(self) -> Machine:
        if not torch.cuda.is_available() and not self._asked["cpu"]:
            raise UsageError(
                "torch sees no CUDA device.", fix="Install a torch with CUDA; or --cpu, to see that the suite works."
            )
        name = self._asked["dtype"]
        return find_machine(
            getattr(torch, name) if name else None,
            graphs=not self._asked["no_graphs"],
            fused=not self._asked["no_fusing"],
        )

    def _cells(self) -> list[Cell]:
        batches, prompts = self._asked["batch"] or [1, 8, 64], self._asked["prompt_tokens"] or [128]
        if self._asked["model"] is not None:
            pruned = self._asked["pruned"]
            return chosen(
                [(self._asked["model"].name, pruned.name if pruned else self._asked["cut"])], batches, prompts
            )
        if not self._asked["pair"]:
            return planned()
        cells = chosen([_pair(text) for text in self._asked["pair"]], batches, prompts)
        for cell in cells:
            specs_of(cell)  # a wrong name is told before anything is measured
        return cells

    def _cell(self, machine: Machine, cell: Cell) -> CellState:
        kept = self._kept(machine, cell)
        if kept is not None:
            return CellState(name=cell.name, status="measured", figures=kept.figures())
        began = time.monotonic()
        try:
            foretold = self._foretold_s(machine, cell)
            expected = self._budget.expected_s(foretold)
            if expected > self._budget.left_s:
                reason = f"it would take some {expected:.0f} s, and {self._budget.left_s:.0f} s of the budget are left"
                return CellState(name=cell.name, status="skipped", reason=reason)
            result = self._measure(machine, cell)
        except EngineError as error:  # it does not fit into memory
            self._budget.spend(time.monotonic() - began)
            return CellState(name=cell.name, status="skipped", reason=str(error))
        except (FlabcError, RuntimeError) as error:  # torch's own are RuntimeErrors, running out of memory too
            self._loaded = None
            self._budget.spend(time.monotonic() - began)
            return CellState(name=cell.name, status="failed", reason=f"{type(error).__name__}: {error}")
        self._budget.spend(time.monotonic() - began, foretold)
        self._write(f"{CELLS}/{cell.name}.json", result)
        return CellState(name=cell.name, status="measured", figures=result.figures())

    def _foretold_s(self, machine: Machine, cell: Cell) -> float:
        workload = cell.workload(self._asked["output_tokens"], self._asked["rounds"])
        specs, share = self._specs(cell), 1.0
        if machine.device.type == "cuda":
            size = 2 * sum(spec.num_parameters for spec in specs)
            share = min(1.0, 0.6 * torch.cuda.get_device_properties(machine.device).total_memory / size)
        return foretold_s(specs, workload, machine.roofline, share, energy=self._energy)

    def _specs(self, cell: Cell) -> tuple[ModelSpec, ModelSpec]:
        if self._loaded is not None and self._loaded[0] == (cell.shape, cell.cut):
            return self._loaded[1].dense.spec, self._loaded[1].pruned.spec
        if self._asked["model"] is None:
            return specs_of(cell)
        config = json.loads((self._asked["model"] / "config.json").read_text(encoding="utf-8"))
        return (ModelSpec.from_config(config),) * 2  # nearly: the pruned one is smaller

    def _measure(self, machine: Machine, cell: Cell) -> ShapeResult:
        workload = cell.workload(self._asked["output_tokens"], self._asked["rounds"])
        key = (cell.shape, cell.cut)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # before the next, so that both never share the memory
            self._loaded = (key, self._pair(machine, cell))
        return measure_pair(machine, self._loaded[1], workload, energy=self._energy)

    def _pair(self, machine: Machine, cell: Cell) -> Pair:
        if self._asked["model"] is not None:
            return stored_pair(machine, self._asked["model"], cell.cut, self._asked["pruned"])
        return make_pair(machine, cell.shape, cell.cut, layers=self._asked["layers"], cache_share=0.3)

    def _kept(self, machine: Machine, cell: Cell) -> ShapeResult | None:
        """What an earlier run measured in the same way."""
        file = self._folder / CELLS / f"{cell.name}.json"
        if not file.is_file():
            return None
        try:
            result = ShapeResult.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError:
            note(f"{file} is of another version, or damaged: measured again")
            return None
        workload = cell.workload(self._asked["output_tokens"], self._asked["rounds"])
        same = result.workload == workload and How(result.graphs, result.fused) == machine.how
        return result if same and result.dtype == machine.roofline.dtype else None

    def _same_machine(self, machine: Machine) -> None:
        for result in results(self._folder):
            for key in ("cpu", "gpu"):
                if result.environment.get(key) != machine.environment.get(key):
                    raise EngineError(
                        f"{self._folder} holds results of another machine.",
                        expected=str(machine.environment.get(key)),
                        found=str(result.environment.get(key)),
                        fix="Choose another folder.",
                    )

    def _write(self, name: str, record: Frozen) -> None:
        """Whole or not at all, whenever it is stopped."""
        artifact.write_whole(self._folder / name, record.model_dump_json(indent=1) + "\n")

    def _engines(self, machine: Machine) -> str:
        """Measure two engine folders; where the figures are, or why there are none."""
        from .gpu_engines import measure_engines

        self._loaded = None
        free_bytes(machine.device)
        prompts = self._asked["prompt_tokens"] or [128]
        cells = [Cell("", "", batch, prompt) for prompt in prompts for batch in self._asked["batch"] or [1, 8]]
        workloads = [cell.workload(self._asked["output_tokens"], self._asked["rounds"]) for cell in cells]
        dense, pruned = self._asked["engine"]
        try:
            self._write(ENGINES, measure_engines(dense, pruned, workloads, machine.device.type))
        except FlabcError as error:  # a library that is not installed, an engine for another target or device
            return f"none: {error}"
        return ENGINES

    def _draw(self) -> str:
        """Where the drawings are, or why there are none."""
        from .gpu_plots import write_drawings

        try:
            files = write_drawings(list(results(self._folder)), self._folder)
        except MissingExtraError as error:
            return f"none: {error}"
        return ", ".join(file.name for file in files) or "none: nothing was measured"


def results(folder: Path) -> Iterator[ShapeResult]:
    """Every cell that was measured; damaged ones and those of other versions are passed over."""
    for file in sorted((folder / CELLS).glob("*.json")):
        try:
            yield ShapeResult.model_validate_json(file.read_text(encoding="utf-8"))
        except ValidationError:
            continue


def _pair(text: str) -> tuple[str, str]:
    shape, _, cut = text.partition(":")
    if not cut:
        raise UsageError("A pair is a shape and a cut.", expected="llama-2-70b:self-pruner-49b", found=text)
    return shape, cut


def _told(cell: CellState) -> str:
    """A line about what was measured."""
    if cell.figures is None:
        return ""
    found = cell.figures
    label = " (extrapolated)" if found.extrapolated else ""
    dense, pruned = found.tpot_ms
    gained = f"{found.tpot_speedup:.2f}x, {found.conversion:.0%} of what the bytes allow"
    return f", {dense:.2f} → {pruned:.2f} ms a token{label}: {gained}"
