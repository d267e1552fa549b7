"""A model of an address space: of each page what it must hold, its protection, and what is mapped there.

It knows the kernel's rules (what munmap, mprotect, madvise, mremap and fork do to a page) and nothing of
pymirror. Contents are whole pages of bytes, shared where they are equal.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pymirror as pm

PAGE = 4096
HUGE = 2 << 20
ZERO = bytes(PAGE)

NONE, READ, WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE

DONTNEED = mmap.MADV_DONTNEED
FREE = mmap.MADV_FREE
REMOVE = mmap.MADV_REMOVE
COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE, COLLAPSE = 20, 21, 22, 23, 25
GUARD_INSTALL, GUARD_REMOVE = 102, 103
#: Advice that drops what pages hold.
DROPS = (DONTNEED, FREE, REMOVE)

PRESENT = 1 << 63
FILE = 1 << 61
PFN = (1 << 55) - 1

Interval = tuple[int, int]


class File:
    """A file behind mappings. ``fd`` is the model's own; ``pages`` are its contents, holes left out."""

    def __init__(self, fd: int, *, disk: bool = False) -> None:
        self.fd = os.dup(fd)
        stat = os.fstat(fd)
        self.inode = stat.st_ino
        self.npages = -(-stat.st_size // PAGE)
        self.disk = disk
        self.pages: dict[int, bytes] = {}

    def at(self, index: int) -> bytes:
        return self.pages.get(index, ZERO)

    def grow(self, npages: int) -> None:
        if npages > self.npages:
            os.ftruncate(self.fd, npages * PAGE)
            self.npages = npages

    def punch(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.pages.pop(index, None)

    def close(self) -> None:
        os.close(self.fd)


@dataclass(slots=True, eq=False)
class Page:
    """What is mapped at one page.

    ``own`` is the private copy, None where the file's bytes (or zeroes) show through. ``lazy``: after a
    MADV_FREE it may turn to zeroes. ``exclusive``: written since the last fork, and so this process's alone.
    ``guard``: every access of it is a fault, whatever the protection. ``watched``: foreign munmap, mremap and
    madvise of it must be told. ``blind``: it was not when a fork made it read-only, so that nobody can see
    whether it is so still. ``mapping`` numbers the mmap() that it is of.
    """

    prot: int
    shared: bool
    huge: str | None
    file: File | None
    index: int
    mapping: int
    owner: pm.Region | None = None
    own: bytes | None = None
    lazy: bool = False
    exclusive: bool = False
    watched: bool = False
    guard: bool = False
    blind: bool = False

    @property
    def anonymous(self) -> bool:
        return self.file is None

    @property
    def readable(self) -> bool:
        return bool(self.prot & READ) and not self.guard

    @property
    def writable(self) -> bool:
        return self.prot & WRITE == WRITE and not self.guard

    @property
    def below(self) -> bytes:
        """What shows through where there is no private copy."""
        return ZERO if self.file is None else self.file.at(self.index)

    @property
    def allowed(self) -> tuple[bytes, ...]:
        """What a read may find."""
        if self.own is None:
            return (self.below,)
        return (self.own, ZERO) if self.lazy else (self.own,)

    def store(self, offset: int, data: bytes, found: bytes | None = None) -> None:
        """A store; ``found`` is what was there before, needed only where the page is lazy."""
        before = found or self.allowed[0]
        after = before[:offset] + data + before[offset + len(data) :]
        if self.shared:
            assert self.file is not None
            self.file.pages[self.index] = after
            return
        self.own, self.lazy, self.exclusive, self.blind = after, False, True, False

    def split_off(self) -> None:
        """A private copy is made without a store, as MADV_POPULATE_WRITE does."""
        if not self.shared:
            self.own, self.exclusive, self.blind = self.allowed[0], True, False

    def drop(self) -> None:
        """MADV_DONTNEED."""
        self.own, self.lazy, self.exclusive, self.blind = None, False, False, False


class Model:
    """The pages of an address space that a test has mapped, by address."""

    def __init__(self) -> None:
        self.pages: dict[int, Page] = {}
        self._mappings = 0
        self._segments: list[Interval] | None = None

    def map(
        self,
        start: int,
        size: int,
        prot: int,
        *,
        shared: bool = False,
        huge: str | None = None,
        file: File | None = None,
        index: int = 0,
        owner: pm.Region | None = None,
        watched: bool = False,
    ) -> None:
        self._mappings += 1
        self._segments = None
        for i in range(size // PAGE):
            page = Page(prot, shared, huge, file, index + i, self._mappings, owner)
            page.watched = watched and (file is None or huge == "hugetlb")
            self.pages[start + i * PAGE] = page

    def unmap(self, start: int, end: int) -> None:
        self._segments = None
        for addr in range(start, end, PAGE):
            self.pages.pop(addr, None)

    def move(
        self, old: Interval, start: int, size: int, owner: pm.Region | None, *, leave: bool = False
    ) -> None:
        """mremap() from old to [start, start + size): grown, cut or moved; ``leave`` is MREMAP_DONTUNMAP."""
        moved = [self.pages[addr] for addr in range(*old, PAGE)]
        if leave:
            left = [
                replace(page, own=None, lazy=False, exclusive=False, watched=False, guard=False, blind=False)
                for page in moved
            ]
        self.unmap(*old)
        self.unmap(start, start + size)
        first = moved[0]
        self._mappings += 1
        for i in range(size // PAGE):
            grown = replace(
                first, index=first.index + i, own=None, lazy=False, exclusive=False, guard=False, blind=False
            )
            page = moved[i] if i < len(moved) else grown
            page.owner, page.mapping = owner, self._mappings
            self.pages[start + i * PAGE] = page
        if leave:
            self.pages.update(zip(range(*old, PAGE), left, strict=True))

    def duplicate(self, addr: int, start: int, size: int, owner: pm.Region | None) -> None:
        """mremap() of shared memory with an old size of 0: the same pages once more."""
        page = self.pages[addr]
        self.map(
            start, size, page.prot, shared=True, huge=page.huge, file=page.file, index=page.index, owner=owner
        )

    def inside(self, start: int, end: int) -> list[tuple[int, Page]]:
        """The mapped pages of [start, end), in order."""
        return self.among(range(start, end, PAGE))

    def among(self, pages: Iterable[int]) -> list[tuple[int, Page]]:
        """Those of these pages that are mapped."""
        found = ((addr, self.pages.get(addr)) for addr in pages)
        return [(addr, page) for addr, page in found if page is not None]

    def hole(self, start: int, end: int) -> int | None:
        """The first page of [start, end) that is not mapped."""
        return next((addr for addr in range(start, end, PAGE) if addr not in self.pages), None)

    def segments(self) -> list[Interval]:
        """Runs of pages of one mapping, in order of age: where the kernel has put them does not matter."""
        if self._segments is None:
            found = merged(self.pages, lambda a, b: self.pages[a].mapping == self.pages[b].mapping)
            self._segments = sorted(found, key=lambda segment: (self.pages[segment[0]].mapping, segment))
        return self._segments

    def of_file(self, file: File, indices: Iterable[int]) -> list[int]:
        """Where these pages of a file are mapped."""
        wanted = set(indices)
        return [addr for addr, page in self.pages.items() if page.file is file and page.index in wanted]

    def write(self, addr: int, data: bytes, found: dict[int, bytes]) -> None:
        for page, offset, piece in pieces(addr, data):
            self.pages[page].store(offset, piece, found.get(page))

    def readable_prefix(self, start: int, end: int) -> int:
        """Up to where [start, end) can be read."""
        return next((addr for addr in range(start, end, PAGE) if not self._allows(addr, READ)), end)

    def writable_prefix(self, start: int, end: int) -> int:
        return next((addr for addr in range(start, end, PAGE) if not self._allows(addr, WRITE)), end)

    def _allows(self, addr: int, prot: int) -> bool:
        page = self.pages.get(addr)
        return page is not None and not page.guard and page.prot & prot == prot

    def advised(self, start: int, end: int, advice: int) -> tuple[int, list[int]]:
        """The errno of madvise(), and the pages that it is applied to."""
        done, error = [], 0
        for addr in range(start, end, PAGE):
            page = self.pages.get(addr)
            if page is None:
                error = errno.ENOMEM
                if advice in (POPULATE_READ, POPULATE_WRITE):
                    break
                continue
            if refused := refuses(page, advice):
                return refused, done
            done.append(addr)
        return error, done

    def protected(self, start: int, end: int, prot: int) -> tuple[int, list[int]]:
        """The errno of mprotect(), and the pages whose protection changes."""
        hole = self.hole(start, end)
        done = [addr for addr, page in self.inside(start, end if hole is None else hole) if page.prot != prot]
        return (errno.ENOMEM if hole is not None else 0), done

    def forked(self, *, tracked: bool) -> None:
        """``tracked``: writes after the fork can be seen, where it is watched."""
        for page in self.pages.values():
            page.exclusive = False
            page.blind |= not page.shared and not (tracked and page.watched)


def refuses(page: Page, advice: int) -> int:
    """The errno with which madvise() stops at the page, 0 if it does not."""
    if advice == FREE and (page.huge == "hugetlb" or not page.anonymous):
        return errno.EINVAL
    if advice == REMOVE and not page.shared:
        return errno.EINVAL if page.anonymous and page.huge != "hugetlb" else errno.EACCES
    if advice in (GUARD_INSTALL, GUARD_REMOVE) and page.huge == "hugetlb":
        return errno.EINVAL
    if advice in (POPULATE_READ, POPULATE_WRITE):
        needed = READ if advice == POPULATE_READ else WRITE
        return errno.EINVAL if page.prot & needed != needed else errno.EFAULT if page.guard else 0
    return errno.EINVAL if advice in (PAGEOUT, COLD) and page.huge == "hugetlb" else 0


def refuses_device(page: Page | None, write: bool) -> int:
    """The errno with which a fault of the page by a device is refused, 0 if it is not."""
    if page is None or not page.prot & READ:
        return errno.EFAULT
    if write and page.prot & WRITE != WRITE:
        return errno.EPERM
    return errno.EFAULT if page.guard else 0


def pieces(addr: int, data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Data at an address cut at pages: (page, offset in it, bytes)."""
    done = 0
    while done < len(data):
        at = addr + done
        piece = data[done : done + PAGE - at % PAGE]
        yield at - at % PAGE, at % PAGE, piece
        done += len(piece)


def merged(pages: Iterable[int], alike: Callable[[int, int], bool] | None = None) -> list[Interval]:
    """Pages as intervals, in order; ``alike(a, b)`` says whether two that touch belong together."""
    found: list[list[int]] = []
    for addr in sorted(pages):
        if found and found[-1][1] == addr and (alike is None or alike(addr - PAGE, addr)):
            found[-1][1] = addr + PAGE
        else:
            found.append([addr, addr + PAGE])
    return [(start, end) for start, end in found]
