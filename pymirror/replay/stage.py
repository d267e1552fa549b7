"""One scenario's stage: its mapping, its devices and its forked child, and what each step does to them.

Every change goes through the address space, every device step through the dmirror driver, and the CPU's steps
touch the pages themselves.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import PROT_READ, PROT_WRITE
from typing import Any

import numpy as np
import numpy.typing as npt

from ..drivers.dmirror import Dmirror
from ..drivers.dmirror_uapi import Result
from ..mm import AddressSpace
from ..region import Region
from .child import ForkedChild
from .evidence import RawPage, read_pages
from .hugezero import split_huge_zero_pages
from .placement import mapping_end
from .scenario import Step, compress

PROT_NONE = 0
PAGE = 4096
HUGE = 1 << 21
PROT = {"none": PROT_NONE, "r": PROT_READ, "rw": PROT_READ | PROT_WRITE}
ADVICE = {"DONTNEED": 4, "REMOVE": 9, "POPULATE_READ": 22, "POPULATE_WRITE": 23}
MADV_NOHUGEPAGE = 15
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
FILE_BASE = 0x40
DEVICES = 2
DEVICE_FILL = 0xEE


class Stage:
    """Where a scenario, by its id, plays. Use it as a context manager: on leaving, nothing of it is left
    behind.
    """

    def __init__(self, scenario: str = "", devices: str = "private") -> None:
        self._file_end = mapping_end(scenario)
        self._mm = AddressSpace()
        self._regions: list[Region] = []
        self._fds: list[int] = []
        # Open from the start, as in the recordings: what a notifier covers is watched from its birth.
        self._mirrors = [Dmirror(self._mm, f"hmm_dmirror{number}", kind=devices) for number in range(DEVICES)]
        self._children: list[ForkedChild] = []
        self._addr = self._npages = 0
        self._kind = ""
        self._steps: dict[str, Callable[[Step], dict[str, Any]]] = {
            "mmap": self._mmap,
            "munmap": self._munmap,
            "mprotect": self._mprotect,
            "madvise": self._madvise,
            "mremap": self._mremap,
            "cpu_write": self._cpu_write,
            "cpu_read": self._cpu_read,
            "fork": self._fork,
            "child_write": self._child_write,
            "reap": self._reap,
            "dev_read": self._dev_read,
            "dev_write": self._dev_write,
            "snapshot": self._snapshot,
            "migrate_to_dev": self._migrate_to_dev,
            "migrate_to_sys": self._migrate_to_sys,
            "exclusive": self._exclusive,
            "check_exclusive": self._check_exclusive,
        }

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_exc: object) -> None:
        for child in self._children:
            child.discard()
        for mirror in self._mirrors:
            mirror.close()
        for region in self._regions:
            region.close()
        self._mm.close()
        for fd in self._fds:
            os.close(fd)

    @property
    def mapped(self) -> bool:
        """Whether the scenario's mapping could be made."""
        return bool(self._regions)

    def play(self, step: Step) -> dict[str, Any]:
        """Do one step and give its outcome as a recording writes it."""
        return self._steps[step["op"]](step)

    def raw_pages(self, step: Step) -> list[RawPage]:
        """The raw page table under a step's pages, or under the whole mapping where it names none."""
        return read_pages(self._at(step.get("page", 0)), step.get("count", self._npages))

    def _at(self, page: int) -> int:
        return self._addr + page * PAGE

    def _span(self, step: Step) -> tuple[int, int]:
        return self._at(step["page"]), step["count"] * PAGE

    def _first_bytes(self, step: Step) -> npt.NDArray[np.uint8]:
        addr, size = self._span(step)
        memory = memoryview((ctypes.c_uint8 * size).from_address(addr))
        return np.frombuffer(memory, np.uint8)[::PAGE]

    def _mmap(self, step: Step) -> dict[str, Any]:
        self._kind, self._npages = step["kind"], step["pages"]
        with _errno() as outcome:
            region = self._map(self._kind, self._npages * PAGE, PROT[step["prot"]])
            self._regions.append(region)
            self._addr = region.addr
        return outcome

    def _map(self, kind: str, size: int, prot: int) -> Region:
        if kind in ("thp", "hugetlb"):
            return self._mm.mmap(size, prot=prot, huge=kind)
        if kind == "anon_private":
            region = self._mm.mmap(size, prot=prot)
            self._mm.madvise(region.addr, size, MADV_NOHUGEPAGE)
            return region
        if kind == "anon_shared":
            region = self._mm.mmap(size, prot=prot, shared=True)
        else:
            region = self._mm.mmap(size, prot=prot, shared=kind == "file_shared", fd=self._file(size))
        return self._move(region.addr, size, self._file_end - size)

    def _file(self, size: int) -> int:
        fd = os.memfd_create("pymirror-replay")
        self._fds.append(fd)
        os.ftruncate(fd, size)
        for page in range(size // PAGE):
            os.pwrite(fd, bytes([(FILE_BASE + page) & 0xFF]), page * PAGE)
        return fd

    def _munmap(self, step: Step) -> dict[str, Any]:
        with _errno() as outcome:
            self._mm.munmap(*self._span(step))
        return outcome

    def _mprotect(self, step: Step) -> dict[str, Any]:
        with _errno() as outcome:
            self._mm.mprotect(*self._span(step), PROT[step["prot"]])
        return outcome

    def _madvise(self, step: Step) -> dict[str, Any]:
        if step["advice"] == "POPULATE_WRITE":
            self._split_zero(step)
        with _errno() as outcome:
            self._mm.madvise(*self._span(step), ADVICE[step["advice"]])
        return outcome

    def _mremap(self, _step: Step) -> dict[str, Any]:
        size = self._npages * PAGE
        with _errno() as outcome:
            moved = self._move(self._addr, size, self._addr - size)
            self._regions.append(moved)
            self._addr = moved.addr
        return outcome

    def _move(self, addr: int, size: int, like: int) -> Region:
        """Move [addr, addr + size) to an address that stands in its 2 MiB as `like` does."""
        with self._mm.mmap(size + HUGE, prot=PROT_NONE) as reserved:
            place = reserved.addr + (like - reserved.addr) % HUGE
            return self._mm.mremap(addr, size, size, flags=MREMAP_MAYMOVE | MREMAP_FIXED, new_addr=place)

    def _cpu_write(self, step: Step) -> dict[str, Any]:
        self._split_zero(step)
        self._first_bytes(step)[:] = _counting(step)
        return {}

    def _split_zero(self, step: Step) -> None:
        addr, size = self._span(step)
        if self._kind == "thp":
            split_huge_zero_pages(self._mm, addr, addr + size)

    def _cpu_read(self, step: Step) -> dict[str, Any]:
        return {"data": compress(self._first_bytes(step).tobytes(), counting=True)}

    def _fork(self, _step: Step) -> dict[str, Any]:
        self._children.append(ForkedChild())
        self._mm.sync()
        return {}

    def _child_write(self, step: Step) -> dict[str, Any]:
        self._children[-1].write(self._at(step["page"]), step["count"], step["value"])
        return {}

    def _reap(self, _step: Step) -> dict[str, Any]:
        self._children.pop().reap()
        return {}

    def _dev_read(self, step: Step) -> dict[str, Any]:
        with _errno() as outcome:
            result = self._mirrors[step["dev"]].read(self._at(step["page"]), step["count"])
            outcome |= {
                "cpages": result.cpages,
                "faults": result.faults,
                "data": compress(result.data[::PAGE], counting=True),
            }
        return outcome

    def _dev_write(self, step: Step) -> dict[str, Any]:
        pages = np.full((step["count"], PAGE), DEVICE_FILL, np.uint8)
        pages[:, 0] = _counting(step)
        self._split_zero(step)
        with _errno() as outcome:
            result = self._mirrors[step["dev"]].write(self._at(step["page"]), pages.tobytes())
            outcome |= {"cpages": result.cpages, "faults": result.faults}
        return outcome

    def _migrate_to_dev(self, step: Step) -> dict[str, Any]:
        return self._counted(step, self._mirrors[step["dev"]].migrate_to_dev)

    def _migrate_to_sys(self, step: Step) -> dict[str, Any]:
        return self._counted(step, self._mirrors[step["dev"]].migrate_to_sys)

    def _exclusive(self, step: Step) -> dict[str, Any]:
        self._split_zero(step)
        return self._counted(step, self._mirrors[step["dev"]].exclusive)

    def _check_exclusive(self, step: Step) -> dict[str, Any]:
        return self._counted(step, self._mirrors[step["dev"]].check_exclusive)

    def _counted(self, step: Step, command: Callable[[int, int], Result]) -> dict[str, Any]:
        with _errno() as outcome:
            outcome["cpages"] = command(self._at(step["page"]), step["count"]).cpages
        return outcome

    def _snapshot(self, step: Step) -> dict[str, Any]:
        with _errno() as outcome:
            result = self._mirrors[step["dev"]].snapshot(self._at(step["page"]), step["count"])
            outcome |= {"cpages": result.cpages, "prot": compress(result.data, counting=False)}
        return outcome


def _counting(step: Step) -> npt.NDArray[np.uint8]:
    values: npt.NDArray[np.uint8] = (np.arange(step["count"]) + step["value"]).astype(np.uint8)
    return values


@contextmanager
def _errno() -> Iterator[dict[str, Any]]:
    """Collects an outcome; an OSError inside leaves its errno and nothing else."""
    outcome: dict[str, Any] = {"errno": 0}
    try:
        yield outcome
    except OSError as error:
        outcome.clear()
        outcome["errno"] = errno.errorcode.get(error.errno or 0, repr(error))
