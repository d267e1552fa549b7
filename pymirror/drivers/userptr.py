# SPDX-License-Identifier: MIT
"""userptr: a driver that follows invalidation, but whose device has no page faults (amdgpu's userptr).

A buffer object is user memory. Its pages are got before a job is submitted (hmm_range_fault()), and
validated under the driver's lock when it is: what was invalidated meanwhile is got again. An invalidation
takes them off the device; a job that ran over them stops there, and is restarted once they are valid, as
amdkfd evicts and restores the queues of a process.
"""

from __future__ import annotations

import errno
import operator
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from ..callback import may_wait
from ..device import Device
from ..device_fault import DeviceFault
from ..errors import MirrorError, error
from ..event import MmuNotifierRange
from ..lock import DriverLock
from ..notifier import IntervalNotifier
from ..pfn import HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, PfnArray
from ..walk import check_interval
from .counts import Counts
from .retry import HMM_RANGE_DEFAULT_TIMEOUT, RangeRetry, invalidated

if TYPE_CHECKING:
    from ..mm import AddressSpace


@dataclass
class UserptrStats(Counts):
    """Counts: ``jobs`` submitted, ``restarts`` of jobs, ``get_pages`` calls and ``pages`` that they got,
    ``invalidations``, those of them that met no valid pages (``false_invalidations``), and ``evictions`` of
    a running job.
    """

    jobs: int = 0
    restarts: int = 0
    get_pages: int = 0
    pages: int = 0
    invalidations: int = 0
    false_invalidations: int = 0
    evictions: int = 0


class UserptrBo:
    """A buffer object over [start, end) bytes of user memory. Made by Userptr.gem_userptr().

    ``readonly``: jobs may not write to it, and its pages are not faulted for writing. ``valid``: its pages
    are on the device as they are in the process; the driver's lock protects it.
    """

    def __init__(self, driver: Userptr, start: int, end: int, readonly: bool) -> None:
        self.driver = driver
        self.start = start
        self.end = end
        self.readonly = readonly
        self.valid = False
        self.closed = False
        self.notifier = IntervalNotifier(
            driver.mm, start, end - start, self._invalidate, update_lock=driver.notifier_lock
        )

    def __len__(self) -> int:
        """Bytes."""
        return self.end - self.start

    def __repr__(self) -> str:
        state = "closed" if self.closed else "valid" if self.valid else "invalid"
        return f"<UserptrBo {self.start:#x}-{self.end:#x} {state}>"

    def _invalidate(self, sub: IntervalNotifier, update: MmuNotifierRange, cur_seq: int) -> bool:
        # amdgpu waits here for the fences of the jobs. Native fencing has stopped the device already.
        driver = self.driver

        def take_off() -> None:
            sub.set_seq(cur_seq)
            driver.device.page_table.clear(max(update.start, self.start), min(update.end, self.end))
            driver.stats.add(invalidations=1, false_invalidations=not self.valid)
            self.valid = False

        return invalidated(driver.notifier_lock, update, take_off)


@dataclass(frozen=True, slots=True)
class Read:
    """A command: the device reads n bytes at ``offset`` of a buffer object, which are its result."""

    bo: UserptrBo
    offset: int
    n: int


@dataclass(frozen=True, slots=True)
class Write:
    """A command: the device writes ``data`` at ``offset`` of a buffer object. Its result is empty."""

    bo: UserptrBo
    offset: int
    data: bytes

    @property
    def n(self) -> int:
        """Bytes."""
        return len(self.data)


Command = Read | Write


class Userptr:
    """A device without page faults over ``mm``, its notifier_lock and its buffer objects.

    ``timeout`` is for how many seconds pages are got again, and a job may make no progress.
    """

    def __init__(
        self,
        mm: AddressSpace,
        name: str = "amdgpu",
        *,
        device: Device | None = None,
        timeout: float = HMM_RANGE_DEFAULT_TIMEOUT,
    ) -> None:
        self.mm = mm
        self.device = Device(name) if device is None else device
        self.timeout = timeout
        self.notifier_lock = DriverLock("adev->notifier_lock")
        self.retry = RangeRetry(self.notifier_lock, timeout=timeout)
        self.stats = UserptrStats()
        self.device.set_fault_handler(self._evicted)
        self._bos: set[UserptrBo] = set()

    def close(self) -> None:
        """Close every buffer object. Idempotent, and quiet in a forked child. EDEADLK in a callback."""
        for bo in list(self._bos):
            self.gem_close(bo)

    def __repr__(self) -> str:
        return f"<Userptr {self.device.name!r} {len(self._bos)} objects, {self.stats}>"

    def __enter__(self) -> Userptr:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def gem_userptr(
        self, start: int, size: int, *, readonly: bool = False, validate: bool = True
    ) -> UserptrBo:
        """DRM_IOCTL_AMDGPU_GEM_USERPTR: a buffer object over user memory of whole pages.

        ``validate`` gets its pages at once, so that memory which is not there is found now. EINVAL: not
        page-aligned, empty, beyond the address space. Else as submit().
        """
        start, end = check_interval("gem_userptr", start, operator.index(start) + size, mm=self.mm)
        bo = UserptrBo(self, start, end, readonly)
        self._bos.add(bo)
        try:
            if validate:
                self._get_user_pages(bo)
        except BaseException:
            self.gem_close(bo)
            raise
        return bo

    def gem_close(self, bo: UserptrBo) -> None:
        """DRM_IOCTL_GEM_CLOSE: off the device, no callback any more. Idempotent.

        EINVAL: another driver's object. EDEADLK in a callback and under a driver lock.
        """
        if os.getpid() != self.mm.pid:
            return
        may_wait("gem_close")
        if bo.driver is not self:
            raise MirrorError(
                errno.EINVAL,
                f"gem_close: {bo!r} is of another driver",
                addr=bo.start,
                hint="close it where it was made",
            )
        with self.notifier_lock:
            bo.closed = True
        bo.notifier.remove()
        with self.notifier_lock:
            bo.valid = False
            self.device.page_table.clear(bo.start, bo.end)
        self._bos.discard(bo)

    def submit(self, job: Sequence[Command]) -> list[bytes]:
        """DRM_IOCTL_AMDGPU_CS: validate what the job uses, run it, and give the results of its commands.

        A command that an invalidation stops is begun anew, with the pages got again; those before it stay
        done. So each must be one that may run twice.

        EINVAL: a command beyond its buffer object, or one that is closed. EACCES: a write to a readonly one.
        EFAULT: memory that is not there. EPERM: not writable. EBUSY: its pages were invalidated for
        ``timeout`` seconds. ETIMEDOUT: the job made no progress for so long. ESRCH: the mm is closed.
        EDEADLK in a callback or under a driver lock.
        """
        for command in job:
            self._check(command)
        self.stats.add(jobs=1)
        results: list[bytes] = []
        deadline = time.monotonic() + self.timeout
        while len(results) < len(job):
            self._validate(job[len(results) :])
            before = len(results)
            stopped_at = self._run(job, results)
            if len(results) > before:
                deadline = time.monotonic() + self.timeout
            if stopped_at is None:
                break
            self.stats.add(restarts=1)
            if time.monotonic() > deadline:
                raise self._no_progress(stopped_at)
        return results

    def _validate(self, job: Sequence[Command]) -> None:
        """amdgpu_cs_parser_bos(): pages for all, until all are valid at one moment."""
        bos = list(dict.fromkeys(command.bo for command in job))
        deadline = time.monotonic() + self.timeout
        while True:
            for bo in bos:
                if not bo.valid:
                    self._get_user_pages(bo)
            # What amdgpu_cs_submit() asks of every page array, under the lock that the callbacks take.
            with self.notifier_lock:
                if all(bo.valid for bo in bos):
                    return
                invalid = next(bo for bo in bos if not bo.valid)
            if time.monotonic() > deadline:
                raise self._no_progress(invalid.start)

    def _get_user_pages(self, bo: UserptrBo) -> None:
        """amdgpu_ttm_tt_get_user_pages(), and the pages into the device's page table."""

        def program(seq: int, pfns: PfnArray) -> bool:
            self._check_open(bo)
            # Entries of before: others' over the same memory may be for reading only.
            self.device.page_table.clear(bo.start, bo.end)
            bo.valid = self.device.page_table.map(bo.notifier, seq, bo.start, pfns)
            return bo.valid

        request = HMM_PFN_REQ_FAULT | (0 if bo.readonly else HMM_PFN_REQ_WRITE)
        found = self.retry.fault(bo.notifier, bo.start, bo.end, program, default_flags=request)
        self.stats.add(get_pages=1, pages=found.size)

    def _run(self, job: Sequence[Command], results: list[bytes]) -> int | None:
        """Run the rest of a job; the address where it was stopped, or None."""
        for command in job[len(results) :]:
            try:
                results.append(self._execute(command))
            except _EvictedError as stopped:
                with self.notifier_lock:
                    # Entries went without a callback of this object: another one over the same memory closed.
                    command.bo.valid = False
                self.stats.add(evictions=1)
                return stopped.addr
        return None

    def _execute(self, command: Command) -> bytes:
        at = command.bo.start + command.offset
        if isinstance(command, Read):
            return self.device.read(self.mm, at, command.n)
        self.device.write(self.mm, at, command.data)
        return b""

    def _evicted(self, fault: DeviceFault) -> None:
        """The device has no page faults: where an entry is missing it stops."""
        raise _EvictedError(fault)

    def _check(self, command: Command) -> None:
        bo = command.bo
        self._check_open(bo)
        at = bo.start + command.offset
        if not 0 <= command.offset <= command.offset + command.n <= len(bo):
            number, wrong, hint = errno.EINVAL, f"{command.n} bytes are not inside {bo!r}", "stay inside it"
        elif bo.readonly and isinstance(command, Write):
            number, wrong, hint = errno.EACCES, f"{bo!r} is readonly", "make it without readonly=True"
        else:
            return
        raise error(number, f"submit: {wrong}", addr=at, mm=self.mm, hint=hint)

    def _check_open(self, bo: UserptrBo) -> None:
        if bo.closed or bo.driver is not self:
            raise MirrorError(
                errno.EINVAL,
                f"userptr: {bo!r} is closed, or another driver's",
                addr=bo.start,
                hint="make a new one: gem_userptr()",
            )

    def _no_progress(self, addr: int) -> MirrorError:
        return error(
            errno.ETIMEDOUT,
            f"submit: invalidated again and again for {self.timeout} s",
            addr=addr,
            mm=self.mm,
            hint="AddressSpace.dump() shows what invalidates it",
        )


class _EvictedError(MirrorError):
    """The device stopped at an entry that is not there any more."""

    def __init__(self, fault: DeviceFault) -> None:
        self.addr: int
        super().__init__(
            errno.EINTR,
            f"{fault.device.name}: stopped by an invalidation ({fault.reason})",
            addr=fault.addr,
            hint="get the pages again, and restart the job",
        )
