# SPDX-License-Identifier: MIT
"""What a driver offers to the study, whatever its own calls are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .options import Options

if TYPE_CHECKING:
    from ..device import Device
    from ..mm import AddressSpace


@dataclass(slots=True)
class DriverCounts:
    """What a driver has counted since open().

    ``faults`` are rounds in which it had to look at the CPU's page table for the device, ``invalidations``
    callbacks in which it took something off the device, ``retries`` rounds that were void since memory
    changed meanwhile, ``registrations`` what it pinned or registered anew, ``pages_pinned`` pages of these
    pins, ``pages_mapped`` pages that it made the device reach, by DMA mappings or its page table.
    """

    faults: int = 0
    invalidations: int = 0
    retries: int = 0
    registrations: int = 0
    pages_pinned: int = 0
    pages_mapped: int = 0


class Contender(Protocol):
    """A driver with its device, for one address space at a time."""

    name: str
    #: One line for tables: how it keeps the device and the CPU together.
    about: str
    device: Device

    def __init__(self, options: Options) -> None: ...

    def open(self, mm: AddressSpace) -> None: ...

    def register(self, addr: int, size: int) -> None:
        """The application tells of memory that it is going to use (ibv_reg_mr()), and never takes it back."""

    def read(self, addr: int, n: int) -> bytes:
        """The device reads n bytes of registered memory."""

    def write(self, addr: int, data: bytes) -> None:
        """The device writes to registered memory."""

    def close(self) -> None:
        """Nothing stays mapped or pinned. Idempotent."""

    def counters(self) -> DriverCounts: ...
