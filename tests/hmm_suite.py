# SPDX-License-Identifier: MIT
"""What the kernel's hmm-tests have in common: their names, their two fixtures, and their variants."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from mirroring import PAGE
from racing import in_child

import pymirror as pm
from pymirror.drivers.dmirror import LINUX_6_12, Dmirror, Quirks
from pymirror.drivers.dmirror_uapi import PROT_DEV_COHERENT_LOCAL, PROT_DEV_PRIVATE_LOCAL, PROT_WRITE

BUFFER_PAGES = 1024
TIMES = 10
HUGE = 2 << 20
HUGE_PAGES = HUGE // PAGE

#: A device that takes huge pages whole, as that of the newest kernels does.
LINUX_NEWEST = Quirks(
    chunk_pages=HUGE_PAGES,
    overrun_pages=0,
    mapped_folios_stay=False,
    large_folios_not_had=False,
    setup_splits=False,
)

#: The 38 tests of tools/testing/selftests/mm/hmm-tests.c, in its order.
NAMES = (
    "open_close",
    "anon_read",
    "anon_read_prot",
    "anon_write",
    "anon_write_prot",
    "anon_write_child",
    "anon_write_child_shared",
    "anon_write_huge",
    "anon_write_hugetlbfs",
    "file_read",
    "file_write",
    "migrate",
    "migrate_file_private",
    "migrate_fault",
    "migrate_release",
    "migrate_shared",
    "migrate_mixed",
    "migrate_multiple",
    "anon_read_multiple",
    "anon_teardown",
    "mixedmap",
    "snapshot",
    "compound",
    "double_map",
    "exclusive",
    "exclusive_mprotect",
    "exclusive_cow",
    "hmm_gup_test",
    "hmm_cow_in_device",
    "migrate_anon_huge_empty",
    "migrate_anon_huge_zero",
    "migrate_anon_huge_free",
    "migrate_anon_huge_fault",
    "migrate_partial_unmap_fault",
    "migrate_remap_fault",
    "migrate_anon_huge_err",
    "migrate_anon_huge_zero_err",
    "benchmark_thp_migration",
)

#: Those of them that user space cannot have, with the reason.
NOT_POSSIBLE: dict[str, str] = {}

Words = np.ndarray[Any, np.dtype[np.uint64]]


def pattern(pages: int, salt: int = 0) -> bytes:
    """Other bytes in each page."""
    numbers = np.arange(salt, salt + pages * PAGE // 8, dtype=np.uint64)
    return (numbers * np.uint64(0x9E3779B97F4A7C15)).tobytes()


class Hmm:
    """Open test devices over one address space."""

    def __init__(self, delivery: str, kind: str, devices: int, quirks: Quirks) -> None:
        self.kind, self.delivery, self.quirks = kind, delivery, quirks
        self.stack = ExitStack()
        self.mm = self.stack.enter_context(pm.AddressSpace(fault_delivery=delivery))
        self.devs = [self.open(self.mm, number) for number in range(devices)]
        self.dev = self.devs[0]

    def open(self, mm: pm.AddressSpace, number: int = 0) -> Dmirror:
        dev = Dmirror(mm, f"hmm_dmirror{number}", kind=self.kind, quirks=self.quirks)
        self.stack.callback(dev.close)
        return dev

    @property
    def resident(self) -> int:
        """The snapshot of a page of this device's memory that may be written."""
        kinds = {"private": PROT_DEV_PRIVATE_LOCAL, "coherent": PROT_DEV_COHERENT_LOCAL}
        return kinds[self.kind] | PROT_WRITE

    def buffer(self, pages: int = BUFFER_PAGES, *, salt: int = 0, **how: Any) -> pm.Region:
        """Memory with a pattern in it."""
        buf = self.mm.mmap(pages * PAGE, **how)
        ctypes.memmove(buf.addr, pattern(pages, salt), buf.size)
        return buf

    def huge(self, pages: int = HUGE_PAGES, *, touch: bool = True) -> pm.Region:
        buf = self.mm.mmap(pages * PAGE, huge="thp")
        if touch:
            ctypes.memmove(buf.addr, pattern(pages), buf.size)
        return buf

    def snapshot(self, buf: pm.Region, first: int = 0, pages: int | None = None) -> bytes:
        pages = buf.size // PAGE - first if pages is None else pages
        return self.dev.snapshot(buf.addr + first * PAGE, pages).data

    def in_child(self, work: Callable[[Dmirror], object]) -> None:
        """In a forked child, that has a device of its own over its memory."""

        def child() -> None:
            with pm.AddressSpace(fault_delivery=self.delivery) as mm:
                dev = Dmirror(mm, kind=self.kind, quirks=self.quirks)
                work(dev)
                dev.close()

        assert in_child(child) == 0

    def close(self) -> None:
        self.stack.close()


def content(buf: pm.Region, first: int = 0, pages: int | None = None) -> bytes:
    """What the CPU reads, from its own touch."""
    pages = buf.size // PAGE - first if pages is None else pages
    return ctypes.string_at(buf.addr + first * PAGE, pages * PAGE)


VARIANTS = [
    pytest.param((delivery, kind), id=f"hmm_device_{kind}-{delivery}")
    for kind in ("private", "coherent")
    for delivery in ("thread", "inline")
]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> tuple[str, str]:
    """How CPU faults are delivered, and the kind of the device's memory."""
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def quirks() -> Quirks:
    return LINUX_6_12


@pytest.fixture
def hmm(variant: tuple[str, str], quirks: Quirks, nothing_left_behind: None) -> Iterator[Hmm]:
    one = Hmm(*variant, 1, quirks)
    yield one
    one.close()


@pytest.fixture
def hmm2(variant: tuple[str, str], quirks: Quirks, nothing_left_behind: None) -> Iterator[Hmm]:
    two = Hmm(*variant, 2, quirks)
    yield two
    two.close()
