"""The memory that the demonstration mirrors: chunks of every kind that a process has.

A chunk is the unit of locking. Who holds its lock may change the memory or compare it; everybody else may at
most fault it into the device, which changes no byte.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

import pymirror as pm
from pymirror.demo import libc
from pymirror.demo.options import MIB
from pymirror.demo.source import Bytes, DataSource, machine_files

PROT_NONE = 0
NOWHERE = 0
RW = mmap.PROT_READ | mmap.PROT_WRITE
SMALL_CHUNK = MIB
HUGE_CHUNK = 2 * MIB
CHUNKS_PER_REGION = 16
SPARSE_STRIDE = 8 * mmap.PAGESIZE


class Kind(StrEnum):
    """Kinds of memory. The raw ones are mapped by libc behind the library's back, and changed so too."""

    ANONYMOUS = "anonymous"
    SPARSE = "anonymous_sparse"
    FILE_PRIVATE = "file_private"
    FILE_SHARED = "file_shared"
    SHARED = "shared_memory"
    THP = "thp"
    HUGETLB = "hugetlb"
    RAW = "raw_anonymous"
    RAW_SHARED = "raw_memfd"

    @property
    def raw(self) -> bool:
        return self in (Kind.RAW, Kind.RAW_SHARED)

    @property
    def shared(self) -> bool:
        return self in (Kind.FILE_SHARED, Kind.SHARED, Kind.RAW_SHARED)

    @property
    def huge(self) -> str | None:
        return self.value if self in (Kind.THP, Kind.HUGETLB) else None

    @property
    def chunk_size(self) -> int:
        return HUGE_CHUNK if self.huge else SMALL_CHUNK


SHARES = {
    Kind.ANONYMOUS: 0.26,
    Kind.SPARSE: 0.08,
    Kind.FILE_PRIVATE: 0.14,
    Kind.FILE_SHARED: 0.14,
    Kind.SHARED: 0.12,
    Kind.THP: 0.16,
    Kind.RAW: 0.06,
    Kind.RAW_SHARED: 0.04,
}
HUGETLB_CHUNKS = 8


@dataclass(slots=True, eq=False)
class Chunk:
    """`size` bytes at `addr`; fd and offset say what is mapped there (-1: anonymous).

    All but kind and size are guarded by `lock`: an operation may map the chunk elsewhere, and one that fails
    may leave it NOWHERE. `seen`: the device has checksummed it since a libc call last changed it.
    """

    kind: Kind
    size: int
    addr: int
    region: pm.Region | None = None
    fd: int = -1
    offset: int = 0
    writable: bool = True
    seen: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def view(self) -> Bytes:
        """The chunk's bytes as the CPU has them. Keep it only while the lock is held: the memory may move."""
        if self.region is None:
            raw = (ctypes.c_ubyte * self.size).from_address(self.addr)
            return np.frombuffer(memoryview(raw), np.uint8)
        # numpy's types know no buffer protocol on Python 3.11.
        region: Any = self.region
        return np.frombuffer(region, np.uint8, self.size, self.addr - region.addr)

    @property
    def end(self) -> int:
        return self.addr + self.size


class Memory:
    """Maps and fills chunks, and takes all of it away again.

    `refused` has the kinds that the machine would not give, with the error.
    """

    def __init__(self, mm: pm.AddressSpace, source: DataSource) -> None:
        self.mm = mm
        self.source = source
        self.chunks: list[Chunk] = []
        self.refused: dict[Kind, OSError] = {}
        self._fds: list[int] = []

    def plan(self, size: int) -> list[tuple[Kind, int]]:
        """How many chunks of which kind make `size` bytes."""
        plan = [(kind, max(2, round(size * share / kind.chunk_size))) for kind, share in SHARES.items()]
        # Half of the pool at most: others need it too, and so do copies after a fork.
        pool = libc.free_hugetlb_bytes() // 2 // HUGE_CHUNK
        return [*plan, (Kind.HUGETLB, max(1, min(HUGETLB_CHUNKS, pool)))]

    def build(self, size: int) -> Iterator[Chunk]:
        """Map and fill `size` bytes; yields each chunk when it is ready."""
        for kind, count in self.plan(size):
            before = len(self.chunks)
            try:
                for chunk in self._map_kind(kind, count):
                    self._fill(chunk)
                    self.chunks.append(chunk)
                    yield chunk
            except pm.MirrorError as error:
                if kind is not Kind.HUGETLB or len(self.chunks) != before:
                    raise
                self.refused[kind] = error

    def map_anew(self, chunk: Chunk) -> None:
        """Map the chunk, which is mapped nowhere, where the kernel likes; by the API or libc, as before."""
        chunk.writable = True
        if chunk.kind.raw:
            chunk.addr = libc.mmap_guarded(chunk.size, chunk.fd, chunk.offset)
            return
        chunk.region = self.mm.mmap(
            chunk.size,
            prot=RW,
            shared=chunk.kind.shared,
            fd=chunk.fd,
            offset=chunk.offset,
            huge=chunk.kind.huge,
        )
        chunk.addr = chunk.region.addr

    def unmap(self, chunk: Chunk) -> None:
        """Unmap the chunk if it is mapped; by the API or libc, as it was mapped."""
        addr, chunk.addr = chunk.addr, NOWHERE
        if addr == NOWHERE:
            return
        if chunk.kind.raw:
            libc.munmap_guarded(addr, chunk.size)
        else:
            self.mm.munmap(addr, chunk.size)

    def close(self) -> None:
        """Unmap everything. Idempotent; an error does not keep the rest mapped."""
        with ExitStack() as stack:
            for fd in self._fds:
                stack.callback(os.close, fd)
            for chunk in self.chunks:
                stack.callback(self.unmap, chunk)
            self._fds, self.chunks = [], []

    def abandon(self) -> None:
        """Leave everything mapped: a thread that hangs may still touch it."""
        self._fds, self.chunks = [], []

    def _map_kind(self, kind: Kind, count: int) -> Iterator[Chunk]:
        if kind.raw:
            return self._map_raw(kind, count)
        if kind is Kind.FILE_PRIVATE:
            return self._map_machine_files(count)
        return self._map_regions(kind, count)

    def _map_regions(self, kind: Kind, count: int) -> Iterator[Chunk]:
        size = kind.chunk_size
        for first in range(0, count, CHUNKS_PER_REGION):
            chunks = min(CHUNKS_PER_REGION, count - first)
            fd = self._temporary_file(chunks * size) if kind is Kind.FILE_SHARED else -1
            region = self.mm.mmap(chunks * size, prot=RW, shared=kind.shared, fd=fd, huge=kind.huge)
            if kind is Kind.SHARED:
                # The Region closes its own once nothing of it is left; chunks are mapped anew from this one.
                fd = self._keep(os.dup(region.fd))
            for i in range(chunks):
                offset = i * size if fd >= 0 else 0
                yield Chunk(kind, size, region.addr + i * size, region, fd, offset)

    def _map_machine_files(self, count: int) -> Iterator[Chunk]:
        """Private mappings of files that the machine has; of a temporary one when they are too few."""
        left = count
        for path, length in machine_files(smallest=SMALL_CHUNK):
            if left == 0:
                return
            chunks = min(length // SMALL_CHUNK, CHUNKS_PER_REGION, left)
            fd = self._keep(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            yield from self._map_file(fd, chunks)
            left -= chunks
        if left:
            fd = self._temporary_file(left * SMALL_CHUNK)
            block = np.empty(SMALL_CHUNK, np.uint8)
            for i in range(left):
                self.source.fill(block)
                os.pwrite(fd, block.data, i * SMALL_CHUNK)
            yield from self._map_file(fd, left)

    def _map_file(self, fd: int, chunks: int) -> Iterator[Chunk]:
        region = self.mm.mmap(chunks * SMALL_CHUNK, prot=RW, fd=fd)
        for i in range(chunks):
            yield Chunk(
                Kind.FILE_PRIVATE, SMALL_CHUNK, region.addr + i * SMALL_CHUNK, region, fd, i * SMALL_CHUNK
            )

    def _map_raw(self, kind: Kind, count: int) -> Iterator[Chunk]:
        fd = -1
        if kind is Kind.RAW_SHARED:
            fd = self._keep(os.memfd_create("pymirror-demo"))
            os.ftruncate(fd, count * SMALL_CHUNK)
        for i in range(count):
            offset = i * SMALL_CHUNK if fd >= 0 else 0
            yield Chunk(kind, SMALL_CHUNK, libc.mmap_guarded(SMALL_CHUNK, fd, offset), None, fd, offset)

    def _fill(self, chunk: Chunk) -> None:
        if chunk.kind is Kind.FILE_PRIVATE:
            return
        view = chunk.view()
        if chunk.kind is not Kind.SPARSE:
            self.source.fill(view)
            return
        # One page of eight is written: the others read as the zero page.
        block = np.empty(chunk.size // SPARSE_STRIDE * mmap.PAGESIZE, np.uint8)
        self.source.fill(block)
        view.reshape(-1, SPARSE_STRIDE)[:, : mmap.PAGESIZE] = block.reshape(-1, mmap.PAGESIZE)

    def _temporary_file(self, size: int) -> int:
        with tempfile.TemporaryFile(prefix="pymirror-demo-") as file:
            fd = self._keep(os.dup(file.fileno()))
        os.posix_fallocate(fd, 0, size)
        return fd

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd
