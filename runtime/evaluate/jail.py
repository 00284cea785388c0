"""The child's side of the sandbox: builds the walls, runs one program inside, tells how it ended.

A script of nothing but the standard library that reads one JSON object from stdin and writes one to stdout. The
supervisor stays outside and keeps the time; in namespaces, ``init`` is process 1, with which the kernel ends all
others; the worker drops every privilege and runs the program. It starts anew for every program, so it imports little.

Sources: the man pages namespaces(7), pivot_root(2), mount_setattr(2), capabilities(7), seccomp(2), prctl(2).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from contextlib import suppress

TYPE_CHECKING = False  # the module typing would cost milliseconds
if TYPE_CHECKING:
    from typing import Any, NoReturn

#: Seconds between two looks at a program, and for all that is not the program: a busy machine builds walls slowly.
POLL_S, GRACE_S = 0.003, 30.0
#: What a namespace shows of the system; links stay links. Nix and Guix keep an interpreter's libraries in a store.
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/gnu/store")
PREFIXES = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
#: The only folder in there that can be written, other names of it, and where the old root is while it is needed.
SCRATCH, ALIASES, OLD = "/sandbox", ("/tmp", "/dev/shm"), "/.old"

LINUX = sys.platform == "linux"
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 8, 36, 38
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_ADMIN = 0, 1, 2, 5, 6, 7, 21

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes) -> None:
    """A function of libc that returns 0, or else raises OSError."""
    if getattr(libc, name)(*(ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, value: int, more: int = 0) -> None:
    """The system call of that name."""
    call("prctl", option, value, more, 0, 0)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """The system call of that name."""
    call("mount", os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode())


def kernel_file(path: str, text: str | None = None) -> str:
    """Read a file of the kernel's, or write it."""
    with open(path, "r" if text is None else "w", encoding="utf-8", errors="replace") as file:
        return file.read() if text is None else str(file.write(text))


class Board:
    """Memory that supervisor and worker share: when the program began, and how it ended.

    Not a pipe: a program may close every file. Nor can it write here by accident: a secret comes before the message.
    """

    def __init__(self, size: int) -> None:
        self.memory, self.secret = mmap.mmap(-1, size), os.urandom(16)
        self.room = size - 8 - len(self.secret)

    @property
    def began(self) -> float:
        """When the program began, on the monotonic clock; 0 if it has not."""
        return float(struct.unpack_from("d", self.memory)[0])

    def write(self, message: bytes) -> None:
        """Leave the message; no name is looked up that a program could have changed."""
        self.memory.seek(8)
        self.memory.write(self.secret + message[: self.room])

    def read(self) -> tuple[str, str]:
        """A word and an explanation; empty if nothing was written."""
        _, secret, message = self.memory[8:].rstrip(b"\0").rpartition(self.secret)
        word, _, rest = message.decode("utf-8", "replace").partition(" ") if secret else ("", "", "")
        return word, rest


def capable(*needed: int) -> bool:
    """Whether this process has these capabilities."""
    held = int(kernel_file("/proc/self/status").partition("CapEff:")[2].split()[0], 16)
    return all(held >> each & 1 for each in needed)


def spare_identity(inside: bool) -> tuple[int, int] | None:
    """A user and a group that nobody else has, if this is root: the kernel then counts its processes alone."""
    needed = (CAP_SETUID, CAP_SETGID, CAP_KILL) + ((CAP_SYS_ADMIN,) if inside else (CAP_CHOWN, CAP_DAC_OVERRIDE))
    if not LINUX or os.geteuid() != 0 or not capable(*needed):
        return None
    user, group = _spare_id("uid_map"), _spare_id("gid_map")
    return (user, group) if user and group else None


def _spare_id(kind: str) -> int:
    """From the upper half of the largest range of ids here, where no system hands them out; 0 if there is only root."""
    ranges = (line.split() for line in kernel_file(f"/proc/self/{kind}").splitlines())
    count, first = max((min(int(count), 2**31), int(first)) for first, _, count in ranges)
    return first + count - 1 - os.getpid() % max(count // 2, 1)


def enter_namespaces(identity: tuple[int, int] | None) -> None:
    """Leave the outside's network, mounts, processes and, if this is not root, users."""
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    call("unshare", flags if identity else flags | CLONE_NEWUSER)
    if not identity:
        kernel_file("/proc/self/setgroups", "deny")
        kernel_file("/proc/self/uid_map", f"{user} {user} 1")
        kernel_file("/proc/self/gid_map", f"{group} {group} 1")


def build_root(scratch_mib: int) -> None:
    """A root that holds the interpreter, read-only, a few devices, and one small folder that can be written."""
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    wanted = {each for path in (*SYSTEM, *PREFIXES, *DEVICES) for each in (path, os.path.realpath(path))}
    real = {path: os.path.realpath(path) for path in sorted(wanted, key=len) if os.path.exists(path)}  # parents first
    os.umask(0o022)  # whoever has no privileges must get through
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    os.mkdir("/tmp" + OLD)
    call("syscall", PIVOT_ROOT.get(os.uname().machine, -1), b"/tmp", os.fsencode("/tmp" + OLD))
    os.chdir("/")
    for path, target in links.items():
        os.symlink(target, path)
    for path, source in real.items():
        if not os.path.lexists(path):
            _show(OLD + source, path)
    _add_scratch(scratch_mib)
    call("umount2", os.fsencode(OLD), MNT_DETACH)
    os.rmdir(OLD)
    mount("none", "/", flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _show(source: str, path: str) -> None:
    """Show a device, or, read-only, a folder with all that is mounted in it."""
    if path in DEVICES:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(source, path, flags=MS_BIND)
        return
    os.makedirs(path)
    mount(source, path, flags=MS_BIND | MS_REC)
    attributes = struct.pack("4Q", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, os.fsencode(path), AT_RECURSIVE, attributes, len(attributes))


def _add_scratch(mib: int) -> None:
    os.mkdir(SCRATCH)
    mount("tmpfs", SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, f"size={mib}m,nr_inodes=4k,mode=1777")
    for alias in ALIASES:
        if not os.path.lexists(alias):  # the interpreter may live below it
            os.symlink(SCRATCH, alias)
    os.chdir(SCRATCH)


def set_capabilities(held: int) -> None:
    """Hold these capabilities (all below 32) and no others."""
    version_3 = struct.pack("Ii", 0x20080522, 0)
    call("capset", version_3, struct.pack("6I", held, held, 0, 0, 0, 0))


def drop_privileges(identity: tuple[int, int] | None) -> None:
    """Become nobody, for good, without capabilities; but one to read if the interpreter is for root's eyes only."""
    if identity:
        user, group = identity
        with suppress(PermissionError):
            os.setgroups([])
        os.setresgid(group, group, group)
        prctl(PR_SET_KEEPCAPS, 1)
        os.setresuid(user, user, user)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    legible = all(os.access(path, os.R_OK) for path in (os.__file__, *PREFIXES))
    set_capabilities(0 if legible or not identity else 1 << CAP_DAC_READ_SEARCH)


def filter_calls(rules: list[tuple[int, int, int, int]]) -> None:
    """Install a seccomp filter; a negative operand stands for the id of this process."""
    if not rules:
        return
    code = b"".join(struct.pack("HBBI", *rule[:3], rule[3] if rule[3] >= 0 else os.getpid()) for rule in rules)
    packed = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(packed)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program))


def limit(bounds: dict[str, tuple[int, int]]) -> None:
    """Set soft and hard limits by the names of setrlimit(2), as far as they may still be set."""
    unsupported = () if LINUX else (OSError, ValueError)
    for name, (soft, hard) in bounds.items():
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]
        most = hard if most == resource.RLIM_INFINITY else min(most, hard)
        with suppress(*unsupported):
            resource.setrlimit(kind, (min(soft, most), most))


def describe(error: BaseException, program: str, kind: type[type] = type, text: type[str] = str) -> bytes:
    """What was raised, and by which line if it says nothing more; defaults because names can be taken away."""
    line, trace = 0, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<string>" else line
        trace = trace.tb_next
    why = text(error) or (program.splitlines()[line - 1].strip() if line else "")
    return f"{kind(error).__name__}: {why}".rstrip(": ").encode("utf-8", "replace")


def perform(program: str, board: Board) -> NoReturn:
    """Run a program to its end and leave a message; a process that the program forked leaves none."""
    anything, leave, pid_of, pid, message = BaseException, os._exit, os.getpid, os.getpid(), b"passed"
    struct.pack_into("d", board.memory, 0, time.monotonic())
    try:
        exec(program, {})
    except anything as error:  # whatever ends a program early, it did not pass
        try:
            message = b"failed " + describe(error, program)
        except anything:
            message = b"failed an error that cannot be shown"
    if pid_of() == pid:
        board.write(message)
    leave(0)


def work(job: dict[str, Any], board: Board, identity: tuple[int, int] | None) -> NoReturn:
    """The worker: every way out closed, then the program."""
    try:
        if identity and not job["inside"]:
            os.chown(".", *identity)
        if LINUX:
            drop_privileges(identity)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        limit(job["bounds"])
        filter_calls(job["filter"])
        os.environ.pop("LD_LIBRARY_PATH", None)
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    except (OSError, ValueError) as error:
        board.write(f"broken {error}".encode())
        os._exit(1)
    perform(job["program"], board)


def init(job: dict[str, Any], board: Board, identity: tuple[int, int] | None) -> NoReturn:
    """Process 1 of the namespace: dies with the supervisor, and takes all others with it when the worker is done."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))  # in case the supervisor was dead by then
    signal.setitimer(signal.ITIMER_REAL, job["timeout_s"] + 3 * GRACE_S)
    try:
        build_root(job["scratch_mib"])
    except OSError as error:
        board.write(f"broken {error}".encode())
        os._exit(1)
    worker = os.fork()
    if worker == 0:
        os.setsid()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        work(job, board, identity)
    set_capabilities(0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # for process 1, that is to ignore it
    while True:
        ended, status = os.wait()
        if ended == worker:
            os._exit(code_of(status))


def code_of(status: int) -> int:
    """An exit code as a shell has it: 128 and more for a signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def detach() -> None:
    """Let go of everything of the supervisor's, and be the first to go when the machine runs out of memory."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.closerange(3, 1 << 16)
    with suppress(OSError):
        kernel_file("/proc/self/oom_score_adj", "1000")


def supervise(job: dict[str, Any]) -> dict[str, Any]:
    """Start the worker behind its walls, wait for it, leave nothing of it, and say how it ended.

    Returns:
        the word (passed, failed, broken, or none) and detail that the worker left, its exit code (none if it took too
        long) and its seconds (none if the program was never begun).
    """
    board = Board(job["room"])
    identity = spare_identity(job["inside"])
    if job["inside"]:
        enter_namespaces(identity)
    elif LINUX:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        try:
            detach()
            (init if job["inside"] else work)(job, board, identity)
        finally:
            os._exit(1)
    in_time = False
    try:
        in_time = wait_for(child, board, job["timeout_s"])
    finally:
        seconds = time.monotonic() - board.began if board.began else None
        code = end(child)
        if job["folder"]:  # the parent may be gone
            import shutil

            shutil.rmtree(job["folder"], ignore_errors=True)
    word, detail = board.read()
    return {"word": word, "detail": detail, "code": code if in_time else None, "seconds": seconds}


def wait_for(child: int, board: Board, seconds: float) -> bool:
    """Whether the child ended in time, which runs from the moment that the program began. It is not reaped yet."""
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < (board.began + seconds if board.began else deadline):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(POLL_S)
    return False


def end(child: int) -> int:
    """End the child and all that it left; its exit code. With process 1 of a namespace, the kernel ends all others."""
    for kill in (os.kill, os.killpg):
        with suppress(OSError):
            kill(child, signal.SIGKILL)
    code = code_of(os.waitpid(child, 0)[1])
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        for pid in descendants():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    return code


def descendants() -> list[int]:
    """Those that fled from the worker's group, whom a subreaper inherits, and theirs."""
    parents = {}
    for pid in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
        with suppress(OSError):
            parents[int(pid)] = int(kernel_file(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
    family = [os.getpid()]
    for member in family:
        family += [pid for pid, parent in parents.items() if parent == member]
    return family[1:]


def stop(*_: object) -> NoReturn:
    """The parent wants no answer any more, or is gone: leave, cleaning up once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def main() -> None:
    """Read the job, run it, say how it ended."""
    job = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, stop)
    try:
        if LINUX:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == job["parent"]:
            print(json.dumps(supervise(job)), flush=True)
    except OSError as error:
        print(json.dumps({"word": "broken", "detail": str(error), "seconds": None}), flush=True)


if __name__ == "__main__":
    main()
