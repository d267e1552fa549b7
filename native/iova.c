/* SPDX-License-Identifier: MIT */
/*
 * iova.c - the IOVA allocator: which DMA addresses of a domain are given out.
 *
 * Top-down below a limit, size-aligned, as the kernel's. Small sizes are rounded up to a power of two. Powers
 * of two up to a huge page that were freed last wait in a magazine of their size to be given out again. What
 * backs an IOVA is no matter here.
 */
#include "iova.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "extents.h"
#include "internal.h"

enum {
    ROUNDED_PAGES = 32,       /* up to here sizes are rounded up to a power of two */
    MAGAZINE_SIZES = 10,      /* 1, 2, 4, ... 512 pages */
    MAGAZINE_DEPTH = 8 * 127, /* as many as eight of the kernel's magazines */
    RESERVED_MAX = 64,
    MAX_ALIGN_ORDER = 18, /* 1 GiB, the largest page that an IOMMU maps */
};

struct magazine {
    uint64_t page[MAGAZINE_DEPTH];
    uint32_t count;
};

struct run {
    uint64_t first, last;
};

struct pm_iova_space {
    pthread_mutex_t lock;
    uint64_t owner; /* pm_process() of the process that made it */
    struct run pages;
    struct pm_extents unused;
    struct pm_live live; /* those in magazines included */
    struct magazine magazines[MAGAZINE_SIZES];
    struct run reserved[RESERVED_MAX];
    uint32_t nreserved;
    /* An allocation of so many pages below that limit is known to fail until something is freed. */
    uint64_t failed_pages, failed_last;
    struct pm_iova_stats stats;
};

static uint64_t power_of_two(uint64_t pages)
{
    return pages <= 1 ? 1 : 1ULL << (64 - __builtin_clzll(pages - 1));
}

/* How many pages an allocation really takes. */
static uint64_t rounded(uint64_t pages)
{
    return pages <= ROUNDED_PAGES ? power_of_two(pages) : pages;
}

static struct magazine *magazine_of(struct pm_iova_space *space, uint64_t taken)
{
    unsigned order = (unsigned)__builtin_ctzll(taken);

    return taken == 1ULL << order && order < MAGAZINE_SIZES ? &space->magazines[order] : NULL;
}

static uint64_t magazine_pages(const struct pm_iova_space *space, const struct magazine *magazine)
{
    return 1ULL << (magazine - space->magazines);
}

/* The oldest n of a magazine become unused. */
static void magazine_drain(struct pm_iova_space *space, struct magazine *magazine, uint32_t n)
{
    uint64_t pages = magazine_pages(space, magazine);

    for (uint32_t i = 0; i < n; i++) {
        pm_live_remove(&space->live, pm_live_find(&space->live, magazine->page[i]));
        pm_extents_add(&space->unused, magazine->page[i], pages);
    }
    magazine->count -= n;
    memmove(magazine->page, magazine->page + n, magazine->count * sizeof(magazine->page[0]));
    space->stats.cached -= n;
    space->stats.cached_bytes -= n * pages << PM_PAGE_SHIFT;
}

static bool drain_all(struct pm_iova_space *space)
{
    bool any = space->stats.cached != 0;

    for (unsigned i = 0; i < MAGAZINE_SIZES; i++)
        magazine_drain(space, &space->magazines[i], space->magazines[i].count);
    return any;
}

static bool magazine_get(struct pm_iova_space *space, struct magazine *magazine, uint64_t last,
                         uint64_t *page)
{
    uint64_t pages = magazine_pages(space, magazine);

    for (uint32_t i = magazine->count; i-- > 0;) {
        if (magazine->page[i] + pages - 1 > last)
            continue;
        *page = magazine->page[i];
        magazine->page[i] = magazine->page[--magazine->count];
        space->stats.cached--;
        space->stats.cached_bytes -= pages << PM_PAGE_SHIFT;
        return true;
    }
    return false;
}

static void magazine_put(struct pm_iova_space *space, struct magazine *magazine, uint64_t page)
{
    if (magazine->count == MAGAZINE_DEPTH)
        magazine_drain(space, magazine, MAGAZINE_DEPTH / 2 + 1);
    magazine->page[magazine->count++] = page;
    space->stats.cached++;
    space->stats.cached_bytes += magazine_pages(space, magazine) << PM_PAGE_SHIFT;
}

static int space_lock(struct pm_iova_space *space)
{
    if (space->owner != pm_process())
        return -ESRCH;
    pthread_mutex_lock(&space->lock);
    return 0;
}

static void space_unlock(struct pm_iova_space *space)
{
    pthread_mutex_unlock(&space->lock);
}

int pm_iova_create(uint64_t first, uint64_t last, pm_iova_space **ret)
{
    struct pm_iova_space *space;
    int err;

    if (first & (PM_PAGE_SIZE - 1) || ~last & (PM_PAGE_SIZE - 1))
        return -EINVAL;
    first = pm_max(first >> PM_PAGE_SHIFT, 1);
    last >>= PM_PAGE_SHIFT;
    if (first > last)
        return -EINVAL;
    space = pm_sys_calloc(1, sizeof(*space));
    if (!space)
        return -ENOMEM;
    err = pm_process_mark(&space->owner);
    if (!err)
        err = pm_extents_reserve(&space->unused, 2);
    if (err) {
        free(space);
        return err;
    }
    pthread_mutex_init(&space->lock, NULL);
    space->pages = (struct run){first, last};
    space->failed_pages = UINT64_MAX;
    pm_extents_add(&space->unused, first, last - first + 1);
    *ret = space;
    return 0;
}

void pm_iova_destroy(pm_iova_space *space)
{
    if (!space)
        return;
    pm_extents_free(&space->unused);
    free(space->live.slots);
    pthread_mutex_destroy(&space->lock);
    free(space);
}

/* At most this many gaps are there, whatever is freed. */
static int reserve_nodes(struct pm_iova_space *space, uint64_t more)
{
    return pm_extents_reserve(&space->unused, space->live.count + space->nreserved + more + 1);
}

static bool touches_reserved(const struct pm_iova_space *space, const struct run *run, struct run *which)
{
    for (uint32_t i = 0; i < space->nreserved; i++) {
        if (!pm_overlap(run->first, run->last, space->reserved[i].first, space->reserved[i].last))
            continue;
        *which = space->reserved[i];
        return true;
    }
    return false;
}

/* Every page of the run is unused, or reserved already. */
static bool can_reserve(const struct pm_iova_space *space, struct run run)
{
    uint64_t first, last;
    struct run old;

    while (run.first <= run.last) {
        if (pm_extents_next(&space->unused, run.first, &first, &last) && first <= run.first)
            run.first = last + 1;
        else if (touches_reserved(space, &(struct run){run.first, run.first}, &old))
            run.first = old.last + 1;
        else
            return false;
    }
    return true;
}

static int reserve_locked(struct pm_iova_space *space, struct run run)
{
    uint64_t first, last;

    drain_all(space);
    if (!can_reserve(space, run))
        return -EBUSY;
    if (space->nreserved == RESERVED_MAX)
        return -ENOSPC;
    if (reserve_nodes(space, 1))
        return -ENOMEM;
    space->reserved[space->nreserved++] = run;
    while (pm_extents_next(&space->unused, run.first, &first, &last) && first <= run.last) {
        first = pm_max(first, run.first);
        last = pm_min(last, run.last);
        pm_extents_take(&space->unused, first, last - first + 1);
        space->stats.reserved_bytes += (last - first + 1) << PM_PAGE_SHIFT;
    }
    return 0;
}

int pm_iova_reserve(pm_iova_space *space, uint64_t first, uint64_t last)
{
    struct run run = {first >> PM_PAGE_SHIFT, last >> PM_PAGE_SHIFT};
    int err;

    if (first > last)
        return -EINVAL;
    run.first = pm_max(run.first, space->pages.first);
    run.last = pm_min(run.last, space->pages.last);
    if (run.first > run.last)
        return 0;
    err = space_lock(space);
    if (err)
        return err;
    err = reserve_locked(space, run);
    space_unlock(space);
    return err;
}

static bool take_unused(struct pm_iova_space *space, uint64_t pages, uint64_t last, uint64_t *page)
{
    uint64_t align = pm_min(power_of_two(pages), 1ULL << MAX_ALIGN_ORDER);

    if (pages >= space->failed_pages && last <= space->failed_last)
        return false;
    if (!pm_extents_find(&space->unused, pages, align, last, page) &&
        !(drain_all(space) && pm_extents_find(&space->unused, pages, align, last, page))) {
        space->failed_pages = pages;
        space->failed_last = last;
        return false;
    }
    pm_extents_take(&space->unused, *page, pages);
    return true;
}

static int alloc_locked(struct pm_iova_space *space, uint64_t pages, uint64_t last, uint64_t *page)
{
    uint64_t taken = rounded(pages);
    struct magazine *magazine = magazine_of(space, taken);

    if (magazine && magazine_get(space, magazine, last, page)) {
        pm_live_find(&space->live, *page)->pages = pages;
        space->stats.magazine_hits++;
        return 0;
    }
    if (pm_live_grow(&space->live) || reserve_nodes(space, 1))
        return -ENOMEM;
    if (!take_unused(space, taken, last, page))
        return -ENOSPC;
    pm_live_add(&space->live, *page, pages);
    return 0;
}

int pm_iova_alloc(pm_iova_space *space, uint64_t size, uint64_t limit_last, uint64_t *ret)
{
    uint64_t pages = (size >> PM_PAGE_SHIFT) + ((size & (PM_PAGE_SIZE - 1)) != 0);
    uint64_t page, last;
    int err;

    if (!pages)
        return -EINVAL;
    if (limit_last < PM_PAGE_SIZE - 1)
        return -ENOSPC;
    last = pm_min(space->pages.last, ((limit_last - (PM_PAGE_SIZE - 1)) >> PM_PAGE_SHIFT));
    err = space_lock(space);
    if (err)
        return err;
    err = alloc_locked(space, pages, last, &page);
    if (err) {
        space->stats.failed++;
    } else {
        space->stats.allocs++;
        space->stats.live_bytes += rounded(pages) << PM_PAGE_SHIFT;
        *ret = page << PM_PAGE_SHIFT;
    }
    space_unlock(space);
    return err;
}

static int free_locked(struct pm_iova_space *space, uint64_t page, uint64_t pages)
{
    struct pm_live_slot *slot = pm_live_find(&space->live, page);
    uint64_t taken = rounded(pages);
    struct magazine *magazine = magazine_of(space, taken);

    if (!slot || !slot->pages)
        return -ENOENT;
    if (slot->pages != pages)
        return -EINVAL;
    space->failed_pages = UINT64_MAX;
    if (magazine) {
        slot->pages = 0;
        magazine_put(space, magazine, page);
    } else {
        pm_live_remove(&space->live, slot);
        pm_extents_add(&space->unused, page, taken);
    }
    space->stats.frees++;
    space->stats.live_bytes -= taken << PM_PAGE_SHIFT;
    return 0;
}

int pm_iova_free(pm_iova_space *space, uint64_t iova, uint64_t size)
{
    uint64_t pages = (size >> PM_PAGE_SHIFT) + ((size & (PM_PAGE_SIZE - 1)) != 0);
    int err;

    if (iova & (PM_PAGE_SIZE - 1) || !pages)
        return -EINVAL;
    err = space_lock(space);
    if (err)
        return err;
    err = free_locked(space, iova >> PM_PAGE_SHIFT, pages);
    space_unlock(space);
    return err;
}

int64_t pm_iova_size(pm_iova_space *space, uint64_t iova)
{
    const struct pm_live_slot *slot;
    int64_t ret = space_lock(space);

    if (ret)
        return ret;
    slot = pm_live_find(&space->live, iova >> PM_PAGE_SHIFT);
    ret = slot && slot->pages && !(iova & (PM_PAGE_SIZE - 1)) ? (int64_t)(slot->pages << PM_PAGE_SHIFT)
                                                              : -ENOENT;
    space_unlock(space);
    return ret;
}

int pm_iova_stats(pm_iova_space *space, struct pm_iova_stats *ret)
{
    int err = space_lock(space);

    if (err)
        return err;
    *ret = space->stats;
    ret->live = space->live.count - space->stats.cached;
    ret->unused_bytes = space->unused.pages << PM_PAGE_SHIFT;
    ret->unused_runs = space->unused.count;
    ret->memory = sizeof(*space) + space->live.room * sizeof(*space->live.slots) +
                  (space->unused.room + 1ULL) * sizeof(*space->unused.nodes);
    space_unlock(space);
    return 0;
}
