# SPDX-License-Identifier: MIT
"""The contenders: pymirror's drivers behind the calls that the study makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..device import Device
from ..drivers.odp import IB_ACCESS_LOCAL_WRITE, IB_ACCESS_ON_DEMAND, IbSge, Odp, OdpMr
from ..drivers.pinned import Pinned
from ..drivers.svm import CHUNK_SIZES, NOTIFIER_SIZE, Svm
from ..drivers.userptr import Read, Userptr, UserptrBo, Write
from .contender import Contender, DriverCounts
from .options import PAGE, Options

if TYPE_CHECKING:
    from ..mm import AddressSpace


def outward(start: int, end: int, unit: int) -> tuple[int, int]:
    """[start, end) made of whole units."""
    return start // unit * unit, -(-end // unit) * unit


class OnDemand:
    """RDMA on-demand paging: a memory region on demand for each registration."""

    name = "odp"
    about = "mirrors: DMA mappings made by page faults, a notifier for each region"

    def __init__(self, options: Options) -> None:
        self._span = options.notifier_span or PAGE
        self.device = Device(self.name)

    def open(self, mm: AddressSpace) -> None:
        self._odp = Odp(mm, device=self.device)
        self._all: list[OdpMr] = []

    def register(self, addr: int, size: int) -> None:
        start, end = outward(addr, addr + size, self._span)
        if any(mr.start <= start and end <= mr.end for mr in self._all):
            return
        access = IB_ACCESS_ON_DEMAND | IB_ACCESS_LOCAL_WRITE
        self._all.append(self._odp.reg_user_mr(start, end - start, access))

    def read(self, addr: int, n: int) -> bytes:
        return self._odp.gather([self._sge(addr, n)])

    def write(self, addr: int, data: bytes) -> None:
        self._odp.scatter([self._sge(addr, len(data))], data)

    def close(self) -> None:
        self._odp.close()

    def counters(self) -> DriverCounts:
        stats = [mr.stats for mr in self._all]
        return DriverCounts(
            faults=sum(one.faults for one in stats),
            invalidations=sum(one.invalidations - one.false_invalidations for one in stats),
            retries=self._odp.retries.retries,
            registrations=len(self._all),
            pages_mapped=sum(one.page_faults for one in stats),
        )

    def _sge(self, addr: int, n: int) -> IbSge:
        return IbSge(addr, n, next(mr.lkey for mr in self._all if mr.start <= addr < mr.end))


class UserPointers:
    """userptr: buffer objects of user memory, whose pages are got before a job."""

    name = "userptr"
    about = "mirrors without page faults: a whole buffer's pages before each job, if they were invalidated"

    def __init__(self, options: Options) -> None:
        self._span = options.notifier_span or PAGE
        self.device = Device(self.name)
        self._bos: list[UserptrBo] = []

    def open(self, mm: AddressSpace) -> None:
        self._driver = Userptr(mm, device=self.device)

    def register(self, addr: int, size: int) -> None:
        start, end = outward(addr, addr + size, self._span)
        if not any(bo.start <= start and end <= bo.end for bo in self._bos):
            self._bos.append(self._driver.gem_userptr(start, end - start, validate=False))

    def read(self, addr: int, n: int) -> bytes:
        bo = self._bo(addr)
        return self._driver.submit([Read(bo, addr - bo.start, n)])[0]

    def write(self, addr: int, data: bytes) -> None:
        bo = self._bo(addr)
        self._driver.submit([Write(bo, addr - bo.start, data)])

    def close(self) -> None:
        self._driver.close()

    def counters(self) -> DriverCounts:
        stats = self._driver.stats
        return DriverCounts(
            faults=stats.get_pages,
            invalidations=stats.invalidations - stats.false_invalidations,
            retries=self._driver.retry.stats.retries + stats.restarts,
            registrations=len(self._bos),
            pages_mapped=stats.pages,
        )

    def _bo(self, addr: int) -> UserptrBo:
        return next(bo for bo in self._bos if bo.start <= addr < bo.end)


class SharedVirtual:
    """svm without device memory: faults map the largest aligned chunk, a notifier watches a window."""

    name = "svm"
    about = "mirrors: a page table of the device, faulted in by chunks of up to 2 MiB"

    def __init__(self, options: Options) -> None:
        self._span = options.notifier_span or NOTIFIER_SIZE
        self.device = Device(self.name)

    def open(self, mm: AddressSpace) -> None:
        self._mm = mm
        chunks = [size for size in CHUNK_SIZES if size <= self._span]
        self._driver = Svm(mm, device=self.device, notifier_size=self._span, chunk_sizes=chunks)

    def register(self, addr: int, size: int) -> None:
        """The device may use all of the process's memory."""

    def read(self, addr: int, n: int) -> bytes:
        return self.device.read(self._mm, addr, n)

    def write(self, addr: int, data: bytes) -> None:
        self.device.write(self._mm, addr, data)

    def close(self) -> None:
        self._driver.close()

    def counters(self) -> DriverCounts:
        stats = self._driver.stats
        return DriverCounts(
            faults=stats.faults,
            invalidations=stats.invalidations - stats.false_invalidations,
            retries=self._driver.retry.stats.retries,
            registrations=stats.inserted,
            pages_mapped=stats.pages,
        )


class Pinning:
    """Pins, with a registration cache: a look-up by address finds what was pinned there before."""

    name = "pinned"
    about = "pins, with a registration cache that nobody tells of changes"
    notified = False

    def __init__(self, options: Options) -> None:
        self.device = Device(self.name)

    def open(self, mm: AddressSpace) -> None:
        self._driver = Pinned(mm, device=self.device, notified=self.notified)

    def register(self, addr: int, size: int) -> None:
        self._driver.put(self._driver.register(addr, size))

    def read(self, addr: int, n: int) -> bytes:
        return self._driver.read(addr, n)

    def write(self, addr: int, data: bytes) -> None:
        self._driver.write(addr, data)

    def close(self) -> None:
        self._driver.close()

    def counters(self) -> DriverCounts:
        stats = self._driver.stats
        return DriverCounts(
            invalidations=stats.invalidations,
            retries=self._driver.retry.stats.retries,
            registrations=stats.registrations,
            pages_pinned=stats.pages,
            pages_mapped=stats.pages,
        )


class PinningNotified(Pinning):
    """The same with the cure: a notifier for each registration, which takes it out of the cache."""

    name = "pinned-notified"
    about = "pins, with a registration cache that notifiers keep honest"
    notified = True


CONTENDERS: tuple[type[Contender], ...] = (OnDemand, SharedVirtual, UserPointers, Pinning, PinningNotified)


def chosen(names: tuple[str, ...]) -> Iterator[type[Contender]]:
    """Those of these names, or all."""
    return (one for one in CONTENDERS if not names or one.name in names)
