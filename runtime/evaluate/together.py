"""Programs that import of the same packages: many in one sandbox, so that these are imported once.

Each runs in a process of its own, forked after the packages, with its own time, behind the same walls as the others;
it passes if it reaches its end. They share the sandbox's folder and its processes, which is well for code that one has
and reads; what a model wrote runs by ``sandbox.run_all``, each alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .sandbox import SandboxLimits, Verdict, isolation, run_all

#: Programs in one sandbox at most, and seconds for what they import.
CROWD, IMPORT_S = 64, 60.0

#: The first statement of the script's last line: a number whose bits say who passed.
_TOLD = re.compile(r"SystemExit: flabc ([0-9a-f]+)")

_SCRIPT = """
import importlib
import os
import select
import signal

for each in {imports!r}:
    try:
        importlib.import_module(each)
    except BaseException:
        pass  # whoever needs it will say so


def ran(source):
    mine, theirs = os.pipe()
    secret = os.urandom(16)
    child = os.fork()
    if child == 0:
        pid_of, pid, write, leave, message = os.getpid, os.getpid(), os.write, os._exit, b""
        os.setsid()
        os.close(mine)
        try:
            exec(source, {{}})
            message = secret
        except BaseException:
            pass
        if pid_of() == pid:
            write(theirs, message)
        leave(0)
    os.close(theirs)
    said = os.read(mine, 16) if select.select([mine], [], [], {timeout_s})[0] else b""
    for kill in (os.kill, os.killpg):
        try:
            kill(child, signal.SIGKILL)
        except OSError:
            pass
    os.waitpid(child, 0)
    os.close(mine)
    return said == secret


passed = sum(1 << place for place, source in enumerate({programs!r}) if ran(source))
raise SystemExit(f"flabc {{passed:x}}")
"""


def run_together(
    programs: Sequence[str], imports: Sequence[Sequence[str]], limits: SandboxLimits, workers: int | None = None
) -> Iterator[tuple[int, bool]]:
    """Run many programs: (index, whether it passed) as they end.

    A crowd that one of its programs ended is run again, each alone; and so are all where the system lets no program end
    another, as it has to when one takes too long.

    Args:
        programs: Python sources.
        imports: the modules that each imports, of which the outermost packages are imported before: who imports
            ``a.b`` imports ``a`` at first. Only those with the same packages share a sandbox: what a neighbour
            imported would be there too.
        limits: what each may take.
        workers: sandboxes at once; by default as many as there are cores.

    Raises:
        SandboxError: if the walls cannot be built.
    """
    if isolation().level != "namespace":
        yield from ((index, verdict.passed) for index, verdict in run_all(programs, limits, workers))
        return
    alike = defaultdict[tuple[str, ...], list[int]](list)
    for index, names in enumerate(imports):
        alike[_packages(names)].append(index)
    crowds = [indices[at : at + CROWD] for indices in alike.values() for at in range(0, len(indices), CROWD)]
    scripts = [
        _SCRIPT.format(
            imports=_packages(imports[crowd[0]]),
            programs=[programs[index] for index in crowd],
            timeout_s=limits.timeout_s,
        )
        for crowd in crowds
    ]
    whole = limits.model_copy(update={"timeout_s": IMPORT_S + CROWD * limits.timeout_s})
    alone = list[int]()
    for place, verdict in run_all(scripts, whole, workers):
        passed = _told(verdict)
        if passed is None:
            alone += crowds[place]
            continue
        yield from ((index, bool(passed >> number & 1)) for number, index in enumerate(crowds[place]))
    for number, verdict in run_all([programs[index] for index in alone], limits, workers):
        yield alone[number], verdict.passed


def _packages(modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({name.split(".")[0] for name in modules}))


def _told(verdict: Verdict) -> int | None:
    """Who passed, by bits; None if the crowd came to no end."""
    found = _TOLD.fullmatch(verdict.detail)
    return int(found.group(1), 16) if found else None
