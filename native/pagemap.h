/* SPDX-License-Identifier: MIT */
/*
 * pagemap.h - page-table entries from /proc/self/pagemap, and what they say in HMM's terms.
 */
#ifndef PM_PAGEMAP_H
#define PM_PAGEMAP_H

#include "entries.h"
#include "internal.h"

enum {
    PM_BLOCK_HUGE = 16, /* PMD ranges in a block */
    PM_BLOCK_PAGES = PM_BLOCK_HUGE
        << PM_HUGE_ORDER, /* 64 KiB of entries: they stay in the cache while worked on */
};

/* What of a vma decides how its entries read. */
struct pm_rules {
    uint64_t vma_start, vma_end;
    uint64_t order; /* of hugetlb pages, in place; 0 where huge pages have to be found */
    bool writable;
    bool shared;
    bool anonymous; /* and private: no page of a file is in it */
};

struct pm_rules pm_rules_of(const struct pm_vma *vma);

/* Of a raw entry: is there a page, in memory or in swap? */
static inline bool pm_is_there(uint64_t entry)
{
    return entry & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED);
}

/* Raw entries of n pages, in a block or any number; what lies beyond the address space is 0. */
int pm_pagemap_fill(struct pm_mm *mm, uint64_t start, uint64_t n, uint64_t *ret);
/* How many bytes from an address on have pages, without a gap; as far as can be read. */
uint64_t pm_pagemap_there(struct pm_mm *mm, uint64_t addr, uint64_t len);
/*
 * Turn the raw entries of n <= PM_BLOCK_PAGES pages, that cross at most PM_BLOCK_HUGE PMD ranges, into HMM
 * pfns in place. Returns the bits that all of them have.
 */
uint64_t pm_pagemap_convert(struct pm_mm *mm, const struct pm_rules *rules, uint64_t start, uint64_t n,
                            uint64_t *pfns);
struct pm_conversion pm_pagemap_conversion(const struct pm_mm *mm, const struct pm_rules *rules);

/* scan.c: Has the page a category of PAGEMAP_SCAN? Without the call: not known, false. */
bool pm_pagemap_is(struct pm_mm *mm, uint64_t addr, uint64_t category);
/* The end of what huge pages map from `start` on, `start` if they map nothing there or nothing can be told.
 */
uint64_t pm_pagemap_huge_end(struct pm_mm *mm, uint64_t start, uint64_t end);
/* The same, of those alike: *kind becomes what of `kinds`, categories of PAGEMAP_SCAN, all of them have. */
uint64_t pm_pagemap_huge_alike(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t kinds,
                               uint64_t *kind);
/*
 * HMM pfns of a block as pm_pagemap_fill() and pm_pagemap_convert() give them, as far as there is a faster
 * way: of so many pages from the first on, maybe 0. *common: the bits that all of these have.
 */
uint64_t pm_scan_block(struct pm_mm *mm, const struct pm_rules *rules, uint64_t start, uint64_t n,
                       uint64_t *pfns, uint64_t *common);
/* What the other way has read, from `seq` of the mm on, may make this one possible the next time. */
void pm_scan_learn(struct pm_mm *mm, const struct pm_rules *rules, uint64_t start, uint64_t n,
                   uint64_t common, uint64_t seq);

#endif
