/* SPDX-License-Identifier: MIT */
/*
 * table_map.c - programming the device page table: page_table.map().
 */
#include <errno.h>

#include "devmem.h"
#include "table.h"

static bool any_valid(const uint64_t *pfns, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        if (pfns[i] & PM_PFN_VALID)
            return true;
    }
    return false;
}

static int grow_range(struct pm_table *table, uint64_t start, uint64_t n, const uint64_t *pfns)
{
    uint64_t step;

    for (uint64_t i = 0; i < n; i += step) {
        uint64_t addr = start + (i << PM_PAGE_SHIFT);

        step = pm_leaf_pages(addr, n - i);
        if (!any_valid(pfns + i, step))
            continue;
        int err = pm_table_grow(table, addr);

        if (err)
            return err;
    }
    return 0;
}

/* A leaf that the growing saw may be gone again: a clear freed it. */
static bool leaves_stand(struct pm_table *table, uint64_t start, uint64_t n, const uint64_t *pfns)
{
    uint64_t step;

    for (uint64_t i = 0; i < n; i += step) {
        uint64_t addr = start + (i << PM_PAGE_SHIFT);

        step = pm_leaf_pages(addr, n - i);
        if (!pm_table_leaf(table, addr) && any_valid(pfns + i, step))
            return false;
    }
    return true;
}

static void program_leaf(struct pm_table *table, struct pm_leaf *leaf, unsigned slot, uint64_t n,
                         const uint64_t *pfns)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t *entry = &leaf->entry[slot + i];

        if (!(pfns[i] & PM_PFN_VALID))
            continue;
        if (*entry == 0) {
            leaf->used++;
            table->entries++;
        } else if (*entry & PM_ENTRY_FENCED) {
            leaf->fenced--;
            table->fenced--;
        }
        *entry = pfns[i] & ~PM_ENTRY_FENCED;
    }
}

static void program(struct pm_table *table, uint64_t start, uint64_t n, const uint64_t *pfns)
{
    uint64_t step;

    for (uint64_t i = 0; i < n; i += step) {
        uint64_t addr = start + (i << PM_PAGE_SHIFT);
        struct pm_leaf *leaf = pm_table_leaf(table, addr);

        step = pm_leaf_pages(addr, n - i);
        if (leaf)
            program_leaf(table, leaf, pm_leaf_slot(addr), step, pfns + i);
    }
}

int pm_table_map(pm_table *table, pm_sub *sub, uint64_t seq, uint64_t start, uint64_t n, const uint64_t *pfns)
{
    struct pm_mm *mm = sub->mm;
    bool stand = false;
    int err = pm_mm_check(mm);

    if (err)
        return err;
    if (table->owner && table->owner != mm->owner)
        return -ESRCH;
    if (n == 0 || n > PM_USER_END >> PM_PAGE_SHIFT || start % PM_PAGE_SIZE || start >= PM_USER_END ||
        PM_USER_END - start < n << PM_PAGE_SHIFT)
        return -EINVAL;
    if (!pm_sub_covers(sub, start, n))
        return -EINVAL;
    pthread_mutex_lock(&table->grow);
    err = pm_table_bind(table, mm);
    while (!err && !stand) {
        err = grow_range(table, start, n, pfns);
        if (err)
            break;
        pm_point(PM_POINT_MAP_BEFORE_COMMIT);
        pm_lock(mm);
        if (pm_sub_stale(sub, seq) || !pm_resident_stand(mm, start, n, pfns)) {
            err = -EBUSY;
        } else {
            stand = leaves_stand(table, start, n, pfns);
            if (stand)
                program(table, start, n, pfns);
        }
        pm_status_update(mm);
        pm_unlock(mm);
    }
    pthread_mutex_unlock(&table->grow);
    pm_point(PM_POINT_MAP_AFTER_COMMIT);
    return err;
}
