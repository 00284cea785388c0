"""A seccomp filter as data: which system calls a program in the sandbox is refused. See seccomp(2) and bpf(4).

``jail`` installs it; it is made here because the jail, which starts anew for every program, should be small.
"""

from __future__ import annotations

import errno
import functools
import struct

#: One instruction of classic BPF: operation, jump if true, jump if false, operand.
Rule = tuple[int, int, int, int]

#: An operand that ``jail`` replaces with the id of the process that installs the filter.
OWN_PID = -1

#: The name that the audit system gives to a machine, and its system call numbers.
_CALLS: dict[str, dict[str, int]] = {
    "x86_64": {
        "audit": 0xC000003E, "clone": 56, "kill": 62, "tgkill": 234, "socketpair": 53, "socket": 41, "tkill": 200,
        "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "ptrace": 101, "process_vm_readv": 310, "pivot_root": 155,
        "process_vm_writev": 311, "mount": 165, "umount2": 166, "unshare": 272, "setns": 308, "bpf": 321,
        "add_key": 248, "request_key": 249, "keyctl": 250, "perf_event_open": 298, "userfaultfd": 323,
        "open_by_handle_at": 304,
    },
    "aarch64": {
        "audit": 0xC00000B7, "clone": 220, "kill": 129, "tgkill": 131, "socketpair": 199, "socket": 198, "tkill": 130,
        "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "ptrace": 117, "process_vm_readv": 270, "pivot_root": 41,
        "process_vm_writev": 271, "mount": 40, "umount2": 39, "unshare": 97, "setns": 268, "bpf": 280,
        "add_key": 217, "request_key": 218, "keyctl": 219, "perf_event_open": 241, "userfaultfd": 282,
        "open_by_handle_at": 265,
    },
}  # fmt: skip

#: Numbers that all machines share.
_COMMON = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "clone3": 435, "pidfd_getfd": 438, "mount_setattr": 442,
}  # fmt: skip

#: By these a program would get hold of another, or of walls to move. io_uring opens sockets past every filter.
_RISING = (
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "mount", "umount2", "pivot_root", "open_tree",
    "move_mount", "fsopen", "mount_setattr", "unshare", "setns", "bpf", "add_key", "request_key", "keyctl",
    "perf_event_open", "userfaultfd", "io_uring_setup", "open_by_handle_at",
)  # fmt: skip

#: By these it reaches other processes and machines, unless namespaces have put them out of sight.
_REACHING = ("socket", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")

#: All flags of clone(2) that ask for a namespace.
_CLONE_NEW = 0x7E020080

_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_OF, _ANSWER = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW: Rule = (_ANSWER, 0, 0, 0x7FFF0000)
_REFUSE: Rule = (_ANSWER, 0, 0, 0x00050000 | errno.EPERM)
_UNKNOWN: Rule = (_ANSWER, 0, 0, 0x00050000 | errno.ENOSYS)
#: Offsets in ``struct seccomp_data``; of an argument, the lower half on a little-endian machine.
_NUMBER, _MACHINE, _FIRST, _SECOND = ((_LOAD, 0, 0, offset) for offset in (0, 4, 16, 24))


@functools.cache
def rules(machine: str, *, alone: bool) -> tuple[Rule, ...]:
    """The filter for a machine, as ``os.uname`` names it; refused calls fail with EPERM.

    Args:
        machine: the processor's architecture.
        alone: whether namespaces hide the network and all other processes; if not, the filter refuses sockets and
            signals to others.

    Returns:
        the instructions; none if the machine's system calls are not known.
    """
    if machine not in _CALLS or struct.calcsize("P") != 8:
        return ()
    calls = _CALLS[machine] | _COMMON
    code = _same_table(calls["audit"]) + _no_namespaces(calls)
    for name in _RISING if alone else _RISING + _REACHING:
        code += _when(calls[name], _REFUSE)
    return (*code, *([] if alone else _only_itself(calls)), _ALLOW)


def _when(call: int, *then: Rule) -> list[Rule]:
    return [(_EQUAL, 0, len(then), call), *then]


def _same_table(audit: int) -> list[Rule]:
    """Refuse calls by other tables of numbers: those of 32 bits, and x32. Leaves the number loaded."""
    return [_MACHINE, (_EQUAL, 1, 0, audit), _REFUSE, _NUMBER, (_AT_LEAST, 0, 1, 0x40000000), _REFUSE]


def _no_namespaces(calls: dict[str, int]) -> list[Rule]:
    """The flags of clone3 lie in memory, which a filter cannot see; without it, libc takes clone."""
    clone = _when(calls["clone"], _FIRST, (_ANY_OF, 0, 1, _CLONE_NEW), _REFUSE, _ALLOW)
    return _when(calls["clone3"], _UNKNOWN) + clone


def _only_itself(calls: dict[str, int]) -> list[Rule]:
    """Signals to itself, as abort() sends them; pairs of streams, which asyncio needs (a datagram can go anywhere)."""
    code = _when(calls["socketpair"], _SECOND, (_AND, 0, 0, 0xF), (_EQUAL, 1, 0, 1), _REFUSE, _ALLOW)
    for name in ("kill", "tgkill"):
        code += _when(calls[name], _FIRST, (_EQUAL, 1, 0, OWN_PID), _REFUSE, _ALLOW)
    return code
