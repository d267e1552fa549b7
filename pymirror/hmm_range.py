# SPDX-License-Identifier: MIT
"""Range: an interval of an mm that a mirror looks at and faults (``struct hmm_range`` of 5.1)."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from . import trace
from ._shim import ffi, lib
from .arguments import check_is
from .callback import may_wait
from .encoding import EntryForm
from .errors import MirrorError, check, error
from .lock import not_in_callback
from .notifier import KIND_RANGE, wait_read_begin
from .pfn import HMM_PFN_ERROR
from .range_base import RangeBase
from .walk import FAULT, FAULT_NOBLOCK, PAGE_SHIFT, SNAPSHOT, check_interval, walk_error

if TYPE_CHECKING:
    from .encoding import PfnEncoding
    from .hmm_mirror import Hmm, Mirror
    from .mm import AddressSpace
    from .pfn import PfnArray

HMM_RANGE_DEFAULT_TIMEOUT = 1.0

_HUGE_SHIFT = 21
_ALL = (1 << 64) - 1


class Range(RangeBase):
    """[start, end) bytes of a mirror's mm, and what is known of its pages. Made by ``Mirror.range``.

    ``pfns`` is a uint64 array, an entry a page. In: requests of fault(); out: what the walk found. An
    invalidation makes the range invalid and leaves them readable; a failed walk does not.

    ``default_flags`` and ``pfn_flags_mask``: the request of a page is ``(pfns[i] & pfn_flags_mask) |
    default_flags``. As in the series they begin as 0 and all ones, so what an earlier walk found is asked for
    again: set the mask to 0 for one policy over the whole range.

    ``valid``: no invalidation has overlapped since the last wait_until_valid(), or register(); ``seq`` is
    the sequence number of that moment.

    ``encoding`` is None for the modern HMM_PFN_* bits, or the driver's own, see PfnEncoding. One thread at a
    time uses a range; ``valid`` may be read by any.
    """

    __slots__ = (
        "__weakref__",
        "_form",
        "_hmm",
        "_native_mm",
        "_pages",
        "_pfns",
        "_registered",
        "_seq",
        "_sub",
        "_walk",
        "encoding",
        "end",
        "mirror",
        "mm",
        "npages",
        "page_shift",
        "start",
    )

    def __init__(
        self,
        mirror: Mirror,
        start: int,
        end: int,
        page_shift: int = PAGE_SHIFT,
        encoding: PfnEncoding | None = None,
    ) -> None:
        """EINVAL: not aligned to 1 << page_shift, empty, reversed or beyond the address space. ENOMEM."""
        if page_shift not in (PAGE_SHIFT, _HUGE_SHIFT):
            raise MirrorError(
                errno.EINVAL,
                f"range: page_shift {page_shift} is no size of page here",
                hint="give 12, or 21 for hugetlb memory of 2 MiB",
            )
        check_is("range", "mirror", mirror, "sync_cpu_device_pagetables", "a Mirror")
        start, end = check_interval("range", start, end, page_shift, mirror.mm)
        self.mirror = mirror
        self.mm: AddressSpace = mirror.mm
        self.start = start
        self.end = end
        self.page_shift = page_shift
        self.encoding = encoding
        self.npages = (end - start) >> page_shift
        self._native_mm = self.mm.native
        #: What native code works on: an entry a 4 KiB page.
        self._pages: PfnArray = _new_array((end - start) >> PAGE_SHIFT)
        self._pfns = self._pages
        self._form: EntryForm | None = None
        if page_shift != PAGE_SHIFT or encoding is not None:
            self._form = EntryForm(self._pages, 1 << (page_shift - PAGE_SHIFT), encoding)
            self._pfns = self._form.pfns
        self._walk = ffi.new("struct pm_walk *")
        self._walk.start = start
        self._walk.end = end
        self._walk.pfns = ffi.from_buffer("uint64_t[]", self._pages)
        self._walk.pfn_flags_mask = _ALL
        self._dma_mappings = {}
        self._hmm: Hmm | None = None
        self._sub: Any = None
        self._seq = 0
        self._registered = False

    def __enter__(self) -> Range:
        self.register()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.unregister()

    def __repr__(self) -> str:
        state = ("valid" if self.valid else "invalid") if self._registered else "unregistered"
        return f"<Range {self.start:#x}-{self.end:#x} {state}>"

    @property
    def pfns(self) -> PfnArray:
        """uint64, an entry a page of ``1 << page_shift`` bytes: requests of fault() in, what was found out.

        Assigning copies into it: ``rng.pfns = HMM_PFN_REQ_FAULT`` asks for every page.
        """
        return self._pfns

    @pfns.setter
    def pfns(self, values: Any) -> None:
        self._pfns[:] = values

    @property
    def default_flags(self) -> int:
        """What is asked for of every page, in the range's bits: HMM_PFN_REQ_FAULT and _WRITE, or 0."""
        return int((self._form or self._walk).default_flags)

    @default_flags.setter
    def default_flags(self, flags: int) -> None:
        (self._form or self._walk).default_flags = int(flags) & _ALL

    @property
    def pfn_flags_mask(self) -> int:
        """Which bits of each entry of ``pfns`` count as a request too: 0 for none, all ones at first."""
        return int((self._form or self._walk).pfn_flags_mask)

    @pfn_flags_mask.setter
    def pfn_flags_mask(self, mask: int) -> None:
        (self._form or self._walk).pfn_flags_mask = int(mask) & _ALL

    @property
    def sub(self) -> Any:
        """The ``pm_sub *``, None before register()."""
        return self._sub

    @property
    def seq(self) -> int:
        """The sequence number of the last wait_until_valid(), or register(); 0 before."""
        return self._seq

    @property
    def registered(self) -> bool:
        """Between register() and unregister(); the end of the mm does not change it."""
        return self._registered

    @property
    def valid(self) -> bool:
        """hmm_range_valid(), under the driver's lock. Fixed against 5.1: it never comes back by itself."""
        return not self.read_retry(self._seq)

    def read_retry(self, seq: int) -> bool:
        """Whether an invalidation has overlapped since `seq` was the range's sequence number."""
        return not self._registered or lib.pm_sub_read_retry(self._sub, seq) != 0

    def _dma_pages(self) -> PfnArray:
        return self._pages

    def _dma_source(self, options: Any, seq: int) -> None:
        """By address, under the sequence: no page is held."""
        options.source = lib.PM_DMA_MIRROR
        options.sub = self._sub
        options.seq = seq
        options.pfns = self._walk.pfns

    def _dma_stands(self, seq: int) -> bool:
        """An invalidation after the commit may have looked for the mapping before it could be found."""
        return not self.read_retry(seq)

    def _forget(self, first: int, npages: int) -> None:
        """Of 4 KiB pages taken off a device: NONE in ``pfns``, as hmm_range_dma_unmap() leaves it."""
        self._pages[first : first + npages] = 0
        if self._form is not None:
            self._form.from_native()

    def register(self) -> None:
        """hmm_range_register(): from here on invalidations make the range invalid. Idempotent.

        The vmas of the range are watched, and it is valid unless an invalidation runs. EFAULT when the mm is
        closed or the mirror unregistered; ESRCH in a forked child; EDEADLK in a callback.
        """
        not_in_callback("Range.register")
        if self._registered:
            return
        hmm = self.mirror.hmm
        hmm.check_alive("Range.register")
        sub = ffi.new("pm_sub **")
        ret = lib.pm_sub_insert(self._native_mm, self.start, self.end - 1, 0, KIND_RANGE, sub)
        if ret == -errno.ESRCH:
            hmm.check_alive("Range.register")
        check(ret, "Range.register", addr=self.start, mm=self.mm)
        self._sub = self._walk.sub = ffi.gc(sub[0], lib.pm_sub_put)
        self._hmm = hmm
        self._registered = True
        try:
            self.mm.watch(self.start, self.end)
            self._begin(0.0)
        except BaseException:
            self.unregister()
            raise

    def unregister(self) -> None:
        """hmm_range_unregister(): forget the range; ``pfns`` stays. Idempotent. EDEADLK in a callback."""
        not_in_callback("Range.unregister")
        if not self._registered:
            return
        self._registered = False
        self._hmm = None
        lib.pm_sub_remove(self._sub)

    def wait_until_valid(self, timeout: float | None = HMM_RANGE_DEFAULT_TIMEOUT) -> bool:
        """hmm_range_wait_until_valid(): wait until no invalidation overlaps, and count from that moment on.

        True; False when the mm is gone. ETIMEDOUT after `timeout` seconds (None: no limit; Ctrl-C ends every
        wait). EDEADLK in a callback and under a driver lock; EINVAL when not registered; ESRCH in a forked
        child.
        """
        may_wait("wait_until_valid")
        self._check_registered("wait_until_valid")
        ret = -errno.ESRCH if self._gone() else self._begin(timeout)
        if ret == 0 and not self._gone():
            return True
        if ret in (0, -errno.ESRCH) and lib.pm_mm_alive(self._native_mm) >= 0:
            return False
        self.mm._check_pid("wait_until_valid")
        what = f"wait_until_valid: [{self.start:#x}, {self.end:#x}) is being invalidated for {timeout} s now"
        check(ret, what, addr=self.start, mm=self.mm)
        return False

    def snapshot(self) -> int:
        """hmm_range_snapshot(): what the page table holds now, without faulting. Returns the sequence number.

        Absent pages are 0. EAGAIN: invalid when called, wait_until_valid() first. EBUSY: invalidated
        meanwhile. EPERM: a vma that cannot be read. EFAULT: a hole, a special mapping, or the mm is gone.
        EINVAL: page_shift does not fit. On an error the pfns from the failing address on are 0. EDEADLK in a
        callback and under a driver lock.
        """
        return self._look("snapshot", SNAPSHOT)

    def fault(self, block: bool = True) -> int:
        """hmm_range_fault(): fault what ``default_flags`` and ``pfns`` ask for and is absent.

        Returns the sequence number. EAGAIN: invalid when called, or ``block`` is false and it would have to
        wait. EBUSY: invalidated meanwhile. EFAULT: a page asked for is in a hole, unreadable or special, or
        the mm is gone. EPERM: a write to a read-only vma. EINVAL, ENOMEM. EDEADLK in a callback and under a
        driver lock. One native call, one system call for each run of absent pages.
        """
        return self._look("fault", FAULT if block else FAULT_NOBLOCK)

    def _look(self, what: str, flags: int) -> int:
        may_wait(what)
        seq = self._seq
        if not self._registered or lib.pm_sub_read_retry(self._sub, seq):
            raise self._invalid(what)
        walk = self._walk
        walk.flags = flags
        walk.seq = seq
        if trace.active is None and self._form is None:
            ret = lib.pm_walk(self._native_mm, walk)
        elif trace.active is None:
            ret = self._formed_walk(what)
        else:
            with trace.span(trace.Track.WALK, what, self.mm, self.start, self.end, seq=seq) as span:
                ret = self._native_walk(what)
                span.note(ret=ret)
        if ret < 0:
            raise self._failed(what, ret)
        return seq

    def _native_walk(self, what: str) -> int:
        return lib.pm_walk(self._native_mm, self._walk) if self._form is None else self._formed_walk(what)

    def _formed_walk(self, what: str) -> int:
        """The walk of a range whose entries are not those of native code."""
        assert self._form is not None
        if self.page_shift != PAGE_SHIFT:
            self._check_hugetlb(what)
        self._form.to_native()
        ret = int(lib.pm_walk(self._native_mm, self._walk))
        self._form.from_native()
        if self.encoding is not None and (ret == -errno.EFAULT or (ret == 0 and self._has_errors())):
            self._mark_special(self._form, self._walk.fail_start if ret else self.end)
        return ret

    def _has_errors(self) -> bool:
        return bool((self._pages & np.uint64(HMM_PFN_ERROR)).any())

    def _check_hugetlb(self, what: str) -> None:
        for vma in self.mm.vmas(self.start, self.end):
            if vma.page_size == 1 << self.page_shift:
                continue
            raise MirrorError(
                errno.EINVAL,
                f"{what}: page_shift {self.page_shift} does not fit pages of {vma.page_size} bytes",
                addr=vma.start,
                vma=vma,
                hint="mirror it with page_shift 12",
            )

    def _begin(self, timeout: float | None) -> int:
        """Count from now on; a failure leaves the range as it was."""
        seq = ffi.new("uint64_t *")
        ret = wait_read_begin(self._sub, seq, timeout, self._gone)
        if ret == 0:
            self._seq = seq[0]
        return ret

    def _gone(self) -> bool:
        hmm = self._hmm
        return hmm is None or hmm.dead

    def _check_registered(self, what: str) -> None:
        if not self._registered:
            raise MirrorError(
                errno.EINVAL,
                f"{what}: {self!r} is not registered",
                addr=self.start,
                hint="register() it first, or use it as `with mirror.range(...) as rng:`",
            )

    def _invalid(self, what: str) -> MirrorError:
        self._check_registered(what)
        if self._hmm is not None:
            self._hmm.check_alive(what)
        trace.instant(trace.Track.RETRY, f"{what}: invalid", self.mm, self.start, self.end)
        return error(
            errno.EAGAIN,
            f"{what}: [{self.start:#x}, {self.end:#x}) was invalidated since the last wait_until_valid()",
            addr=self.start,
            mm=self.mm,
            hint="wait_until_valid(), then go again",
        )

    def _failed(self, what: str, ret: int) -> MirrorError:
        if ret == -errno.ESRCH and self._hmm is not None:
            self._hmm.check_alive(what)
        return walk_error(self.mm, self._walk, ret, what)

    def _mark_special(self, form: EntryForm, last: int) -> None:
        """hmm_pfns_special(): of the special vmas up to the one that holds ``last``, the entries say so."""
        for vma in self.mm._walk(self.start, self.end):
            if vma.special and vma.start <= last:
                first, end = max(vma.start, self.start), min(vma.end, self.end)
                form.special((first - self.start) >> PAGE_SHIFT, (end - self.start) >> PAGE_SHIFT)


def _new_array(npages: int) -> PfnArray:
    try:
        return np.zeros(npages, np.uint64)
    except MemoryError:
        raise MirrorError(
            errno.ENOMEM,
            f"range: no memory for {npages} pfns of 8 bytes",
            hint="mirror it in smaller ranges",
        ) from None
