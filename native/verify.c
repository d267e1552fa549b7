/* SPDX-License-Identifier: MIT */
/*
 * verify.c - changes of the page table that no event told of, found by comparing it with device tables and
 * with DMA mappings.
 *
 * The kernel tells user space nothing of copy-on-write breaks, swap, page migration, or a foreign mprotect. A
 * device entry remembers the PFN it was made from; a page that is gone or has another PFN is a change to
 * deliver as `detected`. Without the privilege to see PFNs only absence shows.
 */
#include <errno.h>

#include "devmem.h"
#include "domain.h"
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
    pm_resident_present(mm, addr, n, seen);
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

/* What the walk has just read, and the lowest changed run of [from, end) so far, which lies in one leaf. */
struct changed {
    uint64_t start, from, end;
    const uint64_t *pfns;
    uint64_t *cs, *ce;
    int err;
};

/* The entries of [addr, stop), where a run below changed->end becomes the one. */
static void verify_entries(struct changed *changed, const uint64_t *entry, uint64_t addr, uint64_t stop)
{
    const uint64_t *pfns = changed->pfns + ((addr - changed->start) >> PM_PAGE_SHIFT);
    uint64_t n = (stop - addr) >> PM_PAGE_SHIFT, i = 0, first;

    while (i < n && !pfn_changed(entry[i], pfns[i]))
        i++;
    if (i == n)
        return;
    first = i;
    n = pm_min(n, i + PM_FANOUT - pm_leaf_slot(addr + (i << PM_PAGE_SHIFT)));
    while (i < n && pfn_changed(entry[i], pfns[i]))
        i++;
    *changed->cs = changed->end = addr + (first << PM_PAGE_SHIFT);
    *changed->ce = addr + (i << PM_PAGE_SHIFT);
    changed->err = -ESTALE;
}

static bool verify_dmap(struct pm_inode *node, void *arg)
{
    struct pm_dmap *dmap = (struct pm_dmap *)node;
    struct changed *changed = arg;
    uint64_t addr = pm_max(changed->from, dmap->start), stop = pm_min(changed->end, node->last + 1);

    if (addr < stop)
        verify_entries(changed, dmap->entry + ((addr - dmap->start) >> PM_PAGE_SHIFT), addr, stop);
    return changed->from < changed->end;
}

/* With the device lock held: the lowest changed run over all tables and DMA mappings. */
static int first_changed(struct pm_mm *mm, struct changed *changed)
{
    uint64_t from = changed->from;

    for (struct pm_table *table = mm->tables; table && from < changed->end; table = table->next) {
        uint64_t addr = from;
        struct pm_leaf *leaf;

        while (from < changed->end && (leaf = pm_table_next_leaf(table, &addr, changed->end - 1))) {
            uint64_t next = pm_leaf_first(addr) + PM_HUGE_SIZE;

            verify_entries(changed, leaf->entry + pm_leaf_slot(addr), addr, pm_min(changed->end, next));
            addr = next;
        }
    }
    if (from < changed->end)
        pm_itree_visit(mm->dmaps, from, changed->end - 1, verify_dmap, changed);
    return changed->err;
}

/* n pages of a leaf, as the pagemap shows them and as the walk has read them. */
struct seen {
    uint64_t addr, n;
    const uint64_t *pagemap, *pfns;
    bool changed;
};

static void compare(struct seen *seen, const uint64_t *entry, uint64_t i, uint64_t end)
{
    for (; i < end && !seen->changed; i++, entry++) {
        /* A vma that may not be read has its pages still. */
        seen->changed = pm_entry_changed(*entry, seen->pagemap[i]) ||
                        ((*entry & PM_ENTRY_VALID) && (seen->pfns[i] & PM_PFN_ERROR));
    }
}

static bool compare_dmap(struct pm_inode *node, void *arg)
{
    struct pm_dmap *dmap = (struct pm_dmap *)node;
    struct seen *seen = arg;
    uint64_t from = pm_max(seen->addr, dmap->start);
    uint64_t end = pm_min(seen->addr + (seen->n << PM_PAGE_SHIFT), node->last + 1);

    compare(seen, dmap->entry + ((from - dmap->start) >> PM_PAGE_SHIFT), (from - seen->addr) >> PM_PAGE_SHIFT,
            (end - seen->addr) >> PM_PAGE_SHIFT);
    return !seen->changed;
}

/* With the device lock held. */
static bool changed_in(struct pm_mm *mm, struct seen *seen)
{
    for (struct pm_table *table = mm->tables; table && !seen->changed; table = table->next) {
        const struct pm_leaf *leaf = pm_table_leaf(table, seen->addr);

        if (leaf)
            compare(seen, leaf->entry + pm_leaf_slot(seen->addr), 0, seen->n);
    }
    if (!seen->changed)
        pm_itree_visit(mm->dmaps, seen->addr, seen->addr + (seen->n << PM_PAGE_SHIFT) - 1, compare_dmap,
                       seen);
    return seen->changed;
}

/*
 * A run of one leaf, looked at once more: another thread may have faulted and programmed pages since pfns
 * were read, which is no change behind an entry. 0; -ESTALE; -EBUSY: pfns are what is outdated.
 */
static int confirm(struct pm_mm *mm, uint64_t addr, uint64_t n, const uint64_t *pfns)
{
    uint64_t pagemap[VERIFY_BLOCK];
    struct seen seen = {.addr = addr, .n = n, .pagemap = pagemap, .pfns = pfns};
    int err = pm_pagemap_read(mm, addr, n, pagemap);

    if (err)
        return err;
    pm_lock(mm);
    pm_resident_present(mm, addr, n, pagemap);
    err = changed_in(mm, &seen) ? -ESTALE : 0;
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

    if (atomic_load(&mm->ntables) == 0 && atomic_load(&mm->ndmaps) == 0)
        return 0;
    while (!err && from < end) {
        struct changed changed = {.start = start, .from = from, .end = end, .pfns = pfns, .cs = cs, .ce = ce};

        pm_lock(mm);
        err = first_changed(mm, &changed);
        pm_unlock(mm);
        if (!err)
            return 0;
        err = confirm(mm, *cs, (*ce - *cs) >> PM_PAGE_SHIFT, pfns + ((*cs - start) >> PM_PAGE_SHIFT));
        from = *ce;
    }
    return err;
}
