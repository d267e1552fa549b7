"""Steps that map memory of each kind, through the API and behind the library's back."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from machine import NUMBERS, PICKS, PROTS, Pick, Steps
from model import HUGE, PAGE, WRITE, File
from model_world import World
from seams import foreign

import pymirror as pm
from pymirror.demo.libc import free_hugetlb_bytes

SMALL_PAGES = 160
#: Of the machine's hugetlb pool, before memory is made of it: who finds it empty at a touch is killed.
ENOUGH_HUGE_PAGES = 24
MAP_FIXED = 0x10

KINDS = (
    "anonymous",
    "shared",
    "memfd_private",
    "memfd_shared",
    "disk_private",
    "disk_shared",
    "again",
    "again",
)
HUGE_KINDS = ("thp", "hugetlb", "hugetlb_shared")
RAW_KINDS = ("anonymous", "memfd_private", "memfd_shared", "again")
#: Features that the library can do without.
DISPENSABLE = ("pagemap_scan", "procmap_query", "populate", "pfn", "uffd", "wp_async", "event_fork")


class MappingSteps(Steps):
    @initialize(
        kinds=st.lists(st.sampled_from(KINDS + HUGE_KINDS), min_size=2, max_size=4),
        disable=st.sampled_from(((), (), (), *((name,) for name in DISPENSABLE))),
        queue_length=st.sampled_from((1024, 1024, 1)),
    )
    def begin(self, kinds: list[str], disable: tuple[str, ...], queue_length: int) -> None:
        self.world = World(disable=disable, queue_length=queue_length)
        self.touched = []
        for i, kind in enumerate(kinds):
            self._map(kind, 4 + i, WRITE, i, self._map_by_api)

    @rule(kind=st.sampled_from(KINDS), pages=st.integers(1, 10), prot=PROTS, which=NUMBERS)
    def mmap(self, kind: str, pages: int, prot: int, which: int) -> None:
        if len(self.world.model.pages) <= SMALL_PAGES:
            self._map(kind, pages, prot, which, self._map_by_api)

    @rule(kind=st.sampled_from(HUGE_KINDS), prot=PROTS)
    def mmap_huge(self, kind: str, prot: int) -> None:
        if sum(page.huge is not None for page in self.world.model.pages.values()) < 3 * HUGE // PAGE:
            self._map(kind, 1, prot, 0, self._map_by_api)

    @rule(kind=st.sampled_from(RAW_KINDS), pages=st.integers(1, 10), prot=PROTS, which=NUMBERS)
    def mmap_foreign(self, kind: str, pages: int, prot: int, which: int) -> None:
        if len(self.world.model.pages) <= SMALL_PAGES:
            self._map(kind, pages, prot, which, self._map_by_libc)

    def _map(self, kind: str, pages: int, prot: int, which: int, how: Callable[..., None]) -> None:
        size = HUGE * (1 + pages % 2) if kind in HUGE_KINDS else pages * PAGE
        file, index = None, 0
        if kind.startswith("hugetlb") and free_hugetlb_bytes() < HUGE * ENOUGH_HUGE_PAGES:
            return
        if kind == "again":
            small = [file for file in self.world.files if file.npages < HUGE // PAGE]
            if not small:
                return
            file = small[which % len(small)]
            index = which % file.npages
            size = min(size, (file.npages - index) * PAGE)
        elif kind.startswith(("memfd", "disk")):
            file = self._new_file(pages + which % 3, disk=kind.startswith("disk"), seed=which)
        shared = kind.endswith("shared") or (kind == "again" and which % 2 == 0)
        try:
            how(kind, size, prot, shared, file, index)
        except pm.MirrorError as refused:
            if refused.errno != errno.ENOMEM or not kind.startswith("hugetlb"):
                raise
        assert self.world.settle() == []

    def _map_by_api(
        self, kind: str, size: int, prot: int, shared: bool, file: File | None, index: int
    ) -> None:
        huge = kind.removesuffix("_shared") if kind in HUGE_KINDS else None
        fd = -1 if file is None else file.fd
        region = self.world.mm.mmap(size, prot=prot, shared=shared, fd=fd, offset=index * PAGE, huge=huge)
        if file is None and shared:
            file = File(region.fd)
            self.world.files.append(file)
        self.world.regions.append(region)
        watched = self.world.born_watched(region.addr, region.addr + size)
        self.world.model.map(
            region.addr,
            size,
            prot,
            shared=shared,
            huge=huge,
            file=file,
            index=index,
            owner=region,
            watched=watched,
        )

    def _map_by_libc(
        self, kind: str, size: int, prot: int, shared: bool, file: File | None, index: int
    ) -> None:
        flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | (
            mmap.MAP_ANONYMOUS if file is None else 0
        )
        fd = -1 if file is None else file.fd
        addr = foreign.mmap(0, size, prot, flags, fd, index * PAGE)
        self.world.model.map(addr, size, prot, shared=shared, file=file, index=index)

    def _new_file(self, pages: int, *, disk: bool, seed: int) -> File:
        if disk:
            with tempfile.TemporaryFile(prefix="pymirror-") as temporary:
                fd = os.dup(temporary.fileno())
        else:
            fd = os.memfd_create("pymirror-test")
        os.ftruncate(fd, pages * PAGE)
        file = File(fd, disk=disk)
        os.close(fd)
        for index in range(0, pages, 2):
            file.pages[index] = bytes([1 + (seed + index) % 255]) * PAGE
            os.pwrite(file.fd, file.pages[index], index * PAGE)
        self.world.files.append(file)
        return file

    @rule(pick=PICKS, prot=PROTS)
    def map_over(self, pick: Pick, prot: int) -> None:
        """mmap(MAP_FIXED) behind the library's back: other memory at the same address."""
        span = self.span(pick)
        if span is None or not self.foreign_may_take(*span):
            return
        start, end = span
        world = self.world
        taken = world.model.inside(start, end)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        world.change(
            lambda: foreign.mmap(start, end - start, prot, flags),
            api=False,
            changed=[addr for addr, _ in taken],
            within=[span],
            event=pm.Event.UNMAP,
        )
        world.doubt(addr for addr, _ in taken)
        world.model.map(start, end - start, prot)
