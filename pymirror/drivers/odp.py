# SPDX-License-Identifier: MIT
"""odp: RDMA on-demand paging as a driver (ib_core's umem_odp with what mlx5 and rxe put on top).

A memory region is registered without touching a page. The device finds an entry missing, and its page fault
maps what the access needs, as long as the CPU's page table stays as it is. Each region has one notifier; an
implicit one, over the whole address space, has a child with a notifier for each chunk that was ever used.
"""

from __future__ import annotations

import errno
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from ..callback import may_wait
from ..device import Device
from ..errors import MirrorError, error
from ..walk import PAGE_SHIFT, USER_END
from .odp_mr import (
    IB_ACCESS,
    IB_ACCESS_HUGETLB,
    IB_ACCESS_LOCAL_WRITE,
    IB_ACCESS_ON_DEMAND,
    IB_ACCESS_REMOTE_ATOMIC,
    IB_ACCESS_REMOTE_READ,
    IB_ACCESS_REMOTE_WRITE,
    ImplicitMr,
    OdpMr,
)
from .retry import HMM_RANGE_DEFAULT_TIMEOUT, RetryStats

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..mm import AddressSpace

__all__ = [
    "ADVICE_PREFETCH",
    "ADVICE_PREFETCH_NO_FAULT",
    "ADVICE_PREFETCH_WRITE",
    "IB_ACCESS_HUGETLB",
    "IB_ACCESS_LOCAL_WRITE",
    "IB_ACCESS_ON_DEMAND",
    "IB_ACCESS_REMOTE_ATOMIC",
    "IB_ACCESS_REMOTE_READ",
    "IB_ACCESS_REMOTE_WRITE",
    "U64_MAX",
    "IbSge",
    "ImplicitMr",
    "Odp",
    "OdpMr",
]

#: advise_mr(): bring pages in for reading, for writing, or map only those that are there.
ADVICE_PREFETCH = 0
ADVICE_PREFETCH_WRITE = 1
ADVICE_PREFETCH_NO_FAULT = 2

#: The length of an implicit region, from address 0.
U64_MAX = (1 << 64) - 1
#: Bytes of a child of an implicit region.
IMR_CHUNK = 16 << 20
#: Bytes that the device copies between two looks at its table: so much is done again after a fault.
PIECE = 1 << 20

_KEY_TAGS = 1 << 8


class IbSge(NamedTuple):
    """``struct ib_sge``: length bytes at addr, of the region with that lkey."""

    addr: int
    length: int
    lkey: int


class Odp:
    """A device with on-demand paging and its protection domain, over ``mm``.

    ``timeout``: for how many seconds a page fault is tried again, and an access may make no progress.
    ``imr_chunk``: bytes of a child of an implicit region, a power of two and whole pages. ``retries`` counts
    the rounds of all retry loops.

    Errors of the device's work are what a completion would say, with IB_WC_* in the message: EINVAL for a
    key that names nothing or a malformed request, EACCES for missing rights, EFAULT beyond the region or
    where no memory is, EPERM for a write to a read-only vma, EBUSY and ETIMEDOUT when invalidations do not
    leave it time. What precedes an error in the memory may be done.
    """

    def __init__(
        self,
        mm: AddressSpace,
        name: str = "mlx5_0",
        *,
        device: Device | None = None,
        timeout: float = HMM_RANGE_DEFAULT_TIMEOUT,
        imr_chunk: int = IMR_CHUNK,
    ) -> None:
        if imr_chunk < 1 << PAGE_SHIFT or imr_chunk & (imr_chunk - 1):
            raise _einval(f"imr_chunk={imr_chunk}", "give a power of two, 4096 or more")
        if not timeout >= 0:
            raise _einval(f"timeout={timeout}", "give seconds, 0 or more")
        self.mm = mm
        self.device = Device(name) if device is None else device
        self.timeout = timeout
        self.imr_chunk = imr_chunk
        self.retries = RetryStats()
        self._mrs: dict[int, OdpMr] = {}
        self._next_key = 1 << 8
        self._lock = threading.Lock()
        self._atomics = threading.Lock()

    def close(self) -> None:
        """Deregister every region. Idempotent, and quiet in a forked child. EDEADLK in a callback."""
        if os.getpid() != self.mm.pid:
            return
        for mr in list(self._mrs.values()):
            self.dereg_mr(mr)

    def __repr__(self) -> str:
        return f"<Odp {self.device.name!r} {len(self._mrs)} regions, {self.retries}>"

    def __enter__(self) -> Odp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def mrs(self) -> list[OdpMr]:
        """The regions that are registered."""
        return list(self._mrs.values())

    def reg_user_mr(self, start: int, length: int, access: int) -> OdpMr:
        """ibv_reg_mr(): memory that need not be there yet. From 0 and of U64_MAX bytes it is implicit.

        ``access`` has IB_ACCESS_ON_DEMAND. EINVAL: other flags, remote writing or atomics without
        IB_ACCESS_LOCAL_WRITE, an empty region, IB_ACCESS_HUGETLB where the memory is not hugetlb. EOVERFLOW:
        beyond the address space. ENOSPC: no IOVAs. ESRCH; EDEADLK in a callback.
        """
        start, length = operator.index(start), operator.index(length)
        _check_access(access)
        implicit = start == 0 and length == U64_MAX
        if not implicit:
            self._check_interval(start, length, access)
        with self._lock:
            key = self._next_key
            self._next_key += _KEY_TAGS + 1
        mr = (ImplicitMr if implicit else OdpMr)(
            self, start, USER_END if implicit else start + length, access, key
        )
        self._mrs[key] = mr
        return mr

    def dereg_mr(self, mr: OdpMr) -> None:
        """ibv_dereg_mr(): the keys name nothing from here on. Idempotent.

        EINVAL: another device's region. EDEADLK in a callback and under a driver lock.
        """
        may_wait("dereg_mr")
        if mr.odp is not self:
            raise _einval(f"{mr!r} is of another device", "deregister it where it was registered")
        self._mrs.pop(mr.lkey, None)
        try:
            mr.release()
        except BaseException:
            # Ctrl-C: close() has to find it.
            self._mrs[mr.lkey] = mr
            raise

    def advise_mr(self, advice: int, sg_list: Sequence[IbSge], *, flush: bool = True) -> int:
        """ibv_advise_mr(): prefetch, and wait for it. Returns the pages that were mapped.

        ADVICE_PREFETCH faults for reading, _WRITE for writing, _NO_FAULT maps what is present. The kernel
        leaves the work to a queue unless IBV_ADVISE_MR_FLAG_FLUSH is given; ``flush=False`` is EOPNOTSUPP
        here. With a wrong entry in the list nothing is done. Errors as of the class.
        """
        if advice not in (ADVICE_PREFETCH, ADVICE_PREFETCH_WRITE, ADVICE_PREFETCH_NO_FAULT):
            raise _einval(f"advice {advice}", "give an ADVICE_PREFETCH constant")
        if not flush:
            raise MirrorError(
                errno.EOPNOTSUPP, "advise_mr: there is no work queue", hint="give flush=True, and wait"
            )
        write = advice == ADVICE_PREFETCH_WRITE
        need = IB_ACCESS_LOCAL_WRITE if write else 0
        checked = [(self._local(sge, need), sge) for sge in sg_list]
        return sum(
            self._map(
                mr, sge.addr, sge.length, write, fault=advice != ADVICE_PREFETCH_NO_FAULT, prefetch=True
            )
            for mr, sge in checked
        )

    def gather(self, sg_list: Sequence[IbSge]) -> bytes:
        """Local work that reads memory by lkey, as a send: the bytes of the list. Errors as of the class."""
        checked = [(self._local(sge, 0), sge) for sge in sg_list]
        return b"".join(self._read(mr, sge.addr, sge.length) for mr, sge in checked)

    def scatter(self, sg_list: Sequence[IbSge], data: Buffer) -> None:
        """Local work that writes memory by lkey, as a receive. EINVAL: no room; errors as of the class."""
        checked = [(self._local(sge, IB_ACCESS_LOCAL_WRITE), sge) for sge in sg_list]
        left = memoryview(data).cast("B")
        if len(left) > sum(sge.length for sge in sg_list):
            raise _einval("IB_WC_LOC_LEN_ERR: more data than the list has room for", "give a longer list")
        for mr, sge in checked:
            self._write(mr, sge.addr, left[: sge.length])
            left = left[sge.length :]

    def read(self, rkey: int, addr: int, n: int) -> bytes:
        """RDMA READ by a peer: n bytes at addr of the region with that rkey. Errors as of the class."""
        return self._read(self._remote(rkey, addr, n, IB_ACCESS_REMOTE_READ), addr, n)

    def write(self, rkey: int, addr: int, data: Buffer) -> None:
        """RDMA WRITE by a peer. Errors as of the class."""
        view = memoryview(data).cast("B")
        self._write(self._remote(rkey, addr, len(view), IB_ACCESS_REMOTE_WRITE), addr, view)

    def fetch_add(self, rkey: int, addr: int, add: int) -> int:
        """Add to the 64-bit number at addr, modulo 2**64; what it was. As cmp_swap()."""
        return self._atomic(rkey, addr, lambda old: old + add)

    def cmp_swap(self, rkey: int, addr: int, compare: int, swap: int) -> int:
        """Write ``swap`` to the 64-bit number at addr if it is ``compare``; what it was.

        Atomic among the atomics of this device (IB_ATOMIC_HCA), not against the CPU: the device reads, then
        writes, under a lock of its own. EINVAL: addr is no multiple of 8. Errors as of the class.
        """
        return self._atomic(rkey, addr, lambda old: swap if old == compare else None)

    def _atomic(self, rkey: int, addr: int, change: Callable[[int], int | None]) -> int:
        mr = self._remote(rkey, addr, 8, IB_ACCESS_REMOTE_ATOMIC)
        if addr % 8:
            raise error(
                errno.EINVAL,
                "odp: IB_WC_REM_INV_REQ_ERR: an atomic that is not aligned",
                addr=addr,
                mm=self.mm,
                hint="give a multiple of 8",
            )
        with self._atomics:
            # For writing from the first: between the two a page that was only read would be exchanged.
            with mr.umem_at(addr) as umem:
                if not umem.permits(addr, 8, True):
                    umem.map_dma(addr, addr + 8, True)
            old = int.from_bytes(self._read(mr, addr, 8), "little")
            new = change(old)
            if new is not None:
                self._write(mr, addr, memoryview((new % (1 << 64)).to_bytes(8, "little")))
        return old

    def _read(self, mr: OdpMr, addr: int, n: int) -> bytes:
        into = bytearray(n)
        self._copy(mr, addr, memoryview(into), False)
        return bytes(into)

    def _write(self, mr: OdpMr, addr: int, data: memoryview) -> None:
        self._copy(mr, addr, data, True)

    def _copy(self, mr: OdpMr, addr: int, memory: memoryview, write: bool) -> None:
        """The responder: piece by piece, with a page fault for the rest of the request where it must be."""
        for at, n in self._pieces(addr, len(memory)):
            piece = memory[at - addr : at - addr + n]
            deadline = time.monotonic() + self.timeout
            with mr.umem_at(at) as umem:
                while not umem.access(at, piece, write):
                    if time.monotonic() > deadline:
                        raise self._no_progress(at)
                    umem.map_dma(at, min(addr + len(memory), umem.end), write)

    def _map(
        self, mr: OdpMr, addr: int, n: int, write: bool, *, fault: bool = True, prefetch: bool = False
    ) -> int:
        mapped, at = 0, addr
        while at < addr + n:
            with mr.umem_at(at) as umem:
                end = min(addr + n, umem.end)
                mapped += umem.map_dma(at, end, write, fault=fault, prefetch=prefetch)
            at = end
        return mapped

    def _pieces(self, addr: int, n: int) -> Iterator[tuple[int, int]]:
        """Cut where a child of an implicit region may end."""
        step, at = min(PIECE, self.imr_chunk), addr
        while at < addr + n:
            end = min(addr + n, (at // step + 1) * step)
            yield at, end - at
            at = end

    def _local(self, sge: IbSge, need: int) -> OdpMr:
        mr = self._mrs.get(sge.lkey)
        return self._permitted(mr, sge.lkey, sge.addr, sge.length, need, "IB_WC_LOC_PROT_ERR")

    def _remote(self, rkey: int, addr: int, n: int, need: int) -> OdpMr:
        mr = self._mrs.get(rkey)
        if mr is not None and mr.rkey != rkey:
            mr = None
        return self._permitted(mr, rkey, addr, n, need, "IB_WC_REM_ACCESS_ERR")

    def _permitted(self, mr: OdpMr | None, key: int, addr: int, n: int, need: int, status: str) -> OdpMr:
        if mr is None:
            number, wrong, hint = (
                errno.EINVAL,
                f"key {key:#x} names no region",
                "use the key of a region that is registered",
            )
        elif need & ~mr.access:
            number, wrong, hint = (
                errno.EACCES,
                f"{mr!r} does not permit it",
                "register it with the access that is asked for",
            )
        elif not mr.start <= addr <= addr + n <= mr.end:
            number, wrong, hint = errno.EFAULT, f"{n} bytes are not inside {mr!r}", "stay inside the region"
        else:
            return mr
        raise error(number, f"odp: {status}: {wrong}", addr=addr, mm=self.mm, hint=hint)

    def _no_progress(self, addr: int) -> MirrorError:
        return error(
            errno.ETIMEDOUT,
            f"odp: IB_WC_RESP_TIMEOUT_ERR: page faults are served, but no access for {self.timeout} s,",
            addr=addr,
            mm=self.mm,
            hint="AddressSpace.dump() shows what invalidates it again and again",
        )

    def _check_interval(self, start: int, length: int, access: int) -> None:
        if length <= 0 or start < 0:
            raise _einval(f"{length} bytes at {start:#x}", "give an address and a number of bytes")
        if start + length > USER_END:
            raise error(
                errno.EOVERFLOW,
                f"reg_user_mr: {length:#x} bytes from {start:#x} end beyond the address space",
                addr=start,
                mm=self.mm,
                hint="from 0 and of U64_MAX bytes it is an implicit region",
            )
        if not access & IB_ACCESS_HUGETLB:
            return
        at = start
        for vma in self.mm.vmas(start, start + length):
            if vma.start > at or not vma.hugetlb:
                break
            at = vma.end
        if at < start + length:
            raise error(
                errno.EINVAL,
                "reg_user_mr: IB_ACCESS_HUGETLB, and no hugetlb memory",
                addr=at,
                mm=self.mm,
                hint="leave IB_ACCESS_HUGETLB out",
            )


def _check_access(access: int) -> None:
    if access & ~IB_ACCESS or not access & IB_ACCESS_ON_DEMAND:
        raise _einval(f"access {access:#x}", "give IB_ACCESS_* flags, IB_ACCESS_ON_DEMAND among them")
    if access & (IB_ACCESS_REMOTE_WRITE | IB_ACCESS_REMOTE_ATOMIC) and not access & IB_ACCESS_LOCAL_WRITE:
        raise _einval(f"access {access:#x}", "remote writing and atomics need IB_ACCESS_LOCAL_WRITE")


def _einval(wrong: str, hint: str) -> MirrorError:
    return MirrorError(errno.EINVAL, f"odp: {wrong}", hint=hint)
