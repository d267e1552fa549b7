/* SPDX-License-Identifier: MIT */
/*
 * inout.c - a walk that leaves alone the bits that are in and out at once (HMM_PFN_INOUT_FLAGS): a driver
 * keeps them in its pfns from one fault to the next.
 */
#include <errno.h>
#include <stdlib.h>

#include "internal.h"

static uint64_t all_bits(const uint64_t *pfns, uint64_t n)
{
    uint64_t bits = 0;

    for (uint64_t i = 0; i < n; i++)
        bits |= pfns[i];
    return bits;
}

int pm_walk_inout(pm_mm *mm, struct pm_walk *walk)
{
    uint64_t n = pm_walk_is_sane(mm, walk) ? (walk->end - walk->start) >> PM_PAGE_SHIFT : 0;
    uint64_t *kept;
    int err;

    if (!(all_bits(walk->pfns, n) & PM_PFN_STICKY))
        return pm_walk(mm, walk);
    kept = pm_sys_malloc(n * sizeof(*kept));
    if (!kept)
        return -ENOMEM;
    for (uint64_t i = 0; i < n; i++)
        kept[i] = walk->pfns[i] & PM_PFN_STICKY;
    err = pm_walk(mm, walk);
    for (uint64_t i = 0; i < n; i++)
        walk->pfns[i] |= kept[i];
    free(kept);
    return err;
}
