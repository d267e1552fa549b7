# SPDX-License-Identifier: MIT
"""Memory regions on demand: what a key names, of one interval, or of the whole address space by children."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..callback import may_wait
from ..errors import error
from ..walk import PAGE_SHIFT, USER_END
from .counts import take
from .umem_odp import OdpStats, UmemOdp

if TYPE_CHECKING:
    from .odp import Odp

IB_ACCESS_LOCAL_WRITE = 1 << 0
IB_ACCESS_REMOTE_WRITE = 1 << 1
IB_ACCESS_REMOTE_READ = 1 << 2
IB_ACCESS_REMOTE_ATOMIC = 1 << 3
IB_ACCESS_ON_DEMAND = 1 << 6
IB_ACCESS_HUGETLB = 1 << 7
IB_ACCESS_REMOTE = IB_ACCESS_REMOTE_WRITE | IB_ACCESS_REMOTE_READ | IB_ACCESS_REMOTE_ATOMIC
IB_ACCESS = IB_ACCESS_REMOTE | IB_ACCESS_LOCAL_WRITE | IB_ACCESS_ON_DEMAND | IB_ACCESS_HUGETLB

_HUGE_SHIFT = 21


class OdpMr:
    """A memory region (``struct ib_mr``) of [start, end) bytes. Made by Odp.reg_user_mr().

    ``access`` are IB_ACCESS_* flags. ``lkey`` names it in local work, ``rkey`` in a peer's, 0 without remote
    access. ``stats`` counts its faults and invalidations.
    """

    def __init__(self, odp: Odp, start: int, end: int, access: int, key: int) -> None:
        self.odp = odp
        self.start = start
        self.end = end
        self.access = access
        self.lkey = key
        self.rkey = key if access & IB_ACCESS_REMOTE else 0
        self.stats = OdpStats()
        self._get()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.start:#x}-{self.end:#x} key {self.lkey:#x}>"

    @contextmanager
    def umem_at(self, addr: int) -> Iterator[UmemOdp]:
        """What serves an address of the region, kept while the caller works on it."""
        yield self.umem

    def release(self) -> None:
        """Off the device. Idempotent."""
        self.umem.release()

    def _get(self) -> None:
        shift = _HUGE_SHIFT if self.access & IB_ACCESS_HUGETLB else PAGE_SHIFT
        page = 1 << shift
        self.umem = self._umem(self.start // page * page, -(-self.end // page) * page, page_shift=shift)

    def _umem(self, start: int, end: int, **how: Any) -> UmemOdp:
        odp = self.odp
        return UmemOdp(
            odp.mm, odp.device, start, end, self.stats, timeout=odp.timeout, retries=odp.retries, **how
        )


class ImplicitMr(OdpMr):
    """A region over the whole address space: a parent without a notifier, and children made on demand.

    A child whose last page was taken off goes at the next access; in the callback no notifier can be removed.
    """

    @property
    def children(self) -> list[UmemOdp]:
        """In order of address."""
        with self._lock:
            return [umem for _, umem in sorted(self._children.items())]

    @contextmanager
    def umem_at(self, addr: int) -> Iterator[UmemOdp]:
        may_wait("odp: access to an implicit region")
        self._reap()
        index = addr // self.odp.imr_chunk
        with self._lock:
            if index not in self._children:
                self._children[index] = self._child(index)
            umem = self._children[index]
            umem.users += 1
        try:
            yield umem
        finally:
            with self._lock:
                umem.users -= 1
                if not umem.users and not umem.npages:
                    # There was nothing to map, or it went while it was in use.
                    self._empty.append(umem)

    def release(self) -> None:
        with self._lock:
            self._released = True
            self._dying.extend(self._children.values())
            self._children.clear()
        while self._dying:
            self._dying[-1].release()
            self._dying.pop()

    def _get(self) -> None:
        self._lock = threading.Lock()
        self._children: dict[int, UmemOdp] = {}
        self._empty: deque[UmemOdp] = deque()
        self._dying: list[UmemOdp] = []
        self._released = False

    def _child(self, index: int) -> UmemOdp:
        if self._released:
            raise error(
                errno.EINVAL, f"{self!r} was deregistered", hint="finish the work that uses a key first"
            )
        start = index * self.odp.imr_chunk
        end = min(start + self.odp.imr_chunk, USER_END)
        return self._umem(start, end, emptied=self._empty.append)

    def _reap(self) -> None:
        """destroy_unused_implicit_child_mr(), which the kernel leaves to a work queue."""
        while (umem := take(self._empty)) is not None:
            index = umem.start // self.odp.imr_chunk
            with self._lock:
                if umem.users or umem.npages or self._children.get(index) is not umem:
                    continue
                del self._children[index]
            try:
                umem.release()
            except BaseException:
                # Ctrl-C: release() has to find it.
                self._dying.append(umem)
                raise
