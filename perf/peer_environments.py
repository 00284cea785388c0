"""The peers' environments and models: installed, prepared by their own tools, opened in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from flabc.compress import checkpoint, load
from flabc.console import note
from flabc.errors import EngineError
from flabc.perf import peer_worker
from flabc.runtime.measure.process import Pipe
from flabc.runtime.measure.result import Sample, Workload
from flabc.spec import ModelSpec

#: Seconds that a peer may take for anything that it is asked.
PATIENCE_S = 1800

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
            "nncf==3.4.0",
            "optimum-intel==2.2.0",
            _TORCH,
        ),
        without=("torchvision",),  # built for CUDA, it breaks transformers beside a torch that is not
    ),
    "torch": Recipe((_TORCH, "transformers==5.23.0")),
}


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
    """The peers, and where what they need lies.

    Args:
        model: whatever ``flabc compress`` takes as a model.
        work: where environments and models are made.
        tie: as for ``flabc compress``.
    """

    def __init__(self, model: str, work: Path, *, tie: bool) -> None:
        self.work, self.tie, self.model = work.absolute(), tie, model
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
        wanted = json.dumps(asdict(recipe))
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
            with self.log(name).open("a") as log, closing(PeerProcess(name, python, log, {})) as process:
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
        raise EngineError(f"{Path(command[0]).name} {' '.join(command[1:4])} failed: {tail_of(log)}")


def tail_of(log: Path) -> str:
    """The end of what was written to a log, on one line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-TAIL:])[-800:]
