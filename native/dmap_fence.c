/* SPDX-License-Identifier: MIT */
/*
 * dmap_fence.c - what an invalidation does to the DMA mappings of an mm. With the device lock held; nothing
 * here allocates or takes another lock, for the monitor runs it.
 */
#include "domain.h"

/* The pages of a mapping that lie in [start, last]. */
struct interval {
    uint64_t start, last, seq;
};

static void pages_in(const struct pm_dmap *dmap, const struct interval *at, uint64_t *first, uint64_t *end)
{
    uint64_t start = pm_max(at->start, dmap->by_addr.start), last = pm_min(at->last, dmap->by_addr.last);

    *first = (start - dmap->start) >> PM_PAGE_SHIFT;
    *end = ((last - dmap->start) >> PM_PAGE_SHIFT) + 1;
}

static bool fence_dmap(struct pm_inode *node, void *arg)
{
    struct pm_dmap *dmap = (struct pm_dmap *)node;
    const struct interval *at = arg;
    uint64_t i, end, fenced = 0;

    for (pages_in(dmap, at, &i, &end); i < end; i++) {
        if (!(dmap->entry[i] & PM_ENTRY_VALID))
            continue;
        dmap->entry[i] = PM_ENTRY_FENCED | (dmap->entry[i] & PM_ENTRY_WRITE) | (at->seq & PM_ENTRY_SEQ_MASK);
        fenced++;
    }
    if (fenced) {
        atomic_fetch_add(&dmap->domain->fenced, fenced);
        atomic_fetch_add(&dmap->domain->flushes, !pm_domain_direct(dmap->domain));
    }
    return true;
}

void pm_dmaps_fence(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq)
{
    struct interval at = {start, last, seq};

    pm_itree_visit(mm->dmaps, start, last, fence_dmap, &at);
}

static bool drop_dmap(struct pm_inode *node, void *arg)
{
    struct pm_dmap *dmap = (struct pm_dmap *)node;
    const struct interval *at = arg;
    uint64_t fenced = PM_ENTRY_FENCED | (at->seq & PM_ENTRY_SEQ_MASK), i, end;

    for (pages_in(dmap, at, &i, &end); i < end; i++) {
        if ((dmap->entry[i] & ~PM_ENTRY_WRITE) != fenced)
            continue;
        dmap->entry[i] = 0;
        dmap->linked--;
        atomic_fetch_sub(&dmap->domain->pages, 1);
    }
    return true;
}

void pm_dmaps_drop(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq)
{
    struct interval at = {start, last, seq};

    pm_itree_visit(mm->dmaps, start, last, drop_dmap, &at);
}
