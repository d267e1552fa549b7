"""The device's work, compared with the CPU's: checksum a chunk through its page table, and write to it."""

from __future__ import annotations

import errno
import mmap
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import pymirror as pm
from pymirror.demo.memory import HUGE_CHUNK, Chunk, Kind
from pymirror.demo.source import Bytes
from pymirror.demo.world import Worker, World

REFUSED = (errno.EPERM, errno.EFAULT)
DEVICE_WRITE_SIZE = 3 * mmap.PAGESIZE + 100


@dataclass(slots=True)
class Work:
    """Bytes checksummed, and the seconds that the device and the CPU took for them."""

    chunks: int = 0
    bytes: int = 0
    device_seconds: float = 0.0
    cpu_seconds: float = 0.0
    wrong: int = 0

    def add(self, other: Work) -> None:
        self.chunks += other.chunks
        self.bytes += other.bytes
        self.device_seconds += other.device_seconds
        self.cpu_seconds += other.cpu_seconds
        self.wrong += other.wrong


class Checker:
    """Compares device and CPU. The caller holds the lock of the chunk it hands in."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.work = Work()
        self._buffer = np.empty(HUGE_CHUNK, np.uint8)

    def check(self, chunk: Chunk) -> bool:
        """Checksum by the device and by the CPU, alike or not.

        Who goes first alternates, because the second finds warm caches.
        """
        buffer = self._buffer[: chunk.size]
        view = chunk.view()
        try:
            if self.work.chunks % 2:
                cpu = self._by_cpu(view)
                device = self._by_device(chunk, buffer)
            else:
                device = self._by_device(chunk, buffer)
                cpu = self._by_cpu(view)
        except pm.MirrorError as error:
            self.world.fail(f"device read of {_place(chunk)}: {error}")
            return False
        self.work.chunks += 1
        self.work.bytes += chunk.size
        if device == cpu:
            return True
        self.work.wrong += 1
        self.world.fail(_difference(chunk, buffer, view, device, cpu))
        return False

    def device_write(self, chunk: Chunk, rng: np.random.Generator) -> bool:
        """Write as the device, at any alignment, and look at what came of it. True if written.

        The CPU must read it, the bytes around must stay, a shared file must hold it; where the memory is
        read-only, the write must be refused and change nothing.
        """
        offset = int(rng.integers(0, chunk.size - DEVICE_WRITE_SIZE))
        data = self.world.fresh_data(rng, DEVICE_WRITE_SIZE)
        view = chunk.view()
        expected = view.copy()
        if chunk.writable:
            expected[offset : offset + data.size] = data
        try:
            self.world.device.write(self.world.mm, chunk.addr + offset, data.tobytes())
            written = True
        except pm.StaleAccessError:
            raise
        except pm.MirrorError as error:
            if error.errno not in REFUSED:
                raise
            written = False
        if written != chunk.writable:
            self.world.fail(f"device write to {_place(chunk)} was {'done' if written else 'refused'}")
        if not np.array_equal(view, expected):
            self.work.wrong += 1
            self.world.fail(
                f"after a device write at {offset:#x} of {_place(chunk)} the CPU reads something else"
            )
        if written and chunk.kind is Kind.FILE_SHARED:
            self._compare_file(chunk, offset, data)
        return written

    def _compare_file(self, chunk: Chunk, offset: int, data: Bytes) -> None:
        if os.pread(chunk.fd, data.size, chunk.offset + offset) != data.tobytes():
            self.work.wrong += 1
            self.world.fail(f"a device write to {_place(chunk)} did not reach the file")

    def _by_device(self, chunk: Chunk, buffer: Bytes) -> int:
        begin = time.perf_counter()
        self.world.device.read_into(self.world.mm, chunk.addr, buffer.data)
        checksum = zlib.crc32(buffer.data)
        self.work.device_seconds += time.perf_counter() - begin
        return checksum

    def _by_cpu(self, view: Bytes) -> int:
        begin = time.perf_counter()
        checksum = zlib.crc32(view.data)
        self.work.cpu_seconds += time.perf_counter() - begin
        return checksum


class DeviceThread(Worker):
    """One engine of the device: checksums, and a write now and then."""

    WRITES = 0.25

    def __init__(self, world: World, name: str, seed: Sequence[int], chunks: list[Chunk]) -> None:
        super().__init__(world, name, seed, chunks)
        self.checker = Checker(world)

    def step(self, chunk: Chunk) -> None:
        if self.rng.random() < self.WRITES:
            written = self.checker.device_write(chunk, self.rng)
            self.tally["device_writes" if written else "device_writes_refused"] += 1
        self.checker.check(chunk)
        chunk.seen = True


def _place(chunk: Chunk) -> str:
    return f"{chunk.kind} [{chunk.addr:#x}, {chunk.end:#x})"


def _difference(chunk: Chunk, device: Bytes, cpu: Bytes, device_sum: int, cpu_sum: int) -> str:
    pages = np.flatnonzero((device != cpu).reshape(-1, mmap.PAGESIZE).any(axis=1))
    where = "the bytes are alike now"
    if pages.size:
        where = f"{pages.size} pages differ, the first at {chunk.addr + int(pages[0]) * mmap.PAGESIZE:#x}"
    return f"wrong checksum of {_place(chunk)}: device {device_sum:#010x}, CPU {cpu_sum:#010x}; {where}"
