/* SPDX-License-Identifier: MIT */
/*
 * watch.c - which vmas the watch descriptor reports on, and the write bits it keeps after a fork.
 *
 * Memory is registered in write-protect mode without protecting anything: that costs a touch nothing and
 * brings the events of munmap, mremap, madvise and fork. The list of what is registered is changed by the
 * monitor too, which cannot allocate: it always has room to spare.
 */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "alone.h"
#include "devmem.h"
#include "populate.h"

enum { LIST_SLACK = 64, AGAIN_LIMIT = 10000, CACHED_PAGES = 4096 };
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

static int reserve(struct pm_mm *mm)
{
    uint32_t cap = mm->watched_cap * 2 + 2 * LIST_SLACK;
    struct pm_watch_range *grown, *old = mm->watched;
    bool room;

    pm_lock(mm);
    room = mm->nwatched + LIST_SLACK <= mm->watched_cap;
    pm_unlock(mm);
    if (room)
        return 0;
    grown = pm_sys_calloc(cap, sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    pm_lock(mm);
    if (old)
        memcpy(grown, old, mm->nwatched * sizeof(*grown));
    mm->watched = grown;
    mm->watched_cap = cap;
    pm_unlock(mm);
    free(old);
    return 0;
}

/* The first range that ends beyond addr. */
static uint32_t range_at(const struct pm_mm *mm, uint64_t addr)
{
    uint32_t low = 0, high = mm->nwatched;

    while (low < high) {
        uint32_t mid = low + (high - low) / 2;

        if (mm->watched[mid].end > addr)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

static void count_watched(struct pm_mm *mm)
{
    mm->watched_bytes = 0;
    for (uint32_t i = 0; i < mm->nwatched; i++)
        mm->watched_bytes += mm->watched[i].end - mm->watched[i].start;
    pm_status_watched(mm);
}

static void drop_ranges(struct pm_mm *mm, uint32_t first, uint32_t n)
{
    memmove(&mm->watched[first], &mm->watched[first + n],
            (mm->nwatched - first - n) * sizeof(mm->watched[0]));
    mm->nwatched -= n;
}

/* Registered still, and to be unregistered at the end: then a child may hold the descriptor, and nobody reads
 * events. */
static void keep_unlisted(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    if (mm->unlisted.end == 0)
        mm->unlisted.start = start;
    mm->unlisted.start = pm_min(mm->unlisted.start, start);
    mm->unlisted.end = pm_max(mm->unlisted.end, end);
}

/*
 * Take [start, end) out of the list. Without room to split a range its upper part is dropped too: it is
 * then registered once more some day, which does no harm.
 */
static void forget(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint32_t i = range_at(mm, start), first;

    if (i == mm->nwatched)
        return;
    if (mm->watched[i].start < start) {
        struct pm_watch_range high = {end, mm->watched[i].end};

        mm->watched[i].end = start;
        i++;
        if (high.end > end) {
            if (mm->nwatched == mm->watched_cap) {
                keep_unlisted(mm, high.start, high.end);
                return;
            }
            memmove(&mm->watched[i + 1], &mm->watched[i], (mm->nwatched - i) * sizeof(high));
            mm->watched[i] = high;
            mm->nwatched++;
            return;
        }
    }
    for (first = i; i < mm->nwatched && mm->watched[i].end <= end; i++)
        continue;
    if (i < mm->nwatched && mm->watched[i].start < end)
        mm->watched[i].start = end;
    drop_ranges(mm, first, i - first);
}

static void remember(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint32_t i, last;

    i = last = range_at(mm, start ? start - 1 : 0);
    while (last < mm->nwatched && mm->watched[last].start <= end) {
        start = pm_min(start, mm->watched[last].start);
        end = pm_max(end, mm->watched[last].end);
        last++;
    }
    if (last > i) {
        mm->watched[i] = (struct pm_watch_range){start, end};
        drop_ranges(mm, i + 1, last - i - 1);
        return;
    }
    if (mm->nwatched == mm->watched_cap) {
        keep_unlisted(mm, start, end);
        return;
    }
    memmove(&mm->watched[i + 1], &mm->watched[i], (mm->nwatched - i) * sizeof(mm->watched[0]));
    mm->watched[i] = (struct pm_watch_range){start, end};
    mm->nwatched++;
}

void pm_watch_forget(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    forget(mm, start, end);
    pm_alone_forget(mm, start, pm_last(end));
    count_watched(mm);
}

/* The old place is unmapped with a message of its own, or with MREMAP_DONTUNMAP stays mapped and registered.
 */
void pm_watch_moved(struct pm_mm *mm, uint64_t to, uint64_t len)
{
    remember(mm, to, to + len);
    count_watched(mm);
}

bool pm_watch_lists(const struct pm_mm *mm, uint64_t addr)
{
    uint32_t i = range_at(mm, addr);

    if (i < mm->nwatched && mm->watched[i].start <= addr)
        return true;
    return mm->unlisted.start <= addr && addr < mm->unlisted.end;
}

bool pm_watch_covers(const struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint32_t i = range_at(mm, start);

    return i < mm->nwatched && mm->watched[i].start <= start && mm->watched[i].end >= end;
}

bool pm_watched(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    bool covered;

    pm_lock(mm);
    covered = pm_watch_covers(mm, start, end);
    pm_unlock(mm);
    return covered;
}

static int uffd_register(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t mode)
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

/*
 * Write-protect mode switches the fault-around of file mappings off, and the mode for missing pages does not:
 * it is for files in memory of which no page is missing. One that is punched out later, and touched, is
 * filled by the monitor.
 */
static uint64_t mode_of(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end)
{
    bool in_memory = (vma->flags & (PM_VMA_FILE | PM_VMA_HUGETLB)) == PM_VMA_FILE && pm_is_shmem(vma);

    if (in_memory && !mm->inline_faults && pm_have(mm, PM_FEAT_UFFD_KERNEL) && end - start <= cached_max &&
        (mm->features.uffd_features & PM_ABI_UFFD_FEATURE_MISSING_SHMEM) && all_cached(start, end))
        return UFFDIO_REGISTER_MODE_MISSING;
    return UFFDIO_REGISTER_MODE_WP;
}

static int protect_run(struct pm_mm *mm, uint64_t start, uint64_t end)
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
            protect_run(mm, addr, addr + vma->page_size);
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
    err = reserve(mm);
    if (err)
        return err;
    err = uffd_register(mm, first, last, mode_of(mm, vma, first, last));
    if (err == -EBUSY || err == -EINVAL || err == -EPERM)
        return 0;
    if (err)
        return err;
    protect_absent_huge(mm, vma, first, last);
    pm_lock(mm);
    remember(mm, first, last);
    count_watched(mm);
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

static bool next_watched(struct pm_mm *mm, uint64_t addr, struct pm_watch_range *ret)
{
    bool found;
    uint32_t i;

    pm_lock(mm);
    i = range_at(mm, addr);
    found = i < mm->nwatched;
    if (found)
        *ret = mm->watched[i];
    pm_unlock(mm);
    return found;
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
    while (next_watched(mm, range.end, &range))
        unregister(mm, range.start, range.end);
    unregister(mm, mm->unlisted.start, mm->unlisted.end);
    wait_for_events(mm);
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
                protect_run(mm, run, page);
                run = 0;
            }
        }
    }
    if (run)
        protect_run(mm, run, end);
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

    while (next_watched(mm, range.end, &range)) {
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
        uffd_register(mm, start, end, UFFDIO_REGISTER_MODE_WP);
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
