"""The IOVA allocator against a model that looks at every page; and with a million IOVAs live."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from racing import in_child

import pymirror as pm
from pymirror._shim import ffi, lib

PAGE = 4096
FIRST, LAST = 3, 300
STRESS = int(os.environ.get("PYMIRROR_STRESS", "1"))
ALL = (1 << 64) - 1


def space(first: int, last: int) -> Any:
    made = ffi.new("pm_iova_space **")
    assert lib.pm_iova_create(first, last, made) == 0
    return ffi.gc(made[0], lib.pm_iova_destroy)


def alloc(native: Any, size: int, limit: int = ALL) -> int:
    """The IOVA, or a negative errno."""
    out = ffi.new("uint64_t *")
    err = lib.pm_iova_alloc(native, size, limit, out)
    return int(out[0]) if err == 0 else int(err)


def stats(native: Any) -> Any:
    found = ffi.new("struct pm_iova_stats *")
    assert lib.pm_iova_stats(native, found) == 0
    return found


def power_of_two(pages: int) -> int:
    return 1 << (pages - 1).bit_length()


def taken(pages: int) -> int:
    """Pages that an allocation of so many takes: small ones are rounded up."""
    return power_of_two(pages) if pages <= 32 else pages


class IovaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.native = space(FIRST * PAGE, (LAST + 1) * PAGE - 1)
        self.live: dict[int, int] = {}
        self.used: set[int] = set()
        self.reserved: set[int] = set()

    def room(self, pages: int, last: int) -> bool:
        return any(
            not self.used.intersection(range(first, first + taken(pages)))
            for first in range(FIRST, min(last, LAST) + 2 - taken(pages))
            if first % power_of_two(pages) == 0
        )

    @rule(
        pages=st.integers(1, 70),
        missing=st.integers(0, PAGE - 1),
        last=st.one_of(st.just(ALL // PAGE), st.integers(1, LAST)),
    )
    def alloc(self, pages: int, missing: int, last: int) -> None:
        got = alloc(self.native, pages * PAGE - missing, last * PAGE + PAGE - 1)
        if got < 0:
            assert got == -errno.ENOSPC
            assert not self.room(pages, last)
            return
        first = got // PAGE
        assert got % (power_of_two(pages) * PAGE) == 0
        mine = set(range(first, first + taken(pages)))
        assert not mine & self.used, "given out twice"
        assert first >= FIRST
        assert max(mine) <= min(last, LAST)
        self.used |= mine
        self.live[got] = pages

    @precondition(lambda self: self.live)
    @rule(data=st.data(), other=st.integers(1, 80))
    def free(self, data: Any, other: int) -> None:
        iova = data.draw(st.sampled_from(sorted(self.live)))
        pages = self.live[iova]
        if other != pages:
            assert lib.pm_iova_free(self.native, iova, other * PAGE) == -errno.EINVAL
        assert lib.pm_iova_free(self.native, iova, pages * PAGE) == 0
        assert lib.pm_iova_free(self.native, iova, pages * PAGE) == -errno.ENOENT
        del self.live[iova]
        self.used -= set(range(iova // PAGE, iova // PAGE + taken(pages)))

    @rule(page=st.integers(0, LAST + 10), pages=st.integers(1, 40))
    def free_what_is_not_live(self, page: int, pages: int) -> None:
        if page * PAGE not in self.live:
            assert lib.pm_iova_free(self.native, page * PAGE, pages * PAGE) == -errno.ENOENT
            assert lib.pm_iova_size(self.native, page * PAGE) == -errno.ENOENT

    @precondition(lambda self: len(self.reserved) < 30)
    @rule(first=st.integers(FIRST, LAST), n=st.integers(1, 5))
    def reserve(self, first: int, n: int) -> None:
        window = set(range(first, min(first + n, LAST + 1)))
        busy = bool(window & (self.used - self.reserved))
        got = lib.pm_iova_reserve(self.native, first * PAGE, max(window) * PAGE)
        assert got == (-errno.EBUSY if busy else 0)
        if not busy:
            self.reserved |= window
            self.used |= window

    @invariant()
    def nothing_is_lost(self) -> None:
        now = stats(self.native)
        assert now.live == len(self.live)
        assert now.live_bytes == sum(taken(pages) for pages in self.live.values()) * PAGE
        assert now.reserved_bytes == len(self.reserved) * PAGE
        whole = now.live_bytes + now.cached_bytes + now.reserved_bytes + now.unused_bytes
        assert whole == (LAST - FIRST + 1) * PAGE
        assert all(lib.pm_iova_size(self.native, iova) == pages * PAGE for iova, pages in self.live.items())


def test_the_allocator_behaves_as_the_model() -> None:
    run_state_machine_as_test(
        IovaMachine,
        settings=settings(
            max_examples=60 * STRESS, stateful_step_count=60, deadline=None, derandomize="CI" in os.environ
        ),
    )


@pytest.mark.parametrize("live", [1_000, 200_000])
def test_many_are_all_different_and_all_come_back(live: int) -> None:
    native = space(PAGE, (1 << 40) - 1)
    iovas = [alloc(native, PAGE) for _ in range(live)]
    assert len(set(iovas)) == live
    assert max(iovas) == (1 << 40) - PAGE
    assert min(iovas) == (1 << 40) - live * PAGE, "not from the top"
    for iova in iovas[::2] + iovas[1::2]:
        assert lib.pm_iova_free(native, iova, PAGE) == 0
    now = stats(native)
    assert (now.live, now.live_bytes) == (0, 0)
    assert now.unused_bytes + now.cached_bytes == (1 << 40) - PAGE
    assert alloc(native, (1 << 40) - (1 << 30)) == 1 << 30


def test_a_domain_leaves_out_page_0_and_the_window_of_interrupts() -> None:
    domain = pm.IommuDomain(first=0, last=(1 << 32) - 1)
    iovas = lib.pm_domain_iovas(domain.native)
    got = [alloc(iovas, 1 << 20) for _ in range(4094)]
    assert len(set(got)) == 4094
    assert not {0, 0xFEE00000} & set(got)
    assert alloc(iovas, 1 << 20) == -errno.ENOSPC


def test_a_forked_child_is_refused() -> None:
    native = space(PAGE, (1 << 20) - 1)
    held = alloc(native, PAGE)

    def child() -> None:
        assert alloc(native, PAGE) == -errno.ESRCH
        assert lib.pm_iova_free(native, held, PAGE) == -errno.ESRCH
        assert alloc(space(PAGE, (1 << 20) - 1), PAGE) > 0

    assert in_child(child) == 0
    assert lib.pm_iova_free(native, held, PAGE) == 0
