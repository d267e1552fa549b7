# SPDX-License-Identifier: MIT
"""What a device meets where its page table does not serve an access: faults, their counts, stale entries."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ._shim import lib
from .errors import MirrorError
from .history import ago, invalidated_text
from .page_table import Mapping

if TYPE_CHECKING:
    from .device import Device
    from .mm import AddressSpace
    from .notifier import Invalidation
    from .vma import Vma


class FaultReason(StrEnum):
    """Why the device could not use its page table: ``enum pm_access_fault``."""

    MISSING = "missing"
    READONLY = "readonly"
    FENCED = "fenced"
    STALE = "stale"
    CHANGED = "changed"
    ATOMIC = "atomic"


FAULT_REASONS = {getattr(lib, f"PM_FAULT_{reason.name}"): reason for reason in FaultReason}


@dataclass(frozen=True, slots=True)
class DeviceFault:
    """A device fault, for the driver's handler.

    ``addr`` is the page that the table does not serve, ``end`` the end (page-aligned) of what the access
    still needs, ``write`` the access, ``atomic`` whether it is an atomic. ``reason``: no entry (missing), a
    write through a read-only entry (readonly), an entry invalidated whose callback has not run yet (fenced),
    an atomic on memory that the CPU uses too (atomic): make_device_exclusive(), or migrate it.
    """

    device: Device
    mm: AddressSpace
    addr: int
    end: int
    write: bool
    reason: FaultReason
    atomic: bool = False


FaultHandler = Callable[[DeviceFault], Any]


@dataclass(slots=True)
class DeviceStats:
    """Counts since the device was made. Times an event happened, but for the two that end in _bytes.

    ``redone`` are reads discarded because an invalidation passed meanwhile, ``stale`` accesses through an
    entry that a callback should have cleared, ``detected`` changes of memory that no event told of.
    """

    reads: int = 0
    writes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    missing: int = 0
    readonly: int = 0
    fenced: int = 0
    atomic: int = 0
    atomics: int = 0
    stale: int = 0
    detected: int = 0
    redone: int = 0

    @property
    def faults(self) -> int:
        """Device faults that were given to the handler."""
        return self.missing + self.readonly + self.fenced + self.atomic


class StaleAccessError(MirrorError):
    """The device used an entry whose invalidation is over and whose callback did not clear it: a driver bug.

    No memory was touched: the entry is fenced. ``mapped`` tells who programmed it, ``invalidated`` what
    should have cleared it; None where that is too long ago.
    """

    def __init__(
        self,
        device: Device,
        addr: int,
        write: bool,
        mapped: Mapping | None,
        invalidated: Invalidation | None,
        seq: int,
        vma: Vma | None = None,
    ) -> None:
        access = "write" if write else "read"
        super().__init__(
            errno.EFAULT,
            f"{device.name}: {access} at {addr:#x} through an entry that its callback did not clear;"
            f" {_mapped_text(mapped)}; {invalidated_text(invalidated, seq)}",
            addr=addr,
            vma=vma,
            hint="clear the whole of [update.start, update.end) in the callback, before it returns",
        )
        self.mapped = mapped
        self.invalidated = invalidated

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_stale, (self._message, dict(self.__dict__)))


def _mapped_text(mapped: Mapping | None) -> str:
    if mapped is None:
        return "who mapped it is too long ago"
    return (
        f"mapped by {mapped.file}:{mapped.line} with [{mapped.start:#x}, {mapped.end:#x}), seq {mapped.seq},"
        f" {ago(mapped.when)}"
    )


def _rebuild_stale(message: str, state: dict[str, Any]) -> StaleAccessError:
    stale = StaleAccessError.__new__(StaleAccessError)
    MirrorError.__init__(
        stale, errno.EFAULT, message, addr=state["addr"], vma=state["vma"], hint=state["hint"]
    )
    stale.__dict__.update(state)
    return stale
