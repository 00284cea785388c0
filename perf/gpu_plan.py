"""What the GPU suite measures, by importance, and how long each cell will take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from flabc.runtime.measure.result import Workload
from flabc.runtime.measure.shape_result import DeviceRoofline
from flabc.runtime.measure.shapes import cut_named, cut_shape, shape_named
from flabc.spec import ModelSpec

#: The pairs of the goal, then those that show that layers may differ, then those of another family.
GOAL = (("llama-2-70b", "self-pruner-49b"), ("llama-2-70b", "self-pruner-35b"))
FLAB = (("qwen2.5-coder-7b", "flab-22"), ("qwen2.5-coder-1.5b", "flab-22"), ("codellama-7b", "flab-22"))
UNEVEN = (("llama-2-70b", "self-pruner-49b-uneven"), ("llama-2-70b", "self-pruner-35b-uneven"))

#: Pairs, batches and lengths of prompts; what comes first is measured first.
TIERS: tuple[tuple[tuple[tuple[str, str], ...], tuple[int, ...], tuple[int, ...]], ...] = (
    ((*GOAL, *FLAB), (1,), (128,)),
    (UNEVEN, (1,), (128,)),
    ((*GOAL, *FLAB), (8, 64), (128,)),
    ((*GOAL, *FLAB), (1,), (1024, 4096)),
    ((*GOAL, *FLAB), (2, 4, 16, 32), (128,)),
    ((*GOAL, *FLAB), (1,), (512, 2048)),
    ((*GOAL, *FLAB), (16,), (1024,)),
    (UNEVEN, (8, 64), (128,)),
)

#: Of the roofline, what is reckoned with before anything was measured.
REACHED = 0.5

#: Runs of each side beside its rounds: warming up. Seconds that capturing graphs and filling memory take.
WARMUPS, PREPARING_S = 3, 4.0

#: Seconds that reading energy takes of each side: idle, and at least so long at work.
ENERGY_S = 4.0


@dataclass(frozen=True)
class Cell:
    """One pair at one workload."""

    shape: str
    cut: str
    batch: int
    prompt_tokens: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.shape}.{self.cut}.b{self.batch}.p{self.prompt_tokens}"

    def workload(self, output_tokens: int, rounds: int) -> Workload:
        """What each run does."""
        shape = {"prompt_tokens": self.prompt_tokens, "batch": self.batch}
        return Workload(**shape, output_tokens=output_tokens, rounds=rounds)


def planned() -> list[Cell]:
    """All cells, the most important first; within a tier those of a pair together, so that it is loaded once."""
    return list(dict.fromkeys(_tiers()))


def _tiers() -> Iterator[Cell]:
    for pairs, batches, prompts in TIERS:
        for shape, cut in pairs:
            yield from (Cell(shape, cut, batch, prompt) for batch in batches for prompt in prompts)


def chosen(pairs: Sequence[tuple[str, str]], batches: Sequence[int], prompts: Sequence[int]) -> list[Cell]:
    """The cells of some pairs, in the order given."""
    return [Cell(*pair, batch, prompt) for pair in pairs for batch in batches for prompt in prompts]


def foretold_s(
    specs: tuple[ModelSpec, ModelSpec], workload: Workload, roofline: DeviceRoofline, share: float, *, energy: bool
) -> float:
    """Seconds that a cell will take, from bytes and operations.

    Args:
        specs: dense and pruned, whole.
        workload: what each run does.
        roofline: what the device can do.
        share: of the layers, how many are measured.
        energy: whether it is read.
    """
    runs = WARMUPS + 2 * workload.rounds
    return PREPARING_S + sum(
        runs * (one := share * _run_s(spec, workload, roofline)) + energy * (ENERGY_S + one) for spec in specs
    )


def _run_s(spec: ModelSpec, workload: Workload, roofline: DeviceRoofline) -> float:
    size = 4 if roofline.dtype == "float32" else 2
    held = workload.batch * (workload.prompt_tokens + workload.output_tokens) * spec.kv_bytes_per_token(size)
    step_s = (size * spec.num_parameters + held) / 2**30 / roofline.bandwidth_gib_s
    operations = spec.flops_per_token(workload.prompt_tokens) * workload.batch / 1e9 / roofline.gflops
    return (workload.prompt_tokens * operations + workload.output_tokens * max(step_s, operations)) / REACHED


class Budget:
    """Seconds that may be spent, and what cells took against what was foretold."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._ratios: list[float] = []

    @property
    def left_s(self) -> float:
        """What is left."""
        return max(self._left, 0.0)

    def expected_s(self, foretold: float) -> float:
        """What a cell will take, by what others took: never reckoned to be faster than half of what was foretold."""
        return foretold * (max(median(self._ratios), 0.5) if self._ratios else 1.0)

    def spend(self, seconds: float, foretold: float | None = None) -> None:
        """Say what was spent, on a cell or else."""
        self._left -= seconds
        if foretold:
            self._ratios.append(seconds / foretold)


def specs_of(cell: Cell) -> tuple[ModelSpec, ModelSpec]:
    """Both shapes of a cell.

    Raises:
        UnknownNameError: if shape or cut has no such name.
        UsageError: if the shape cannot be cut so.
    """
    dense = shape_named(cell.shape)
    return dense, cut_shape(dense, cut_named(cell.cut))
