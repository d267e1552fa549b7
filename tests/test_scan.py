"""What PAGEMAP_SCAN tells at once is what the pagemap says page by page, whatever happened before."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mirroring import FAULT, PAGE, WRITE
from racing import run_child, sleeping_clone, waiting_child
from seams import foreign, needs

import pymirror as pm

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

HUGE = 2 * pm.MiB
SIZE = 2 * HUGE
NPAGES = SIZE // PAGE
LEARNT = 3
"""Looks after which all is known that will be: a page of one's own, what is mapped alone, and its use."""

PRESENT, FILE, WP, EXCLUSIVE = (np.uint64(1 << bit) for bit in (63, 61, 57, 56))
PFN = np.uint64((1 << 55) - 1)
VALID_WRITE = np.uint64(pm.HMM_PFN_VALID | pm.HMM_PFN_WRITE)


@pytest.fixture(autouse=True)
def scan() -> None:
    needs("pagemap_scan", "uffd_events")


def raw(addr: int) -> np.ndarray:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        return np.frombuffer(os.pread(fd, NPAGES * 8, addr // PAGE * 8), np.uint64)
    finally:
        os.close(fd)


def expected(addr: int, orders: np.ndarray, shared: bool) -> np.ndarray:
    """VALID and WRITE of each page; one PMD is read-only for all of its pages."""
    entries = raw(addr)
    present = (entries & PRESENT) != 0
    own = (entries & (EXCLUSIVE | FILE | WP)) == EXCLUSIVE
    if shared:
        own[:] = True
    for first in range(0, NPAGES, HUGE // PAGE):
        huge = slice(first, first + HUGE // PAGE)
        if orders[first] == 9:
            own[huge] = own[huge].all()
    return np.where(present, np.where(own, VALID_WRITE, np.uint64(pm.HMM_PFN_VALID)), np.uint64(0))


def look(rng: pm.Range, addr: int, *, shared: bool = False, pfns: bool = True) -> None:
    for _ in range(LEARNT):
        rng.wait_until_valid(timeout=5)
        rng.snapshot()
        orders = np.asarray(pm.hmm_pfn_to_map_order(rng.pfns))
        want = expected(addr, orders, shared)
        assert (rng.pfns & VALID_WRITE).tolist() == want.tolist()
        if pfns:
            there = want != 0
            seen = np.asarray(pm.hmm_pfn_to_pfn(rng.pfns))[there]
            assert seen.tolist() == (raw(addr)[there] & PFN).tolist()


def bytes_read(work: Callable[[], object]) -> int:
    """By this process while ``work`` runs, from the pagemap for one."""

    def rchar() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = rchar()
    of_rchar = rchar() - before
    before = rchar()
    work()
    return rchar() - before - of_rchar


@contextmanager
def memory(kind: str, disable: tuple[str, ...]) -> Iterator[tuple[pm.Range, int]]:
    """A range over SIZE bytes on a huge page's boundary, watched, that asks for what a snapshot shows."""
    with ExitStack() as stack:
        mm = stack.enter_context(pm.AddressSpace(disable=disable))
        if kind == "shared":
            buf = mm.mmap(SIZE + HUGE, shared=True)
        else:
            buf = mm.mmap(SIZE + HUGE, huge=None if kind == "small" else kind)
        addr = buf.addr + -buf.addr % HUGE
        if kind == "small":
            mm.madvise(addr, SIZE, mmap.MADV_NOHUGEPAGE)
        rng = stack.enter_context(stack.enter_context(pm.Mirror(mm)).range(addr, addr + SIZE))
        rng.default_flags = WRITE
        yield rng, addr


def fill(addr: int, npages: int = NPAGES, page: int = 0) -> None:
    for i in range(page, page + npages):
        ctypes.c_char.from_address(addr + i * PAGE).value = b"\1"


PFNS = [pytest.param((), id="pfns"), pytest.param(("pfn",), id="presence")]


@pytest.mark.parametrize(
    ("kind", "disable"),
    [
        ("thp", ()),
        pytest.param("hugetlb", (), marks=pytest.mark.hugetlb),
        ("small", ("pfn",)),
        pytest.param("hugetlb", ("pfn",), marks=pytest.mark.hugetlb),
        ("shared", ("pfn",)),
    ],
)
def test_what_is_known_costs_no_entry_a_page(kind: str, disable: tuple[str, ...]) -> None:
    if "pfn" not in disable:
        needs("pfn")
    with memory(kind, disable) as (rng, addr):
        fill(addr)
        look(rng, addr, shared=kind == "shared", pfns=not disable)
        if kind == "thp" and pm.hmm_pfn_to_map_order(int(rng.pfns[0])) == 0:
            pytest.skip("the kernel gave no huge page")
        assert bytes_read(rng.snapshot) < NPAGES
        assert bytes_read(rng.fault) < NPAGES


@pytest.mark.parametrize("disable", PFNS)
def test_what_an_invalidation_covered_is_read_again(disable: tuple[str, ...]) -> None:
    with memory("thp", disable) as (rng, addr):
        fill(addr)
        look(rng, addr, pfns=not disable)
        foreign.madvise(addr, PAGE, mmap.MADV_DONTNEED)
        rng.mm.sync()
        rng.wait_until_valid(timeout=5)
        assert bytes_read(rng.snapshot) >= NPAGES * 8
        look(rng, addr, pfns=not disable)


STEP = st.tuples(
    st.sampled_from(["write", "read", "drop", "free", "clone", "fork", "reap", "fault", "collapse", "split"]),
    st.integers(0, NPAGES - 1),
    st.sampled_from([1, 7, 64, 512, NPAGES]),
)


def take(step: tuple[str, int, int], rng: pm.Range, addr: int, children: ExitStack) -> None:
    what, page, n = step
    n = min(n, NPAGES - page)
    start, size = addr + page * PAGE, n * PAGE
    if what == "write":
        fill(addr, n, page)
    elif what == "read":
        for i in range(page, page + n):
            _ = ctypes.c_char.from_address(addr + i * PAGE).value
    elif what in ("drop", "free"):
        foreign.madvise(start, size, mmap.MADV_DONTNEED if what == "drop" else mmap.MADV_FREE)
    elif what == "clone":
        children.enter_context(sleeping_clone())
    elif what == "fork":
        children.enter_context(waiting_child())
    elif what == "reap":
        children.close()
    elif what == "fault":
        rng.wait_until_valid(timeout=5)
        rng.fault()
    elif what == "collapse":
        try_to(foreign.madvise, addr, SIZE, 25)
    elif what == "split":
        foreign.mprotect(start, PAGE, mmap.PROT_READ)
        foreign.mprotect(start, PAGE, mmap.PROT_READ | mmap.PROT_WRITE)


def try_to(call: Callable[..., object], *args: int) -> None:
    """What the kernel may refuse."""
    try:
        call(*args)
    except OSError:
        return


@pytest.mark.parametrize("disable", PFNS)
@pytest.mark.parametrize("kind", ["small", "thp"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEP, max_size=6))
@example(steps=[("write", 0, NPAGES), ("clone", 0, 1), ("write", 9, 7), ("reap", 0, 1), ("fault", 0, 1)])
@example(steps=[("write", 0, NPAGES), ("fork", 0, 1), ("reap", 0, 1), ("write", 3, 512)])
@example(steps=[("read", 0, NPAGES), ("write", 100, 64), ("collapse", 0, 1), ("split", 77, 1)])
@example(steps=[("write", 0, NPAGES), ("drop", 5, 7), ("read", 5, 1), ("fault", 0, 1), ("split", 0, 1)])
def test_after_any_steps(kind: str, disable: tuple[str, ...], steps: list[tuple[str, int, int]]) -> None:
    with memory(kind, disable) as (rng, addr), ExitStack() as children:
        for step in steps:
            take(step, rng, addr, children)
            rng.mm.sync()
            look(rng, addr, pfns=not disable)


@contextmanager
def child_from_before(work: Callable[[], object]) -> Iterator[None]:
    """A child that did ``work`` and then keeps what it has until the end of the block."""
    ready, done = os.pipe()
    stay, leave = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(leave)
        os.close(ready)
        run_child(lambda: (work(), os.write(done, b"r"), os.read(stay, 1)))
    try:
        assert os.read(ready, 1) == b"r"
        yield
    finally:
        for fd in (ready, done, stay, leave):
            os.close(fd)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("disable", PFNS)
@pytest.mark.parametrize("split", [False, True])
def test_a_child_of_before_that_keeps_part_of_a_huge_page(disable: tuple[str, ...], split: bool) -> None:
    own = mmap.mmap(-1, SIZE + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(own))
    addr += -addr % HUGE
    foreign.madvise(addr, SIZE, mmap.MADV_HUGEPAGE)
    fill(addr)
    gone = [(addr, PAGE), (addr + HUGE - PAGE, PAGE)]
    with (
        child_from_before(lambda: [foreign.munmap(*part) for part in gone]),
        pm.AddressSpace(disable=disable) as mm,
        pm.Mirror(mm) as mirror,
        mirror.range(addr, addr + SIZE) as rng,
    ):
        rng.default_flags = FAULT
        look(rng, addr, pfns=not disable)
        if split:
            take(("split", 7, 1), rng, addr, ExitStack())
            look(rng, addr, pfns=not disable)
        assert not (rng.pfns[HUGE // PAGE :] & pm.HMM_PFN_WRITE).any()


@pytest.mark.parametrize("disable", PFNS)
def test_shared_pages_moved_into_what_was_known(disable: tuple[str, ...]) -> None:
    elsewhere = foreign.mmap(0, 16 * PAGE)
    fill(elsewhere, 16)
    with child_from_before(lambda: None), memory("small", disable) as (rng, addr):
        fill(addr)
        look(rng, addr, pfns=not disable)
        foreign.mremap(elsewhere, 16 * PAGE, 16 * PAGE, 3, addr + 100 * PAGE)
        rng.mm.sync()
        look(rng, addr, pfns=not disable)
        assert not (rng.pfns[100:116] & pm.HMM_PFN_WRITE).any()
