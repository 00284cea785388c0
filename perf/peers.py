"""Peers against our engines on one dense model and this machine, each in an environment of its own.

    flabc export MODEL -o dense && flabc export pruned-checkpoint -o pruned
    python perf/peers.py MODEL --dense dense --pruned pruned --work build/peers

Engines are compared within one precision and one batch only: there they take turns, so that drift hits all alike. All
have the same prompts, threads and count of output tokens, stop tokens ignored. What is in the result already, of the
same engines and requirements, is not measured again; ``--again`` measures those cells anew where something failed. A
peer that cannot be installed, prepared or run is in the result with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from flabc.artifact import MANIFEST, Artifact, sha256
from flabc.compress import checkpoint, load
from flabc.compress.data import corpus
from flabc.console import note
from flabc.errors import EngineError, FlabcError, UsageError
from flabc.perf import peer_table, peer_worker
from flabc.perf.peer_table import PeerCell, PeerSide, PeersResult
from flabc.runtime.backend import Limits
from flabc.runtime.measure.environment import environment
from flabc.runtime.measure.foreign import ForeignLoad
from flabc.runtime.measure.process import Pipe, Process, warm_up
from flabc.runtime.measure.result import Sample, Workload
from flabc.runtime.measure.roofline import bytes_per_token, measure_roofline
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session
from flabc.spec import ModelSpec

RESULT = Path(__file__).resolve().parent / "results" / "peers.json"

#: The order of the table; fp16 has no kernels on most processors and no peer here.
PRECISIONS = ("fp32", "bf16", "int8", "int4")

#: Seconds that a peer may take for anything that it is asked.
PATIENCE_S = 1800

#: Seconds before each run: threads of the one before may spin for a while.
REST_S = 0.3

P = TypeVar("P", bound=Pipe)

#: Lines of a log that tell why something failed.
TAIL = 6


@dataclass(frozen=True)
class Recipe:
    """How a peer's environment is made.

    Args:
        requirements: for pip.
        options: further ones of pip.
        variables: set while it is built.
        flags: what the processor must have, as Linux calls it.
        without: packages that are taken out again.
    """

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


_TORCH = "torch==2.13.0"
_LLAMA_CPU = ("AVX2", "FMA", "F16C", "AVX512", "AVX512_VNNI")

ENVIRONMENTS = {
    "onnxruntime-genai": Recipe(
        (
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.32.0",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
            _TORCH,
            "transformers==5.23.0",
        )
    ),
    "optimum-onnx": Recipe(("optimum-onnx[onnxruntime]==0.1.0", _TORCH)),
    "llama.cpp": Recipe(
        ("llama-cpp-python==0.3.36",),
        ("--no-binary", "llama-cpp-python"),
        {"CMAKE_ARGS": " ".join(["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in _LLAMA_CPU)])},
        ("avx2", "fma", "f16c", "avx512f", "avx512_vnni"),
    ),
    "openvino": Recipe(
        (
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "nncf==3.4.0",
            "optimum-intel==2.2.0",
            _TORCH,
        ),
        without=("torchvision",),  # built for CUDA, it breaks transformers beside a torch that is not
    ),
    "torch": Recipe((_TORCH, "transformers==5.23.0")),
}


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


class PeerProcess(Pipe):
    """A peer in its environment.

    Args:
        name: a key of ``ENVIRONMENTS``.
        python: the environment's interpreter.
        log: where it writes.
        prompts: token ids by text, as our dense engine has them.
    """

    def __init__(self, name: str, python: Path, log: IO[str], prompts: Mapping[str, Sequence[int]]) -> None:
        super().__init__([str(python), peer_worker.__file__, name], name, log)
        self._prompts = prompts
        #: The tokens of the first row of the last run.
        self.tokens: list[int] = []

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """As ``Pipe.call``; whoever does not answer for too long is killed."""
        watch = threading.Timer(PATIENCE_S, self.kill)
        watch.start()
        try:
            return super().call(name, **arguments)
        finally:
            watch.cancel()

    def run(self, text: str, workload: Workload) -> Sample:
        """One timed run, all rows of a batch alike."""
        rows = [list(self._prompts[text][: workload.prompt_tokens])] * workload.batch
        reply = self.call("generate", prompts=rows, output_tokens=workload.output_tokens)
        made = reply.pop("tokens")
        self.tokens = [step[0] for step in made]
        return Sample.model_validate(reply)


class Peers:
    """Everything that is measured, and where it lies.

    Args:
        model: whatever ``flabc compress`` takes as a model.
        ours: engines of it and of what it was cut to.
        work: where environments and models are made.
        tie: as for ``flabc compress``.
    """

    def __init__(self, model: str, ours: Sequence[Ours], work: Path, *, tie: bool) -> None:
        self.ours, self.work, self.tie, self.model = ours, work.absolute(), tie, model
        self.work.mkdir(parents=True, exist_ok=True)
        self.spec: ModelSpec | None = None

    def python(self, name: str) -> Path:
        """The interpreter of a peer's environment, which is made if it is not there.

        Raises:
            EngineError: if it cannot be.
        """
        recipe, folder = ENVIRONMENTS[name], self.work / "environments" / name
        stamp, python = folder / "requirements.json", folder / "bin" / "python"
        lacking = set(recipe.flags) - _processor_flags()
        if lacking:
            raise EngineError(f"This processor lacks {', '.join(sorted(lacking))}.")
        wanted = json.dumps([recipe.requirements, recipe.options, dict(recipe.variables)])
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return python
        note(f"installing {name} into {folder}")
        _logged([sys.executable, "-m", "venv", str(folder)], self.log(name), {})
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *recipe.options]
        _logged([*install, *recipe.requirements], self.log(name), recipe.variables)
        if recipe.without:
            _logged([str(python), "-m", "pip", "uninstall", "--yes", *recipe.without], self.log(name), {})
        stamp.write_text(wanted, encoding="utf-8")
        return python

    def log(self, name: str) -> Path:
        """Where a peer's libraries write."""
        return self.work / f"{name}.log"

    def checkpoint(self) -> Path:
        """The dense model as a Hugging Face folder, which every peer starts from."""
        folder = self.work / "checkpoint"
        if not (folder / "config.json").is_file():
            folder.mkdir(exist_ok=True)
            checkpoint.write(load.load(self.model, tie=self.tie), folder)
            _for_older_readers(folder / "config.json")
        self.spec = ModelSpec.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        return folder

    def gguf(self) -> Path:
        """The same as a float32 GGUF."""
        folder = self.work / "gguf"
        if not folder.is_dir():
            asked = ["export", str(self.checkpoint()), "--target", "gguf", "--precision", "fp32", "-o", str(folder)]
            _logged([sys.executable, "-m", "flabc", *asked], self.log("gguf"), {})
        return folder / "model.gguf"

    def prepared(self, name: str, precision: str) -> Path:
        """The folder that a peer loads.

        Raises:
            EngineError: if it cannot be made.
        """
        python, folder = self.python(name), self.work / "models" / f"{name}-{precision}"
        if name == "torch":
            return self.checkpoint()
        stamp = folder / "prepared"
        if not stamp.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            gguf = str(self.gguf()) if name == "llama.cpp" else ""
            note(f"preparing {name}, {precision}")
            with self.log(name).open("a") as log, _open(PeerProcess(name, python, log, {})) as process:
                process.call("prepare", model=str(self.checkpoint()), gguf=gguf, out=str(folder), precision=precision)
            stamp.touch()
        return folder

    def started(
        self, name: str, precision: str, workload: Workload, log: IO[str], prompts: Mapping[str, Sequence[int]]
    ) -> tuple[PeerProcess, dict[str, Any]]:
        """A peer that has loaded its model, and what it says of itself."""
        folder = self.prepared(name, precision)
        process = PeerProcess(name, self.python(name), log, prompts)
        try:
            room = {"max_length": workload.prompt_tokens + workload.output_tokens, "max_batch": workload.batch}
            said = process.call("open", folder=str(folder), precision=precision, threads=workload.threads, **room)
        except EngineError:
            process.close()
            raise
        return process, said


class Cell:
    """One precision at one batch: every engine is opened, warmed up and run in turns."""

    def __init__(self, peers: Peers, precision: str, workload: Workload, texts: Sequence[str]) -> None:
        self.peers, self.precision, self.workload, self.texts = peers, precision, workload, texts
        self.ours = [each for each in peers.ours if each.precision == precision]
        self.sides: dict[str, PeerSide] = {}
        self.running: dict[str, Process | PeerProcess] = {}

    def asked(self, names: Sequence[str]) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "workload": self.workload.model_dump(),
            "ours": {each.name: sha256(each.folder / MANIFEST) for each in self.ours},
            "peers": {name: list(ENVIRONMENTS[name].requirements) for name in names},
        }

    def measure(self, names: Sequence[str]) -> PeerCell:
        """Measure our engines and these peers."""
        dense = next(each for each in self.peers.ours if each.role == "dense")
        prompts, expected = self._greedy(dense)
        with ExitStack() as stack:
            for each in self.ours:
                self._open_ours(each, stack)
            for name in names:
                self._open_peer(name, prompts, expected, stack)
            foreign, samples = self._rounds()
        done = [side.model_copy(update={"samples": tuple(samples.get(name, ()))}) for name, side in self.sides.items()]
        return PeerCell(
            asked=self.asked(names),
            precision=self.precision,
            sides=tuple(done),
            foreign_cores=tuple(round(cores, 3) for cores in foreign),
            threads=self.workload.threads or 0,
            **self.workload.model_dump(include={"batch", "prompt_tokens", "output_tokens"}),
        )

    def _greedy(self, dense: Ours) -> tuple[dict[str, list[int]], list[int]]:
        """The prompts' ids, and what our dense engine says behind the first."""
        length = self.workload.prompt_tokens + self.workload.output_tokens
        session = Session.open(dense.folder, limits=Limits(max_length=length, threads=self.workload.threads))
        prompts = {text: session.codec.encode_plain(text)[: self.workload.prompt_tokens] for text in self.texts}
        params = SamplingParams(max_tokens=self.workload.output_tokens, ignore_eos=True)
        return prompts, [token.id for token in session.tokens(prompts[self.texts[0]], params)]

    def _open_ours(self, each: Ours, stack: ExitStack) -> None:
        process = stack.enter_context(_open(Process(each.folder, self.workload)))
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
            stack.enter_context(_open(process))
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

    def _rounds(self) -> tuple[list[float], dict[str, list[Sample]]]:
        """Every engine once a round, the order turning round with every round; who fails leaves."""
        foreign: list[float] = []
        samples: dict[str, list[Sample]] = {name: [] for name in self.running}
        for turn in range(self.workload.rounds):
            order = list(samples) if turn % 2 == 0 else list(reversed(samples))
            pids = [self.running[name].pid for name in order]
            text = self.texts[turn % len(self.texts)]
            with ForeignLoad(pids) as load_meanwhile:
                failed = [name for name in order if not self._run(name, text, samples[name])]
            foreign.append(load_meanwhile.cores)
            for name in failed:
                del samples[name]
        return foreign, samples

    def _run(self, name: str, text: str, samples: list[Sample]) -> bool:
        time.sleep(REST_S)
        try:
            samples.append(self.running[name].run(text, self.workload))
        except EngineError as error:
            self.sides[name] = self.sides[name].model_copy(update={"error": str(error)})
            return False
        return True


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
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--again", action="store_true", help="measure cells with errors anew")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    ours = [Ours(each, _label("flabc, dense", each, asked.dense), "dense") for each in asked.dense]
    ours += [Ours(each, _label("flabc, pruned", each, asked.pruned), "pruned") for each in asked.pruned]
    peers = Peers(asked.model, ours, asked.work, tie=asked.tie)
    peers.checkpoint()
    result = _read(asked.output, asked.name or asked.model)
    for precision in asked.precisions:
        for batch in asked.batch:
            workload = Workload(batch=batch, **{name: getattr(asked, name) for name in _SAME})
            cell = Cell(peers, precision, workload, _texts(workload))
            names = [name for name in asked.peers if precision in peer_worker.PEERS[name].precisions]
            before = next((done for done in result.cells if done.asked == cell.asked(names)), None)
            if before and not (asked.again and any(side.error for side in before.sides)):
                continue
            result = _with(result, cell.measure(names))
            _save(result, asked.output)
    print(peer_table.as_markdown(result))


#: What all cells have in common.
_SAME = ("prompt_tokens", "output_tokens", "rounds", "threads")


def _label(role: str, folder: Path, beside: Sequence[Path]) -> str:
    """A name for people; the folder's too where several have the role."""
    return role if len(beside) == 1 else f"{role} ({folder.name})"


def _texts(workload: Workload) -> list[str]:
    """Held-out texts, one for each round; the same for everyone."""
    documents = corpus.load("python-stdlib", "heldout")
    long = [each.text[: 12 * workload.prompt_tokens] for each in documents]
    found = [text for text in long if len(text) == 12 * workload.prompt_tokens][: workload.rounds]
    if not found:
        raise UsageError(f"No held-out text is long enough for a prompt of {workload.prompt_tokens} tokens.")
    return found


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


def _save(result: PeersResult, file: Path) -> None:
    """Write the result; what was there stays until the new one is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def _nominal(spec: ModelSpec, precision: str) -> int:
    """Bytes of weights that a token reads: all but an input embedding of its own."""
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    return round(spec.bytes_at(precision) * (1 - looked_up / spec.num_parameters))


def _agreeing(tokens: Sequence[int], expected: Sequence[int]) -> int:
    """How many are the same from the first on."""
    pairs = zip(tokens, expected, strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), len(expected))


def _for_older_readers(file: Path) -> None:
    """Say what transformers 5 calls ``rope_parameters`` in the words of version 4 too, or it takes its default."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _logged(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
    """Run a command.

    Raises:
        EngineError: with the end of what it wrote, if it fails.
    """
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | dict(variables))
    if done.returncode:
        raise EngineError(f"{Path(command[0]).name} {' '.join(command[1:4])} failed: {_tail(log)}")


def _told(error: FlabcError, log: Path) -> str:
    """An error in one line, with the end of the log where the error itself says little."""
    text = " ".join(str(error).split())
    return f"{text} ({_tail(log)})" if "died" in text or "CalledProcessError" in text else text


def _tail(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-TAIL:])[-800:]


@contextmanager
def _open(process: P) -> Iterator[P]:
    """A process for as long as it is needed."""
    try:
        yield process
    finally:
        process.close()


if __name__ == "__main__":
    main()
