"""The fault buffer of a device: entries, batches, coalescing, overflow, replay, cancel, and its end."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator

import pytest
from mirroring import FAULT, PAGE, WRITE, FaultDriver, filled
from racing import ctrl_c_in, eventually
from seams import Background, errno_of

import pymirror as pm
from pymirror.fault_buffer import FaultBuffer, coalesce

PAGES = 8


class Buffered(FaultDriver):
    """A driver that takes faults from a buffer."""

    def __init__(self, mm: pm.AddressSpace, size: int = 256, timeout: float = 10.0) -> None:
        super().__init__(mm)
        self.buffer = FaultBuffer(size, timeout=timeout)
        self.device.set_fault_handler(self.buffer)
        self.memory = filled(mm, PAGES)

    def read(self, page: int) -> Background[bytes]:
        """A device access in a thread of its own, which has written its entry."""
        before = self.counted()
        access = Background(self.device.read, self.mm, self.memory.addr + page * PAGE, 4)
        eventually(lambda: self.counted() > before)
        return access

    def write(self, page: int) -> Background[None]:
        before = self.counted()
        access = Background(self.device.write, self.mm, self.memory.addr + page * PAGE, b"data")
        eventually(lambda: self.counted() > before)
        return access

    def counted(self) -> int:
        stats = self.buffer.stats
        return stats.entered + stats.coalesced + stats.dropped

    def expected(self, page: int) -> bytes:
        return bytes(memoryview(self.memory).cast("B")[page * PAGE : page * PAGE + 4])

    def serve(self, batch: int | None = None) -> int:
        groups = coalesce(self.buffer.fetch(batch, timeout=0))
        for first, *_ in groups:
            self.map(first.fault.addr, first.fault.addr + PAGE, WRITE if first.fault.write else FAULT)
        self.buffer.replay()
        return len(groups)


@pytest.fixture
def driver(mm: pm.AddressSpace) -> Iterator[Buffered]:
    with Buffered(mm) as made:
        yield made
        made.buffer.close()


def test_an_access_stalls_until_it_is_replayed(driver: Buffered) -> None:
    access = driver.read(3)
    assert not access.done
    (entry,) = driver.buffer.fetch(timeout=0)
    assert (entry.fault.addr, entry.fault.write) == (driver.memory.addr + 3 * PAGE, False)
    driver.map(entry.fault.addr, entry.fault.end)
    assert access.stays()
    assert driver.buffer.replay() == 1
    assert access.result() == driver.expected(3)


def test_a_replay_without_the_page_faults_again(driver: Buffered) -> None:
    access = driver.read(0)
    driver.buffer.fetch(timeout=0)
    driver.buffer.replay()
    (again,) = driver.buffer.fetch(timeout=10)
    driver.map(again.fault.addr, again.fault.end)
    driver.buffer.replay()
    assert access.result() == driver.expected(0)
    assert driver.buffer.stats.entered == 2


def test_entries_come_in_batches_the_oldest_first(driver: Buffered) -> None:
    accesses = [driver.read(page) for page in (5, 1, 3)]
    first = driver.buffer.fetch(2, timeout=0)
    assert [(entry.fault.addr - driver.memory.addr) // PAGE for entry in first] == [5, 1]
    assert len(driver.buffer) == 1
    for entry in first:
        driver.map(entry.fault.addr, entry.fault.addr + PAGE)
    assert driver.buffer.replay() == 2
    assert [access.result() for access in accesses[:2]] == [driver.expected(5), driver.expected(1)]
    # What has not been fetched stalls on.
    assert accesses[2].stays()
    assert driver.serve() == 1
    assert accesses[2].result() == driver.expected(3)


def test_faults_of_a_page_share_an_entry_if_they_ask_for_the_same(driver: Buffered) -> None:
    before = driver.expected(2)
    reads = [driver.read(2), driver.read(2)]
    write = driver.write(2)
    also = driver.read(2)
    assert driver.buffer.stats.coalesced == 2
    assert len(driver.buffer) == 2
    (group,) = coalesce(driver.buffer.fetch(timeout=0))
    assert [entry.fault.write for entry in group] == [True, False]
    driver.map(group[0].fault.addr, group[0].fault.addr + PAGE, WRITE)
    driver.buffer.replay()
    write.result()
    assert {access.result() for access in (*reads, also)} <= {before, b"data"}


def test_a_batch_is_put_in_order_of_address(driver: Buffered) -> None:
    accesses = [driver.read(page) for page in (6, 0, 4)]
    groups = coalesce(driver.buffer.fetch(timeout=0))
    assert [(group[0].fault.addr - driver.memory.addr) // PAGE for group in groups] == [0, 4, 6]
    for group in groups:
        driver.map(group[0].fault.addr, group[0].fault.addr + PAGE)
    driver.buffer.replay()
    assert [access.result() for access in accesses] == [driver.expected(page) for page in (6, 0, 4)]


def test_what_finds_no_room_faults_again_after_the_replay(mm: pm.AddressSpace) -> None:
    with Buffered(mm, size=2) as driver:
        accesses = [driver.read(page) for page in range(4)]
        assert (len(driver.buffer), driver.buffer.stats.dropped, driver.buffer.stats.most) == (2, 2, 2)
        served = 0
        while served < 4:
            served += driver.serve()
            eventually(lambda: len(driver.buffer) > 0 or all(access.done for access in accesses))
        assert [access.result() for access in accesses] == [driver.expected(page) for page in range(4)]


def test_a_cancelled_fault_ends_its_access(driver: Buffered) -> None:
    access, other = driver.read(1), driver.read(2)
    first, second = driver.buffer.fetch(timeout=0)
    driver.buffer.cancel(first)
    with pytest.raises(pm.MirrorError, match="cancelled") as failed:
        access.result()
    assert failed.value.errno == errno.EFAULT
    assert failed.value.addr == driver.memory.addr + PAGE
    own = pm.MirrorError(errno.EPERM, "not yours")
    driver.buffer.cancel(second, own)
    assert errno_of(other.result) == errno.EPERM
    assert driver.buffer.replay() == 0
    assert driver.buffer.stats.cancelled == 2


def test_accesses_of_one_entry_end_with_an_error_each(driver: Buffered) -> None:
    accesses = [driver.read(0), driver.read(0)]
    eventually(lambda: driver.buffer.stats.coalesced == 1)
    (entry,) = driver.buffer.fetch(timeout=1)
    driver.buffer.cancel(entry)
    errors = []
    for access in accesses:
        with pytest.raises(pm.MirrorError, match="cancelled") as failed:
            access.result()
        errors.append(failed.value)
    assert errors[0] is not errors[1]
    assert str(errors[0]) == str(errors[1])
    assert errors[0].addr == errors[1].addr == driver.memory.addr


def test_nobody_serves_it(mm: pm.AddressSpace) -> None:
    with Buffered(mm, timeout=0.05) as driver:
        access = driver.read(0)
        with pytest.raises(pm.MirrorError, match="not replayed") as failed:
            access.result()
        assert failed.value.errno == errno.ETIMEDOUT
        assert len(driver.buffer) == 0


def test_closing_ends_everything(driver: Buffered) -> None:
    fetched, waiting = driver.read(0), driver.read(1)
    driver.buffer.fetch(1, timeout=0)
    server = Background(driver.buffer.fetch)
    driver.buffer.close()
    driver.buffer.close()
    assert {errno_of(access.result) for access in (fetched, waiting)} <= {errno.ESRCH}
    server.result()
    assert driver.buffer.fetch() == []
    assert errno_of(driver.device.read, driver.mm, driver.memory.addr, 1) == errno.ESRCH


def test_ctrl_c_ends_a_stalled_access_and_a_fetch(driver: Buffered) -> None:
    with ctrl_c_in("wait"):
        driver.device.read(driver.mm, driver.memory.addr, 1)
    assert len(driver.buffer) == 0
    with ctrl_c_in("wait"):
        driver.buffer.fetch()


def test_many_accesses_and_one_server(driver: Buffered) -> None:
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for first, *_ in coalesce(driver.buffer.fetch(16, timeout=0.05)):
                driver.map(first.fault.addr, first.fault.addr + PAGE, WRITE if first.fault.write else FAULT)
            driver.buffer.replay()

    def use(page: int) -> int:
        wrong = 0
        for turn in range(40):
            page = (page + turn) % PAGES
            addr = driver.memory.addr + page * PAGE
            if turn % 5 == 0:
                with driver.mm.invalidate(addr, addr + PAGE):
                    pass
            wrong += driver.device.read(driver.mm, addr, 4) != driver.expected(page)
        return wrong

    server = Background(serve)
    users = [Background(use, page) for page in range(4)]
    assert [user.result(30) for user in users] == [0, 0, 0, 0]
    stop.set()
    server.result()


def test_wrong_sizes() -> None:
    assert errno_of(FaultBuffer, 0) == errno.EINVAL
