/* SPDX-License-Identifier: MIT */
/*
 * scan.c - what PAGEMAP_SCAN tells of many pages at once, without a look at each.
 *
 * A huge page then costs one entry of the pagemap, the PFNs of its other pages following from it; and where
 * no PFNs are to be had, runs of small pages cost no entry at all. Whether a page is mapped here alone the
 * scan does not tell, see alone.c: where it is asked for and not known, nothing is done here.
 */
#include <string.h>

#include "alone.h"
#include "entries.h"
#include "pagemap.h"

enum {
    REGIONS = 32,
    REGION_PAGES = 64, /* with less to a region, the pagemap is the faster way */
};

static int scan(struct pm_mm *mm, struct pm_abi_scan_arg *arg, struct pm_abi_page_region *regions, uint64_t n)
{
    arg->size = sizeof(*arg);
    arg->vec = (uintptr_t)regions;
    arg->vec_len = n;
    return pm_sys_ioctl(mm->pagemap_fd, PM_ABI_PAGEMAP_SCAN, arg);
}

bool pm_pagemap_is(struct pm_mm *mm, uint64_t addr, uint64_t category)
{
    struct pm_abi_page_region region;
    struct pm_abi_scan_arg arg = {
        .start = addr,
        .end = addr + PM_PAGE_SIZE,
        .max_pages = 1,
        .category_mask = category,
        .return_mask = category,
    };

    return pm_have(mm, PM_FEAT_PAGEMAP_SCAN) && scan(mm, &arg, &region, 1) > 0;
}

uint64_t pm_pagemap_huge_end(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_abi_page_region region;
    struct pm_abi_scan_arg arg = {
        .start = start,
        .end = end,
        .max_pages = 1,
        .category_inverted = PM_ABI_PAGE_IS_HUGE,
        .category_mask = PM_ABI_PAGE_IS_HUGE,
        .return_mask = PM_ABI_PAGE_IS_HUGE,
    };
    int n = pm_have(mm, PM_FEAT_PAGEMAP_SCAN) ? scan(mm, &arg, &region, 1) : -1;

    if (n < 0)
        return start;
    return n ? region.start : end;
}

uint64_t pm_pagemap_huge_alike(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t kinds, uint64_t *kind)
{
    struct pm_abi_page_region region;
    struct pm_abi_scan_arg arg = {
        .start = start,
        .end = end,
        .return_mask = kinds | PM_ABI_PAGE_IS_HUGE,
    };

    /* It ends where the next region would begin. Of small pages that could be far. */
    if (!pm_pagemap_is(mm, start, PM_ABI_PAGE_IS_HUGE) || scan(mm, &arg, &region, 1) != 1 ||
        !(region.categories & PM_ABI_PAGE_IS_HUGE))
        return start;
    *kind = region.categories & kinds;
    return region.end;
}

/* A block that is being told. */
struct telling {
    struct pm_mm *mm;
    const struct pm_rules *rules;
    struct pm_conversion conversion;
    uint64_t start, end, *pfns;
    enum { NOT_ASKED, ALONE, NOT_KNOWN } alone;
    uint64_t common;
};

static bool is_alone(struct telling *t)
{
    if (t->alone == NOT_ASKED)
        t->alone = pm_alone(t->mm, t->start, t->end) ? ALONE : NOT_KNOWN;
    return t->alone == ALONE;
}

static void tell(struct telling *t, uint64_t start, uint64_t end, struct pm_run run)
{
    pm_entries_set(t->pfns + ((start - t->start) >> PM_PAGE_SHIFT), (end - start) >> PM_PAGE_SHIFT, run);
    t->common &= run.step ? run.first & ~PM_PFN_MASK : run.first;
}

/*
 * Of a part of a huge page, by the entry `raw` of its page at `at`. False: it is none, or what it is cannot
 * be told by one entry.
 */
static bool tell_piece(struct telling *t, uint64_t start, uint64_t end, uint64_t at, uint64_t raw)
{
    uint64_t step = pm_have(t->mm, PM_FEAT_PFN) ? 1 : 0, pfn = raw;
    bool hugetlb = t->rules->order != 0;

    pm_entries_convert(&pfn, 1, &t->conversion);
    if (!pfn && !hugetlb)
        return false;
    if (pfn && step && (raw ^ (at >> PM_PAGE_SHIFT)) % PM_HUGE_PAGES)
        return false;
    if ((pfn & PM_PFN_WRITE) && !t->rules->shared && !hugetlb && !is_alone(t))
        return false;
    if (!pfn)
        step = 0;
    tell(t, start, end, (struct pm_run){pfn - ((at - start) >> PM_PAGE_SHIFT) * step, step});
    return true;
}

/* Two neighbours, where there are two, cost one call: the last entry of one and the first of the other. */
static uint64_t tell_two(struct telling *t, uint64_t start, uint64_t end)
{
    uint64_t middle = pm_min(end, (start & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);
    uint64_t stop = pm_min(end, middle + PM_HUGE_SIZE), raw[2];

    if (pm_pagemap_fill(t->mm, middle - PM_PAGE_SIZE, middle < stop ? 2 : 1, raw) ||
        !tell_piece(t, start, middle, middle - PM_PAGE_SIZE, raw[0]))
        return start;
    return middle < stop && tell_piece(t, middle, stop, middle, raw[1]) ? stop : middle;
}

/* Of [start, end), which was huge pages when it was looked at last, and still is. Returns where that ends. */
static uint64_t tell_huge(struct telling *t, uint64_t start, uint64_t end)
{
    uint64_t addr = start, next;

    for (; addr < end; addr = next) {
        next = tell_two(t, addr, end);
        if (next == addr)
            break;
    }
    if (start < addr && !t->rules->order && pm_pagemap_huge_end(t->mm, start, addr) < addr)
        return start;
    return addr;
}

static uint64_t tell_whole_pages(struct telling *t)
{
    const struct pm_rules *rules = t->rules;

    if (rules->order || (pm_have(t->mm, PM_FEAT_PFN) && is_alone(t)))
        return tell_huge(t, t->start, t->end);
    if (!rules->writable || rules->shared)
        return tell_huge(t, t->start, pm_pagemap_huge_end(t->mm, t->start, t->end));
    return t->start;
}

static uint64_t flags_of(const struct telling *t, uint64_t categories)
{
    const uint64_t bits = PM_ABI_PAGE_IS_WRITTEN | PM_ABI_PAGE_IS_PFNZERO;
    bool write = t->rules->shared || (categories & bits) == PM_ABI_PAGE_IS_WRITTEN;

    return PM_PFN_VALID | t->rules->order | (write && t->rules->writable ? PM_PFN_WRITE : 0);
}

static uint64_t tell_region(struct telling *t, uint64_t addr, const struct pm_abi_page_region *region)
{
    if (addr < region->start)
        tell(t, addr, region->start, (struct pm_run){0, 0});
    if (region->categories & PM_ABI_PAGE_IS_HUGE)
        return tell_huge(t, region->start, region->end);
    tell(t, region->start, region->end, (struct pm_run){flags_of(t, region->categories), 0});
    return region->end;
}

/* Without PFNs. Returns up to where something was told. */
static uint64_t tell_presence(struct telling *t, uint64_t end)
{
    struct pm_abi_page_region regions[REGIONS];
    uint64_t addr = t->start;
    int n;

    while (addr < end) {
        struct pm_abi_scan_arg arg = {
            .start = addr,
            .end = end,
            .category_mask = PM_ABI_PAGE_IS_PRESENT,
            .return_mask = PM_ABI_PAGE_IS_PRESENT | PM_ABI_PAGE_IS_WRITTEN | PM_ABI_PAGE_IS_PFNZERO |
                           PM_ABI_PAGE_IS_HUGE,
        };

        n = scan(t->mm, &arg, regions, REGIONS);
        if (n < 0)
            return addr;
        for (int i = 0; i < n; i++) {
            uint64_t told = tell_region(t, addr, &regions[i]);

            if (told < regions[i].end)
                return told;
            addr = told;
        }
        if (n < REGIONS) {
            tell(t, addr, end, (struct pm_run){0, 0});
            return end;
        }
        if (addr - arg.start < (uint64_t)REGIONS * REGION_PAGES << PM_PAGE_SHIFT)
            return addr;
    }
    return addr;
}

static bool worth_it(const struct pm_mm *mm, const struct pm_rules *rules, uint64_t n)
{
    if (!pm_have(mm, PM_FEAT_PAGEMAP_SCAN))
        return false;
    if (pm_have(mm, PM_FEAT_PFN))
        return n >= PM_HUGE_PAGES && rules->vma_end - rules->vma_start >= PM_HUGE_SIZE;
    return n >= REGION_PAGES;
}

/* Of small pages. */
static bool can_tell_presence(struct telling *t)
{
    const struct pm_rules *rules = t->rules;

    return !pm_have(t->mm, PM_FEAT_PFN) && (!rules->writable || rules->shared ||
                                            (rules->anonymous && is_alone(t) && !pm_alone_merged(t->mm)));
}

uint64_t pm_scan_block(struct pm_mm *mm, const struct pm_rules *rules, uint64_t start, uint64_t n,
                       uint64_t *pfns, uint64_t *common)
{
    struct telling t = {
        .mm = mm,
        .rules = rules,
        .start = start,
        .end = start + (n << PM_PAGE_SHIFT),
        .pfns = pfns,
        .common = UINT64_MAX,
    };
    uint64_t told;

    *common = UINT64_MAX;
    if (!worth_it(mm, rules, n))
        return 0;
    t.conversion = pm_pagemap_conversion(mm, rules);
    if (!rules->order)
        t.conversion.order = (uint64_t)PM_HUGE_ORDER << PM_PFN_ORDER_SHIFT;
    told = can_tell_presence(&t) ? tell_presence(&t, t.end) : tell_whole_pages(&t);
    *common = t.common;
    return (told - start) >> PM_PAGE_SHIFT;
}

static bool has_huge(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_abi_page_region region;
    struct pm_abi_scan_arg arg = {
        .start = start,
        .end = end,
        .max_pages = 1,
        .category_mask = PM_ABI_PAGE_IS_HUGE,
        .return_mask = PM_ABI_PAGE_IS_HUGE,
    };

    return scan(mm, &arg, &region, 1) != 0;
}

/*
 * Of the pages of a huge page the pagemap tells by the first one whether they are mapped here alone, and a
 * child may have kept another. So what was read of huge pages is of use for huge pages only.
 */
void pm_scan_learn(struct pm_mm *mm, const struct pm_rules *rules, uint64_t start, uint64_t n,
                   uint64_t common, uint64_t seq)
{
    const uint64_t huge = (uint64_t)PM_HUGE_ORDER << PM_PFN_ORDER_SHIFT;
    uint64_t end = start + (n << PM_PAGE_SHIFT);
    bool one_kind;

    if (rules->shared || rules->order || !(common & PM_PFN_WRITE) || !worth_it(mm, rules, n))
        return;
    one_kind = pm_have(mm, PM_FEAT_PFN) ? (common & huge) == huge : !has_huge(mm, start, end);
    if (one_kind)
        pm_alone_learn(mm, start, end, seq);
}
