/* SPDX-License-Identifier: MIT */
/*
 * walk.h - what walk.c and walk_fault.c tell each other.
 */
#ifndef PM_WALK_H
#define PM_WALK_H

#include <errno.h>

#include "devmem.h"
#include "pagemap.h"

/* A part of one vma, no larger than a block, and what is asked of it. */
struct pm_part {
    struct pm_mm *mm;
    struct pm_walk *walk;
    const struct pm_vma *vma;
    struct pm_rules rules;
    uint64_t start, n;
    uint64_t *pfns;
    uint64_t all;         /* wanted of every page, or else */
    const uint64_t *each; /* page by page */
    bool announcing;      /* populate for writing what is there already */
};

static inline int pm_walk_fail(struct pm_walk *walk, uint64_t addr, int err)
{
    walk->fail_start = addr;
    walk->fail_end = addr + PM_PAGE_SIZE;
    return err;
}

static inline int pm_walk_check(struct pm_walk *walk, uint64_t addr)
{
    return walk->sub && pm_sub_read_retry(walk->sub, walk->seq) ? pm_walk_fail(walk, addr, -EBUSY) : 0;
}

static inline uint64_t pm_part_addr(const struct pm_part *b, uint64_t i)
{
    return b->start + (i << PM_PAGE_SHIFT);
}

static inline uint64_t pm_part_wanted(const struct pm_part *b, uint64_t i)
{
    return b->each ? b->each[i] : b->all;
}

/* Of a page in device memory of the walk's owner nothing is faulted, not even when it is read-only. */
static inline bool pm_part_own(const struct pm_part *b, uint64_t i)
{
    return b->pfns[i] & PM_PFN_DEVICE;
}

static inline uint64_t pm_part_lack(const struct pm_part *b, uint64_t i)
{
    return pm_part_own(b, i) ? 0 : pm_part_wanted(b, i) & ~b->pfns[i];
}

/* Read [i, end) of it; *lacking: what any page of it lacks. */
int pm_part_read(struct pm_part *b, uint64_t i, uint64_t end, uint64_t *lacking);
/* Populate what is lacking, and read it again. */
int pm_part_fault(struct pm_part *b);
bool pm_part_must_announce(const struct pm_part *b);
int pm_part_announce(struct pm_part *b);

#endif
