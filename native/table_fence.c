/* SPDX-License-Identifier: MIT */
/*
 * table_fence.c - an invalidation fences entries of the device page tables, a driver's callback clears them.
 */
#include <errno.h>
#include <stdlib.h>

#include "table.h"

static void fence_leaf(struct pm_table *table, struct pm_leaf *leaf, uint64_t addr, unsigned last,
                       uint64_t seq)
{
    for (unsigned i = pm_leaf_slot(addr); i <= last; i++) {
        if (!(leaf->entry[i] & PM_ENTRY_VALID))
            continue;
        pm_tlb_flush(&table->tlb, pm_leaf_first(addr) + ((uint64_t)i << PM_PAGE_SHIFT));
        leaf->entry[i] = PM_ENTRY_FENCED | (leaf->entry[i] & PM_ENTRY_WRITE) | (seq & PM_ENTRY_SEQ_MASK);
        leaf->fenced++;
        table->fenced++;
    }
}

void pm_tables_fence(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq)
{
    for (struct pm_table *table = mm->tables; table; table = table->next) {
        uint64_t addr = start;
        struct pm_leaf *leaf;

        while ((leaf = pm_table_next_leaf(table, &addr, last))) {
            fence_leaf(table, leaf, addr, pm_leaf_last(addr, last), seq);
            addr = pm_leaf_first(addr) + PM_HUGE_SIZE;
        }
    }
}

static void drop_fenced(struct pm_table *table, struct pm_leaf *leaf, unsigned first, unsigned last,
                        uint64_t seq)
{
    uint64_t fenced = PM_ENTRY_FENCED | (seq & PM_ENTRY_SEQ_MASK);

    for (unsigned i = first; i <= last; i++) {
        if ((leaf->entry[i] & ~PM_ENTRY_WRITE) != fenced)
            continue;
        leaf->entry[i] = 0;
        leaf->used--;
        leaf->fenced--;
        table->fenced--;
        table->entries--;
    }
}

void pm_tables_drop(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq)
{
    for (struct pm_table *table = mm->tables; table; table = table->next) {
        uint64_t addr = start;
        struct pm_leaf *leaf;

        while ((leaf = pm_table_next_leaf(table, &addr, last))) {
            drop_fenced(table, leaf, pm_leaf_slot(addr), pm_leaf_last(addr, last), seq);
            addr = pm_leaf_first(addr) + PM_HUGE_SIZE;
        }
    }
}

static int64_t clear_leaf(struct pm_table *table, struct pm_leaf *leaf, uint64_t addr, unsigned last)
{
    int64_t n = 0;

    for (unsigned i = pm_leaf_slot(addr); i <= last; i++) {
        if (leaf->entry[i] == 0)
            continue;
        pm_tlb_flush(&table->tlb, pm_leaf_first(addr) + ((uint64_t)i << PM_PAGE_SHIFT));
        if (leaf->entry[i] & PM_ENTRY_FENCED) {
            leaf->fenced--;
            table->fenced--;
        }
        leaf->entry[i] = 0;
        leaf->used--;
        n++;
    }
    table->entries -= (uint64_t)n;
    return n;
}

int64_t pm_table_clear(pm_table *table, uint64_t start, uint64_t end)
{
    struct pm_mm *mm = pm_table_mm(table);
    uint64_t addr = start, last = pm_last(end);
    struct pm_leaf *leaf, *empty = NULL;
    int64_t n = 0;

    if (!mm)
        return 0;
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    while (pm_table_of(table, mm) && (leaf = pm_table_next_leaf(table, &addr, last))) {
        n += clear_leaf(table, leaf, addr, pm_leaf_last(addr, last));
        if (leaf->used == 0) {
            pm_table_unlink(table, addr);
            leaf->entry[0] = (uint64_t)(uintptr_t)empty;
            empty = leaf;
        }
        addr = pm_leaf_first(addr) + PM_HUGE_SIZE;
    }
    pm_status_update(mm);
    pm_unlock(mm);
    while ((leaf = empty)) {
        empty = (struct pm_leaf *)(uintptr_t)leaf->entry[0];
        free(leaf);
    }
    pm_mm_put(mm);
    return n;
}
