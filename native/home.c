/* SPDX-License-Identifier: MIT */
/*
 * home.c - pages of device memory come home: by call, at a touch of the CPU, and into a forked child.
 *
 * What is noted and what is true change in one hold of the device lock; see migrate.c.
 */
#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include "devmem.h"

enum { AGAIN_LIMIT = 64 };
static const uint64_t drain_limit_ns = 1000ULL * 1000 * 1000;
static const uint64_t home_limit_ns = 5000ULL * 1000 * 1000;

/* Where UFFDIO_MOVE may not: the vma is read-only by now, or locked, or the slot is looked at. */
static int64_t copy_home(struct pm_mm *mm, uint64_t addr, uint64_t slot)
{
    struct uffdio_copy copy = {.dst = addr, .src = slot, .len = PM_PAGE_SIZE};
    uint64_t seen;
    int err = pm_pagemap_read(mm, slot, 1, &seen);

    if (err)
        return err;
    /* Never touched: a hole at home, too. */
    if (!(seen & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)))
        return PM_PAGE_SIZE;
    err = pm_sys_ioctl(mm->uffd, UFFDIO_COPY, &copy);
    /* EEXIST: something is there that is younger, a guard page for one. */
    if (err && err != -EEXIST)
        return err;
    pm_sys_madvise(slot, PM_PAGE_SIZE, MADV_DONTNEED);
    mm->devices->stats.copied++;
    return PM_PAGE_SIZE;
}

int64_t pm_home(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only)
{
    struct pm_devices *devices = mm->devices;
    int64_t total = 0, got;

    for (uint64_t addr = start; pm_resident_next(devices, &addr, end); addr += (uint64_t)got) {
        uint64_t slot = pm_resident(devices, addr);
        uint64_t limit = pm_min(end, (addr & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);

        got = PM_PAGE_SIZE;
        if (only && pm_devmem_of(devices, slot) != only)
            continue;
        got = pm_move_pages(mm->uffd, addr, slot, pm_resident_run(devices, addr, limit) << PM_PAGE_SHIFT);
        if (got < 0 && got != -EAGAIN)
            got = copy_home(mm, addr, slot);
        if (got < 0)
            return got;
        pm_devmem_forget(mm, addr, (uint64_t)got >> PM_PAGE_SHIFT);
        devices->stats.to_system += (uint64_t)got >> PM_PAGE_SHIFT;
        total += got >> PM_PAGE_SHIFT;
    }
    return total;
}

/* The next 2 MiB range of [*addr, end) that has resident pages. */
static int64_t home_step(struct pm_mm *mm, uint64_t *addr, uint64_t end, const struct pm_devmem *only)
{
    int64_t got = 0;
    uint64_t next = end;

    pm_lock(mm);
    if (pm_resident_next(mm->devices, addr, end)) {
        next = pm_min(end, (*addr & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);
        pm_drain_writes(mm, *addr, next - 1, pm_now_ns() + drain_limit_ns);
        got = pm_home(mm, *addr, next, only);
    }
    pm_unlock(mm);
    if (got >= 0)
        *addr = next;
    return got;
}

int pm_home_all(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only, uint64_t *moved)
{
    uint64_t until = pm_now_ns() + home_limit_ns;

    if (!mm->devices)
        return 0;
    while (start < end) {
        int64_t got = home_step(mm, &start, end, only);

        if (got >= 0) {
            *moved += (uint64_t)got;
            until = pm_now_ns() + home_limit_ns;
            continue;
        }
        if (got != -EAGAIN || pm_now_ns() > until)
            return (int)got;
        pm_doze();
    }
    return 0;
}

int pm_migrate_to_system(pm_mm *mm, uint64_t start, uint64_t end, const pm_devmem *only, uint64_t *moved)
{
    int err;

    *moved = 0;
    if (!pm_is_interval(start, end))
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    err = pm_home_all(mm, start, end, only, moved);
    pm_mm_exit(mm);
    return err;
}

/* A huge page that comes home in pieces would be split. */
static bool in_huge_page(struct pm_mm *mm, uint64_t addr)
{
    uint64_t slot = pm_resident(mm->devices, addr), first = slot & ~(PM_HUGE_SIZE - 1);
    uint64_t pfn[2];

    if (!pm_have(mm, PM_FEAT_PFN) || (addr - slot) % PM_HUGE_SIZE || !pm_devmem_full(mm->devices, slot))
        return false;
    for (int i = 0; i < 2; i++) {
        if (pm_pagemap_read(mm, first + (uint64_t)i * (PM_HUGE_SIZE - PM_PAGE_SIZE), 1, &pfn[i]))
            return false;
        pfn[i] &= PM_ABI_PAGEMAP_PFN_MASK;
    }
    return pfn[0] && pfn[0] % PM_HUGE_PAGES == 0 && pfn[1] == pfn[0] + PM_HUGE_PAGES - 1;
}

/* How much comes home with the page at addr. */
static void span_around(struct pm_mm *mm, uint64_t addr, uint64_t *start, uint64_t *end)
{
    uint64_t around = in_huge_page(mm, addr) ? PM_HUGE_SIZE : mm->devices->around;

    *start = addr & ~(around - 1);
    *end = *start + around;
}

/* Other threads' device writes to what is to come home. The monitor has waited for all, and must not again:
 * one may wait for it to fault in what it writes from. */
static void drain_inline(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t n, until = pm_now_ns() + drain_limit_ns;

    if (!mm->inline_faults)
        return;
    for (uint64_t addr = start; pm_resident_next(mm->devices, &addr, end); addr += n << PM_PAGE_SHIFT) {
        n = pm_resident_run(mm->devices, addr, end);
        pm_drain_writes(mm, addr, addr + (n << PM_PAGE_SHIFT) - 1, until);
    }
}

int64_t pm_home_told(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_event event = {.start = start, .end = end, .type = PM_CLEAR, .guarantee = PM_BEFORE};
    struct pm_inv inv = {0};
    uint64_t first = start;
    int64_t got;

    drain_inline(mm, start, end);
    if (!pm_resident_next(mm->devices, &first, end))
        return 0;
    event.seq = pm_inv_open(mm, &inv, start, end - 1, PM_CLEAR, PM_BEFORE);
    event.when_ns = inv.since_ns;
    got = pm_home(mm, start, end, NULL);
    pm_inv_close(mm, &inv);
    mm->devices->stats.faults++;
    mm->stats.events[PM_CLEAR]++;
    pm_queue_push(mm, &event);
    return got;
}

int pm_home_fault(struct pm_mm *mm, uint64_t addr)
{
    struct uffdio_zeropage zero = {.range = {addr, PM_PAGE_SIZE}};
    uint64_t start = addr, end = addr + PM_PAGE_SIZE;
    int64_t err = 0;

    if (mm->devices && pm_resident(mm->devices, addr)) {
        span_around(mm, addr, &start, &end);
        err = pm_home_told(mm, start, end);
    }
    if (!mm->devices || !pm_resident(mm->devices, addr)) {
        err = pm_sys_ioctl(mm->uffd, UFFDIO_ZEROPAGE, &zero);
        if (!err && mm->devices)
            mm->devices->stats.filled++;
    }
    /* Whatever did not work is tried again when the thread faults again. */
    if (!mm->inline_faults)
        pm_sys_ioctl(mm->uffd, UFFDIO_WAKE, &(struct uffdio_range){start, end - start});
    return err < 0 ? (int)err : 0;
}

static bool copy_to_child(int fd, uint64_t addr, uint64_t slot)
{
    struct uffdio_copy copy = {.dst = addr, .src = slot, .len = PM_PAGE_SIZE};
    struct uffd_msg msg;

    for (int i = 0; i < AGAIN_LIMIT; i++) {
        int err = pm_sys_ioctl(fd, UFFDIO_COPY, &copy);

        if (err != -EAGAIN)
            return err == 0 || err == -EEXIST || err == -ENOENT || err == -ESRCH;
        /* The child has begun to change its memory: it waits for a reader. */
        pm_sys_read(fd, &msg, sizeof(msg));
    }
    return false;
}

void pm_home_child(struct pm_mm *mm, int child_uffd)
{
    struct pm_devices *devices = mm->devices;
    uint64_t seen;

    if (!devices)
        return;
    for (uint64_t addr = 0; pm_resident_next(devices, &addr, PM_USER_END); addr += PM_PAGE_SIZE) {
        uint64_t slot = pm_resident(devices, addr);

        if (pm_pagemap_read(mm, slot, 1, &seen) == 0 &&
            !(seen & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)))
            continue;
        if (!copy_to_child(child_uffd, addr, slot))
            devices->stats.child_lost++;
    }
}
