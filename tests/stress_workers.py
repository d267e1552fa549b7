"""The threads of the stress test: owners change memory and know its every byte, an onlooker looks."""

from __future__ import annotations

import ctypes
import errno
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from model import DONTNEED, FREE, NONE, PAGE, POPULATE_READ, POPULATE_WRITE, READ, REMOVE, WRITE
from model_device import FAULT, FAULT_WRITE, IntervalDriver, Log, MirrorDriver
from seams import errno_of, foreign
from stress_memory import Chunk, child_of

import pymirror as pm
from pymirror.features import probe

if TYPE_CHECKING:
    from test_stress import Stress

# Before Linux 6.11 a look-up of a vma reads the text of all that lie before it.
OPERATIONS = 1000 if "procmap_query" in probe() else 250
PATIENCE_S = 30.0
FIXED_NOREPLACE = 0x100022
SCRATCH = 64 * PAGE
SCRATCH_DATA = b"\x55" * SCRATCH
MOVE = pm.MREMAP_MAYMOVE | pm.MREMAP_FIXED


#: How often each is chosen, and what it does.
Operations = dict[str, tuple[int, "Callable[[Any, Chunk], None]"]]


class Patient:
    """Drivers here retry for as long as others may hold them up."""

    def again(self, attempt: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                if attempt():
                    return
            except pm.MirrorError as refused:
                if refused.errno not in (errno.EBUSY, errno.EAGAIN):
                    raise
        raise AssertionError(f"no success in {PATIENCE_S} s")


class SharedDriver(Patient, MirrorDriver):
    """One table for all threads."""


class OwnDriver(Patient, IntervalDriver):
    """A table and interval notifiers of one thread; the intervals reach into others' chunks."""


class Scratch:
    """Memory of no owner. Its device has it under ``lock`` only: after an invalidation it is EFAULT."""

    def __init__(self, mm: pm.AddressSpace, log: Log) -> None:
        self.mm = mm
        self.lock = threading.Lock()
        self.driver = SharedDriver(mm, log)
        self.driver.device.set_fault_handler(None)
        self.map()

    def map(self) -> None:
        self.addr = self.mm.mmap(SCRATCH).addr
        ctypes.memmove(self.addr, SCRATCH_DATA, SCRATCH)
        with self.driver.range(self.addr, self.addr + SCRATCH) as rng:
            rng.default_flags = FAULT_WRITE
            rng.pfn_flags_mask = 0
            self.driver.again(lambda: self.driver.try_map(rng))

    def unmap(self, *, api: bool = True) -> None:
        if api:
            self.mm.munmap(self.addr, SCRATCH)
            return
        self.mm.watch(self.addr, self.addr + SCRATCH)
        foreign.munmap(self.addr, SCRATCH)


class Worker(threading.Thread):
    """A thread that does a number of operations, and keeps what made it fail."""

    def __init__(self, stress: Stress, name: str) -> None:
        super().__init__(name=f"{name} of seed {stress.seed}", daemon=True)
        self.stress = stress
        self.mm = stress.mm
        self.rng = random.Random(f"{stress.seed} {name}")
        self.tally: Counter[str] = Counter()
        self.doing = ""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            error.add_note(f"{self.name}, operation {self.tally.total()}: {self.doing}")
            self.error = error
            self.stress.stop = True

    def work(self) -> None:
        raise NotImplementedError


class Owner(Worker):
    """Changes its own chunks, by the API or behind the library's back, and compares them each time."""

    count = OPERATIONS

    def __init__(self, stress: Stress, name: str, chunks: list[Chunk]) -> None:
        super().__init__(stress, name)
        self.chunks = chunks
        self.own = self.open_driver()

    def open_driver(self) -> OwnDriver:
        return OwnDriver(self.mm, self.stress.log)

    def operations(self) -> Operations:
        return OPERATIONS_BY_NAME

    def work(self) -> None:
        operations = self.operations()
        names = [name for name in operations for _ in range(operations[name][0])]
        for _ in range(self.count):
            if self.stress.stop:
                return
            chunk, name = self.rng.choice(self.chunks), self.rng.choice(names)
            self.doing = f"{name} of {chunk}"
            operations[name][1](self, chunk)
            self.tally[name] += 1
            self.compare(chunk)

    def driver(self) -> SharedDriver | OwnDriver:
        return self.rng.choice((self.stress.mirror, self.own))

    def api(self) -> bool:
        return self.rng.random() < 0.5

    def data(self, size: int) -> bytes:
        return self.rng.randbytes(size)

    def place(self, chunk: Chunk) -> tuple[int, int]:
        """An offset and a size inside the chunk."""
        offset = self.rng.randrange(chunk.size)
        return offset, min(self.rng.choice((1, 64, PAGE, 3 * PAGE)), chunk.size - offset)

    def pages(self, chunk: Chunk) -> tuple[int, int]:
        """An offset and a size in whole pages; all of it where pages are huge."""
        if chunk.kind == "hugetlb":
            return 0, chunk.size
        first = self.rng.randrange(chunk.size // PAGE)
        return first * PAGE, self.rng.randint(1, chunk.size // PAGE - first) * PAGE

    def compare(self, chunk: Chunk) -> None:
        """The CPU and a device read what was last written."""
        if not chunk.prot & READ:
            return
        chunk.compare(ctypes.string_at(chunk.addr, chunk.size), "the CPU")
        if self.rng.random() < 0.5:
            driver = self.driver()
            chunk.compare(driver.device.read(self.mm, chunk.addr, chunk.size), driver.device.name)

    def watch(self, chunk: Chunk) -> None:
        """Without that a Region does not learn that its memory was taken away."""
        self.mm.watch(chunk.addr, chunk.end, files=True)


def cpu_write(owner: Owner, chunk: Chunk) -> None:
    if chunk.prot != WRITE:
        protect(owner, chunk, WRITE)
    offset, size = owner.place(chunk)
    data = owner.data(size)
    ctypes.memmove(chunk.addr + offset, data, size)
    chunk.wrote(offset, data)


def device_write(owner: Owner, chunk: Chunk) -> None:
    """It is done where the CPU may write, and refused elsewhere."""
    offset, size = owner.place(chunk)
    data = owner.data(size)
    code = errno_of(owner.driver().device.write, owner.mm, chunk.addr + offset, data)
    assert code == {WRITE: 0, READ: errno.EPERM, NONE: errno.EFAULT}[chunk.prot]
    if not code:
        chunk.wrote(offset, data)


def device_read(owner: Owner, chunk: Chunk) -> None:
    offset, size = owner.place(chunk)
    device = owner.driver().device
    if chunk.prot & READ:
        expected = chunk.data[offset : offset + size]
        assert device.read(owner.mm, chunk.addr + offset, size) == expected, f"{device} reads something else"
        return
    assert errno_of(device.read, owner.mm, chunk.addr + offset, size) == errno.EFAULT


def protect(owner: Owner, chunk: Chunk, prot: int | None = None) -> None:
    chosen = owner.rng.choice((WRITE, WRITE, READ, NONE)) if prot is None else prot
    (owner.mm if owner.api() else foreign).mprotect(chunk.addr, chunk.size, chosen)
    chunk.prot = chosen


def take_away(owner: Owner, chunk: Chunk) -> None:
    """Where no access is left, nobody has an entry once mprotect() has returned, or gets one."""
    if chunk.prot == NONE:
        # Behind the library's back, maybe: then there may be entries, of no use.
        return
    owner.mm.mprotect(chunk.addr, chunk.size, NONE)
    chunk.prot = NONE
    for _ in range(3):
        for driver in (owner.stress.mirror, owner.own):
            entries = driver.device.page_table.entries(chunk.addr, chunk.end)
            assert not (entries & pm.HMM_PFN_VALID).any(), f"{driver.device} has entries of {chunk}"
        time.sleep(0)


def swap(owner: Owner, chunk: Chunk) -> None:
    """The scratch memory is unmapped while a device reads and writes it, and a chunk takes its place.

    What of the device's is late would be found in the chunk, or the chunk's bytes by the device.
    """
    if chunk.kind not in ("anonymous", "raw"):
        return
    scratch = owner.stress.scratch
    with scratch.lock:
        place = scratch.addr
        scratch.unmap(api=owner.api())
        code = errno_of(foreign.mmap, place, chunk.size, WRITE, FIXED_NOREPLACE)
        if not code:
            owner.mm.munmap(chunk.addr, chunk.size)
            chunk.addr, chunk.prot = place, WRITE
            data = owner.data(chunk.size)
            ctypes.memmove(chunk.addr, data, chunk.size)
            chunk.wrote(0, data)
        assert code in (0, errno.EEXIST)
        time.sleep(0)
        scratch.map()


def drop(owner: Owner, chunk: Chunk) -> None:
    # What gives a page of the pool back may not get another.
    if chunk.kind == "hugetlb":
        return
    offset, size = owner.pages(chunk)
    (owner.mm if owner.api() else foreign).madvise(chunk.addr + offset, size, DONTNEED)
    chunk.dropped(offset, size)


def free(owner: Owner, chunk: Chunk) -> None:
    """Until it is written again its contents are the kernel's to choose."""
    if chunk.kind not in ("anonymous", "thp", "raw"):
        return
    if chunk.prot != WRITE:
        protect(owner, chunk, WRITE)
    (owner.mm if owner.api() else foreign).madvise(chunk.addr, chunk.size, FREE)
    data = owner.data(chunk.size)
    if owner.api():
        owner.driver().device.write(owner.mm, chunk.addr, data)
    else:
        ctypes.memmove(chunk.addr, data, chunk.size)
    chunk.wrote(0, data)


def punch(owner: Owner, chunk: Chunk) -> None:
    """The pages go from the file, and so from each mapping of it."""
    if not chunk.shared:
        return
    offset, size = owner.pages(chunk)
    if owner.api():
        (owner.mm if owner.api() else foreign).madvise(chunk.addr + offset, size, REMOVE)
    else:
        foreign.punch_hole(chunk.fd, chunk.offset + offset, size)
    chunk.wrote(offset, bytes(size))


def populate(owner: Owner, chunk: Chunk) -> None:
    advice = owner.rng.choice((POPULATE_READ, POPULATE_WRITE))
    code = errno_of((owner.mm if owner.api() else foreign).madvise, chunk.addr, chunk.size, advice)
    needed = READ if advice == POPULATE_READ else WRITE
    assert code == (0 if chunk.prot & needed == needed else errno.EINVAL)


def remap(owner: Owner, chunk: Chunk) -> None:
    """Unmapped, and mapped anew wherever the kernel likes: often where another thread has just unmapped."""
    if chunk.kind == "hugetlb":
        return
    api = owner.api()
    if api:
        owner.mm.munmap(chunk.addr, chunk.size)
    else:
        owner.watch(chunk)
        foreign.munmap(chunk.addr, chunk.size)
    owner.stress.memory.map(chunk, api=owner.api())


def map_over(owner: Owner, chunk: Chunk) -> None:
    """Other memory in its place, in one step."""
    if chunk.kind == "hugetlb":
        return
    owner.watch(chunk)
    owner.stress.memory.map(chunk, api=False, at=chunk.addr)


def move(owner: Owner, chunk: Chunk) -> None:
    if chunk.kind == "hugetlb":
        return
    if owner.api():
        room = owner.mm.mmap(chunk.size, prot=NONE, huge="thp" if chunk.kind == "thp" else None)
        owner.mm.mremap(chunk.addr, chunk.size, chunk.size, flags=MOVE, new_addr=room.addr)
        chunk.addr = room.addr
        return
    owner.watch(chunk)
    place = foreign.mmap(0, chunk.size, prot=NONE)
    chunk.addr = foreign.mremap(chunk.addr, chunk.size, chunk.size, MOVE, place)


def mirror_it(owner: Owner, chunk: Chunk) -> None:
    """The driver's loop over the chunk, whole or in part, and what it finds."""
    if not chunk.prot & READ:
        return
    offset, size = owner.pages(chunk)
    start, end = chunk.addr + offset, chunk.addr + offset + size
    mirror = owner.stress.mirror
    with mirror.range(start, end) as rng:
        rng.default_flags = FAULT_WRITE if chunk.prot == WRITE else FAULT
        rng.pfn_flags_mask = 0
        mirror.again(lambda: mirror.try_map(rng))
        assert (rng.pfns & rng.default_flags == rng.default_flags).all()


def within(owner: Owner, chunk: Chunk) -> None:
    """While an invalidation runs nothing is valid there, whatever the others do."""
    mirror = owner.stress.mirror
    rng = mirror.range(chunk.addr, chunk.end)
    with owner.mm.invalidate(chunk.addr, chunk.end, pm.Event.MIGRATE), rng:
        assert errno_of(rng.wait_until_valid, 0.0005) == errno.ETIMEDOUT
        assert not mirror.commit(rng, rng.seq)


def intervals(owner: Owner, chunk: Chunk) -> None:
    """Notifiers come and go while others are told."""
    owner.own.insert(chunk.addr - PAGE, chunk.end + PAGE, two_pass=owner.api())
    if owner.rng.random() < 0.5:
        owner.own.remove(owner.rng.choice(owner.own.subs))


def sync(owner: Owner, chunk: Chunk) -> None:
    owner.mm.sync(PATIENCE_S)


def fork(owner: Owner, chunk: Chunk) -> None:
    """The child sees what was there at the fork, and what either writes stays its own."""
    private = [one for one in owner.chunks if not one.shared and one.prot & READ and one.kind != "hugetlb"]
    with child_of(private):
        for one in owner.rng.sample(owner.chunks, min(3, len(owner.chunks))):
            cpu_write(owner, one)
            device_write(owner, one)
    for one in private:
        owner.compare(one)


OPERATIONS_BY_NAME: Operations = {
    "cpu_write": (8, cpu_write),
    "device_write": (8, device_write),
    "device_read": (6, device_read),
    "protect": (6, protect),
    "take_away": (2, take_away),
    "swap": (8, swap),
    "drop": (5, drop),
    "free": (2, free),
    "punch": (6, punch),
    "populate": (2, populate),
    "remap": (6, remap),
    "map_over": (4, map_over),
    "move": (6, move),
    "mirror_it": (6, mirror_it),
    "within": (2, within),
    "intervals": (3, intervals),
    "sync": (1, sync),
    "fork": (1, fork),
}


class Scribe(Worker):
    """A device that reads and writes scratch memory while it is taken away. It maps nothing by itself."""

    def work(self) -> None:
        scratch = self.stress.scratch
        device = scratch.driver.device
        buffer = bytearray(SCRATCH)
        while any(owner.is_alive() for owner in self.stress.owners):
            if errno_of(device.write, self.mm, scratch.addr, SCRATCH_DATA) == 0:
                self.tally["written"] += 1
            if errno_of(device.read_into, self.mm, scratch.addr, buffer) == 0:
                assert buffer == SCRATCH_DATA, "a device has read what came after its memory was unmapped"
                self.tally["read"] += 1


class Onlooker(Worker):
    """Looks at anybody's memory by the shared mirror, which changes no byte, and finds some of it gone."""

    REFUSALS = (0, errno.EFAULT, errno.EPERM, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT)

    def work(self) -> None:
        mirror = self.stress.mirror
        while any(owner.is_alive() for owner in self.stress.owners):
            chunk = self.rng.choice(self.stress.memory.chunks)
            start = chunk.addr + self.rng.randrange(-4, 4) * PAGE
            size = self.rng.choice((1, 6, 64)) * PAGE
            self.doing = f"look at {start:#x}"
            self.tally[self.doing[:4]] += 1
            if self.rng.random() < 0.5:
                self._check(errno_of(mirror.device.read, self.mm, start, size))
                continue
            with mirror.range(start, start + size) as rng:
                rng.wait_until_valid(PATIENCE_S)
                self._check(errno_of(rng.snapshot))

    def _check(self, code: int) -> None:
        assert code in self.REFUSALS, f"errno {code}"
