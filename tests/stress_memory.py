"""The memory of the stress test: mappings of each kind, cut into chunks, and what each chunk must hold."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn

from model import HUGE, PAGE, WRITE
from seams import foreign

import pymirror as pm

KINDS = ("anonymous", "shared", "file_private", "file_shared", "thp", "raw", "raw_shared", "hugetlb")
CHUNK = 4 * PAGE
CHUNKS_PER_OWNER = 2
MAP_FIXED = 0x10
MARK = b"the child's own"


@dataclass(eq=False)
class Chunk:
    """``data`` is what it holds, ``below`` what it holds again once it is dropped (None: what it holds)."""

    kind: str
    addr: int
    size: int
    fd: int
    offset: int
    data: bytearray
    below: bytes | None
    prot: int = WRITE

    @property
    def end(self) -> int:
        return self.addr + self.size

    @property
    def shared(self) -> bool:
        return self.kind.endswith("shared")

    def __repr__(self) -> str:
        return f"<{self.kind} [{self.addr:#x}, {self.end:#x}) prot {self.prot}>"

    def wrote(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def dropped(self, offset: int, size: int) -> None:
        if self.below is not None:
            self.data[offset : offset + size] = self.below[offset : offset + size]

    def compare(self, found: bytes, who: str) -> None:
        if found == self.data:
            return
        first = next(i for i in range(self.size) if found[i] != self.data[i])
        raise AssertionError(
            f"{who} reads at {self.addr + first:#x} of {self} {found[first : first + 8].hex()},"
            f" must be {self.data[first : first + 8].hex()}"
        )


class Memory:
    """Chunks in the order in which they lie, so that every n-th is an owner's and neighbours are others'."""

    def __init__(self, mm: pm.AddressSpace, rng: random.Random, owners: int) -> None:
        self.mm = mm
        self.rng = rng
        self.chunks: list[Chunk] = []
        self._fds: list[int] = []
        for kind in KINDS:
            with suppress_no_hugetlb(kind):
                self._map_kind(kind, owners)

    def _map_kind(self, kind: str, owners: int) -> None:
        count = owners if kind == "hugetlb" else owners * CHUNKS_PER_OWNER
        each = HUGE if kind == "hugetlb" else CHUNK
        size = HUGE if kind == "thp" else each * count
        fd = self._file(size) if kind.startswith("file") or kind.endswith("shared") else -1
        first = Chunk(kind, 0, size, fd, 0, bytearray(), None)
        self._place(first, api=not kind.startswith("raw"), at=0)
        for offset in range(0, each * count, each):
            chunk = Chunk(
                kind, first.addr + offset, each, fd, offset if fd >= 0 else 0, bytearray(each), bytes(each)
            )
            if fd >= 0:
                chunk.data[:] = os.pread(fd, each, offset)
                chunk.below = None if chunk.shared else bytes(chunk.data)
            self.chunks.append(chunk)

    def map(self, chunk: Chunk, *, api: bool, at: int = 0) -> None:
        """Map a chunk that is not mapped, or over itself: what it holds is what comes from below."""
        hugetlb = chunk.kind == "hugetlb"
        self._place(chunk, api=api or hugetlb, at=at)
        chunk.prot = WRITE
        chunk.dropped(0, chunk.size)

    def _place(self, chunk: Chunk, *, api: bool, at: int) -> None:
        if api:
            huge = chunk.kind if chunk.kind in ("thp", "hugetlb") and chunk.size >= HUGE else None
            region = self.mm.mmap(
                chunk.size, shared=chunk.shared, fd=chunk.fd, offset=chunk.offset, huge=huge
            )
            chunk.addr = region.addr
            return
        flags = mmap.MAP_SHARED if chunk.shared else mmap.MAP_PRIVATE
        flags |= (mmap.MAP_ANONYMOUS if chunk.fd < 0 else 0) | (MAP_FIXED if at else 0)
        chunk.addr = foreign.mmap(at, chunk.size, WRITE, flags, chunk.fd, chunk.offset)

    def _file(self, size: int) -> int:
        fd = os.memfd_create("pymirror-test")
        self._fds.append(fd)
        os.pwrite(fd, self.rng.randbytes(size), 0)
        return fd

    def close(self) -> None:
        for chunk in self.chunks:
            self.mm.munmap(chunk.addr, chunk.size)
        self.chunks.clear()
        for fd in self._fds:
            os.close(fd)


@contextmanager
def suppress_no_hugetlb(kind: str) -> Iterator[None]:
    try:
        yield
    except pm.MirrorError as refused:
        if kind != "hugetlb" or refused.errno != errno.ENOMEM:
            raise


@contextmanager
def child_of(chunks: list[Chunk]) -> Iterator[None]:
    """A forked child; at the end of the block it compares the chunks with what they held at the fork."""
    before = [(chunk.addr, bytes(chunk.data), chunk.prot == WRITE) for chunk in chunks]
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(before, go, tell)
    try:
        os.close(go)
        yield
        with suppress(BrokenPipeError):
            os.write(tell, b"g")
    finally:
        os.close(tell)
        _, status = os.waitpid(pid, 0)
    assert status == 0, f"a forked child reads something else, or died: wait status {status:#x}"


def _child(before: list[tuple[int, bytes, bool]], go: int, tell: int) -> NoReturn:
    """It ends with its parent: then nobody tells it to go on."""
    code = 2
    try:
        os.close(tell)
        if os.read(go, 1):
            wrong = [addr for addr, data, _ in before if ctypes.string_at(addr, len(data)) != data]
            right = not wrong
            for addr in wrong:
                os.write(2, f"child: other bytes at {addr:#x}\n".encode())
            for addr, _, writable in before:
                if writable:
                    ctypes.memmove(addr, MARK, len(MARK))
                    right &= ctypes.string_at(addr, len(MARK)) == MARK
            code = 0 if right else 1
    finally:
        os._exit(code)
