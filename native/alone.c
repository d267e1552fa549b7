/* SPDX-License-Identifier: MIT */
/*
 * alone.c - where every page is known to be mapped by this process alone.
 *
 * The pagemap tells this of each page, and looks at each struct page for it; PAGEMAP_SCAN, which is faster,
 * does not tell. So it is kept, for watched private memory of which a read has shown that all of it is
 * present and mapped here alone. A page that comes later is a new one, or the zero page, which the scan
 * shows. A page that is there can be shared by
 *   - what moves it or puts another in its place: an event, and an invalidation forgets;
 *   - a fork, which shows in a page of our own that nobody touches: while a child maps it too, nothing is
 *     known, and afterwards what was known holds again;
 *   - KSM, which takes small pages only and counts those that it has merged.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "alone.h"

static atomic_uint_least64_t locked_bytes;

/* Locked, since a page that comes back from swap looks as if it had no other user. */
static int map_canary(struct pm_mm *mm, uint64_t *at)
{
    const int prot = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;

    mm->canary_locked = pm_sys_mmap(0, PM_PAGE_SIZE, prot, flags | MAP_LOCKED, -1, 0, at) == 0;
    if (!mm->canary_locked)
        return pm_sys_mmap(0, PM_PAGE_SIZE, prot, flags, -1, 0, at);
    atomic_fetch_add(&locked_bytes, PM_PAGE_SIZE);
    return 0;
}

static void make_canary(struct pm_mm *mm)
{
    uint64_t at;

    pm_registry_lock();
    if (!atomic_load(&mm->canary)) {
        mm->ksm_fd = pm_sys_open("/proc/self/ksm_merging_pages", O_RDONLY | O_CLOEXEC);
        if ((mm->ksm_fd >= 0 || mm->ksm_fd == -ENOENT) && map_canary(mm, &at) == 0) {
            *(volatile uint64_t *)(uintptr_t)at = pm_now_ns();
            atomic_store(&mm->canary, at);
        }
    }
    pm_registry_unlock();
}

void pm_alone_close(struct pm_mm *mm)
{
    uint64_t canary = atomic_exchange(&mm->canary, 0);

    if (!canary)
        return;
    pm_sys_munmap(canary, PM_PAGE_SIZE);
    if (mm->canary_locked)
        atomic_fetch_sub(&locked_bytes, PM_PAGE_SIZE);
}

uint64_t pm_alone_locked(void)
{
    return atomic_load(&locked_bytes);
}

void pm_alone_child(void)
{
    atomic_store(&locked_bytes, 0);
}

static bool canary_is_alone(struct pm_mm *mm)
{
    const uint64_t bits = PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_EXCLUSIVE;
    uint64_t canary = atomic_load(&mm->canary), entry;

    return canary &&
           pm_sys_pread(mm->pagemap_fd, &entry, sizeof(entry), (canary >> PM_PAGE_SHIFT) * sizeof(entry)) ==
               sizeof(entry) &&
           (entry & bits) == bits;
}

bool pm_alone_merged(struct pm_mm *mm)
{
    char text[2];

    return mm->ksm_fd != -ENOENT &&
           (pm_sys_pread(mm->ksm_fd, text, sizeof(text), 0) != sizeof(text) || text[0] != '0');
}

bool pm_alone(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    bool known = false;

    if (!atomic_load(&mm->canary))
        return false;
    pm_lock(mm);
    for (uint32_t i = 0; i < PM_ALONE_MAX && !known; i++)
        known = mm->alone[i].start <= start && end <= mm->alone[i].end;
    pm_unlock(mm);
    return known && canary_is_alone(mm);
}

/* Into the slot of a neighbour, a free one, or the next in turn. */
static void keep(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_watch_range *slot = NULL;

    for (uint32_t i = 0; i < PM_ALONE_MAX; i++) {
        struct pm_watch_range *at = &mm->alone[i];

        if (at->end == 0) {
            slot = slot ? slot : at;
        } else if (at->start <= end && start <= at->end) {
            start = pm_min(start, at->start);
            end = pm_max(end, at->end);
            *at = (struct pm_watch_range){0, 0};
            slot = at;
        }
    }
    if (!slot)
        slot = &mm->alone[mm->alone_next++ % PM_ALONE_MAX];
    *slot = (struct pm_watch_range){start, end};
}

void pm_alone_learn(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t seq)
{
    /* What was read before there was a canary may have been shared since. */
    if (!atomic_load(&mm->canary)) {
        make_canary(mm);
        return;
    }
    pm_lock(mm);
    if (atomic_load(&mm->seq) == seq && !mm->invs && pm_watch_covers(mm, start, end))
        keep(mm, start, end);
    pm_unlock(mm);
}

void pm_alone_forget(struct pm_mm *mm, uint64_t start, uint64_t last)
{
    if (!atomic_load_explicit(&mm->canary, memory_order_relaxed))
        return;
    for (uint32_t i = 0; i < PM_ALONE_MAX; i++) {
        struct pm_watch_range *at = &mm->alone[i];

        if (at->end == 0 || !pm_overlap(start, last, at->start, pm_last(at->end)))
            continue;
        /* The longer of what is left. */
        if (start > at->start && (last >= at->end || start - at->start >= at->end - 1 - last))
            at->end = start;
        else if (pm_last(at->end) > last)
            at->start = last + 1;
        else
            *at = (struct pm_watch_range){0, 0};
    }
}
