"""Runs a command with less than this machine has: `python confined.py '{"...": ...}' COMMAND...`.

The keys of the JSON object, each applied in this order before the command is executed:

mounts    {path: source} a private mount namespace in which each path is covered by its source (CAP_SYS_ADMIN)
umount    paths that are unmounted in there
limits    {"MEMLOCK": [soft, hard]} or one number for both
block     signals that are blocked, by name
seccomp   list of [system call number, errno] or [number, errno, index, value]: refused with the errno, the
          latter only where its argument has this value (32 bits)
user      a uid: no groups, and no capability but CAP_DAC_READ_SEARCH, since the interpreter may be root's
drop      true: no capabilities, whatever the uid; or a list of numbers: root gets all others
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

ME = Path(__file__)

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_PRIVATE_ALL, _MNT_DETACH = 4096, (1 << 18) | 16384, 2
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 38, 22, 24, 28
_NOROOT = 0b11
_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _CAP_AMBIENT_RAISE = 8, 47, 2
_CAP_DAC_READ_SEARCH, _CAPABILITY_VERSION_3 = 2, 0x20080522
_CAPS = 64

_libc = ctypes.CDLL(None, use_errno=True)


def command(confinement: dict[str, Any], *args: str) -> list[str]:
    return [sys.executable, str(ME), json.dumps(confinement), *args]


def _call(name: str, *args: Any) -> None:
    if getattr(_libc, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _long(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)


def _mounts(covered: dict[str, str], unmounted: list[str]) -> None:
    if not covered and not unmounted:
        return
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, _long(_MS_PRIVATE_ALL), None)
    for path, source in covered.items():
        _call("mount", source.encode(), path.encode(), None, _long(_MS_BIND), None)
    for path in unmounted:
        _call("umount2", path.encode(), _MNT_DETACH)


def _filter(rules: list[list[int]]) -> bytes:
    """A classic BPF program: load the number, one block a rule, allow the rest."""

    def op(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
        return struct.pack("=HBBI", code, jt, jf, k)

    load, equal, ret = 0x20, 0x15, 0x06
    program = b""
    for number, error, *condition in rules:
        refuse = op(ret, 0x00050000 | error)
        if condition:
            index, value = condition
            check = op(load, 16 + 8 * index) + op(equal, value, 0, 1)
        else:
            check = b""
        body = check + refuse
        program += op(load, 0) + op(equal, number, 0, len(body) // 8) + body
    return program + op(ret, 0x7FFF0000)


def _seccomp(rules: list[list[int]]) -> None:
    if not rules:
        return
    program = _filter(rules)
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 16
    )
    _call("prctl", _PR_SET_NO_NEW_PRIVS, _long(1), _long(0), _long(0), _long(0))
    _call("prctl", _PR_SET_SECCOMP, _long(2), header, _long(0), _long(0))


def _drop_capabilities(numbers: list[int] | bool) -> None:
    """From the bounding set: what uid 0 gets at an exec is all that is in it."""
    for number in range(_CAPS) if numbers is True else numbers:  # type: ignore[union-attr]
        _libc.prctl(_PR_CAPBSET_DROP, _long(number), _long(0), _long(0), _long(0))
    if numbers is True:
        _libc.prctl(_PR_SET_SECUREBITS, _long(_NOROOT), _long(0), _long(0), _long(0))


def _become(uid: int) -> None:
    _call("prctl", _PR_SET_KEEPCAPS, _long(1), _long(0), _long(0), _long(0))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kept = 1 << _CAP_DAC_READ_SEARCH
    _call("capset", struct.pack("=II", _CAPABILITY_VERSION_3, 0), struct.pack("=6I", *(kept,) * 3, 0, 0, 0))
    _call(
        "prctl", _PR_CAP_AMBIENT, _long(_CAP_AMBIENT_RAISE), _long(_CAP_DAC_READ_SEARCH), _long(0), _long(0)
    )


def main() -> None:
    confinement = json.loads(sys.argv[1])
    _mounts(confinement.get("mounts", {}), confinement.get("umount", []))
    for name, value in confinement.get("limits", {}).items():
        both = tuple(value) if isinstance(value, list) else (value, value)
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), both)
    signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in confinement.get("block", [])])
    _seccomp(confinement.get("seccomp", []))
    if drop := confinement.get("drop"):
        _drop_capabilities(drop)
    if (uid := confinement.get("user")) is not None:
        _become(uid)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
