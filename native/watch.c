/* SPDX-License-Identifier: MIT */
/*
 * watch.c - which vmas the watch descriptor reports on.
 *
 * Memory is registered in write-protect mode without protecting anything: that costs a touch nothing and
 * brings the events of munmap, mremap, madvise and fork.
 */
#include "watch.h"

#include <errno.h>
#include <time.h>

#include "devmem.h"
#include "populate.h"

enum { CACHED_PAGES = 4096 };
static const uint64_t cached_max = 1ULL << 30;
static const uint64_t event_limit_ns = 5000ULL * 1000 * 1000;

static uint64_t wanted_features(const struct pm_mm *mm)
{
    uint64_t want = PM_ABI_UFFD_FEATURE_PAGEFAULT_FLAG_WP | PM_ABI_UFFD_FEATURE_WP_HUGETLBFS_SHMEM;

    want |= PM_ABI_UFFD_FEATURE_MINOR_SHMEM | PM_ABI_UFFD_FEATURE_MISSING_SHMEM;
    want &= mm->features.uffd_features;
    if (pm_have(mm, PM_FEAT_UFFD_WP_ASYNC))
        want |= PM_ABI_UFFD_FEATURE_WP_ASYNC;
    if (mm->inline_faults && pm_have(mm, PM_FEAT_UFFD_SIGBUS))
        want |= PM_ABI_UFFD_FEATURE_SIGBUS;
    if (pm_have(mm, PM_FEAT_UFFD_WP_UNPOPULATED))
        want |= PM_ABI_UFFD_FEATURE_WP_UNPOPULATED;
    if (pm_have(mm, PM_FEAT_UFFD_EVENTS))
        want |= PM_ABI_UFFD_FEATURE_EVENT_REMOVE | PM_ABI_UFFD_FEATURE_EVENT_UNMAP |
                PM_ABI_UFFD_FEATURE_EVENT_REMAP;
    if (pm_have(mm, PM_FEAT_UFFD_EVENT_FORK))
        want |= PM_ABI_UFFD_FEATURE_EVENT_FORK;
    return want;
}

/* Under the device lock too, since a fork looks at it. */
static void set_uffd(struct pm_mm *mm, int fd)
{
    pm_lock(mm);
    mm->uffd = fd;
    pm_unlock(mm);
}

/* With watch_lock held. */
int pm_watch_open(struct pm_mm *mm)
{
    uint32_t source;
    int fd, err;

    if (mm->uffd >= 0)
        return 0;
    fd = pm_uffd_open(mm->disable, &source);
    if (fd < 0)
        return fd;
    err = pm_uffd_api(fd, wanted_features(mm));
    if (!err) {
        set_uffd(mm, fd);
        err = pm_monitor_start(mm);
    }
    if (err) {
        set_uffd(mm, -1);
        pm_sys_close(fd);
    }
    return err;
}

int pm_watch_register(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t mode)
{
    struct uffdio_register reg = {.range = {start, end - start}, .mode = mode};

    return pm_sys_ioctl(mm->uffd, UFFDIO_REGISTER, &reg);
}

static bool all_cached(uint64_t start, uint64_t end)
{
    unsigned char cached[CACHED_PAGES];

    for (; start < end; start += (uint64_t)CACHED_PAGES << PM_PAGE_SHIFT) {
        uint64_t len = pm_min(end - start, (uint64_t)CACHED_PAGES << PM_PAGE_SHIFT);

        if (pm_sys_mincore(start, len, cached))
            return false;
        for (uint64_t i = 0; i < len >> PM_PAGE_SHIFT; i++) {
            if (!(cached[i] & 1))
                return false;
        }
    }
    return true;
}

/* The kernel gives a vma the modes asked for in place of those it had. */
static bool any_watched(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_watch_range range;

    return pm_watch_next(mm, start, &range) && range.start < end;
}

/*
 * Write-protect mode switches the fault-around of file mappings off, and the mode for missing pages does not:
 * it is for files in memory of which no page is missing. One that is punched out later, and touched, is
 * filled by the monitor. What is watched already may have been write-protected since, after a fork: without
 * that mode its pages would keep the mark, and never be found writable again.
 */
static uint64_t mode_of(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end)
{
    bool in_memory = (vma->flags & (PM_VMA_FILE | PM_VMA_HUGETLB)) == PM_VMA_FILE && pm_is_shmem(vma);

    if (in_memory && !any_watched(mm, start, end) && !mm->inline_faults && pm_have(mm, PM_FEAT_UFFD_KERNEL) &&
        end - start <= cached_max && (mm->features.uffd_features & PM_ABI_UFFD_FEATURE_MISSING_SHMEM) &&
        all_cached(start, end))
        return UFFDIO_REGISTER_MODE_MISSING;
    return UFFDIO_REGISTER_MODE_WP;
}

/*
 * A private hugetlb page that was only read is mapped read-only, and the pagemap does not show it. Protected
 * while it is not there yet, which leaves a marker, it comes in with the uffd-wp bit and loses it when it is
 * written.
 */
static void protect_absent_huge(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end)
{
    const uint64_t need = PM_ABI_UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    uint64_t entry;

    if ((vma->flags & (PM_VMA_HUGETLB | PM_VMA_SHARED)) != PM_VMA_HUGETLB)
        return;
    if (!pm_have(mm, PM_FEAT_UFFD_WP_ASYNC) || !(mm->features.uffd_features & need))
        return;
    for (uint64_t addr = start; addr < end; addr += vma->page_size) {
        if (pm_pagemap_read(mm, addr, 1, &entry) == 0 && !(entry & PM_ABI_PAGEMAP_PRESENT))
            pm_watch_protect_run(mm, addr, addr + vma->page_size);
    }
}

bool pm_events_unread(struct pm_mm *mm)
{
    struct uffdio_writeprotect nothing = {.range = {0, PM_PAGE_SIZE}};

    return pm_sys_ioctl(mm->uffd, UFFDIO_WRITEPROTECT, &nothing) == -EAGAIN;
}

/* Bytes of the interval that are watched now; a vma that refuses counts nothing. */
static int64_t watch_vma(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end,
                         uint32_t flags)
{
    uint64_t first = pm_max(start, vma->start), last = pm_min(end, vma->end);
    int64_t bytes = (int64_t)(last - first);
    int err;

    /* With an event unread the list may still have what was mapped here before. */
    if (!pm_events_unread(mm) && pm_watched(mm, first, last))
        return bytes;
    if (!(flags & PM_WATCH_EXACT)) {
        first = vma->start;
        last = vma->end;
    }
    err = pm_watch_reserve(mm);
    if (err)
        return err;
    err = pm_watch_register(mm, first, last, mode_of(mm, vma, first, last));
    if (err == -EBUSY || err == -EINVAL || err == -EPERM)
        return 0;
    if (err)
        return err;
    protect_absent_huge(mm, vma, first, last);
    pm_lock(mm);
    pm_watch_remember(mm, first, last);
    pm_unlock(mm);
    return bytes;
}

static int64_t watch_interval(struct pm_mm *mm, uint64_t start, uint64_t end, uint32_t flags)
{
    int64_t total = 0, n;
    struct pm_vma vma;
    uint64_t addr = start;

    while (addr < end) {
        n = pm_vma_query(mm, addr, &vma);
        if (n == -ENOENT || (!n && vma.start >= end))
            break;
        if (n)
            return n;
        addr = vma.end;
        if (vma.flags & PM_VMA_SPECIAL)
            continue;
        if ((vma.flags & PM_VMA_FILE) && !(vma.flags & PM_VMA_HUGETLB) && !(flags & PM_WATCH_FILES))
            continue;
        n = watch_vma(mm, &vma, start, end, flags);
        if (n < 0)
            return n;
        total += n;
    }
    return total;
}

int64_t pm_watch(pm_mm *mm, uint64_t start, uint64_t end, uint32_t flags)
{
    int64_t ret;

    if (start % PM_PAGE_SIZE || end % PM_PAGE_SIZE || end <= start ||
        (flags & ~(uint32_t)(PM_WATCH_FILES | PM_WATCH_EXACT)))
        return -EINVAL;
    if (!pm_have(mm, PM_FEAT_UFFD) || !pm_have(mm, PM_FEAT_UFFD_EVENTS))
        return 0;
    ret = pm_mm_enter(mm);
    if (ret)
        return ret;
    pthread_mutex_lock(&mm->watch_lock);
    ret = pm_watch_open(mm);
    if (!ret)
        ret = watch_interval(mm, start, end, flags);
    pthread_mutex_unlock(&mm->watch_lock);
    pm_mm_exit(mm);
    return ret;
}

int pm_watch_has(pm_mm *mm, uint64_t start, uint64_t end)
{
    int ret = pm_mm_enter(mm);

    if (ret)
        return ret;
    ret = mm->uffd >= 0 && !pm_events_unread(mm) && pm_watched(mm, start, end);
    pm_mm_exit(mm);
    return ret;
}

/* Vma by vma, as one that cannot be registered makes the kernel refuse the whole. */
static void unregister(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_vma vma;
    uint64_t addr = start;

    while (addr < end) {
        int err = pm_vma_query(mm, addr, &vma);
        uint64_t first = err ? addr : pm_max(start, vma.start), last = err ? end : pm_min(end, vma.end);
        struct uffdio_range range = {first, last - first};

        if (err == -ENOENT || first >= end)
            return;
        pm_sys_ioctl(mm->uffd, UFFDIO_UNREGISTER, &range);
        addr = last;
    }
}

int pm_unwatch(pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t moved = 0;
    int err;

    if (start % PM_PAGE_SIZE || end % PM_PAGE_SIZE || end <= start)
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    pthread_mutex_lock(&mm->watch_lock);
    err = pm_home_all(mm, start, end, NULL, &moved);
    if (!err && mm->uffd >= 0) {
        pm_lock(mm);
        pm_watch_forget(mm, start, end);
        if (mm->devices)
            pm_coherent_drop(mm, start, end);
        pm_unlock(mm);
        unregister(mm, start, end);
    }
    pthread_mutex_unlock(&mm->watch_lock);
    pm_mm_exit(mm);
    return err;
}

/*
 * A munmap that began before the end of the registration has its event still to come, and would wait for a
 * reader for ever.
 */
static void wait_for_events(struct pm_mm *mm)
{
    uint64_t until = pm_now_ns() + event_limit_ns;

    while (pm_events_unread(mm) && pm_now_ns() < until)
        nanosleep(&(struct timespec){.tv_nsec = 50 * 1000}, NULL);
}

/* close(2) alone would not do: a child may hold the descriptor still. */
void pm_unwatch_all(struct pm_mm *mm)
{
    struct pm_watch_range range = {0, 0};

    if (mm->uffd < 0)
        return;
    while (pm_watch_next(mm, range.end, &range))
        unregister(mm, range.start, range.end);
    unregister(mm, mm->unlisted.start, mm->unlisted.end);
    wait_for_events(mm);
}
