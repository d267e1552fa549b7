# SPDX-License-Identifier: MIT
"""Errors of pymirror: OSError with the kernel's errno, the address, its vma and what to do."""

from __future__ import annotations

import errno as _errno
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .vma import Vma

EHWPOISON = 133  # Python 3.11 has no name for it

# Numbers with two names, of which Python picks the other, or with none.
_NAMES = {EHWPOISON: "EHWPOISON", _errno.EDEADLK: "EDEADLK", _errno.EOPNOTSUPP: "EOPNOTSUPP"}

_HINTS = {
    _errno.EBUSY: "the range was invalidated meanwhile: take a new sequence number and go again",
    _errno.EAGAIN: "an invalidation is running or I/O is needed: wait_until_valid(), then go again",
    _errno.EFAULT: "map the address and give it the access that is asked for, then go again",
    _errno.EPERM: "mprotect() the vma to permit it, or ask for less",
    _errno.ESRCH: "open a new AddressSpace",
    _errno.ETIMEDOUT: "AddressSpace.dump() shows what is being waited for",
    _errno.EXDEV: "use a device page table with one address space at a time: clear() it first",
    _errno.ENOMEM: "free memory, or see what limits this process: ulimit -v, memory.max of its cgroup",
    _errno.ENOSPC: "give something back first, or ask for less",
    _errno.EMFILE: "close descriptors, or raise ulimit -n",
    _errno.EINVAL: "compare the arguments with what the docstring of the call asks for",
    EHWPOISON: "the page is poisoned hardware memory: unmap it",
}
_UNEXPECTED = "this errno is not expected here: see what `pymirror doctor` finds missing"


class HasVmas(Protocol):
    """What can name the vma that an error is about: an AddressSpace."""

    def _vma_for_error(self, addr: int) -> Vma | None: ...


class MirrorError(OSError):
    """A call was refused or failed. ``errno`` is the kernel's.

    ``addr`` is the address it is about, ``vma`` the vma there (None: no address, or a hole) and ``hint`` what
    to do.
    """

    def __init__(
        self,
        errno: int,
        message: str,
        *,
        addr: int | None = None,
        vma: Vma | None = None,
        hint: str | None = None,
    ) -> None:
        text = f"{errno_name(errno)}: {_located(message, addr)}"
        if vma is not None:
            text += f"; vma: {vma}"
        if hint:
            text += f"; do: {hint}"
        super().__init__(errno, text)
        self.addr = addr
        self.vma = vma
        self.hint = hint
        self._message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # OSError would rebuild from the finished text, and name the errno and the hint twice.
        return (_rebuild, (type(self), self.errno, self._message, self.__dict__.copy()))


class FeatureError(MirrorError):
    """``feature`` is missing: ``reason`` says why (kernel, configuration, privilege), ``command`` helps."""

    def __init__(
        self, feature: str, reason: str, command: str, *, what: str = "", errno: int = _errno.EOPNOTSUPP
    ) -> None:
        lead = f"{what}: " if what else ""
        super().__init__(errno, f"{lead}feature {feature!r} is missing: {reason}", hint=command)
        self.feature = feature
        self.reason = reason
        self.command = command


def _rebuild(cls: type[MirrorError], errno: int, message: str, state: dict[str, Any]) -> MirrorError:
    error = cls.__new__(cls, errno, message)
    MirrorError.__init__(error, errno, message, addr=state["addr"], vma=state["vma"], hint=state["hint"])
    error.__dict__.update(state)
    return error


def errno_name(errno: int) -> str:
    """``EINVAL`` for 22; the number itself where it has no name."""
    return _NAMES.get(errno) or _errno.errorcode.get(errno, str(errno))


def check(
    ret: int, what: str, *, addr: int | None = None, mm: HasVmas | None = None, hint: str | None = None
) -> int:
    """Return a native result, or raise MirrorError for a negative one.

    With an address and an mm the message names the vma there, or says that there is none.
    """
    if ret >= 0:
        return ret
    raise error(-ret, what, addr=addr, mm=mm, hint=hint)


def error(
    errno: int, what: str, *, addr: int | None = None, mm: HasVmas | None = None, hint: str | None = None
) -> MirrorError:
    """The MirrorError that ``check`` raises. ``what`` starts with the call's name."""
    vma = mm._vma_for_error(addr) if mm is not None and addr is not None else None
    message = _located(what, addr)
    if addr is not None and mm is not None and vma is None and errno != _errno.ESRCH:
        message += " (in no vma)"
    return MirrorError(errno, message, addr=addr, vma=vma, hint=hint or _HINTS.get(errno, _UNEXPECTED))


def _located(text: str, addr: int | None) -> str:
    """The text with the address in it, once."""
    if addr is None:
        return text
    _, found, rest = text.partition(f"{addr:#x}")
    named = bool(found) and rest[:1] not in tuple("0123456789abcdef")
    return text if named else f"{text} at {addr:#x}"
