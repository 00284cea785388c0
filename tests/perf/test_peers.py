"""Peers: the worker's contract with a stand-in, cells in turns, errors kept, a table that says what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flabc import api
from flabc.compress.data import corpus
from flabc.errors import EngineError
from flabc.perf import peer_environments, peer_table, peer_worker, peers
from flabc.perf.peer_environments import Peers
from flabc.perf.peer_table import PeerCell, PeerSide, PeersResult
from flabc.perf.peers import Cell, Ours
from flabc.perf.table import DASH, TIMES
from flabc.runtime.measure.process import Pipe, Process
from flabc.runtime.measure.result import Roofline, Sample, Workload

WORK = Workload(prompt_tokens=8, output_tokens=4, rounds=2, threads=1)
OPENINGS = 2


@pytest.fixture(scope="module")
def measured(
    tiny: Callable[[str], Path], tiny_dense_engine: Path, tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory
) -> PeerCell:
    """A cell with both our engines, torch in this very environment, and a peer that cannot be installed."""
    ours = [Ours(tiny_dense_engine, "dense", "dense"), Ours(tiny_engine, "pruned", "pruned")]
    made = Peers(str(tiny("qwen2-tied")), tmp_path_factory.mktemp("peers"), tie=False)
    made.checkpoint()
    texts = corpus.prompts("python-stdlib", WORK.prompt_tokens, WORK.rounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Peers, "python", _python)
        work = WORK.model_copy(update={"batch": 2})
        return Cell(made, ours, "fp32", work, texts, OPENINGS).measure(["torch", "llama.cpp"])


def _python(_: Peers, name: str) -> Path:
    if name != "torch":
        raise EngineError("This processor lacks avx512_vnni.")
    return Path(sys.executable)


def test_a_peer_says_token_for_token_what_our_dense_engine_says(measured: PeerCell) -> None:
    dense, pruned, torch, missing = measured.sides
    assert [side.role for side in measured.sides] == ["dense", "pruned", "peer", "peer"]
    assert torch.same_tokens == WORK.output_tokens
    assert torch.versions["torch"].startswith("2.")
    for side in (dense, pruned, torch):
        assert [sample.opening for sample in side.samples] == [0, 0, 1, 1]
        assert all(len(sample.token_ms) == WORK.output_tokens - 1 for sample in side.samples)
    assert dense.bytes_per_token == pytest.approx(torch.bytes_per_token, rel=0.1)  # and its tables of angles
    assert pruned.bytes_per_token < torch.bytes_per_token  # type: ignore[operator]
    assert (missing.samples, missing.error) == ((), "This processor lacks avx512_vnni.")


def test_an_error_is_in_the_table(measured: PeerCell) -> None:
    result = PeersResult(
        model="tiny", environment={"cpu": "x"}, roofline=Roofline(bandwidth_gib_s=10, gflops=100), cells=(measured,)
    )
    text = peer_table.as_markdown(result)
    assert "| fp32 | 2 | llama.cpp | failed | - |" in text
    assert "- llama.cpp, fp32: This processor lacks avx512_vnni." in text
    assert "as fast as torch" in text
    assert "medians of 4 runs in turns, every engine opened 2 times" in text
    assert PeersResult.model_validate_json(result.model_dump_json()) == result


def test_the_figures_of_the_table() -> None:
    """Against a calculation by hand: 1 GiB a token at 10 GiB/s is at least 100 ms."""

    def side(name: str, role: Any, ttft: float, tpot: float) -> PeerSide:
        runs = tuple(Sample(ttft_ms=ttft, token_ms=(tpot, tpot)) for _ in range(3))
        return PeerSide(name=name, role=role, bytes_per_token=2**30, samples=runs, same_tokens=3)

    cell = PeerCell(
        asked={},
        precision="fp32",
        batch=8,
        prompt_tokens=100,
        output_tokens=3,
        threads=2,
        sides=(side("ours", "dense", 400, 125), side("slow", "peer", 800, 500), side("quick", "peer", 1000, 250)),
    )
    roofline = Roofline(bandwidth_gib_s=10, gflops=1)
    rows = peer_table.as_markdown(PeersResult(model="m", environment={"cpu": "x"}, roofline=roofline, cells=(cell,)))
    assert "| fp32 | 8 | ours | 2,000 | 64.0 | - | - | 80% | 3/3 |" in rows
    half, quarter, twice = (f"{ratio:.2f}{TIMES} ({ratio:.3f}{DASH}{ratio:.3f})" for ratio in (0.5, 0.25, 2))
    assert f"| fp32 | 8 | slow | 1,000 | 16.0 | {half} | {quarter} | 20% | 3/3 |" in rows
    (line,) = peer_table.against_best(cell)
    assert f"prefill {twice} as fast as slow; decode {twice} as fast as quick" in line


def test_nothing_unlike_is_in_one_cell(tiny_dense_engine: Path, tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    api.export(tiny("qwen2-tied"), tmp_path / "int8", precision="int8")
    both = [Ours(tiny_dense_engine, "a", "dense"), Ours(tmp_path / "int8", "b", "dense")]
    assert [each.precision for each in both] == ["fp32", "int8"]
    made = Peers("x", tmp_path / "work", tie=False)
    assert [each.name for each in Cell(made, both, "int8", WORK, []).ours] == ["b"]
    asked = Cell(made, both, "int8", WORK, []).asked(["torch"])
    assert asked != Cell(made, both, "int8", WORK.model_copy(update={"rounds": 3}), []).asked(["torch"])
    assert asked != Cell(made, both, "fp32", WORK, []).asked(["torch"])
    assert asked != Cell(made, both, "int8", WORK, [], OPENINGS).asked(["torch"])


def test_who_fails_once_is_not_opened_again(
    tiny_dense_engine: Path, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of ours too: else it would have other openings than those it is compared with."""
    opened: list[str] = []
    true, run = Cell._open_ours, Process.run

    def open_ours(cell: Cell, each: Ours, stack: Any) -> None:
        opened.append(each.name)
        true(cell, each, stack)

    def failing(process: Process, text: str, workload: Workload) -> Sample:
        if process.folder == tiny_engine and "pruned" in cell.samples:
            raise EngineError("It broke.")
        return run(process, text, workload)

    monkeypatch.setattr(Cell, "_open_ours", open_ours)
    monkeypatch.setattr(Process, "run", failing)
    ours = [Ours(tiny_dense_engine, "dense", "dense"), Ours(tiny_engine, "pruned", "pruned")]
    texts = corpus.prompts("python-stdlib", WORK.prompt_tokens, WORK.rounds)
    cell = Cell(Peers("x", tmp_path, tie=False), ours, "fp32", WORK, texts, OPENINGS)
    dense, pruned = cell.measure([]).sides
    assert opened == ["dense", "pruned", "dense"]
    assert [sample.opening for sample in dense.samples] == [0, 0, 1, 1]
    assert (pruned.samples, pruned.error) == ((), "It broke.")


class Fake(peer_worker.Peer):
    """Makes one token less than asked, or hides its time."""

    def __init__(self, tokens: int, shown_ms: float) -> None:
        self.tokens, self.shown_ms = tokens, shown_ms

    def run(self, prompts: peer_worker.Rows, count: int) -> tuple[list[float], peer_worker.Rows]:
        return [self.shown_ms] * self.tokens, [[1] * len(prompts)] * self.tokens


@pytest.mark.parametrize(("tokens", "shown_ms", "problem"), [(3, 0.0, "not 3 of"), (4, 100.0, "the run took")])
def test_a_run_that_is_not_what_was_asked_is_refused(tokens: int, shown_ms: float, problem: str) -> None:
    worker = peer_worker.Worker("torch")
    worker.peer = Fake(tokens, shown_ms)
    with pytest.raises(RuntimeError, match=problem):
        worker.generate([[1, 2], [1, 2]], 4)


def test_what_libraries_print_is_no_reply(tmp_path: Path) -> None:
    """The worker's own program, with a peer that prints; an error is told and the process goes on."""
    program = tmp_path / "noisy.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(Path(peer_worker.__file__).parent)!r})\n"
        "import peer_worker as w\n"
        "class Noisy(w.Peer):\n"
        "    precisions = {'fp32': 'noise'}\n"
        "    def __init__(self, *_): print('loading'); import os; os.system('echo from a child')\n"
        "    def steps(self, prompts, count):\n"
        "        for _ in range(count): print('token'); yield [7] * len(prompts)\n"
        "w.PEERS['torch'] = Noisy\n"
        "w.main()\n"
    )
    with (tmp_path / "log").open("w") as log:
        pipe = Pipe([sys.executable, str(program), "torch"], "noisy", log)
        said = pipe.call("open", folder="x", precision="fp32", max_length=1, max_batch=1, threads=1)
        assert said["detail"] == "noise"
        with pytest.raises(EngineError, match="noisy: TypeError"):
            pipe.call("prepare")
        assert pipe.call("generate", prompts=[[1], [1]], output_tokens=2)["tokens"] == [[7, 7], [7, 7]]
        pipe.close()
    assert "from a child" in (tmp_path / "log").read_text()


def test_every_peer_has_an_environment_and_says_its_precisions() -> None:
    assert set(peers.ENVIRONMENTS) == set(peer_worker.PEERS)
    for kind in peer_worker.PEERS.values():
        assert set(kind.precisions) <= set(peers.PRECISIONS)


def test_old_readers_find_the_rotary_base(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}))
    peer_environments._for_older_readers(file)
    assert json.loads(file.read_text())["rope_theta"] == 1e6
