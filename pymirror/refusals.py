# SPDX-License-Identifier: MIT
"""What to do about what mmap(2) and its kin refuse, and pymirror cannot see beforehand."""

from __future__ import annotations

import errno

_HINTS = {
    ("mmap", errno.ENOMEM): "ask for less; see ulimit -v, vm.overcommit_memory and vm.max_map_count",
    ("mmap", errno.EACCES): "open the file with the access that prot and shared ask for",
    ("mmap", errno.ENODEV): "give a descriptor of a file, a memfd or a device that can be mapped",
    ("mmap", errno.EPERM): "leave PROT_EXEC or writing out: the mount (noexec) or the file's seals forbid it",
    ("mmap", errno.EINVAL): "the file refuses this size, offset or prot: hugetlbfs wants multiples of 2 MiB",
    ("mmap", errno.EOVERFLOW): "keep offset + size below 2**63",
    ("mmap", errno.EAGAIN): "the file is locked, or ulimit -l is reached",
    ("mprotect", errno.EACCES): "open the file behind it with O_RDWR, and map it anew",
    ("mprotect", errno.EINVAL): "give whole pages, and PROT_READ, PROT_WRITE and PROT_EXEC only",
    (
        "madvise",
        errno.EINVAL,
    ): "the kernel does not know this advice, or not for this kind of vma: madvise(2)",
    ("madvise", errno.EACCES): "MADV_REMOVE needs a shared mapping that may be written to",
    ("madvise", errno.EBUSY): "a page is locked, pinned or the kernel's: munlock() or unpin it, or go again",
    ("madvise", errno.EAGAIN): "the kernel lacks a resource at the moment: go again",
    ("madvise", errno.EIO): "the page could not be read back from where it was swapped or stored",
    ("mremap", errno.EFAULT): "move what /proc/self/maps shows as several vmas piece by piece",
    (
        "mremap",
        errno.ENOMEM,
    ): "free address space or memory: ulimit -v, vm.max_map_count, vm.overcommit_memory",
    ("mremap", errno.EAGAIN): "the memory is locked, and would exceed ulimit -l",
}


def refused_hint(call: str, number: int) -> str:
    """For the errno that a system call gave; the manual page where it is none of these."""
    return _HINTS.get((call, number), f"see {call}(2)")
