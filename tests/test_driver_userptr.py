"""userptr: pages are got before a job, validated when it is submitted, got again when it was stopped."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mirroring import PAGE, as_bytes, errno_in_a_callback, filled
from racing import CHANGES, FOREIGN, GONE, changes, in_child
from seams import Background, errno_of, foreign, needs, points

import pymirror as pm
from pymirror.drivers import userptr
from pymirror.drivers.userptr import Read, Userptr, UserptrBo, Write

PAGES = 8


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Userptr]:
    with Userptr(mm, timeout=10.0) as made:
        yield made
    assert made.device.page_table.stats()["entries"] == 0
    assert mm.stats()["interval_notifiers"] == 0


def whole(driver: Userptr, buf: pm.Region, **how: bool) -> UserptrBo:
    return driver.gem_userptr(buf.addr, buf.size, **how)


class TestJobs:
    def test_commands_run_in_order(self, driver: Userptr) -> None:
        buf = filled(driver.mm, PAGES)
        bo = whole(driver, buf)
        before = bytes(as_bytes(buf)[PAGE - 2 : PAGE + 2])
        job = [Read(bo, PAGE - 2, 4), Write(bo, PAGE - 2, b"jobs"), Read(bo, PAGE - 2, 4)]
        assert driver.submit(job) == [before, b"", b"jobs"]
        assert bytes(as_bytes(buf)[PAGE - 2 : PAGE + 2]) == b"jobs"
        assert driver.submit([]) == []

    def test_pages_are_got_once_and_again_after_an_invalidation(self, driver: Userptr) -> None:
        buf = filled(driver.mm, PAGES)
        bo = whole(driver, buf)
        for _ in range(3):
            driver.submit([Read(bo, 0, PAGE)])
        assert (driver.stats.get_pages, driver.stats.pages) == (1, PAGES)
        driver.mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
        assert not bo.valid
        assert driver.submit([Read(bo, 0, PAGE)]) == [bytes(PAGE)]
        assert (driver.stats.get_pages, driver.stats.invalidations) == (2, 1)

    def test_they_need_not_be_got_before_the_first_job(self, driver: Userptr) -> None:
        bo = whole(driver, filled(driver.mm, PAGES), validate=False)
        assert (bo.valid, driver.stats.get_pages) == (False, 0)
        driver.submit([Read(bo, 0, 1)])
        assert bo.valid

    def test_an_invalidation_of_what_is_not_on_the_device_is_a_false_one(self, driver: Userptr) -> None:
        buf = filled(driver.mm, PAGES)
        whole(driver, buf, validate=False)
        driver.mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
        assert (driver.stats.invalidations, driver.stats.false_invalidations) == (1, 1)

    def test_a_readonly_object_takes_no_pages_for_writing(self, driver: Userptr) -> None:
        buf = driver.mm.mmap(PAGES * PAGE, prot=mmap.PROT_READ)
        assert errno_of(whole, driver, buf) == errno.EPERM
        bo = whole(driver, buf, readonly=True)
        assert driver.submit([Read(bo, 0, 4)]) == [bytes(4)]
        assert errno_of(driver.submit, [Write(bo, 0, b"x")]) == errno.EACCES

    def test_objects_over_the_same_memory(self, driver: Userptr) -> None:
        buf = driver.mm.mmap(PAGES * PAGE)
        readonly = whole(driver, buf, readonly=True)
        other = driver.gem_userptr(buf.addr + PAGE, PAGE)
        driver.submit([Write(other, 0, b"other"), Read(readonly, PAGE, 5)])
        whole(driver, buf, readonly=True)
        assert driver.submit([Write(other, 1, b"THE"), Read(readonly, PAGE, 5)]) == [b"", b"oTHEr"]
        driver.gem_close(other)
        assert driver.submit([Read(readonly, PAGE, 5)]) == [b"oTHEr"]


class TestRefusals:
    def test_commands_beyond_an_object(self, driver: Userptr) -> None:
        bo = whole(driver, filled(driver.mm, PAGES))
        for offset, n in ((-1, 1), (0, PAGES * PAGE + 1), (PAGES * PAGE, 1), (4, -1)):
            assert errno_of(driver.submit, [Read(bo, 0, 1), Read(bo, offset, n)]) == errno.EINVAL
        assert driver.stats.jobs == 0

    def test_objects_that_are_closed_or_anothers(self, driver: Userptr) -> None:
        buf = filled(driver.mm, PAGES)
        bo = whole(driver, buf)
        driver.gem_close(bo)
        driver.gem_close(bo)
        assert errno_of(driver.submit, [Read(bo, 0, 1)]) == errno.EINVAL
        with Userptr(driver.mm) as other:
            assert errno_of(driver.submit, [Read(whole(other, buf), 0, 1)]) == errno.EINVAL

    @pytest.mark.parametrize(("start", "size"), [(1, PAGE), (0, 0), (0, 100), (0, -PAGE), (0, 1 << 48)])
    def test_intervals_that_make_no_sense(self, driver: Userptr, start: int, size: int) -> None:
        buf = filled(driver.mm, PAGES)
        assert errno_of(driver.gem_userptr, buf.addr + start, size) == errno.EINVAL

    def test_memory_that_is_not_there(self, driver: Userptr) -> None:
        buf = filled(driver.mm, PAGES)
        bo = whole(driver, buf)
        driver.mm.munmap(buf.addr + PAGE, PAGE)
        assert errno_of(driver.submit, [Read(bo, 0, 1)]) == errno.EFAULT
        assert errno_of(whole, driver, buf) == errno.EFAULT

    def test_a_closed_address_space(self) -> None:
        mm = pm.AddressSpace()
        driver = Userptr(mm)
        buf = filled(mm, PAGES)
        bo = whole(driver, buf)
        mm.close()
        assert errno_of(driver.submit, [Read(bo, 0, 1)]) == errno.ESRCH
        assert errno_of(whole, driver, buf) == errno.ESRCH
        driver.close()

    def test_a_forked_child(self, driver: Userptr) -> None:
        bo = whole(driver, filled(driver.mm, PAGES))

        def child() -> None:
            assert errno_of(driver.submit, [Read(bo, 0, 1)]) == errno.ESRCH
            driver.close()

        assert in_child(child) == 0
        driver.submit([Read(bo, 0, 1)])


class TestRestart:
    def test_a_job_that_is_stopped_goes_on_where_it_was(self, driver: Userptr) -> None:
        needs("uffd_events", "pagemap")
        buf = filled(driver.mm, PAGES)
        bo = whole(driver, buf)
        job = [Write(bo, 3 * PAGE, b"once"), Read(bo, 0, 4), Read(bo, 3 * PAGE, 4)]
        with points("ACCESS_LOOKED_UP") as point:
            running = Background(driver.submit, job)
            point.wait()  # the write
            point.release()
            driver.mm.madvise(buf.addr, PAGE, mmap.MADV_DONTNEED)
            results = running.result()
        assert results[0] == b""
        assert results[1] in (bytes(4), bytes([0, 1, 2, 3]))
        assert results[2] == b"once"

    @changes(FOREIGN)
    def test_what_changed_behind_its_back_stops_it_before_a_byte_is_had(
        self, driver: Userptr, change: str
    ) -> None:
        needs("uffd_events", "pagemap")
        buf = filled(driver.mm, 4)
        bo = whole(driver, buf)
        with points("ACCESS_COPIED") as point:
            running = Background(driver.submit, [Read(bo, 0, 4), Read(bo, PAGE, 4)])
            point.wait()  # the first command has copied
            FOREIGN[change](driver.mm, buf.addr + PAGE)
            point.release()
            if change in GONE:
                assert errno_of(running.result) == errno.EFAULT
            else:
                assert running.result() == [bytes([0, 1, 2, 3]), bytes(4)]
        assert driver.stats.restarts >= 1

    @changes(CHANGES)
    def test_a_change_while_pages_are_got(self, driver: Userptr, change: str) -> None:
        needs("uffd_events", "pagemap")
        buf = filled(driver.mm, 4)
        bo = whole(driver, buf, validate=False)
        with points("WALK_AFTER_READ") as point:
            running = Background(driver.submit, [Read(bo, PAGE, 4)])
            point.wait()
            CHANGES[change](driver.mm, buf.addr + PAGE)
            point.release()
            if change in GONE:
                assert errno_of(running.result) == errno.EFAULT
            else:
                assert running.result() == [bytes(4)]
        assert driver.retry.stats.retries >= 1

    def test_a_callback_cannot_close_an_object_and_nothing_is_changed(self, driver: Userptr) -> None:
        buf = filled(driver.mm, 4)
        bo = whole(driver, buf)
        assert errno_in_a_callback(driver.mm, driver.gem_close, bo) == errno.EDEADLK
        assert driver.submit([Read(bo, 0, 4)]) == [bytes(as_bytes(buf)[:4])]

    def test_closing_anothers_object(self, driver: Userptr) -> None:
        buf = filled(driver.mm, 1)
        with Userptr(driver.mm) as other:
            theirs = whole(other, buf)
            assert errno_of(driver.gem_close, theirs) == errno.EINVAL
            assert other.submit([Read(theirs, 0, 4)]) == [bytes(as_bytes(buf)[:4])]

    def test_what_became_valid_at_the_deadline(
        self, driver: Userptr, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By another thread's job, after this one had looked."""
        bo = whole(driver, filled(driver.mm, 1), validate=False)
        looks = iter(range(9))

        def monotonic() -> float:
            bo.valid = (look := next(looks)) >= 2
            return 1e9 * look

        monkeypatch.setattr(driver, "_get_user_pages", lambda bo: None)
        monkeypatch.setattr(userptr, "time", SimpleNamespace(monotonic=monotonic))
        assert errno_of(driver.submit, [Read(bo, 0, 4)]) == errno.ETIMEDOUT

    def test_pages_that_stay_invalid(self, mm: pm.AddressSpace) -> None:
        with Userptr(mm, timeout=0.05) as driver:
            buf = filled(mm, 1)
            bo = whole(driver, buf)
            with mm.invalidate(buf.addr, buf.addr + PAGE):
                assert errno_of(driver.submit, [Read(bo, 0, 1)]) == errno.EBUSY

    def test_one_that_may_not_wait_is_refused_while_the_lock_is_held(self, driver: Userptr) -> None:
        buf = filled(driver.mm, PAGES)
        bo = whole(driver, buf)
        with driver.notifier_lock:
            reap = Background(errno_of, driver.mm.oom_reap, buf.addr, buf.addr + buf.size)
            assert reap.result() == errno.EAGAIN
        assert driver.submit([Read(bo, 0, 4)]) == [bytes([0, 1, 2, 3])]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["read", "write", "cpu", "drop", "foreign", "protect", "fork", "again"]),
            st.integers(0, PAGES * PAGE - 1),
            st.integers(0, 2 * PAGE),
        ),
        max_size=15,
    )
)
@settings(deadline=None, max_examples=40, derandomize="CI" in os.environ)
def test_the_device_sees_what_the_cpu_sees(steps: list[tuple[str, int, int]]) -> None:
    with pm.AddressSpace() as mm, Userptr(mm, timeout=10.0) as driver:
        buf = mm.mmap(PAGES * PAGE)
        bo, model, readonly = whole(driver, buf), bytearray(buf.size), set[int]()
        for number, (step, at, n) in enumerate(steps, 1):
            n = min(n, buf.size - at)
            page = at // PAGE
            addr = buf.addr + page * PAGE
            if step in ("read", "write"):
                data = bytes([number]) * n
                command = Read(bo, at, n) if step == "read" else Write(bo, at, data)
                if readonly and not bo.valid:
                    assert errno_of(driver.submit, [command]) == errno.EPERM
                elif step == "read":
                    assert driver.submit([command]) == [bytes(model[at : at + n])]
                else:
                    driver.submit([command])
                    model[at : at + n] = data
            elif step == "cpu" and page not in readonly:
                buf[at] = model[at] = number
            elif step in ("drop", "foreign"):
                (mm if step == "drop" else foreign).madvise(addr, PAGE, mmap.MADV_DONTNEED)
                model[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
                mm.sync()
            elif step == "protect":
                readonly ^= {page}
                mm.mprotect(addr, PAGE, mmap.PROT_READ if page in readonly else 3)
            elif step == "fork":
                assert in_child(lambda: None) == 0
            elif step == "again":
                driver.gem_close(bo)
                bo = whole(driver, buf, validate=False)
        assert not mm.errors
        assert driver.device.stats.stale == 0
