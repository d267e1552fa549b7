/* SPDX-License-Identifier: MIT */
/*
 * walk.c - the range walk: snapshot and fault of a range, after the kernel's hmm_range_fault().
 *
 * Vma by vma, and in a vma block by block: read the page table straight into the caller's array, convert it
 * there, and where that shows less than was asked for, populate and read again. The page table is not locked
 * while this goes on: the sequence number tells whether the result can be used, as it does in the kernel once
 * the mmap lock is dropped.
 */
#include <errno.h>
#include <string.h>

#include "devmem.h"
#include "entries.h"
#include "pagemap.h"
#include "populate.h"

enum {
    ROUND_LIMIT = 8, /* populate and read again, before -EBUSY */
    GAP_LIMIT = 8, /* pages that need nothing (33 ns each) inside a run: cheaper than a call more (170 ns) */
    EACH_PAGES = PM_BLOCK_PAGES / 4, /* 16 KiB of stack */
};

static const uint64_t user_end = 1ULL << 47;

/* A part of one vma, no larger than a block, and what is asked of it. */
struct block {
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

static int fail(struct pm_walk *walk, uint64_t addr, int err)
{
    walk->fail_start = addr;
    walk->fail_end = addr + PM_PAGE_SIZE;
    return err;
}

static int check_seq(struct pm_walk *walk, uint64_t addr)
{
    return walk->sub && pm_sub_read_retry(walk->sub, walk->seq) ? fail(walk, addr, -EBUSY) : 0;
}

static uint64_t addr_of(const struct block *b, uint64_t i)
{
    return b->start + (i << PM_PAGE_SHIFT);
}

static uint64_t wanted(const struct block *b, uint64_t i)
{
    return b->each ? b->each[i] : b->all;
}

/* Of a page in device memory of the walk's owner nothing is faulted, not even when it is read-only. */
static bool is_own(const struct block *b, uint64_t i)
{
    return b->pfns[i] & PM_PFN_DEVICE;
}

static uint64_t lack(const struct block *b, uint64_t i)
{
    return is_own(b, i) ? 0 : wanted(b, i) & ~b->pfns[i];
}

static uint64_t lacking_in(const struct block *b, uint64_t i, uint64_t end)
{
    uint64_t lacking = 0;

    for (; i < end; i++)
        lacking |= lack(b, i);
    return lacking;
}

static bool show_resident(const struct block *b, uint64_t i, uint64_t end)
{
    uint64_t keep = b->rules.writable ? UINT64_MAX : ~PM_PFN_WRITE;

    return b->mm->devices &&
           pm_resident_show(b->mm, b->walk->owner, addr_of(b, i), end - i, keep, b->pfns + i);
}

/* Read pages [i, end) of a block; *lacking: the bits that are asked for and not there. */
static int read_pages(struct block *b, uint64_t i, uint64_t end, uint64_t *lacking)
{
    uint64_t seq = atomic_load(&b->mm->seq), common, told;
    int err;

    pm_point(PM_POINT_WALK_BEFORE_READ);
    told = i + pm_scan_block(b->mm, &b->rules, addr_of(b, i), end - i, b->pfns + i, &common);
    err = pm_pagemap_fill(b->mm, addr_of(b, told), end - told, b->pfns + told);
    pm_point(PM_POINT_WALK_AFTER_READ);
    if (err)
        return fail(b->walk, addr_of(b, i), err);
    common &= pm_pagemap_convert(b->mm, &b->rules, addr_of(b, told), end - told, b->pfns + told);
    if (told < end)
        pm_scan_learn(b->mm, &b->rules, addr_of(b, i), end - i, common, seq);
    if (show_resident(b, i, end))
        *lacking = lacking_in(b, i, end);
    else
        *lacking = b->each ? pm_entries_lacking(b->pfns + i, b->each + i, end - i) : b->all & ~common;
    return 0;
}

/* From the first page at or after i that lacks something: the run to populate in one call, [*first, end). */
static uint64_t next_run(const struct block *b, uint64_t i, uint64_t end, uint64_t *first)
{
    uint64_t kind, last;

    while (i < end && !lack(b, i))
        i++;
    *first = i;
    if (i == end)
        return end;
    /* Populating for writing brings in what has to be read too. */
    kind = wanted(b, i);
    for (last = i++; i < end && i - last <= GAP_LIMIT && wanted(b, i) == kind && !is_own(b, i); i++) {
        if (lack(b, i))
            last = i;
    }
    return last + 1;
}

/* What an error of populate means; the vma may have changed since it was looked up. */
static int explain(struct block *b, uint64_t addr, bool write, int err)
{
    struct pm_vma vma;

    if (err != -EINVAL && err != -ENOMEM)
        return err;
    if (pm_vma_query(b->mm, addr, &vma) || vma.start > addr || !(vma.flags & PM_VMA_READ))
        return -EFAULT;
    if (write && !(vma.flags & PM_VMA_WRITE))
        return -EPERM;
    return err == -ENOMEM ? -ENOMEM : -EFAULT;
}

static bool loses_fault_around(const struct block *b, uint64_t start, uint64_t end)
{
    return (b->vma->flags & PM_VMA_FILE) && !(b->vma->flags & PM_VMA_HUGETLB) &&
           pm_watched(b->mm, start, end);
}

static bool refused(const struct block *b, uint64_t i)
{
    return pm_populate(b->mm, addr_of(b, i), addr_of(b, i + 1), wanted(b, i) & PM_PFN_WRITE) != 0;
}

static int populate_run(struct block *b, uint64_t i, uint64_t end)
{
    bool write = wanted(b, i) & PM_PFN_WRITE;
    uint64_t start = addr_of(b, i), waits, lacking;
    int err = check_seq(b->walk, start);

    if (err)
        return err;
    if ((b->walk->flags & PM_WALK_NOBLOCK) &&
        pm_would_wait(b->mm, b->vma, start, addr_of(b, end), b->pfns + i, &waits))
        return fail(b->walk, waits, -EAGAIN);
    pm_point(PM_POINT_WALK_BEFORE_POPULATE);
    pm_home_touch(b->mm, start, addr_of(b, end));
    err = pm_populate(b->mm, start, addr_of(b, end), write);
    pm_point(PM_POINT_WALK_AFTER_POPULATE);
    b->walk->populated += end - i;
    if (!err && !write && loses_fault_around(b, start, addr_of(b, end)))
        b->walk->populated += pm_populate_around(b->mm, b->vma, start, addr_of(b, end));
    if (!err)
        return 0;
    if (read_pages(b, i, end, &lacking))
        return fail(b->walk, start, err);
    while (i < end && !lack(b, i) && !(b->announcing && refused(b, i)))
        i++;
    if (i == end)
        return 0;
    return fail(b->walk, addr_of(b, i), err == -EAGAIN ? -EBUSY : explain(b, addr_of(b, i), write, err));
}

/* What was populated before the failure is to show too. */
static int read_before_failure(struct block *b, uint64_t first, int err)
{
    uint64_t failed = (b->walk->fail_start - b->start) >> PM_PAGE_SHIFT, lacking;
    int again = first < failed ? read_pages(b, first, failed, &lacking) : 0;

    return again ? again : err;
}

/* Populate the runs of [i, end) that lack something; *first and *last: what has to be read again. */
static int populate_runs(struct block *b, uint64_t i, uint64_t end, uint64_t *first, uint64_t *last)
{
    uint64_t run, stop;
    int err;

    *first = *last = end;
    for (stop = next_run(b, i, end, &run); run < end; stop = next_run(b, stop, end, &run)) {
        err = populate_run(b, run, stop);
        if (err)
            return read_before_failure(b, *first, err);
        *first = pm_min(*first, run);
        *last = stop;
    }
    return 0;
}

static int fault_pages(struct block *b, uint64_t end)
{
    uint64_t first = 0, last = end, lacking;
    int err;

    for (int round = 0; round < ROUND_LIMIT; round++) {
        err = populate_runs(b, first, last, &first, &last);
        if (!err)
            err = check_seq(b->walk, addr_of(b, first));
        if (!err && first < last)
            err = read_pages(b, first, last, &lacking);
        if (err || first == last || !lacking)
            return err;
    }
    return fail(b->walk, addr_of(b, first), -EBUSY);
}

/* Pages before the first one that must not be written are faulted still, as the kernel does. */
static int fault_block(struct block *b)
{
    uint64_t end = b->n;
    int err;

    if (!b->rules.writable) {
        for (end = 0; end < b->n && !(lack(b, end) & PM_PFN_WRITE);)
            end++;
    }
    err = fault_pages(b, end);
    if (!err && end < b->n)
        err = fail(b->walk, addr_of(b, end), -EPERM);
    return err;
}

/*
 * A shared page of a file on disk is mapped read-only until its file system has heard of the write, and the
 * pagemap does not show that: it is populated for writing whenever that is asked for.
 */
static bool must_announce_writes(const struct block *b)
{
    const uint64_t kinds = PM_VMA_SHARED | PM_VMA_FILE | PM_VMA_WRITE;
    uint64_t asked = b->all;

    if ((b->vma->flags & (kinds | PM_VMA_HUGETLB)) != kinds || pm_is_shmem(b->vma))
        return false;
    for (uint64_t i = 0; b->each && i < b->n; i++)
        asked |= b->each[i];
    return asked & PM_PFN_WRITE;
}

static int announce_writes(struct block *b)
{
    uint64_t first, last;
    int err;

    memset(b->pfns, 0, b->n * sizeof(*b->pfns));
    b->announcing = true;
    err = populate_runs(b, 0, b->n, &first, &last);
    b->announcing = false;
    return err;
}

static int walk_block(struct block *b)
{
    uint64_t lacking;
    int err = check_seq(b->walk, b->start);

    if (!err && must_announce_writes(b))
        err = announce_writes(b);
    if (!err)
        err = read_pages(b, 0, b->n, &lacking);
    if (err || !lacking)
        return err;
    return fault_block(b);
}

/* The requests stand where the results go: set them aside, some at a time. */
static __attribute__((noinline)) int walk_block_each(const struct block *whole)
{
    uint64_t each[EACH_PAGES];
    int err = 0;

    for (uint64_t i = 0; i < whole->n && !err; i += EACH_PAGES) {
        struct block b = *whole;

        b.start = addr_of(whole, i);
        b.n = pm_min(EACH_PAGES, whole->n - i);
        b.pfns = whole->pfns + i;
        b.each = each;
        pm_entries_requests(b.pfns, b.n, b.walk->pfn_flags_mask, b.walk->default_flags, each);
        err = walk_block(&b);
    }
    return err;
}

static int walk_block_asked(struct block *b)
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
    struct block b = {.mm = mm, .walk = walk, .vma = vma, .rules = pm_rules_of(vma)};
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
        return fail(walk, addr, strict);
    for (; addr < end; addr += PM_PAGE_SIZE) {
        uint64_t *pfn = pfns_at(walk, addr);
        uint64_t asked = (*pfn & walk->pfn_flags_mask) | walk->default_flags;

        if ((walk->flags & PM_WALK_FAULT) && (asked & PM_PFN_VALID))
            return fail(walk, addr, -EFAULT);
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
        return fail(walk, start, err);
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
        return err ? fail(walk, walk->start, err) : 0;
    /* An invalidation meanwhile explains it. */
    err = check_seq(walk, walk->start);
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
    if (err != -ESTALE && err != -ESRCH && check_seq(walk, err ? walk->fail_start : walk->end))
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
