/* SPDX-License-Identifier: MIT */
/*
 * pagemap.c - page-table entries from /proc/self/pagemap, and what they say in HMM's terms.
 *
 * The pagemap has no write bit. A page is taken to be mapped writable when its vma is, and in a private
 * mapping only if it is also an anonymous page (no file bit), mapped here alone (else copy-on-write is
 * pending; the zero page is never mapped alone) and not write-protected by userfaultfd: after a fork the
 * watch protects what is present, so the bit says "not written since". Not to be seen: KSM, pages of disk
 * files that are clean, private hugetlb pages that were written, dropped and are only read since.
 *
 * Whether 512 consecutive PFNs are mapped by one PMD is asked of PAGEMAP_SCAN. Without it the order of
 * transparent huge pages is given as 0: a device may always map less at once than the CPU does, never more.
 */
#include <errno.h>
#include <string.h>

#include "entries.h"
#include "pagemap.h"

struct pm_rules pm_rules_of(const struct pm_vma *vma)
{
    struct pm_rules rules = {
        .vma_start = vma->start,
        .vma_end = vma->end,
        .writable = vma->flags & PM_VMA_WRITE,
        .shared = vma->flags & PM_VMA_SHARED,
        .anonymous = !(vma->flags & (PM_VMA_SHARED | PM_VMA_FILE)),
    };

    if (vma->flags & PM_VMA_HUGETLB)
        rules.order = (uint64_t)__builtin_ctzll(vma->page_size >> PM_PAGE_SHIFT) << PM_PFN_ORDER_SHIFT;
    return rules;
}

int pm_pagemap_fill(struct pm_mm *mm, uint64_t start, uint64_t n, uint64_t *ret)
{
    uint64_t first = start >> PM_PAGE_SHIFT, done = 0;
    int interrupted = 0;
    ssize_t got;

    if (mm->pagemap_fd < 0)
        return -EOPNOTSUPP;
    while (done < n) {
        got = pm_sys_pread(mm->pagemap_fd, ret + done, (n - done) * sizeof(*ret),
                           (first + done) * sizeof(*ret));
        if (got == -EINTR && interrupted++ < PM_EINTR_LIMIT)
            continue;
        if (got < 0)
            return (int)got;
        if (got == 0)
            break;
        done += (uint64_t)got / sizeof(*ret);
    }
    memset(ret + done, 0, (n - done) * sizeof(*ret));
    if (!pm_have(mm, PM_FEAT_PFN))
        pm_entries_hide(ret, n);
    return 0;
}

uint64_t pm_pagemap_there(struct pm_mm *mm, uint64_t addr, uint64_t len)
{
    uint64_t seen[PM_HUGE_PAGES], total = len >> PM_PAGE_SHIFT, done = 0;

    while (done < total) {
        uint64_t n = pm_min(total - done, PM_HUGE_PAGES), run = 0;
        int err = pm_pagemap_fill(mm, addr + (done << PM_PAGE_SHIFT), n, seen);

        for (int i = 0; err && i < PM_EINTR_LIMIT; i++)
            err = pm_pagemap_fill(mm, addr + (done << PM_PAGE_SHIFT), n, seen);
        while (!err && run < n && pm_is_there(seen[run]))
            run++;
        done += run;
        if (run < n)
            break;
    }
    return done << PM_PAGE_SHIFT;
}

int pm_pagemap_read(pm_mm *mm, uint64_t start, uint64_t n, uint64_t *ret)
{
    int err;

    if (start % PM_PAGE_SIZE || n > (UINT64_MAX - start) >> PM_PAGE_SHIFT)
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    err = pm_pagemap_fill(mm, start, n, ret);
    pm_mm_exit(mm);
    return err;
}

struct pm_conversion pm_pagemap_conversion(const struct pm_mm *mm, const struct pm_rules *rules)
{
    uint64_t zero = mm->features.zero_pfn;
    struct pm_conversion c = {
        .keep = PM_PFN_VALID | (pm_have(mm, PM_FEAT_PFN) ? PM_PFN_MASK : 0),
        .order = rules->order,
        .shared = rules->shared ? PM_PFN_WRITE : 0,
        .write = rules->writable ? PM_PFN_WRITE : 0,
        .zero = zero ? PM_PFN_VALID | zero : UINT64_MAX,
    };

    return c;
}

/* One PMD range's part of a block. */
struct piece {
    uint64_t first, n; /* indices */
    bool huge;
};

static unsigned cut(uint64_t start, uint64_t n, struct piece *pieces)
{
    unsigned count = 0;
    uint64_t i = 0;

    while (i < n) {
        uint64_t page = (start >> PM_PAGE_SHIFT) + i;
        uint64_t len = pm_min(n - i, PM_HUGE_PAGES - page % PM_HUGE_PAGES);

        pieces[count++] = (struct piece){i, len, false};
        i += len;
    }
    return count;
}

/* Could one PMD map these pages? The ends are looked at; the scan decides, and convert_huge() looks at every
 * entry. */
static bool candidate(const struct pm_rules *rules, uint64_t start, const uint64_t *raw,
                      const struct piece *piece, uint64_t step)
{
    uint64_t page = (start >> PM_PAGE_SHIFT) + piece->first;
    uint64_t pmd = (page << PM_PAGE_SHIFT) & ~(PM_HUGE_SIZE - 1);
    uint64_t head = raw[piece->first], tail = raw[piece->first + piece->n - 1];

    if (!(head & PM_ABI_PAGEMAP_PRESENT) ||
        (tail ^ (head + (piece->n - 1) * step)) & ~PM_ABI_PAGEMAP_EXCLUSIVE)
        return false;
    if (step && (head ^ page) % PM_HUGE_PAGES)
        return false;
    return rules->vma_start <= pmd && pmd + PM_HUGE_SIZE <= rules->vma_end;
}

/*
 * Mark the pieces that a PMD maps. The scan stops at the first page that is mapped otherwise, so a run of
 * huge pages costs one call and a piece that only looks like one costs one call too, however long the table
 * below it is.
 */
static bool find_huge(struct pm_mm *mm, const struct pm_rules *rules, uint64_t start, const uint64_t *raw,
                      struct piece *pieces, unsigned count)
{
    uint64_t step = pm_have(mm, PM_FEAT_PFN) ? 1 : 0;
    unsigned i = 0, end;
    bool found = false;

    while (i < count) {
        if (!candidate(rules, start, raw, &pieces[i], step)) {
            i++;
            continue;
        }
        for (end = i + 1; end < count && candidate(rules, start, raw, &pieces[end], step);)
            end++;
        uint64_t from = start + (pieces[i].first << PM_PAGE_SHIFT);
        uint64_t to = start + ((pieces[end - 1].first + pieces[end - 1].n) << PM_PAGE_SHIFT);
        uint64_t small = pm_pagemap_huge_end(mm, from, to);

        while (i < end && start + ((pieces[i].first + pieces[i].n) << PM_PAGE_SHIFT) <= small) {
            pieces[i++].huge = true;
            found = true;
        }
        if (i < end)
            i++;
    }
    return found;
}

/*
 * False if the entries are not those of one huge page after all: the table changed between read and scan. A
 * part that a child maps too is told page by page, but the one PMD is then read-only for all of them.
 */
static bool convert_huge(uint64_t *raw, const struct piece *piece, const struct pm_conversion *c,
                         uint64_t step, uint64_t *common)
{
    struct pm_run old = {raw[piece->first], step}, new = old;
    struct pm_conversion huge = *c;
    uint64_t alone;

    huge.order = (uint64_t)PM_HUGE_ORDER << PM_PFN_ORDER_SHIFT;
    pm_entries_convert(&new.first, 1, &huge);
    if (!pm_entries_replace(raw + piece->first, piece->n, old, new, PM_ABI_PAGEMAP_EXCLUSIVE, &alone))
        return false;
    if (!alone && !huge.shared) {
        old.first = new.first;
        new.first &= ~PM_PFN_WRITE;
        pm_entries_replace(raw + piece->first, piece->n, old, new, 0, &alone);
    }
    *common &= new.first & ~PM_PFN_MASK;
    return true;
}

static uint64_t convert_pieces(struct pm_mm *mm, const struct pm_conversion *c, uint64_t start, uint64_t *raw,
                               const struct piece *pieces, unsigned count)
{
    uint64_t step = pm_have(mm, PM_FEAT_PFN) ? 1 : 0, common = UINT64_MAX;

    for (unsigned i = 0; i < count; i++) {
        const struct piece *piece = &pieces[i];

        if (piece->huge && convert_huge(raw, piece, c, step, &common))
            continue;
        if (piece->huge &&
            pm_pagemap_fill(mm, start + (piece->first << PM_PAGE_SHIFT), piece->n, raw + piece->first))
            memset(raw + piece->first, 0, piece->n * sizeof(*raw));
        common &= pm_entries_convert(raw + piece->first, piece->n, c);
    }
    return common;
}

uint64_t pm_pagemap_convert(struct pm_mm *mm, const struct pm_rules *rules, uint64_t start, uint64_t n,
                            uint64_t *pfns)
{
    struct pm_conversion c = pm_pagemap_conversion(mm, rules);
    struct piece pieces[PM_BLOCK_HUGE + 1];
    unsigned count;

    if (rules->order || rules->vma_end - rules->vma_start < PM_HUGE_SIZE ||
        !pm_have(mm, PM_FEAT_PAGEMAP_SCAN))
        return pm_entries_convert(pfns, n, &c);
    count = cut(start, n, pieces);
    if (!find_huge(mm, rules, start, pfns, pieces, count))
        return pm_entries_convert(pfns, n, &c);
    return convert_pieces(mm, &c, start, pfns, pieces, count);
}
