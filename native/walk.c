/* SPDX-License-Identifier: MIT */
/*
 * walk.c - the range walk: snapshot and fault of a range, after the kernel's hmm_range_fault().
 *
 * Vma by vma, and in a vma block by block: read the page table straight into the caller's array, convert it
 * there, and where that shows less than was asked for, populate and read again. The page table is not locked
 * while this goes on: the sequence number tells whether the result can be used, as it does in the kernel once
 * the mmap lock is dropped.
 */
#include "walk.h"

#include <stdatomic.h>
#include <string.h>

#include "entries.h"

enum { EACH_PAGES = PM_BLOCK_PAGES / 4 }; /* 16 KiB of stack */

static const uint64_t user_end = 1ULL << 47;

static uint64_t lacking_in(const struct pm_part *b, uint64_t i, uint64_t end)
{
    uint64_t lacking = 0;

    for (; i < end; i++)
        lacking |= pm_part_lack(b, i);
    return lacking;
}

static bool show_resident(const struct pm_part *b, uint64_t i, uint64_t end)
{
    uint64_t keep = b->rules.writable ? UINT64_MAX : ~PM_PFN_WRITE;

    return b->mm->devices &&
           pm_resident_show(b->mm, b->walk->owner, pm_part_addr(b, i), end - i, keep, b->pfns + i);
}

/* Read pages [i, end) of a block; *lacking: the bits that are asked for and not there. */
int pm_part_read(struct pm_part *b, uint64_t i, uint64_t end, uint64_t *lacking)
{
    uint64_t seq = atomic_load(&b->mm->seq), common, told;
    int err;

    pm_point(PM_POINT_WALK_BEFORE_READ);
    told = i + pm_scan_block(b->mm, &b->rules, pm_part_addr(b, i), end - i, b->pfns + i, &common);
    err = pm_pagemap_fill(b->mm, pm_part_addr(b, told), end - told, b->pfns + told);
    pm_point(PM_POINT_WALK_AFTER_READ);
    if (err)
        return pm_walk_fail(b->walk, pm_part_addr(b, i), err);
    common &= pm_pagemap_convert(b->mm, &b->rules, pm_part_addr(b, told), end - told, b->pfns + told);
    if (told < end)
        pm_scan_learn(b->mm, &b->rules, pm_part_addr(b, i), end - i, common, seq);
    if (show_resident(b, i, end))
        *lacking = lacking_in(b, i, end);
    else
        *lacking = b->each ? pm_entries_lacking(b->pfns + i, b->each + i, end - i) : b->all & ~common;
    return 0;
}

static int walk_block(struct pm_part *b)
{
    uint64_t lacking;
    int err = pm_walk_check(b->walk, b->start);

    if (!err && pm_part_must_announce(b))
        err = pm_part_announce(b);
    if (!err)
        err = pm_part_read(b, 0, b->n, &lacking);
    if (err || !lacking)
        return err;
    return pm_part_fault(b);
}

/* The requests stand where the results go: set them aside, some at a time. */
static __attribute__((noinline)) int walk_block_each(const struct pm_part *whole)
{
    uint64_t each[EACH_PAGES];
    int err = 0;

    for (uint64_t i = 0; i < whole->n && !err; i += EACH_PAGES) {
        struct pm_part b = *whole;

        b.start = pm_part_addr(whole, i);
        b.n = pm_min(EACH_PAGES, whole->n - i);
        b.pfns = whole->pfns + i;
        b.each = each;
        pm_entries_requests(b.pfns, b.n, b.walk->pfn_flags_mask, b.walk->default_flags, each);
        err = walk_block(&b);
    }
    return err;
}

static int walk_block_asked(struct pm_part *b)
{
    const struct pm_walk *walk = b->walk;

    b->each = NULL;
    b->all = 0;
    if (!(walk->flags & PM_WALK_FAULT))
        return walk_block(b);
    if (pm_entries_same_requests(b->pfns, b->n, walk->pfn_flags_mask, walk->default_flags, &b->all))
        return walk_block(b);
    return walk_block_each(b);
}

static uint64_t block_end(uint64_t addr, uint64_t end)
{
    return pm_min(end, (addr & ~(PM_HUGE_SIZE - 1)) + PM_BLOCK_HUGE * PM_HUGE_SIZE);
}

static uint64_t *pfns_at(const struct pm_walk *walk, uint64_t addr)
{
    return walk->pfns + ((addr - walk->start) >> PM_PAGE_SHIFT);
}

static int walk_vma(struct pm_mm *mm, struct pm_walk *walk, const struct pm_vma *vma, uint64_t addr,
                    uint64_t end)
{
    struct pm_part b = {.mm = mm, .walk = walk, .vma = vma, .rules = pm_rules_of(vma)};
    int err = 0;

    while (!err && addr < end) {
        b.start = addr;
        b.n = (block_end(addr, end) - addr) >> PM_PAGE_SHIFT;
        b.pfns = pfns_at(walk, addr);
        err = walk_block_asked(&b);
        addr += b.n << PM_PAGE_SHIFT;
    }
    return err;
}

/* Holes, and vmas that no device may look into: ERROR, unless a page is asked for. */
static int walk_error(struct pm_walk *walk, uint64_t addr, uint64_t end, int strict)
{
    if (walk->flags & PM_WALK_STRICT)
        return pm_walk_fail(walk, addr, strict);
    for (; addr < end; addr += PM_PAGE_SIZE) {
        uint64_t *pfn = pfns_at(walk, addr);
        uint64_t asked = (*pfn & walk->pfn_flags_mask) | walk->default_flags;

        if ((walk->flags & PM_WALK_FAULT) && (asked & PM_PFN_VALID))
            return pm_walk_fail(walk, addr, -EFAULT);
        *pfn = PM_PFN_ERROR;
    }
    return 0;
}

static int walk_next(struct pm_mm *mm, struct pm_walk *walk, uint64_t *addr)
{
    uint64_t start = *addr, end = walk->end;
    struct pm_vma vma;
    int err = pm_vma_query(mm, start, &vma);

    if (err && err != -ENOENT)
        return pm_walk_fail(walk, start, err);
    if (err || vma.start > start) {
        *addr = err ? end : pm_min(end, vma.start);
        return walk_error(walk, start, *addr, -EFAULT);
    }
    *addr = pm_min(end, vma.end);
    if (vma.flags & PM_VMA_SPECIAL)
        return walk_error(walk, start, *addr, -EFAULT);
    if (!(vma.flags & PM_VMA_READ))
        return walk_error(walk, start, *addr, -EPERM);
    return walk_vma(mm, walk, &vma, start, *addr);
}

static int verify(struct pm_mm *mm, struct pm_walk *walk)
{
    uint64_t start, end;
    int err = pm_tables_verify(mm, walk->start, walk->end, walk->pfns, &start, &end);

    if (err != -ESTALE)
        return err ? pm_walk_fail(walk, walk->start, err) : 0;
    /* An invalidation meanwhile explains it. */
    err = pm_walk_check(walk, walk->start);
    if (err)
        return err;
    walk->fail_start = start;
    walk->fail_end = end;
    return -ESTALE;
}

static int walk_all(struct pm_mm *mm, struct pm_walk *walk)
{
    uint64_t addr = walk->start;
    int err = 0;

    while (!err && addr < walk->end)
        err = walk_next(mm, walk, &addr);
    if (!err && (walk->flags & PM_WALK_VERIFY))
        err = verify(mm, walk);
    /* What was met in the middle of a change, a hole for one, is no news of the memory. */
    if (err != -ESTALE && err != -ESRCH && pm_walk_check(walk, err ? walk->fail_start : walk->end))
        err = -EBUSY;
    if (err)
        memset(pfns_at(walk, walk->fail_start), 0, (walk->end - walk->fail_start) >> PM_PAGE_SHIFT << 3);
    return err;
}

bool pm_walk_is_sane(const struct pm_mm *mm, const struct pm_walk *walk)
{
    const uint32_t flags = PM_WALK_FAULT | PM_WALK_NOBLOCK | PM_WALK_STRICT | PM_WALK_VERIFY;

    return walk->start % PM_PAGE_SIZE == 0 && walk->end % PM_PAGE_SIZE == 0 && walk->start < walk->end &&
           walk->end <= user_end && walk->pfns && !(walk->flags & ~flags) &&
           !(walk->sub && walk->sub->mm != mm);
}

/* Refused calls (-EINVAL, -ESRCH) leave the pfns alone. */
int pm_walk(pm_mm *mm, struct pm_walk *walk)
{
    int err;

    walk->fail_start = walk->fail_end = walk->start;
    walk->populated = 0;
    if (!pm_walk_is_sane(mm, walk))
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    err = walk_all(mm, walk);
    if (walk->populated)
        atomic_fetch_add_explicit(&mm->populated, walk->populated, memory_order_relaxed);
    pm_mm_exit(mm);
    return err;
}
