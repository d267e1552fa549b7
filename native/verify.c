/* SPDX-License-Identifier: MIT */
/*
 * verify.c - changes of the page table that no event told of, found by comparing it with device tables.
 *
 * The kernel tells user space nothing of copy-on-write breaks, swap, page migration, or a foreign mprotect. A
 * device entry remembers the PFN it was made from; a page that is gone or has another PFN is a change to
 * deliver as `detected`. Without the privilege to see PFNs only absence shows.
 */
#include <errno.h>

#include "table.h"

enum { VERIFY_BLOCK = PM_FANOUT };

bool pm_table_has(struct pm_table *table, const struct pm_mm *mm, uint64_t addr, uint64_t entry)
{
    struct pm_leaf *leaf = pm_table_of(table, mm) ? pm_table_leaf(table, addr) : NULL;

    return leaf && leaf->entry[pm_leaf_slot(addr)] == entry;
}

static bool pfn_differs(uint64_t entry, uint64_t pfn)
{
    uint64_t mine = entry & PM_PFN_MASK;

    return mine && pfn && mine != pfn;
}

bool pm_entry_changed(uint64_t entry, uint64_t pagemap)
{
    if (!(entry & PM_ENTRY_VALID))
        return false;
    return !(pagemap & (1ULL << 63)) || pfn_differs(entry, pagemap & ((1ULL << 55) - 1));
}

/* One leaf's part of [addr, end): the first changed run that still stands in the table. */
static int verify_block(struct pm_table *table, struct pm_mm *mm, uint64_t addr, uint64_t end, uint64_t *cs,
                        uint64_t *ce)
{
    uint64_t entry[VERIFY_BLOCK], seen[VERIFY_BLOCK];
    uint64_t n = (pm_min(end, pm_leaf_first(addr) + PM_HUGE_SIZE) - addr) >> PM_PAGE_SHIFT;
    uint64_t i = 0, first;
    int err = pm_table_read(table, addr, n, entry);

    if (!err)
        err = pm_pagemap_read(mm, addr, n, seen);
    if (err)
        return err;
    while (i < n && !pm_entry_changed(entry[i], seen[i]))
        i++;
    pm_lock(mm);
    /* An invalidation that came between the two reads has told of the change already. */
    while (i < n && !(pm_entry_changed(entry[i], seen[i]) &&
                      pm_table_has(table, mm, addr + (i << PM_PAGE_SHIFT), entry[i])))
        i++;
    for (first = i; i < n && pm_entry_changed(entry[i], seen[i]); i++) {
        if (!pm_table_has(table, mm, addr + (i << PM_PAGE_SHIFT), entry[i]))
            break;
    }
    pm_unlock(mm);
    if (first == n)
        return 0;
    *cs = addr + (first << PM_PAGE_SHIFT);
    *ce = addr + (i << PM_PAGE_SHIFT);
    return -ESTALE;
}

int pm_table_verify(pm_table *table, uint64_t start, uint64_t end, uint64_t *changed_start,
                    uint64_t *changed_end)
{
    struct pm_mm *mm = pm_table_mm(table);
    uint64_t addr = start;
    int err = 0;

    if (!mm)
        return 0;
    if (!pm_mm_owned(mm))
        return -ESRCH;
    if (start % PM_PAGE_SIZE || end % PM_PAGE_SIZE || end < start || end > PM_USER_END)
        err = -EINVAL;
    while (!err && addr < end && pm_table_next(table, addr, end, &addr) == 0) {
        err = verify_block(table, mm, addr, end, changed_start, changed_end);
        addr = pm_leaf_first(addr) + PM_HUGE_SIZE;
    }
    pm_mm_put(mm);
    return err;
}

static bool pfn_changed(uint64_t entry, uint64_t pfn)
{
    if (!(entry & PM_ENTRY_VALID))
        return false;
    return !(pfn & PM_PFN_VALID) || pfn_differs(entry, pfn & PM_PFN_MASK);
}

static int verify_leaf(const struct pm_leaf *leaf, uint64_t addr, uint64_t end, uint64_t start,
                       const uint64_t *pfns, uint64_t *cs, uint64_t *ce)
{
    uint64_t stop = pm_min(end, pm_leaf_first(addr) + PM_HUGE_SIZE);

    for (; addr < stop; addr += PM_PAGE_SIZE) {
        if (pfn_changed(leaf->entry[pm_leaf_slot(addr)], pfns[(addr - start) >> PM_PAGE_SHIFT]))
            break;
    }
    if (addr == stop)
        return 0;
    *cs = addr;
    for (; addr < stop; addr += PM_PAGE_SIZE) {
        if (!pfn_changed(leaf->entry[pm_leaf_slot(addr)], pfns[(addr - start) >> PM_PAGE_SHIFT]))
            break;
    }
    *ce = addr;
    return -ESTALE;
}

/* With the device lock held: the lowest changed run of [from, end) over all tables. */
static int first_changed(struct pm_mm *mm, uint64_t from, uint64_t end, uint64_t start, const uint64_t *pfns,
                         uint64_t *cs, uint64_t *ce)
{
    int err = 0;

    for (struct pm_table *table = mm->tables; table && from < end; table = table->next) {
        uint64_t addr = from;
        struct pm_leaf *leaf;

        while (from < end && (leaf = pm_table_next_leaf(table, &addr, end - 1))) {
            if (verify_leaf(leaf, addr, end, start, pfns, cs, ce)) {
                err = -ESTALE;
                end = *cs;
            }
            addr = pm_leaf_first(addr) + PM_HUGE_SIZE;
        }
    }
    return err;
}

static bool changed_in(struct pm_table *table, uint64_t addr, const uint64_t *seen, const uint64_t *pfns,
                       uint64_t n)
{
    const struct pm_leaf *leaf = pm_table_leaf(table, addr);

    for (uint64_t i = 0; leaf && i < n; i++) {
        uint64_t entry = leaf->entry[pm_leaf_slot(addr) + i];

        /* A vma that may not be read has its pages still. */
        if (pm_entry_changed(entry, seen[i]) || ((entry & PM_ENTRY_VALID) && (pfns[i] & PM_PFN_ERROR)))
            return true;
    }
    return false;
}

/*
 * A run of one leaf, looked at once more: another thread may have faulted and programmed pages since pfns
 * were read, which is no change behind an entry. 0; -ESTALE; -EBUSY: pfns are what is outdated.
 */
static int confirm(struct pm_mm *mm, uint64_t addr, uint64_t n, const uint64_t *pfns)
{
    uint64_t seen[VERIFY_BLOCK];
    int err = pm_pagemap_read(mm, addr, n, seen);

    if (err)
        return err;
    pm_lock(mm);
    for (struct pm_table *table = mm->tables; table && !err; table = table->next)
        err = changed_in(table, addr, seen, pfns, n) ? -ESTALE : 0;
    pm_unlock(mm);
    for (uint64_t i = 0; !err && i < n; i++)
        err = pfns[i] & PM_PFN_VALID ? -EBUSY : 0;
    return err;
}

/* For the walk, which has just read [start, end) into pfns while seq held. */
int pm_tables_verify(struct pm_mm *mm, uint64_t start, uint64_t end, const uint64_t *pfns, uint64_t *cs,
                     uint64_t *ce)
{
    uint64_t from = start;
    int err = 0;

    if (atomic_load_explicit(&mm->ntables, memory_order_acquire) == 0)
        return 0;
    while (!err && from < end) {
        pm_lock(mm);
        err = first_changed(mm, from, end, start, pfns, cs, ce);
        pm_unlock(mm);
        if (!err)
            return 0;
        err = confirm(mm, *cs, (*ce - *cs) >> PM_PAGE_SHIFT, pfns + ((*cs - start) >> PM_PAGE_SHIFT));
        from = *ce;
    }
    return err;
}
