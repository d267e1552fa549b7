"""Intervals that make no sense, memory not there or not permitted, things undone under a user's feet."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from calls import World, world
from mirroring import FAULT, PAGE, WRITE, modern_fault
from seams import errno_of, foreign, needs

import pymirror as pm

USER_END = 1 << 47
TOP = 1 << 64


@pytest.fixture
def made(nothing_left_behind: None) -> Iterator[World]:
    with world() as made:
        yield made


def refused(made: World, number: int, call: Callable[..., object], *args: Any) -> pm.MirrorError:
    """The refusal, which has changed nothing and says what to do."""
    before = made.state()
    with pytest.raises(pm.MirrorError) as failed:
        call(*args)
    assert made.state() == before
    assert errno.errorcode[failed.value.errno or 0] == errno.errorcode[number], str(failed.value)
    assert failed.value.hint
    assert f"; do: {failed.value.hint}" in str(failed.value)
    return failed.value


def _enter(manager: Any) -> None:
    with manager:
        raise AssertionError("the body must not run")


INTERVALS: dict[str, Callable[[World, int, int], object]] = {
    "invalidate": lambda w, start, end: _enter(w.mm.invalidate(start, end)),
    "watch": lambda w, start, end: w.mm.watch(start, end),
    "range": lambda w, start, end: w.driver.range(start, end),
    "hmm_range_fault": lambda w, start, end: pm.hmm_range_fault(
        w.sub, start, end, np.zeros(4, np.uint64), seq=w.sub_seq
    ),
    "PageTable.entries": lambda w, start, end: w.table.entries(start, end),
    "PageTable.verify": lambda w, start, end: w.table.verify(start, end),
    "munmap": lambda w, start, end: w.mm.munmap(start, end - start),
    "mprotect": lambda w, start, end: w.mm.mprotect(start, end - start, 1),
    "madvise": lambda w, start, end: w.mm.madvise(start, end - start, mmap.MADV_DONTNEED),
    "oom_reap": lambda w, start, end: w.mm.oom_reap(start, end),
    "mremap": lambda w, start, end: w.mm.mremap(start, end - start, 8 * PAGE),
}
#: From the start of the memory, in bytes. The operations round sizes up, as their system calls do.
WRONG = {
    "unaligned start": (1, PAGE),
    "unaligned end": (0, PAGE + 1),
    "empty": (0, 0),
    "reversed": (2 * PAGE, PAGE),
}
ROUND = {"munmap", "mprotect", "madvise", "mremap"}
OUTSIDE = [
    (-PAGE, PAGE),
    (USER_END - PAGE, USER_END + PAGE),
    (USER_END, USER_END + PAGE),
    (TOP - PAGE, TOP + PAGE),
]
#: Notifiers cover 64 bits.
SIXTY_FOUR = {"invalidate", "watch"}


class TestIntervals:
    @pytest.mark.parametrize(
        ("call", "wrong"),
        [
            (call, wrong)
            for call in INTERVALS
            for wrong in WRONG
            if call not in ROUND or wrong != "unaligned end"
        ],
    )
    def test_wrong_ones_are_einval(self, made: World, call: str, wrong: str) -> None:
        start, end = (made.start + offset for offset in WRONG[wrong])
        error = refused(made, errno.EINVAL, INTERVALS[call], made, start, end)
        assert f"{start:#x}" in str(error) or f"{end - start}" in str(error)

    @pytest.mark.parametrize(
        ("call", "start", "end"),
        [
            (call, start, end)
            for call in INTERVALS
            for start, end in OUTSIDE
            if call not in SIXTY_FOUR or not 0 <= start < end <= TOP
        ],
    )
    def test_those_outside_the_address_space_too(self, made: World, call: str, start: int, end: int) -> None:
        refused(made, errno.EINVAL, INTERVALS[call], made, start, end)

    def test_a_map_of_what_is_not_the_targets(self, made: World) -> None:
        pfns = np.full(4, pm.HMM_PFN_VALID, np.uint64)
        for start in (made.start - PAGE, made.start + PAGE, made.start + 1, USER_END, TOP):
            refused(made, errno.EINVAL, made.table.map, made.sub, made.sub_seq, start, pfns)
        for wrong in (pfns.astype(np.int64), pfns[::2], pfns[:0], pfns.reshape(2, 2).T):
            refused(made, errno.EINVAL, made.table.map, made.sub, made.sub_seq, made.start, wrong)

    def test_a_modern_fault_of_what_is_not_the_notifiers(self, made: World) -> None:
        pfns = np.zeros(4, np.uint64)
        for start in (made.start - PAGE, made.start + PAGE):
            call = lambda start=start: pm.hmm_range_fault(  # noqa: E731
                made.sub, start, start + 4 * PAGE, pfns, seq=made.sub_seq
            )
            error = refused(made, errno.EINVAL, call)
            assert f"{start:#x}" in str(error)

    def test_entries_past_an_end_are_none(self, made: World) -> None:
        before = made.state()
        assert made.table.clear(made.end, made.start) == 0
        assert made.table.clear(made.start, made.start) == 0
        assert made.table.next(made.end, made.start) is None
        assert made.state() == before


class TestMemory:
    """A hole, no access, no permission to write; what is told names the first such page, and its vma."""

    def _range(self, made: World, flags: int) -> pm.Range:
        rng = made.driver.range(made.start, made.end)
        rng.default_flags = flags
        return rng

    def test_a_hole(self, made: World) -> None:
        made.mm.munmap(made.start + PAGE, PAGE)
        made.table.clear(0, TOP)
        del made.buf
        with self._range(made, FAULT) as rng:
            for look in (rng.fault, rng.snapshot):
                with pytest.raises(pm.MirrorError, match=r"in no vma.*; do: map the address") as failed:
                    look()
                assert (failed.value.errno, failed.value.addr) == (errno.EFAULT, made.start + PAGE)
                assert failed.value.vma is None
            assert made.table.stats()["entries"] == 0
        made.buf = made.mm.mmap(PAGE)

    @pytest.mark.parametrize("prot", [mmap.PROT_WRITE, 0])
    def test_no_read_permission(self, made: World, prot: int) -> None:
        made.mm.mprotect(made.start + PAGE, PAGE, prot)
        made.table.clear(0, TOP)
        content, made.buf = made.buf, made.mm.mmap(PAGE)
        with self._range(made, FAULT) as rng:
            for look, number in ((rng.fault, errno.EFAULT), (rng.snapshot, errno.EPERM)):
                error = refused_over(made, number, look)
                assert error.addr == made.start + PAGE
                assert error.vma == made.mm.vma_lookup(made.start + PAGE)
                assert str(error.vma) in str(error)
        made.mm.mprotect(made.start, 4 * PAGE, 3)
        assert bytes(content) == made.content

    def test_a_write_to_read_only_memory(self, made: World) -> None:
        made.mm.mprotect(made.start + PAGE, PAGE, mmap.PROT_READ)
        made.table.clear(0, TOP)
        with self._range(made, WRITE) as rng:
            error = refused_over(made, errno.EPERM, rng.fault)
            assert (error.addr, error.vma) == (made.start + PAGE, made.mm.vma_lookup(made.start + PAGE))
            assert "r--p" in str(error)
            assert "mprotect() the vma" in str(error)
            assert rng.pfns[0] & pm.HMM_PFN_VALID
            assert rng.pfns[1:].tolist() == [0, 0, 0]
        made.device.write(made.mm, made.start, made.content[:PAGE])
        made.device.set_fault_handler(lambda fault: made.driver.map(fault.addr, fault.addr + PAGE, WRITE))
        error = refused_over(made, errno.EPERM, lambda: made.device.write(made.mm, made.start + PAGE, b"x"))
        assert error.addr == made.start + PAGE
        assert bytes(made.buf) == made.content

    def test_the_modern_form_tells_in_the_array(self, made: World) -> None:
        made.mm.mprotect(made.start + PAGE, PAGE, 0)
        content, made.buf = made.buf, made.mm.mmap(PAGE)
        found = modern_fault(made.mm, content)
        assert [bool(pfn & pm.HMM_PFN_ERROR) for pfn in found.tolist()] == [False, True, False, False]
        assert errno_of(modern_fault, made.mm, content, FAULT) == errno.EFAULT


def refused_over(made: World, number: int, call: Callable[[], object]) -> pm.MirrorError:
    """As refused(), of a call that fills pfns up to the page that it names."""
    entries, active = made.table.stats()["entries"], made.mm.stats()["active"]
    with pytest.raises(pm.MirrorError) as failed:
        call()
    assert errno.errorcode[failed.value.errno or 0] == errno.errorcode[number], str(failed.value)
    assert "; do: " in str(failed.value)
    assert made.mm.stats()["active"] == active
    assert made.mm.stats()["inflight"] == 0
    assert made.table.stats()["entries"] == entries
    return failed.value


class TestUndone:
    def test_memory_under_a_registered_range(self, mm: pm.AddressSpace) -> None:
        """The range goes on, and looks at what is there now."""
        needs("uffd_events", "pagemap")
        buf = mm.mmap(4 * PAGE)
        addr = buf.addr
        with pm.Mirror(mm) as mirror, mirror.range(addr, addr + 4 * PAGE) as rng:
            rng.default_flags = FAULT
            rng.fault()
            for unmap in (mm.munmap, foreign.munmap):
                unmap(addr, 4 * PAGE)
                assert not rng.valid
                assert rng.registered
                assert errno_of(rng.fault) == errno.EAGAIN
                assert rng.wait_until_valid()
                assert errno_of(rng.fault) == errno.EFAULT
                foreign.mmap(addr, 4 * PAGE, flags=0x100022)
                mm.watch(addr, addr + 4 * PAGE)
                rng.fault()
                assert rng.valid
            foreign.munmap(addr, 4 * PAGE)

    def test_everything_twice(self, made: World) -> None:
        for _ in range(2):
            made.rng.unregister()
            made.unregistered.unregister()
            made.sub.remove()
            made.lone_sub.remove()
            made.whole.unregister()
            made.driver.unregister()
        assert made.mm.stats()["subs"] == 0
        assert made.mm.stats()["mmu_notifiers"] == 0
        made.buf.close()
        made.buf.close()
        for _ in range(2):
            made.mm.close()

    def test_a_range_after_its_mirror(self, made: World) -> None:
        made.driver.unregister()
        assert made.rng.valid
        assert made.rng.snapshot() == made.rng.seq
        assert errno_of(made.unregistered.register) == errno.EFAULT
        made.mm.munmap(made.start, PAGE)
        assert not made.rng.valid

    def test_a_buffer_that_vanishes_during_a_device_access(self, made: World) -> None:
        """The other side of the copy: EFAULT, and the memory is as it was."""
        needs("uffd_events")
        other = made.mm.mmap(2 * PAGE)
        foreign.mmap(other.addr + PAGE, PAGE, prot=0, flags=0x32)
        made.driver.clears = True
        made.mm.sync()
        before = made.mm.stats()["invalidate_seq"]
        for access in (made.device.read_into, made.device.write):
            with pytest.raises(
                pm.MirrorError, match=r"buffer of the caller, is not mapped, at .*; do: "
            ) as failed:
                access(made.mm, made.start, other)
            assert failed.value.errno == errno.EFAULT
        assert bytes(made.buf) == made.content
        # Nothing is wrong with the memory itself.
        assert made.mm.stats()["invalidate_seq"] == before
        assert made.device.stats.detected == 0


class TestObjects:
    """Of a wrong kind, refused where they are given and not where they are used."""

    @pytest.mark.parametrize("wrong", [3, "gpu", b""])
    def test_a_fault_handler_that_cannot_be_called(self, made: World, wrong: object) -> None:
        error = refused(made, errno.EINVAL, made.device.set_fault_handler, wrong)
        assert f"handler={wrong!r}" in str(error)
        assert made.device.read(made.mm, made.start, PAGE) == made.content[:PAGE]

    @pytest.mark.parametrize("wrong", [3, "gpu", object()])
    def test_device_memory_on_no_device(self, made: World, wrong: object) -> None:
        error = refused(made, errno.EINVAL, pm.DeviceMemory, wrong, PAGE)
        assert f"dev={wrong!r}" in str(error)

    @pytest.mark.parametrize("wrong", [None, 3, "vram"])
    def test_migration_to_no_device_memory(self, made: World, wrong: object) -> None:
        error = refused(made, errno.EINVAL, pm.migrate_to_device, made.mm, made.start, made.end, wrong)
        assert f"vram={wrong!r}" in str(error)
        if wrong is not None:
            refused(made, errno.EINVAL, pm.migrate_to_system, made.mm, made.start, made.end, wrong)
