"""Peers against our engines on one dense model and this machine, each in an environment of its own.

    flabc export MODEL -o dense && flabc export pruned-checkpoint -o pruned
    python perf/peers.py MODEL --dense dense --pruned pruned --work build/peers

Engines are compared within one precision and one batch only: there they take turns, so that drift hits all alike. All
have the same prompts, threads and count of output tokens, stop tokens ignored. All are opened several times, since two
processes of one engine need not be equally fast. What is in the result already, of the same engines and requirements,
is not measured again; ``--again`` measures those cells anew where something failed. A peer that cannot be installed,
prepared or run is in the result with its error.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flabc.artifact import MANIFEST, Artifact, sha256, write_whole
from flabc.compress.data import corpus
from flabc.console import note
from flabc.errors import EngineError, FlabcError
from flabc.perf import peer_table, peer_worker
from flabc.perf.peer_environments import ENVIRONMENTS, PeerProcess, Peers, tail_of
from flabc.perf.peer_table import PeerCell, PeerSide, PeersResult
from flabc.runtime.backend import Limits
from flabc.runtime.measure.environment import environment
from flabc.runtime.measure.foreign import ForeignLoad
from flabc.runtime.measure.process import Process, opened, warm_up
from flabc.runtime.measure.result import Sample, Workload
from flabc.runtime.measure.roofline import bytes_per_token, measure_roofline
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session
from flabc.spec import ModelSpec

RESULT = Path(__file__).resolve().parent / "results" / "peers.json"

#: The order of the table; fp16 has no kernels on most processors and no peer here.
PRECISIONS = ("fp32", "bf16", "int8", "int4")

#: Seconds before each run: threads of the one before may spin for a while.
REST_S = 0.3


@dataclass(frozen=True)
class Ours:
    """An engine of flabc."""

    folder: Path
    name: str
    role: Literal["dense", "pruned"]

    @property
    def precision(self) -> str:
        """Of what rounds most, by the engine's own receipt."""
        stored = Artifact.open(self.folder, "engine").manifest.receipts["parity"]["stored"]
        bits = [stored[part]["bits"] for part in ("layers", "embedding", "head") if stored[part]]
        return f"int{min(bits)}" if bits else str(stored["compute"])


class Cell:
    """One precision at one batch: every engine is opened, warmed up and run in turns, so many times."""

    def __init__(
        self,
        peers: Peers,
        ours: Sequence[Ours],
        precision: str,
        workload: Workload,
        texts: Sequence[str],
        openings: int = 1,
    ) -> None:
        self.peers, self.precision, self.workload, self.texts = peers, precision, workload, texts
        self.openings = openings
        self.dense = next(each for each in ours if each.role == "dense")
        self.ours = [each for each in ours if each.precision == precision]
        self.sides: dict[str, PeerSide] = {}
        self.samples: dict[str, list[Sample]] = {}
        self.running: dict[str, Process | PeerProcess] = {}

    def asked(self, names: Sequence[str]) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "workload": self.workload.model_dump(),
            "openings": self.openings,
            "ours": {each.name: sha256(each.folder / MANIFEST) for each in self.ours},
            "peers": {name: list(ENVIRONMENTS[name].requirements) for name in names},
        }

    def measure(self, names: Sequence[str]) -> PeerCell:
        """Measure our engines and these peers; who fails once has no figures."""
        prompts, expected = self._greedy()
        foreign: list[float] = []
        for number in range(self.openings):
            with ExitStack() as stack:
                self.running = {}
                for each in self.ours:
                    if self._works(each.name):
                        self._open_ours(each, stack)
                for name in names:
                    if self._works(name):
                        self._open_peer(name, prompts, expected, stack)
                foreign += self._rounds(number)
        done = [
            side if side.error else side.model_copy(update={"samples": tuple(self.samples[name])})
            for name, side in self.sides.items()
        ]
        return PeerCell(
            asked=self.asked(names),
            precision=self.precision,
            sides=tuple(done),
            foreign_cores=tuple(round(cores, 3) for cores in foreign),
            threads=self.workload.threads or 0,
            **self.workload.model_dump(include={"batch", "prompt_tokens", "output_tokens"}),
        )

    def _works(self, name: str) -> bool:
        return name not in self.sides or self.sides[name].error is None

    def _greedy(self) -> tuple[dict[str, list[int]], list[int]]:
        """The prompts' ids, and what our dense engine says behind the first."""
        length = self.workload.prompt_tokens + self.workload.output_tokens
        session = Session.open(self.dense.folder, limits=Limits(max_length=length, threads=self.workload.threads))
        prompts = {text: session.codec.encode_plain(text)[: self.workload.prompt_tokens] for text in self.texts}
        params = SamplingParams(max_tokens=self.workload.output_tokens, ignore_eos=True)
        return prompts, [token.id for token in session.tokens(prompts[self.texts[0]], params)]

    def _open_ours(self, each: Ours, stack: ExitStack) -> None:
        process = stack.enter_context(opened(each.folder, self.workload))
        warm_up(process, self.texts[0], self.workload)
        self.running[each.name] = process
        spec = ModelSpec.model_validate(process.description["spec"])
        self.sides[each.name] = PeerSide(
            name=each.name,
            role=each.role,
            detail=f"{spec.num_parameters / 1e6:.1f} M parameters",
            bytes_per_token=bytes_per_token(each.folder, spec),
        )

    def _open_peer(
        self, name: str, prompts: Mapping[str, Sequence[int]], expected: Sequence[int], stack: ExitStack
    ) -> None:
        note(f"{self.precision}, batch {self.workload.batch}: {name}")
        log_file = self.peers.log(name)
        log = stack.enter_context(log_file.open("a"))
        try:
            process, said = self.peers.started(name, self.precision, self.workload, log, prompts)
            stack.enter_context(closing(process))
            process.run(self.texts[0], self.workload)
            same = _agreeing(process.tokens, expected)
            if self.precision == "fp32" and not same:
                raise EngineError("Its first token is not that of our dense engine: it runs another model.")
            warm_up(process, self.texts[0], self.workload)
        except FlabcError as error:
            self.sides[name] = PeerSide(name=name, role="peer", error=_told(error, log_file))
            return
        self.running[name] = process
        spec = self.peers.spec
        assert spec is not None
        self.sides[name] = PeerSide(
            name=name, role="peer", same_tokens=same, bytes_per_token=_nominal(spec, self.precision), **said
        )

    def _rounds(self, number: int) -> Iterator[float]:
        """Every engine once a round, the order turning round with every round; yields what others used in each."""
        for turn in range(self.workload.rounds):
            order = list(self.running) if turn % 2 == 0 else list(reversed(self.running))
            with ForeignLoad([self.running[name].pid for name in order]) as load_meanwhile:
                for name in order:
                    self._run(name, self.texts[turn % len(self.texts)], number)
            yield load_meanwhile.cores

    def _run(self, name: str, text: str, number: int) -> None:
        """One run; who fails leaves."""
        time.sleep(REST_S)
        try:
            sample = self.running[name].run(text, self.workload)
        except EngineError as error:
            self.sides[name] = self.sides[name].model_copy(update={"error": str(error)})
            del self.running[name]
            return
        self.samples.setdefault(name, []).append(sample.model_copy(update={"opening": number}))


def main() -> None:
    """Measure the cells that are missing, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--name", help="the model's name in the result; by default as it is given")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--dense", nargs="+", type=Path, required=True, help="engines of the model, in any precisions")
    parser.add_argument("--pruned", nargs="*", type=Path, default=[], help="engines of what it was cut to")
    parser.add_argument("--work", type=Path, default=Path("build/peers"), help="where environments and models are made")
    parser.add_argument("--peers", nargs="*", default=list(ENVIRONMENTS), choices=ENVIRONMENTS)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--openings", type=int, default=4, help="how often every engine is opened, at least once")
    parser.add_argument("--rounds", type=int, default=3, help="in each opening")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--again", action="store_true", help="measure cells with errors anew")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.openings < 1:
        parser.error(f"--openings {asked.openings}: expected at least 1")
    ours = [Ours(each, _label("flabc, dense", each, asked.dense), "dense") for each in asked.dense]
    ours += [Ours(each, _label("flabc, pruned", each, asked.pruned), "pruned") for each in asked.pruned]
    peers = Peers(asked.model, asked.work, tie=asked.tie)
    peers.checkpoint()
    result = _read(asked.output, asked.name or asked.model)
    for precision in asked.precisions:
        for batch in asked.batch:
            workload = Workload(batch=batch, **{name: getattr(asked, name) for name in _SAME})
            texts = corpus.prompts("python-stdlib", workload.prompt_tokens, workload.rounds)
            cell = Cell(peers, ours, precision, workload, texts, asked.openings)
            names = [name for name in asked.peers if precision in peer_worker.PEERS[name].precisions]
            before = next((done for done in result.cells if done.asked == cell.asked(names)), None)
            if before and not (asked.again and any(side.error for side in before.sides)):
                continue
            result = _with(result, cell.measure(names))
            write_whole(asked.output, result.model_dump_json(indent=1) + "\n")
    print(peer_table.as_markdown(result))


#: What all cells have in common.
_SAME = ("prompt_tokens", "output_tokens", "rounds", "threads")


def _label(role: str, folder: Path, beside: Sequence[Path]) -> str:
    """A name for people; the folder's too where several have the role."""
    return role if len(beside) == 1 else f"{role} ({folder.name})"


def _read(file: Path, model: str) -> PeersResult:
    """What was measured before; the machine and its limits are those of now."""
    cells = PeersResult.model_validate_json(file.read_text(encoding="utf-8")).cells if file.is_file() else ()
    return PeersResult(model=model, environment=environment(), roofline=measure_roofline(), cells=cells)


def _with(result: PeersResult, cell: PeerCell) -> PeersResult:
    """The result with a cell in the place of the one before, in the order of the table."""
    cells = [each for each in result.cells if (each.precision, each.batch) != (cell.precision, cell.batch)]
    cells.append(cell)
    cells.sort(key=lambda each: (PRECISIONS.index(each.precision), each.batch))
    return result.model_copy(update={"cells": tuple(cells)})


def _nominal(spec: ModelSpec, precision: str) -> int:
    """Bytes of weights that a token reads: all but an input embedding of its own."""
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    return round(spec.bytes_at(precision) * (1 - looked_up / spec.num_parameters))


def _agreeing(tokens: Sequence[int], expected: Sequence[int]) -> int:
    """How many are the same from the first on."""
    pairs = zip(tokens, expected, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(expected))


def _told(error: FlabcError, log: Path) -> str:
    """An error in one line, with the end of the log where the error itself says little."""
    text = " ".join(str(error).split())
    return f"{text} ({tail_of(log)})" if "died" in text or "CalledProcessError" in text else text


if __name__ == "__main__":
    main()
