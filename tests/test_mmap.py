"""Memory of every kind: private, shared, of files, huge; and the vmas that it makes."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
from oplog import PAGE, Log, pages
from seams import errno_of, inject

import pymirror as pm

HUGE = 2 << 20
READ = mmap.PROT_READ
USER_END = 1 << 47


@pytest.fixture
def log(mm: pm.AddressSpace) -> Log:
    return Log(mm)


@pytest.mark.parametrize("size", [0, -1])
def test_mmap_of_nothing_is_einval(mm: pm.AddressSpace, size: int) -> None:
    assert errno_of(mm.mmap, size) == errno.EINVAL


def test_mmap_refusals(mm: pm.AddressSpace) -> None:
    assert errno_of(mm.mmap, 1 << 48) == errno.ENOMEM
    assert errno_of(mm.mmap, PAGE, offset=PAGE) == errno.EINVAL
    assert errno_of(mm.mmap, PAGE, huge="gigantic") == errno.EINVAL
    assert errno_of(mm.mmap, PAGE, fd=1 << 20) == errno.EBADF
    with open(os.devnull) as file:
        assert errno_of(mm.mmap, PAGE, fd=file.fileno(), offset=1) == errno.EINVAL
        assert errno_of(mm.mmap, PAGE, fd=file.fileno(), huge="hugetlb") == errno.EINVAL


@pytest.mark.parametrize(("sys", "huge"), [("MMAP", None), ("MADVISE", "thp"), ("MMAP", "thp")])
def test_a_failed_mmap_leaves_nothing(mm: pm.AddressSpace, sys: str, huge: str | None) -> None:
    before = sum(vma.size for vma in mm.vmas())
    with inject(sys, nth=2 if (sys, huge) == ("MMAP", "thp") else 1, err=errno.EPERM):
        assert errno_of(mm.mmap, 64 * HUGE, shared=True, huge=huge) == errno.EPERM
    assert sum(vma.size for vma in mm.vmas()) - before < 64 * HUGE
    assert mm.stats()["regions"] == 0


def test_shared_memory_is_a_memfd(mm: pm.AddressSpace) -> None:
    region = pages(mm, 2, shared=True)
    region[PAGE] = 9
    assert os.pread(region.fd, 1, PAGE) == b"\x09"
    vma = mm.vma_lookup(region.addr)
    assert vma is not None
    assert vma.shared
    assert vma.file
    fd = region.fd
    mm.munmap(region.addr, region.size)
    assert region.fd == -1
    assert errno_of(os.fstat, fd) == errno.EBADF


def test_a_file_is_mapped_through_a_duplicate(mm: pm.AddressSpace, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE)
    with path.open("r+b") as file:
        region = mm.mmap(PAGE, fd=file.fileno(), offset=PAGE, shared=True)
    region[0] = ord("c")
    assert path.read_bytes()[PAGE] == ord("c")
    with path.open("rb") as file:
        private = mm.mmap(2 * PAGE, fd=file.fileno())
        refusal = errno_of(mm.mmap, PAGE, fd=file.fileno(), shared=True)
    private[0] = ord("d")
    assert refusal == errno.EACCES
    assert path.read_bytes()[0] == ord("a")


@pytest.mark.parametrize("shared", [False, True])
def test_thp_is_aligned_and_advised(mm: pm.AddressSpace, shared: bool) -> None:
    region = mm.mmap(HUGE + PAGE, huge="thp", shared=shared)
    assert region.addr % HUGE == 0
    assert region.size == HUGE + PAGE
    smaps = Path("/proc/self/smaps").read_text().split(f"{region.addr:x}-", 1)[1]
    flags = next(line for line in smaps.splitlines() if line.startswith("VmFlags"))
    assert " hg" in flags


@pytest.mark.hugetlb
@pytest.mark.parametrize("shared", [False, True])
def test_hugetlb(mm: pm.AddressSpace, log: Log, shared: bool) -> None:
    region = mm.mmap(PAGE, huge="hugetlb", shared=shared)
    assert region.size == HUGE
    vma = mm.vma_lookup(region.addr)
    assert vma is not None
    assert vma.hugetlb
    assert vma.page_size == HUGE
    region[HUGE - 1] = 7
    for refused in (mm.munmap, lambda addr, size: mm.mprotect(addr, size, READ)):
        assert errno_of(refused, region.addr, PAGE) == errno.EINVAL
    assert log.take() == []
    assert region[HUGE - 1] == 7


def test_no_hugetlb_pages_is_enomem_with_the_command(mm: pm.AddressSpace) -> None:
    with pytest.raises(pm.MirrorError, match=r"nr_overcommit_hugepages.*nr_hugepages") as failed:
        mm.mmap(1 << 45, huge="hugetlb")
    assert failed.value.errno == errno.ENOMEM


def test_vmas_are_those_of_proc_maps(mm: pm.AddressSpace) -> None:
    region = pages(mm, 2, shared=True)
    lines = Path("/proc/self/maps").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{region.addr:x}-"))
    (vma,) = mm.vmas(region.addr, region.addr + region.size)
    assert str(vma).split() == line.split()
    assert mm.find_vma(region.addr + PAGE) == vma
    below = mm.find_vma(0)
    assert below is not None
    assert below.start > 0
    assert mm.vma_lookup(0) is None
    assert mm.find_vma(USER_END) is None
