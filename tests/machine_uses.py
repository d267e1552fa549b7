# SPDX-License-Identifier: MIT
"""Steps that use memory which may be on a device: pins, DMA, migration in steps, exclusive access, others."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from mirroring import FAULT, WRITE
from model import PAGE, READ
from model import WRITE as PROT_WRITE
from seams import errno_of

import pymirror as pm

NUMBERS = st.integers(0, 255)
PICKS = st.tuples(NUMBERS, NUMBERS, st.integers(1, 9))
WORDS = st.binary(min_size=8, max_size=8)
mapped = precondition(lambda self: bool(self.pages))


class UseSteps:
    """Of a machine with address space, device memories, a driver and the model of its pages."""

    mm: pm.AddressSpace
    vrams: list[pm.DeviceMemory]
    driver: Any
    off: tuple[str, ...]
    pages: dict[int, Any]
    span: Callable[[tuple[int, int, int]], tuple[int, int]]
    expected: Callable[[int, int], bytes]
    wrote: Callable[[int, bytes], None]

    @mapped
    @rule(pick=PICKS, word=WORDS)
    def pin(self, pick: tuple[int, int, int], word: bytes) -> None:
        """A device writes by a pin, whose pages stay at home for as long as it lasts."""
        start, end = self.span(pick)
        if self.pages[start].prot != PROT_WRITE:
            code = errno_of(pm.pin_user_pages, self.mm, start, 1)
            assert code in (errno.EFAULT, errno.EPERM), errno.errorcode.get(code)
            return
        with pm.pin_user_pages(self.mm, start, (end - start) // PAGE) as pin:
            pin.write(PAGE // 2, word)
            self.wrote(start + PAGE // 2, word)
            assert pm.migrate_to_device(self.mm, start, end, self.vrams[0]) == 0
            assert pin.read() == self.expected(start, end)
            daddrs = pm.gup_range_dma_map(pin, self.driver.device)
            assert self.driver.device.dma_read(int(daddrs[-1]), PAGE) == self.expected(end - PAGE, end)
            pm.gup_range_dma_unmap(pin, self.driver.device)
            pm.unpin_user_pages(pin, dirty=True)

    @mapped
    @rule(pick=PICKS, word=WORDS, write=st.booleans())
    def dma(self, pick: tuple[int, int, int], word: bytes, write: bool) -> None:
        """hmm_dma_map_*: what is on a device comes home, and is reached there."""
        start, end = self.span(pick)
        prot = self.pages[start].prot
        if not prot & READ or (write and prot != PROT_WRITE):
            return
        device = self.driver.device
        with self._dma_mapped(start, end, WRITE if write else FAULT) as daddrs:
            if write:
                device.dma_write(int(daddrs[0]) + 16, word)
                self.wrote(start + 16, word)
            for i, addr in enumerate(range(start, end, PAGE)):
                assert device.dma_read(int(daddrs[i]), PAGE) == self.pages[addr].data
        assert device.domain.stats()["mappings"] == 0

    @contextmanager
    def _dma_mapped(self, start: int, end: int, flags: int) -> Iterator[Any]:
        device, n = self.driver.device, (end - start) // PAGE
        sub = pm.IntervalNotifier(self.mm, start, end - start, lambda sub, update, seq: sub.set_seq(seq))
        args = pm.hmm_dma_map_alloc(device, sub, start, n)
        found: list[Any] = []

        def attempt() -> bool:
            seq = sub.read_begin(timeout=1.0)
            pm.hmm_range_fault(sub, start, end, args.pfn_list, default_flags=flags, seq=seq)
            found[:] = [pm.hmm_dma_map_pfns(device, args, 0, n, seq=seq)]
            return True

        try:
            self.driver.again(attempt)
            yield found[0]
        finally:
            pm.hmm_dma_unmap_pfns(device, args, 0, n)
            pm.hmm_dma_map_free(device, args)
            sub.remove()

    @mapped
    @rule(pick=PICKS, number=st.integers(0, 1), every=st.integers(1, 3), finish=st.booleans())
    def in_steps(self, pick: tuple[int, int, int], number: int, every: int, finish: bool) -> None:
        """Some of the pages that can, by the driver's choice; or it changes its mind."""
        start, end = self.span(pick)
        vram = self.vrams[number]
        if not self.pages[start].prot & READ or self._vmas(start, end) > 1:
            return
        before = vram.holds(start, end)
        with pm.migrate_vma_setup(self.mm, start, end, vram) as args:
            can = (args.src & pm.MIGRATE_PFN_MIGRATE) != 0
            can[::every] = False
            args.dst[:] = args.alloc_pages(can)
            if finish:
                asked = args.dst != 0
                moved = pm.migrate_vma_pages(args)
                gone = asked & ((args.src & pm.MIGRATE_PFN_MIGRATE) != 0)
                assert moved == gone.sum()
                assert (vram.holds(start, end) == before | gone).all()
            pm.migrate_vma_finalize(args)
        assert finish or (vram.holds(start, end) == before).all()

    def _vmas(self, start: int, end: int) -> int:
        return len(list(self.mm.vmas(start, end)))

    @rule(number=st.integers(0, 1))
    def evict(self, number: int) -> None:
        """All that is in a memory, by its PFNs."""
        vram = self.vrams[number]
        if not vram.pfns:
            return  # nothing has been there yet
        found = pm.migrate_device_range(vram, vram.pfns.start, len(vram.pfns))
        found.dst[:] = pm.MIGRATE_PFN_VALID
        held = vram.used // PAGE
        assert pm.migrate_device_pages(found) == held
        pm.migrate_device_finalize(found)
        assert vram.used == 0

    @mapped
    @rule(pick=PICKS, keep=st.booleans())
    def exclusive(self, pick: tuple[int, int, int], keep: bool) -> None:
        """Pages in a row, for a device that gives them back, or leaves them to the CPU's next touch."""
        start, end = self.span(pick)
        page = self.pages[start]
        if page.kind == "shared" or page.prot != PROT_WRITE:
            return
        if end - start == PAGE:
            got = pm.make_device_exclusive(self.mm, start, self.driver.device)
        else:
            got = pm.make_device_exclusive_range(self.mm, start, end, self.driver.device)
        assert (pm.exclusive_pfns(self.mm, start, end) == got.pfns).all()
        assert got.held == np.count_nonzero(got.pfns)
        if not keep:
            got.release()
            assert not pm.exclusive_pfns(self.mm, start, end).any()

    @mapped
    @rule(pick=PICKS, number=st.integers(0, 1))
    def populate(self, pick: tuple[int, int, int], number: int) -> None:
        start, end = self.span(pick)
        self.vrams[number].populate(start, end)

    @mapped
    @precondition(lambda self: "move" not in self.off)
    @rule(pick=PICKS, back=st.booleans(), word=WORDS)
    def coherent(self, pick: tuple[int, int, int], back: bool, word: bytes) -> None:
        """Exchanged for pages that both reach, written there, and exchanged back or given up."""
        start, end = self.span(pick)
        page = self.pages[start]
        if page.kind == "shared" or page.prot != PROT_WRITE:
            return
        pm.migrate_to_system(self.mm, start, end)
        with pm.DeviceMemory(None, 16 * PAGE, kind="coherent") as vram:
            pm.migrate_to_device(self.mm, start, end, vram)
            there = vram.holds(start, end)
            assert (pm.coherent_pages(self.mm, start, end) == there).all()
            assert vram.used == int(there.sum()) * PAGE
            self.driver.device.write(self.mm, start + 8, word)
            self.wrote(start + 8, word)
            if back:
                pm.migrate_to_system(self.mm, start, end, vram)
                assert vram.used == 0
        assert not pm.coherent_pages(self.mm, start, end).any()

    @rule(count=st.integers(1, 4), word=WORDS, number=st.integers(0, 1))
    def adopt(self, count: int, word: bytes, number: int) -> None:
        """Memory of somebody else's: on a device, written there, and home when it is given back."""
        array = np.full((count + 1) * PAGE, 7, np.uint8)
        own = self.mm.adopt(array)
        at = own.addr - array.ctypes.data
        pm.migrate_to_device(self.mm, own.addr, own.addr + own.size, self.vrams[number])
        self.driver.device.write(self.mm, own.addr + 8, word)
        assert errno_of(self.mm.munmap, own.addr, PAGE) == errno.EBUSY
        array[at : at + 8] = 9
        own.close()
        expected = b"\7" * at + b"\t" * 8 + word + b"\7" * (len(array) - at - 16)
        assert array.tobytes() == expected
        assert not self.vrams[number].holds(own.addr, own.addr + own.size).any()
