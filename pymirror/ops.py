# SPDX-License-Identifier: MIT
"""Operations on memory: the kernel's mmap, munmap, mprotect, madvise and mremap, announced to notifiers.

Each is: check everything, begin an invalidation of what will change (device entries are fenced), run the
callbacks in this thread, make the system call, end the invalidation. A refused request changes nothing that
the kernel's own would not. Operations hold the mmap lock for writing, madvise for reading.
"""

from __future__ import annotations

import errno
import mmap as _mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, cast

from . import affected
from ._shim import ffi, lib
from .adopt import Adopted
from .affected import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, USER_END, Interval
from .arguments import integer
from .errors import MirrorError, check, error
from .event import Event, Guarantee
from .mapping import backing, check_mmap, map_memory
from .mm_base import check_pages, end_native
from .operation import Operation
from .refusals import refused_hint
from .region import Piece, Region, make_region
from .vma import any_vma, find_vma

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .mm import AddressSpace

PROT_READ = _mmap.PROT_READ
PROT_WRITE = _mmap.PROT_WRITE


class MemoryOperations(Operation):
    """The part of AddressSpace that changes memory."""

    def mmap(
        self,
        size: int,
        *,
        prot: int = PROT_READ | PROT_WRITE,
        shared: bool = False,
        fd: int = -1,
        offset: int = 0,
        huge: str | None = None,
    ) -> Region:
        """Map ``size`` bytes, rounded up to pages, and give them as a Region. As mmap(2).

        Without ``fd`` the memory is anonymous; shared anonymous memory is a memfd, kept in Region.fd. With
        one, the file's bytes from ``offset`` (a multiple of 4096); the Region has a duplicate.
        ``huge="thp"``: 2 MiB aligned and MADV_HUGEPAGE; ``"hugetlb"``: 2 MiB hugetlb pages, the size
        rounded up to them.

        EINVAL; ENOMEM (no memory, or no hugetlb pages: the message has the command); EACCES, ENODEV, EBADF
        of mmap(2). This and the other operations are ESRCH once the mm is closed, and in a forked child, and
        EDEADLK in a callback, under a driver lock and under the thread's own read_lock().
        """
        size, offset = check_mmap(size, offset, fd, huge)
        with self._operation("mmap") as span, ExitStack() as undo:
            fd = backing(size, shared, fd, huge)
            if fd >= 0:
                undo.callback(os.close, fd)
            addr = map_memory(self.native, size, prot, shared, fd, offset, huge)
            undo.callback(lib.pm_munmap, self.native, addr, size)
            span.note(start=hex(addr), end=hex(addr + size))
            if huge == "thp":
                ret = lib.pm_madvise(self.native, addr, size, affected.MADV_HUGEPAGE)
                check(
                    ret,
                    "mmap: MADV_HUGEPAGE",
                    addr=addr,
                    hint="boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
                )
            region = make_region(
                cast("AddressSpace", self), addr, size, prot=prot, shared=shared, huge=huge, fd=fd
            )
            undo.pop_all()
            self._regions.add(region)
            self._watch_new(addr, addr + size)
        return region

    def adopt(self, buffer: Buffer) -> Adopted:
        """Mirror memory that is there already: the whole pages inside a contiguous buffer. See Adopted.

        A buffer export is held until it is closed or collected. Several adoptions may overlap. From here on
        munmap(), madvise(), mremap() and oom_reap() refuse to throw its contents away (EBUSY) unless they
        are given ``force=True``. EINVAL: no buffer, not contiguous, or no whole page in it. ESRCH; EDEADLK in
        a callback.
        """
        self._check("adopt")
        adopted = Adopted(cast("AddressSpace", self), buffer)
        self._adoptions.add(adopted)
        return adopted

    def munmap(self, addr: int, size: int, *, force: bool = False) -> None:
        """Unmap [addr, addr + size), whatever is there, as munmap(2): event UNMAP. Views of it then fault.

        EINVAL; EBUSY (adopted memory, without ``force``); ENOMEM (a vma would have to be split and the
        process has too many). ESRCH, EDEADLK as mmap().
        """
        start, end = affected.check_span(self, "munmap", addr, size)
        with self._operation("munmap", start, end):
            affected.check_huge_cuts(self, "munmap", start, end)
            self._keep_adopted("munmap", start, end, force)
            self._unmap("munmap", start, end)

    def mprotect(self, addr: int, size: int, prot: int) -> None:
        """Set the protection, as mprotect(2): event PROTECTION_VMA over each vma whose protection changes.

        EINVAL; ENOMEM at a hole, after what precedes it was changed, as the kernel has it; EACCES. ESRCH,
        EDEADLK as mmap().
        """
        start, end = affected.check_span(self, "mprotect", addr, size)
        prot = integer("mprotect", "prot", prot)
        if prot & ~0xF:
            wrong = f"prot {prot:#x} is not made of PROT_READ, PROT_WRITE and PROT_EXEC"
            hint = "give mmap.PROT_READ | mmap.PROT_WRITE, or what else is wanted of these"
            raise affected.invalid(self, "mprotect", wrong, start, hint)
        with self._operation("mprotect", start, end):
            affected.check_huge_cuts(self, "mprotect", start, end)
            change = list(affected.protected(self._walk(start, end), start, end, prot))
            with self._invalidating(change, Event.PROTECTION_VMA):
                ret = lib.pm_mprotect(self.native, start, end - start, prot)
                self._check_range(ret, "mprotect", start, end)

    def madvise(self, addr: int, size: int, advice: int, *, force: bool = False) -> None:
        """Give advice, as madvise(2): event CLEAR if it zaps or exchanges pages, else no event.

        EINVAL; EBUSY where the contents of adopted memory would be lost, without ``force``; ENOMEM where
        part of it is a hole, after the rest was done; EACCES, EAGAIN, EBUSY of madvise(2). ESRCH, EDEADLK as
        mmap().
        """
        start, end = affected.check_span(self, "madvise", addr, size)
        advice = integer("madvise", "advice", advice)
        with self._operation(f"madvise {advice}", start, end, write=False):
            if affected.discards(advice):
                self._keep_adopted(f"madvise {advice}", start, end, force)
            change = self._zapped(start, end, advice) if affected.zaps(advice) else []
            with self._invalidating(change, Event.CLEAR):
                ret = lib.pm_madvise(self.native, start, end - start, advice)
                self._check_range(ret, f"madvise {advice}", start, end)

    def mremap(
        self,
        addr: int,
        old_size: int,
        new_size: int,
        *,
        flags: int = MREMAP_MAYMOVE,
        new_addr: int | None = None,
        force: bool = False,
    ) -> Region:
        """Resize or move, as mremap(2), and give a Region for the new place. The old keeps what is left.

        What moves away or is cut off is event UNMAP, and so is a target with MREMAP_FIXED; growing in place
        is no event. MREMAP_DONTUNMAP leaves the old place mapped and empty. ``old_size`` 0 maps shared
        memory again.

        EINVAL; EFAULT (a hole); ENOMEM (no room, or it may not move); EBUSY where the old place or the
        target holds adopted memory, without ``force``. ESRCH, EDEADLK as mmap().
        """
        old = affected.check_span(self, "mremap", addr, old_size, empty=True)
        new_size, target = affected.check_mremap(self, old, new_size, flags, new_addr)
        with self._operation("mremap", *old):
            self._keep_adopted("mremap", *old, force)
            if flags & MREMAP_FIXED:
                self._keep_adopted("mremap", target, target + new_size, force)
            return self._mremap(old, new_size, flags, target)

    def oom_reap(self, start: int, end: int, *, force: bool = False) -> None:
        """Reap the private memory of [start, end), vma by vma, as the kernel's OOM reaper does.

        Each vma is a non-blockable invalidation, event UNMAP: a callback that would have to wait answers
        False or -EAGAIN, and that vma is passed over. What is reaped reads as zeroes, or as the file has it;
        shared, hugetlb and special memory is left alone.

        EAGAIN: not all was reaped, go again. EINVAL; EBUSY (adopted memory, without ``force``). ESRCH,
        EDEADLK as mmap().
        """
        start, end = check_pages(self, "oom_reap", start, end)
        start, end = affected.check_span(self, "oom_reap", start, end - start)
        with self._operation("oom_reap", start, end, write=False):
            self._keep_adopted("oom_reap", start, end, force)
            reapable = list(affected.reapable(self._walk(start, end), start, end))
            passed_over = [piece for piece in reapable if not self._reap(*piece)]
        if not passed_over:
            return
        first, last = passed_over[0]
        raise MirrorError(
            errno.EAGAIN,
            f"oom_reap: a callback would have had to wait, so [{first:#x}, {last:#x}) was not reaped"
            f" ({len(passed_over)} of {len(reapable)} vmas)",
            addr=first,
            vma=self._vma_for_error(first),
            hint="go again when the driver's lock is free",
        )

    def _reap(self, start: int, end: int) -> bool:
        """False if a callback refused."""
        try:
            with self._invalidation(start, end, Event.UNMAP, blockable=False), self._claiming(start, end):
                ret = lib.pm_madvise(self.native, start, end - start, affected.MADV_DONTNEED)
                check(ret, "oom_reap", addr=start, mm=self)
        except MirrorError as refused:
            if refused.errno != errno.EAGAIN:
                raise
            return False
        return True

    @contextmanager
    def _claiming(self, start: int, end: int) -> Iterator[None]:
        """The REMOVE that the kernel tells of a zap is this operation's: no second event."""
        begun, seq = ffi.new("pm_inv **"), ffi.new("uint64_t *")
        try:
            ret = lib.pm_invalidate_start(
                self.native, start, end, Event.CLEAR, Guarantee.BEFORE.native, begun, seq
            )
            check(ret, f"invalidate [{start:#x}, {end:#x})")
            lib.pm_invalidate_delivered(begun[0])
            yield
        finally:
            end_native(begun)

    def _mremap(self, old: Interval, new_size: int, flags: int, target: int) -> Region:
        start, end = old
        vma = find_vma(self.native, start)
        if vma is None or start not in vma:
            raise error(errno.EFAULT, "mremap", addr=start, mm=self, hint="mmap() something there first")
        if vma.hugetlb:
            affected.check_huge_cuts(self, "mremap", start, end)
            if (end - start) % vma.page_size:
                # The kernel would round it up, and take what lies behind away too.
                wrong = f"old size {end - start} is not made of huge pages of {vma.page_size} bytes"
                raise affected.invalid(self, "mremap", wrong, start, f"give a multiple of {vma.page_size}")
            new_size = affected.page_up(new_size, vma.page_size)
        if vma.end < end:
            # Watching a part may have split a vma that the kernel would move whole: watched whole it is one.
            self.watch(start, end, files=True)
            lib.pm_migrate_level(self.native, start, end)
        if start == end and not vma.shared:
            raise affected.invalid(self, "mremap", "old size 0", start, "give the size of what is to move")
        with ExitStack() as undo:
            mould = self._mould(start)
            fd = os.dup(mould.fd) if mould is not None and mould.fd >= 0 else -1
            if fd >= 0:
                undo.callback(os.close, fd)
            place, lost = self._move(old, new_size, flags, target)
            undo.pop_all()
        region = make_region(
            cast("AddressSpace", self),
            place,
            new_size,
            prot=mould.prot if mould is not None else vma.prot,
            shared=vma.shared,
            huge=mould.huge if mould is not None else ("hugetlb" if vma.hugetlb else None),
            fd=fd,
        )
        self._regions.add(region)
        # Grown or shrunk in place: views of the old Region are views of the new one's memory.
        self._regions.settle(lost, heir=region if place == start else None)
        self._watch_new(place, place + new_size)
        return region

    def _move(self, old: Interval, new_size: int, flags: int, target: int) -> tuple[int, list[Piece]]:
        """The system call, announced for what it takes away. Gives the new address, and what Regions lost."""
        start, end = old
        moves = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)
        change = []
        if moves and start < end:
            change.append(old)
        elif start + new_size < end:
            change.append((start + new_size, end))
        elif start + new_size > end > start and flags & MREMAP_MAYMOVE:
            # Growing in place changes nothing for a device: the move is announced only if there is no room.
            with suppress(_NoRoomError):
                return self._mremap_call(old, new_size, flags & ~MREMAP_MAYMOVE, target)
            change.append(old)
        if flags & MREMAP_FIXED and self._mapped(target, target + new_size):
            change.append((target, target + new_size))
        with self._invalidating(change, Event.UNMAP):
            return self._mremap_call(old, new_size, flags, target)

    def _mremap_call(self, old: Interval, new_size: int, flags: int, target: int) -> tuple[int, list[Piece]]:
        place = ffi.new("uint64_t *")
        taken = [] if flags & MREMAP_DONTUNMAP else [old]
        if flags & MREMAP_FIXED:
            taken.append((target, target + new_size))
        with self._disowned(taken) as lost:
            ret = lib.pm_mremap(self.native, old[0], old[1] - old[0], new_size, flags, target, place)
            self._check_mremap(ret, old[0], flags)
        return int(place[0]), lost

    def _check_mremap(self, ret: int, addr: int, flags: int) -> None:
        if ret == -errno.ENOMEM and not flags & MREMAP_MAYMOVE:
            raise _NoRoomError(
                errno.ENOMEM,
                f"mremap at {addr:#x}: no room to grow in place",
                addr=addr,
                vma=self._vma_for_error(addr),
                hint="give flags=MREMAP_MAYMOVE",
            )
        check(ret, "mremap", addr=addr, mm=self, hint=refused_hint("mremap", -ret))

    def _unmap(self, what: str, start: int, end: int) -> None:
        change = [(start, end)] if self._mapped(start, end) else []
        with self._invalidating(change, Event.UNMAP), self._disowned([(start, end)]) as lost:
            check(lib.pm_munmap(self.native, start, end - start), what, addr=start, mm=self)
        self._regions.settle(lost)

    def _mould(self, addr: int) -> Region | None:
        """The Region at addr, whose properties a moved piece of it keeps."""
        found = self._regions.overlapping(addr, addr + 1)
        return found[0][2] if found else None

    def _zapped(self, start: int, end: int, advice: int) -> list[Interval]:
        vmas = list(self._walk(start, end))
        change = list(affected.advised(vmas, start, end, advice))
        if advice != affected.MADV_REMOVE:
            return change
        holes = [(vma, piece) for piece in change for vma in vmas if piece[0] in vma]
        return change + list(affected.aliases(self._walk(0, USER_END), holes))

    def _mapped(self, start: int, end: int) -> bool:
        return any_vma(self.native, start, end)


class _NoRoomError(MirrorError):
    """mremap() cannot grow memory where it is."""
