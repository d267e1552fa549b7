/* SPDX-License-Identifier: MIT */
/*
 * watch_fork.c - what a fork has to do with watched memory: the write bits afterwards, and what is shared.
 */
#include <errno.h>
#include <sched.h>

#include "watch.h"

enum { AGAIN_LIMIT = 10000 };

int pm_watch_protect_run(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct uffdio_writeprotect wp = {.range = {start, end - start}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    int ret = 0;

    for (int i = 0; i < AGAIN_LIMIT; i++) {
        ret = pm_sys_ioctl(mm->uffd, UFFDIO_WRITEPROTECT, &wp);
        if (ret != -EAGAIN && ret != -EINTR)
            break;
        sched_yield();
    }
    return ret;
}

/*
 * Write-protect the present pages that are this process's own. The scan must have room for what it finds:
 * with none it protects everything, and leaves markers on unpopulated pages that keep huge pages away (seen
 * on 6.18).
 */
static int protect_present(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_abi_page_region found[32];
    struct pm_abi_scan_arg scan = {
        .size = sizeof(scan),
        .flags = PM_ABI_SCAN_WP_MATCHING,
        .start = start,
        .end = end,
        .vec = (uint64_t)(uintptr_t)found,
        .vec_len = sizeof(found) / sizeof(found[0]),
        .category_inverted = PM_ABI_PAGE_IS_FILE,
        .category_mask = PM_ABI_PAGE_IS_PRESENT | PM_ABI_PAGE_IS_FILE,
        .return_mask = PM_ABI_PAGE_IS_PRESENT,
    };
    int again = 0;

    while (scan.start < end) {
        int ret = pm_sys_ioctl(mm->pagemap_fd, PM_ABI_PAGEMAP_SCAN, &scan);

        if (ret >= 0) {
            if (scan.walk_end <= scan.start)
                return -EIO;
            scan.start = scan.walk_end;
        } else if ((ret != -EAGAIN && ret != -EINTR) || ++again == AGAIN_LIMIT) {
            return ret;
        } else {
            sched_yield(); /* EAGAIN: an event is unread */
        }
    }
    return 0;
}

/* The same without PAGEMAP_SCAN: run by run. */
static void protect_by_runs(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t seen[512], run = 0;

    for (uint64_t addr = start; addr < end; addr += sizeof(seen) / sizeof(seen[0]) * PM_PAGE_SIZE) {
        uint64_t n = pm_min(512, (end - addr) >> PM_PAGE_SHIFT);

        if (pm_pagemap_read(mm, addr, n, seen))
            return;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t page = addr + (i << PM_PAGE_SHIFT);
            bool own = (seen[i] & PM_ABI_PAGEMAP_PRESENT) && !(seen[i] & PM_ABI_PAGEMAP_FILE);

            if (own && !run)
                run = page;
            if (!own && run) {
                pm_watch_protect_run(mm, run, page);
                run = 0;
            }
        }
    }
    if (run)
        pm_watch_protect_run(mm, run, end);
}

static bool is_open(struct pm_mm *mm)
{
    bool open;

    pm_lock(mm);
    open = mm->uffd >= 0;
    pm_unlock(mm);
    return open;
}

typedef void (*watched_fn)(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end,
                           void *arg);

/* The watched part of every vma, in order. */
static void each_watched(struct pm_mm *mm, watched_fn fn, void *arg)
{
    struct pm_watch_range range = {0, 0};
    struct pm_vma vma;

    while (pm_watch_next(mm, range.end, &range)) {
        uint64_t addr = range.start;

        while (addr < range.end && pm_vma_query(mm, addr, &vma) == 0 && vma.start < range.end) {
            fn(mm, &vma, pm_max(addr, vma.start), pm_min(vma.end, range.end), arg);
            addr = vma.end;
        }
    }
}

static void protect_vma(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end, void *arg)
{
    (void)arg;
    if (vma->flags & (PM_VMA_SHARED | PM_VMA_SPECIAL))
        return;
    if (vma->flags & PM_VMA_FILE)
        pm_watch_register(mm, start, end, UFFDIO_REGISTER_MODE_WP);
    if (!pm_have(mm, PM_FEAT_PAGEMAP_SCAN) || protect_present(mm, start, end) != 0)
        protect_by_runs(mm, start, end);
}

void pm_watch_protect(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    if (!pm_have(mm, PM_FEAT_UFFD_WP_ASYNC))
        return;
    if (!pm_have(mm, PM_FEAT_PAGEMAP_SCAN) || protect_present(mm, start, end) != 0)
        protect_by_runs(mm, start, end);
}

void pm_watch_after_fork(struct pm_mm *mm)
{
    if (is_open(mm) && pm_have(mm, PM_FEAT_UFFD_WP_ASYNC) && pm_have(mm, PM_FEAT_PAGEMAP))
        each_watched(mm, protect_vma, NULL);
}

static bool is_hole(struct pm_mm *mm, uint64_t addr)
{
    struct pm_vma vma;

    return pm_vma_query(mm, addr, &vma) != 0 || vma.start > addr;
}

struct shared {
    struct pm_watch_range *ret;
    uint32_t n, cap;
};

static void add_shared(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end, void *arg)
{
    struct shared *shared = arg;

    (void)mm;
    if (!(vma->flags & PM_VMA_SHARED))
        return;
    if (shared->n && shared->ret[shared->n - 1].end == start)
        shared->ret[shared->n - 1].end = end;
    else if (shared->n < shared->cap)
        shared->ret[shared->n++] = (struct pm_watch_range){start, end};
}

uint32_t pm_watch_shared(struct pm_mm *mm, struct pm_watch_range *ret, uint32_t cap)
{
    struct shared shared = {.ret = ret, .cap = cap};

    if (is_open(mm))
        each_watched(mm, add_shared, &shared);
    /* The kernel's intervals end where a vma ends, so drivers get away with dropping the page after (test_hmm
     * does). */
    for (uint32_t i = 0; i < shared.n; i++) {
        if (is_hole(mm, ret[i].start - PM_PAGE_SIZE))
            ret[i].start -= PM_PAGE_SIZE;
    }
    return shared.n;
}
