"""What a program meets in a confined process: `python environment_trials.py` tries each use of pymirror.

Prints a JSON object: for each trial None where it went well, "lost" where it brought less than it could, else
the feature, errno and command of the refusal.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import tempfile
from collections.abc import Callable
from typing import Any

import pymirror as pm

PAGE, HUGE, HUGE_ORDER = 4096, 2 << 20, 9
WAIT_S = 10.0
WORD = b"mirrored"


class LostError(Exception):
    """Nothing was refused, and something is not there."""


class Driver(pm.Mirror):
    def __init__(self, mm: pm.AddressSpace) -> None:
        self.device = pm.Device("d")
        self.told = 0
        super().__init__(mm)

    def sync_cpu_device_pagetables(self, update: pm.MmuNotifierRange) -> None:
        with self.lock:
            self.told += 1
            self.device.page_table.clear(update.start, update.end)

    def look(self, rng: pm.Range, how: Callable[[], int]) -> int:
        """By fault() or snapshot(), once what has changed has been told of."""
        while True:
            rng.wait_until_valid(timeout=WAIT_S)
            try:
                return how()
            except pm.MirrorError as refused:
                if refused.errno not in (errno.EBUSY, errno.EAGAIN):
                    raise

    def map(self, rng: pm.Range) -> None:
        while True:
            seq = self.look(rng, rng.fault)
            with self.lock:
                if rng.valid and self.device.page_table.map(rng, seq):
                    return


def words(mm: pm.AddressSpace, pages: int = 4) -> pm.Region:
    memory = mm.mmap(pages * PAGE)
    for page in range(pages):
        memory[page * PAGE : page * PAGE + len(WORD)] = WORD
    return memory


def mirror() -> None:
    """Both sides see each other's writes."""
    with pm.AddressSpace() as mm:
        memory = words(mm)
        with Driver(mm) as driver, driver.range(memory.addr, memory.addr + memory.size) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT | pm.HMM_PFN_REQ_WRITE
            driver.map(rng)
            assert bytes(driver.device.read(mm, memory.addr, 8)) == WORD
            driver.device.write(mm, memory.addr + PAGE, b"device")
            assert bytes(memory[PAGE : PAGE + 6]) == b"device"
            driver.device.page_table.clear(memory.addr, memory.addr + memory.size)


def foreign_change() -> None:
    """An madvise behind pymirror's back is told of, at the latest when the range is looked at again."""
    libc = ctypes.CDLL(None, use_errno=True)
    with pm.AddressSpace() as mm:
        memory = words(mm)
        with Driver(mm) as driver, driver.range(memory.addr, memory.addr + memory.size) as rng:
            rng.default_flags = pm.HMM_PFN_REQ_FAULT
            driver.map(rng)
            assert libc.madvise(ctypes.c_void_p(memory.addr), ctypes.c_size_t(PAGE), 4) == 0
            mm.sync(WAIT_S)
            told = driver.told
            driver.look(rng, rng.snapshot)
            assert driver.told
            driver.map(rng)
            driver.device.page_table.clear(memory.addr, memory.addr + memory.size)
    if not told:
        raise LostError


def pfns() -> None:
    with pm.AddressSpace() as mm:
        memory = words(mm)
        with Driver(mm) as driver, driver.range(memory.addr, memory.addr + memory.size) as rng:
            rng.snapshot()
            assert all(pfn & pm.HMM_PFN_VALID for pfn in rng.pfns)
            if not all(pm.hmm_pfn_to_pfn(int(pfn)) for pfn in rng.pfns):
                raise LostError


def huge_pages() -> None:
    """One that is there is told, and how large it is."""
    with pm.AddressSpace() as mm:
        memory = mm.mmap(4 * HUGE, huge="thp")
        memory[:] = bytes(memory.size)
        with Driver(mm) as driver, driver.range(memory.addr, memory.addr + memory.size) as rng:
            rng.snapshot()
            if not all(pm.hmm_pfn_to_map_order(int(pfn)) == HUGE_ORDER for pfn in rng.pfns):
                raise LostError


def after_a_fork(present: bool) -> None:
    """Pages that a child had too are mapped read-only still when it is gone; so are zero pages."""
    with pm.AddressSpace() as mm:
        memory = words(mm) if present else mm.mmap(4 * PAGE)
        with Driver(mm) as driver, driver.range(memory.addr, memory.addr + memory.size) as rng:
            driver.look(rng, rng.snapshot)
            if not (child := os.fork()):
                os._exit(0)
            os.waitpid(child, 0)
            assert any(memory[page * PAGE] for page in range(4)) == present
            driver.look(rng, rng.snapshot)
            if any(pfn & pm.HMM_PFN_WRITE for pfn in rng.pfns):
                raise LostError


def device_memory(delivery: str) -> None:
    with pm.AddressSpace(fault_delivery=delivery) as mm:
        memory = words(mm)
        with pm.DeviceMemory(pm.Device("d"), 1 << 20) as vram:
            assert pm.migrate_to_device(mm, memory.addr, memory.addr + memory.size, vram) == 4
            assert bytes(memory[PAGE : PAGE + 8]) == WORD
            assert pm.migrate_to_system(mm, memory.addr, memory.addr + memory.size) == 3
            assert all(bytes(memory[page * PAGE : page * PAGE + 8]) == WORD for page in range(4))


def coherent_memory() -> None:
    with pm.AddressSpace() as mm:
        memory = words(mm)
        with pm.DeviceMemory(pm.Device("d"), 1 << 20, kind="coherent") as vram:
            assert pm.migrate_to_device(mm, memory.addr, memory.addr + memory.size, vram) == 4
            assert bytes(memory[:8]) == WORD


def huge_page_on_a_device() -> None:
    """It comes home whole."""
    with pm.AddressSpace() as mm:
        memory = mm.mmap(4 * HUGE, huge="thp")
        memory[:] = bytes(memory.size)
        with pm.DeviceMemory(pm.Device("d"), memory.size) as vram:
            pm.migrate_to_device(mm, memory.addr, memory.addr + memory.size, vram)
            assert memory[HUGE] == 0
            if vram.used != memory.size - HUGE:
                raise LostError


def copies_of_a_file() -> None:
    """Those of a file on disk move too; what the process has not written stays the file's."""
    with tempfile.TemporaryFile() as file, pm.AddressSpace() as mm:
        file.truncate(4 * PAGE)
        with mm.mmap(4 * PAGE, fd=file.fileno()) as memory, pm.DeviceMemory(pm.Device("d"), 1 << 20) as vram:
            memory[: len(WORD)] = WORD
            moved = pm.migrate_to_device(mm, memory.addr, memory.addr + memory.size, vram)
            assert bytes(memory[: len(WORD)]) == WORD
    if moved != 1:
        raise LostError


def system_call() -> None:
    """On pages that are on a device."""
    with pm.AddressSpace() as mm:
        memory = words(mm)
        with pm.DeviceMemory(pm.Device("d"), 1 << 20) as vram:
            pm.migrate_to_device(mm, memory.addr, memory.addr + memory.size, vram)
            with open("/dev/zero", "rb", buffering=0) as zero:
                assert zero.readinto(memory) == memory.size


def exclusive() -> None:
    with pm.AddressSpace() as mm:
        memory = words(mm)
        with pm.make_device_exclusive(mm, memory.addr, pm.Device("d")):
            pass
        assert bytes(memory[:8]) == WORD


def pin() -> None:
    with pm.AddressSpace() as mm:
        memory = words(mm)
        with pm.pin_user_pages(mm, memory.addr, 4, pm.FOLL_WRITE | pm.FOLL_LONGTERM) as pages:
            assert len(pages.pfns) == 4


TRIALS: dict[str, Callable[[], None]] = {
    "mirror": mirror,
    "foreign change": foreign_change,
    "PFNs": pfns,
    "huge pages": huge_pages,
    "present at a fork": lambda: after_a_fork(present=True),
    "absent at a fork": lambda: after_a_fork(present=False),
    "device memory": lambda: device_memory("thread"),
    "device memory, inline": lambda: device_memory("inline"),
    "coherent memory": coherent_memory,
    "huge page on a device": huge_page_on_a_device,
    "copies of a file": copies_of_a_file,
    "system call": system_call,
    "exclusive": exclusive,
    "pin": pin,
}


def outcome(trial: Callable[[], None]) -> dict[str, Any] | str | None:
    try:
        trial()
    except LostError:
        return "lost"
    except pm.FeatureError as refused:
        return {"feature": refused.feature, "errno": refused.errno, "command": refused.command}
    return None


if __name__ == "__main__":
    signal.alarm(50)
    print(json.dumps({name: outcome(trial) for name, trial in TRIALS.items()}))
