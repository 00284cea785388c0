"""The child's side of the sandbox: builds the walls, runs one program inside, says how it ended. Standard library only.

``python -I jail.py`` reads one JSON object from stdin (program, nonce, level, limits) and writes one to stdout. Three
processes: the supervisor stays outside; ``init`` is process 1 of the new namespace, with which the kernel ends all
others; the worker drops every privilege and runs the program.

Sources: man pages namespaces(7), pivot_root(2), capabilities(7), seccomp(2), prctl(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import time
from typing import Any, NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
SECCOMP_MODE_FILTER, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, EPERM = 2, 0x7FFF0000, 0x00050000, 1
NOBODY = 65534
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
#: By machine: the audit name of its architecture, and its numbers of socket and socketpair.
SOCKET_CALLS = {"x86_64": (0xC000003E, (41, 53)), "aarch64": (0xC00000B7, (198, 199))}
#: How a program is held: in namespaces; in its process group without sockets; in its process group.
NAMESPACE, SECCOMP, GROUP = "namespace", "seccomp", "group"
#: Characters kept of why a program failed, and seconds between two looks at it.
DETAIL, POLL_S = 500, 0.004
DEVICES = ("null", "zero", "urandom", "random")
#: Where the program lives, inside.
SCRATCH = "/scratch"
#: System folders that an interpreter may need; what is a link outside is one inside.
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """A function of libc that returns 0.

    Raises:
        OSError: with errno.
    """
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount a file system or bind a folder."""
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def enter_namespaces() -> None:
    """Leave the outside's network, mounts, processes and users; as root without a user namespace of its own."""
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    if os.geteuid() == 0:
        call("unshare", flags)
        return
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", flags | CLONE_NEWUSER)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def build_root(scratch_mib: int) -> None:
    """A root that holds the interpreter, read-only, a few devices, and one small folder that can be written."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    root = "/tmp"  # mounted over; the real one is out of reach from here on
    sources = list(dict.fromkeys([*SYSTEM, sys.base_prefix, sys.prefix, sys.base_exec_prefix, sys.exec_prefix]))
    sources += [f"/dev/{name}" for name in DEVICES]
    held = {path: os.open(path, os.O_PATH) for path in sources if os.path.exists(path)}
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    for path, handle in held.items():
        inside = root + path
        if path in SYSTEM and os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        elif not os.path.exists(inside):
            _bind(handle, inside, is_file=path.startswith("/dev/"))
        os.close(handle)
    scratch = root + SCRATCH
    os.mkdir(scratch)
    mount("tmpfs", scratch, "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_mib}m,nr_inodes=1k,mode=777")
    os.symlink(SCRATCH, root + "/tmp")
    mount("none", root, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    if libc.syscall(SYS_PIVOT_ROOT[platform.machine()], b".", b"."):
        raise OSError(ctypes.get_errno(), "pivot_root")
    call("umount2", b".", MNT_DETACH)
    os.chdir(SCRATCH)


def _bind(handle: int, inside: str, *, is_file: bool) -> None:
    """Show an open file or folder at another place, read-only."""
    os.makedirs(os.path.dirname(inside) if is_file else inside, mode=0o755, exist_ok=True)
    if is_file:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(f"/proc/self/fd/{handle}", inside, flags=MS_BIND | MS_REC)
    if not is_file:
        mount("none", inside, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def drop_privileges() -> None:
    """Become nobody if this is root, without capabilities and without a way back."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    drop_capabilities()


def become_nobody() -> None:
    """Without a root of its own, a root user becomes nobody if nobody can read the interpreter, and stays otherwise."""
    if os.geteuid() != 0:
        return
    os.seteuid(NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    if readable:
        drop_privileges()


def drop_capabilities() -> None:
    """Give up every capability, so that walls cannot be taken down again."""
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", header, b"\0" * 24)


def refuse_sockets() -> None:
    """A seccomp filter under which socket and socketpair fail with EPERM, and foreign system call tables do as well."""
    architecture, numbers = SOCKET_CALLS[platform.machine()]
    refuse = SECCOMP_RET_ERRNO | EPERM
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (end, 0, 0, refuse), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]  # x32, whose calls have other numbers
    for number in numbers:
        code += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    code.append((end, 0, 0, SECCOMP_RET_ALLOW))
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(packed))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def limit(limits: dict[str, Any]) -> None:
    """Bound what one process, and all of them, may take."""
    mib = 2**20
    bounds = {
        resource.RLIMIT_AS: limits["memory_mib"] * mib,
        resource.RLIMIT_FSIZE: limits["file_mib"] * mib,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: limits["processes"],
        resource.RLIMIT_CPU: int(limits["timeout_s"]) + 1,
        resource.RLIMIT_CORE: 0,
    }
    for kind, bound in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (bound, bound))


def execute(program: str) -> str:
    """Run a program to its end; what it raised, or nothing."""
    try:
        exec(program, {})
    except BaseException as error:  # whatever ends a program early, it did not pass
        try:
            return f"{type(error).__name__}: {str(error) or failed_line(program, error)}".rstrip(": ")
        except BaseException:
            return type(error).__name__
    return ""


def failed_line(program: str, error: BaseException) -> str:
    """The innermost line of the program that was running: an assertion seldom says more than that it failed."""
    line, trace = 0, error.__traceback__
    while trace:
        line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<string>" else line
        trace = trace.tb_next
    return program.splitlines()[line - 1].strip() if line else ""


def work(job: dict[str, Any], report: int) -> NoReturn:
    """The worker: every way out closed, then the program."""
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.closerange(3, report)
        os.closerange(report + 1, 1024)
        if job["level"] == NAMESPACE:
            drop_privileges()
            with contextlib.suppress(OSError):  # processes are then counted in this sandbox only
                call("unshare", CLONE_NEWUSER)
                drop_capabilities()
        else:
            become_nobody()
            if job["level"] == SECCOMP:
                refuse_sockets()
        limit(job["limits"])
        message = {"failure": execute(job["program"])[:DETAIL]}
    except OSError as error:
        message = {"broken": str(error)}
    with contextlib.suppress(OSError):
        os.write(report, json.dumps({"nonce": job["nonce"], **message}).encode() + b"\n")
    os._exit(0)


def init(job: dict[str, Any], report: int) -> NoReturn:
    """Process 1 of the namespace: dies with the supervisor, and takes all others with it when the worker is done."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        build_root(job["limits"]["scratch_mib"])
    except OSError as error:
        os.write(report, json.dumps({"nonce": job["nonce"], "broken": str(error)}).encode())
        os._exit(0)
    worker = os.fork()
    if worker == 0:
        os.setsid()
        work(job, report)
    while True:
        ended, status = os.wait()
        if ended == worker:
            os._exit(code_of(status))


def code_of(status: int) -> int:
    """An exit code as a shell has it: 128 and more for a signal."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def supervise(job: dict[str, Any]) -> dict[str, str]:
    """Start the worker behind its walls, wait for it, and leave nothing of it."""
    reading, writing = os.pipe()
    inside = job["level"] == NAMESPACE
    if inside:
        enter_namespaces()
    elif sys.platform == "linux":
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        os.close(reading)
        if inside:
            init(job, writing)
        os.setsid()
        work(job, writing)
    os.close(writing)
    code = wait_for(child, job["limits"]["timeout_s"])
    if code is None:
        kill(child)
    kill_orphans(child)
    os.set_blocking(reading, False)
    return verdict(job["nonce"], _read(reading), code)


def wait_for(child: int, seconds: float) -> int | None:
    """The child's exit code, or None if it takes longer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return code_of(status)
        time.sleep(POLL_S)
    return None


def kill(child: int) -> None:
    """End the child and reap it; of a namespace's process 1, the kernel ends all others too."""
    for end in (os.kill, os.killpg):
        with contextlib.suppress(OSError):
            end(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill_orphans(child: int) -> None:
    """End whatever the worker left: its group, and those that fled from it, whom a subreaper inherits."""
    with contextlib.suppress(OSError):
        os.killpg(child, signal.SIGKILL)
    listing = f"/proc/self/task/{os.getpid()}/children"
    while os.path.exists(listing):
        with open(listing) as file:
            left = [int(pid) for pid in file.read().split()]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


def verdict(nonce: str, written: bytes, code: int | None) -> dict[str, str]:
    """What the worker said, if it could; a line that does not know the nonce is the program's own."""
    for line in written.splitlines():
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            said = json.loads(line)
            if said.get("nonce") == nonce and code == 0:
                if "broken" in said:
                    return {"broken": said["broken"]}
                return {"outcome": "failed" if said["failure"] else "passed", "detail": said["failure"]}
    if code is None:
        return {"outcome": "timed out", "detail": "it took too long"}
    how = f"exit code {code}" if code < 128 else f"signal {code - 128}"
    return {"outcome": "failed", "detail": f"ended without a verdict: {how}"}


def main() -> None:
    """Read the job, run it, say how it ended."""
    job = json.load(sys.stdin)
    try:
        answer = supervise(job)
    except OSError as error:
        answer = {"broken": str(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
