# SPDX-License-Identifier: MIT
"""Mirroring tried: a page is written, faulted, mapped and read by a device."""

from __future__ import annotations

import os

from ..device import Device
from ..errors import FeatureError
from ..hmm import Mirror
from ..mm import AddressSpace
from ..pfn import HMM_PFN_REQ_FAULT
from .check import Check, Status

_WORD = b"doctor"
_TIMEOUT_S = 5.0
_TRIES = 10


class _Driver(Mirror):
    def __init__(self, mm: AddressSpace, device: Device) -> None:
        self.device = device
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: object) -> None:
        pass


def check() -> Check:
    try:
        read = _mirror_a_page()
    except OSError as error:
        return Check(
            "mirroring",
            "trial",
            Status.MISSING,
            "a page could not be mirrored",
            lost="everything: no range can be faulted and read by a device",
            why=(error.strerror or str(error)).partition("; do: ")[0],
            command=_command(error),
        )
    if read != _WORD:
        return Check(
            "mirroring",
            "trial",
            Status.MISSING,
            f"a device read {read!r} where the CPU had written {_WORD!r}",
            lost="everything",
            why="a bug of pymirror or of this kernel",
            command="report it, with pymirror doctor --json",
        )
    return Check("mirroring", "trial", Status.OK, "a page was faulted, mapped and read by a device")


def _command(error: OSError) -> str:
    if not os.path.exists("/proc/self"):
        return "sudo mount -t proc proc /proc"
    return error.command if isinstance(error, FeatureError) else ""  # else the checks below say what it takes


def _mirror_a_page() -> bytes:
    device = Device("doctor")
    with AddressSpace() as mm:
        memory = mm.mmap(1 << 14)
        memory[: len(_WORD)] = _WORD
        with _Driver(mm, device) as mirror, mirror.range(memory.addr, memory.addr + memory.size) as rng:
            rng.default_flags = HMM_PFN_REQ_FAULT
            for _ in range(_TRIES):
                rng.wait_until_valid(timeout=_TIMEOUT_S)
                seq = rng.fault()
                with mirror.lock:
                    if rng.valid and device.page_table.map(rng, seq):
                        break
            read = bytes(device.read(mm, memory.addr, len(_WORD)))
            device.page_table.clear(memory.addr, memory.addr + memory.size)
    return read
