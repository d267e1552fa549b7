/* SPDX-License-Identifier: MIT */
/*
 * populate.c - faulting pages in, which is user space's handle_mm_fault().
 */
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>

#include "devmem.h"
#include "inline.h"
#include "pagemap.h"
#include "populate.h"

enum {
    AGAIN_LIMIT = 64,
    WAIT_CHUNK = 512,
    AROUND_SIZE = 64 * 1024, /* the kernel's fault_around_bytes */
};

static int populate(uint64_t start, uint64_t end, int advice)
{
    int err = 0;

    for (int i = 0; i < AGAIN_LIMIT; i++) {
        err = pm_sys_madvise(start, end - start, advice);
        if (err != -EAGAIN && err != -EINTR)
            return err;
        sched_yield();
    }
    return -EAGAIN;
}

/* A byte of each page, into the void. */
static int read_pages(uint64_t start, uint64_t end)
{
    for (; start < end; start += PM_PAGE_SIZE) {
        char byte;
        ssize_t n = pm_sys_vm_readv(&byte, start, 1);

        if (n < 0)
            return (int)n;
    }
    return 0;
}

/*
 * process_vm_writev first pins the remote pages for writing, then copies. From a local side that cannot be
 * read the pages are faulted and the copy fails at its first byte: no byte changes, and a vma that goes away
 * meanwhile is an error. A plain store, even an atomic one of nothing, would be a signal then. Whether the
 * faulting worked the caller sees in the page table. The kernel pins a bounded number of pages before it
 * copies: 16 at the least.
 */
static int write_nothing(uint64_t start, uint64_t end)
{
    uint64_t piece = 16 * PM_PAGE_SIZE, bad;
    ssize_t n = -EFAULT;
    int err = pm_sys_mmap(0, PM_PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &bad);

    if (err)
        return err;
    for (; start < end && n == -EFAULT; start += piece)
        n = pm_sys_vm_writev((void *)(uintptr_t)bad, start, pm_min(piece, end - start));
    err = pm_sys_munmap(bad, PM_PAGE_SIZE);
    return n < 0 && n != -EFAULT ? (int)n : err;
}

/* Before MADV_POPULATE_*. Reading last tells what cannot be faulted; reading first would fault neighbours. */
static int populate_by_copy(uint64_t start, uint64_t end, bool write)
{
    int err = write ? write_nothing(start, end) : 0;

    return err ? err : read_pages(start, end);
}

static int populate_once(const struct pm_mm *mm, uint64_t start, uint64_t end, bool write)
{
    if (pm_have(mm, PM_FEAT_POPULATE))
        return populate(start, end, write ? PM_ABI_MADV_POPULATE_WRITE : PM_ABI_MADV_POPULATE_READ);
    if (pm_have(mm, PM_FEAT_PROCESS_VM))
        return populate_by_copy(start, end, write);
    return -EOPNOTSUPP;
}

int pm_populate(struct pm_mm *mm, uint64_t start, uint64_t end, bool write)
{
    unsigned tries = 0;
    int err;

    do
        err = populate_once(mm, start, end, write);
    while (pm_inline_again(err, start, end, &tries));
    return err;
}

/* Nobody has asked for what is on a device. */
static void leave_resident(struct pm_mm *mm, uint64_t start, uint64_t end, unsigned char *cached)
{
    if (!mm->devices)
        return;
    pm_lock(mm);
    for (uint64_t addr = start; pm_resident_next(mm->devices, &addr, end); addr += PM_PAGE_SIZE)
        cached[(addr - start) >> PM_PAGE_SHIFT] = 0;
    pm_unlock(mm);
}

/* Of [start, end), within one block of fault-around, what is in the page cache. Returns the pages asked for.
 */
static uint64_t populate_cached(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    unsigned char cached[AROUND_SIZE >> PM_PAGE_SHIFT];
    uint64_t addr = start, asked = 0;

    if (start >= end || pm_sys_mincore(start, end - start, cached))
        return 0;
    leave_resident(mm, start, end, cached);
    while (addr < end) {
        uint64_t first = addr;

        while (addr < end && (cached[(addr - start) >> PM_PAGE_SHIFT] & 1))
            addr += PM_PAGE_SIZE;
        if (first < addr && pm_populate(mm, first, addr, false) == 0)
            asked += (addr - first) >> PM_PAGE_SHIFT;
        addr += PM_PAGE_SIZE;
    }
    return asked;
}

uint64_t pm_populate_around(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end)
{
    const uint64_t mask = AROUND_SIZE - 1;
    uint64_t below = pm_max(vma->start, start & ~mask), above = pm_min(vma->end, (end + mask) & ~mask);

    return populate_cached(mm, below, start) + populate_cached(mm, end, above);
}

bool pm_is_shmem(const struct pm_vma *vma)
{
    static const char *const prefixes[] = {"/memfd:", "/dev/zero", "/dev/shm/", "/SYSV", "[anon_shmem:"};

    for (size_t i = 0; i < sizeof(prefixes) / sizeof(prefixes[0]); i++) {
        if (strncmp(vma->name, prefixes[i], strlen(prefixes[i])) == 0)
            return true;
    }
    return false;
}

/* A marker of userfaultfd or of a guard region has the last of the swap types: nothing is on any disk. */
static bool in_swap(uint64_t raw)
{
    return (raw & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)) == PM_ABI_PAGEMAP_SWAPPED &&
           !(raw & PM_ABI_PAGEMAP_GUARD) && (raw & 31) != 31;
}

/*
 * Shared memory that is not in the page cache is a hole, as a rule, and may be swapped out: to user space
 * that looks alike, so it is taken for a hole. mincore() tells of files that this process may write or owns;
 * of others it says that all is there. Pages beyond the end of a file are never there.
 */
static bool may_need_reading(const struct pm_vma *vma)
{
    return (vma->flags & PM_VMA_FILE) && !(vma->flags & PM_VMA_HUGETLB) && !pm_is_shmem(vma);
}

/* Index of the first page of a chunk that needs I/O, n if there is none. */
static uint64_t first_waiting(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t n,
                              const uint64_t *pfns)
{
    unsigned char cached[WAIT_CHUNK];
    uint64_t raw[WAIT_CHUNK], i;

    if (pm_pagemap_fill(mm, start, n, raw))
        memset(raw, 0, n * sizeof(*raw));
    if (!may_need_reading(vma) || pm_sys_mincore(start, n << PM_PAGE_SHIFT, cached))
        memset(cached, 1, n);
    for (i = 0; i < n; i++) {
        if (!(pfns[i] & PM_PFN_VALID) && (in_swap(raw[i]) || !(cached[i] & 1)))
            break;
    }
    return i;
}

int pm_would_wait(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end,
                  const uint64_t *pfns, uint64_t *ret)
{
    for (uint64_t addr = start; addr < end; addr += (uint64_t)WAIT_CHUNK << PM_PAGE_SHIFT) {
        uint64_t n = pm_min(WAIT_CHUNK, (end - addr) >> PM_PAGE_SHIFT);
        uint64_t i = first_waiting(mm, vma, addr, n, pfns + ((addr - start) >> PM_PAGE_SHIFT));

        if (i == n)
            continue;
        *ret = addr + (i << PM_PAGE_SHIFT);
        pm_sys_madvise(*ret, end - *ret, MADV_WILLNEED);
        return 1;
    }
    return 0;
}
