/* SPDX-License-Identifier: MIT */
/*
 * table.c - the device page table: its tree, its life, the mm it is bound to, and what it has.
 */
#include "table.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static unsigned slot_of(uint64_t addr, int level)
{
    return (addr >> (PM_PAGE_SHIFT + level * PM_LEVEL_BITS)) & (PM_FANOUT - 1);
}

static uint64_t span_of(int level)
{
    return 1ULL << (PM_PAGE_SHIFT + level * PM_LEVEL_BITS);
}

struct pm_leaf *pm_table_leaf(struct pm_table *table, uint64_t addr)
{
    _Atomic(void *) *node = table->top;

    if (addr >= PM_USER_END)
        return NULL;
    for (int level = PM_TOP_LEVEL; level > 0; level--) {
        void *below = atomic_load_explicit(&node[slot_of(addr, level)], memory_order_acquire);

        if (!below || level == 1)
            return below;
        node = below;
    }
    return NULL;
}

struct pm_leaf *pm_table_next_leaf(struct pm_table *table, uint64_t *addr, uint64_t last)
{
    while (*addr <= last && *addr < PM_USER_END) {
        _Atomic(void *) *node = table->top;
        int level = PM_TOP_LEVEL;

        for (;; level--) {
            void *below = atomic_load_explicit(&node[slot_of(*addr, level)], memory_order_acquire);

            if (below && level == 1)
                return below;
            if (!below)
                break;
            node = below;
        }
        *addr = (*addr & ~(span_of(level) - 1)) + span_of(level);
    }
    return NULL;
}

int pm_table_create(pm_table **ret)
{
    struct pm_table *table = pm_sys_calloc(1, sizeof(*table));

    if (!table)
        return -ENOMEM;
    atomic_init(&table->refs, 1);
    table->owner = pm_process();
    pthread_mutex_init(&table->grow, NULL);
    *ret = table;
    return 0;
}

static void free_below(_Atomic(void *) *node, int level)
{
    for (unsigned i = 0; i < PM_FANOUT; i++) {
        void *below = atomic_load(&node[i]);

        if (below && level > 1)
            free_below(below, level - 1);
        free(below);
        atomic_store(&node[i], NULL);
    }
}

bool pm_table_of(const struct pm_table *table, const struct pm_mm *mm)
{
    return atomic_load(&table->linked) == mm;
}

static void unlink_table(struct pm_table *table)
{
    struct pm_mm *mm = table->mm;
    struct pm_table **link = &mm->tables;

    if (!pm_table_of(table, mm))
        return;
    while (*link != table)
        link = &(*link)->next;
    *link = table->next;
    atomic_store(&table->linked, NULL);
    atomic_fetch_sub(&mm->ntables, 1);
}

/* With `grow` held: forget all entries and the mm they were of. */
static void unbind(struct pm_table *table)
{
    struct pm_mm *mm = table->mm;

    if (!mm)
        return;
    pm_lock(mm);
    unlink_table(table);
    pm_unlock(mm);
    free_below(table->top, PM_TOP_LEVEL);
    table->entries = table->fenced = table->nodes = 0;
    memset(table->tlb.page, 0, sizeof(table->tlb.page));
    table->mm = NULL;
    pm_mm_put(mm);
}

void pm_table_put(pm_table *table)
{
    if (pm_table_inherited(table) || atomic_fetch_sub(&table->refs, 1) != 1)
        return;
    pthread_mutex_lock(&table->grow);
    unbind(table);
    pthread_mutex_unlock(&table->grow);
    pthread_mutex_destroy(&table->grow);
    free(table);
}

struct pm_mm *pm_table_mm(struct pm_table *table)
{
    struct pm_mm *mm;

    if (table->owner != pm_process())
        return NULL;
    pthread_mutex_lock(&table->grow);
    mm = table->mm;
    if (mm)
        pm_mm_get(mm);
    pthread_mutex_unlock(&table->grow);
    return mm;
}

/* With `grow` held. */
static bool has_entries(struct pm_table *table)
{
    bool any;

    pm_lock(table->mm);
    any = table->entries != 0;
    pm_unlock(table->mm);
    return any;
}

int pm_table_bind(struct pm_table *table, struct pm_mm *mm)
{
    if (table->mm == mm)
        return 0;
    if (table->mm && pm_mm_check(table->mm) == 0 && has_entries(table))
        return -EXDEV;
    unbind(table);
    pm_mm_get(mm);
    table->owner = mm->owner;
    table->mm = mm;
    pm_lock(mm);
    table->next = mm->tables;
    mm->tables = table;
    atomic_store(&table->linked, mm);
    atomic_fetch_add(&mm->ntables, 1);
    pm_unlock(mm);
    return 0;
}

int pm_table_grow(struct pm_table *table, uint64_t addr)
{
    _Atomic(void *) *node = table->top;

    for (int level = PM_TOP_LEVEL; level > 0; level--) {
        _Atomic(void *) *link = &node[slot_of(addr, level)];
        void *below = atomic_load_explicit(link, memory_order_acquire);

        if (!below) {
            below = pm_sys_calloc(1, level == 1 ? sizeof(struct pm_leaf) : PM_FANOUT * sizeof(void *));
            if (!below)
                return -ENOMEM;
            atomic_store_explicit(link, below, memory_order_release);
            if (level > 1)
                table->nodes++;
        }
        node = below;
    }
    return 0;
}

void pm_table_unlink(struct pm_table *table, uint64_t addr)
{
    _Atomic(void *) *node = table->top;

    for (int level = PM_TOP_LEVEL; level > 1; level--)
        node = atomic_load(&node[slot_of(addr, level)]);
    atomic_store(&node[slot_of(addr, 1)], NULL);
}

int pm_table_read(pm_table *table, uint64_t start, uint64_t n, uint64_t *ret)
{
    struct pm_mm *mm;
    uint64_t step;

    if (start % PM_PAGE_SIZE || n > PM_USER_END >> PM_PAGE_SHIFT)
        return -EINVAL;
    memset(ret, 0, n * sizeof(*ret));
    mm = pm_table_mm(table);
    if (!mm)
        return 0;
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    for (uint64_t i = 0; i < n; i += step) {
        uint64_t addr = start + (i << PM_PAGE_SHIFT);
        struct pm_leaf *leaf = pm_table_of(table, mm) ? pm_table_leaf(table, addr) : NULL;

        step = pm_leaf_pages(addr, n - i);
        if (leaf)
            memcpy(ret + i, &leaf->entry[pm_leaf_slot(addr)], step * sizeof(*ret));
    }
    pm_unlock(mm);
    pm_mm_put(mm);
    return 0;
}

static int next_in_leaf(const struct pm_leaf *leaf, uint64_t addr, uint64_t last, uint64_t *ret)
{
    for (unsigned i = pm_leaf_slot(addr), end = pm_leaf_last(addr, last); i <= end; i++) {
        if (leaf->entry[i] == 0)
            continue;
        *ret = pm_leaf_first(addr) + ((uint64_t)i << PM_PAGE_SHIFT);
        return 0;
    }
    return -ENOENT;
}

int pm_table_next(pm_table *table, uint64_t start, uint64_t end, uint64_t *ret)
{
    struct pm_mm *mm = pm_table_mm(table);
    uint64_t addr = start, last = pm_last(end);
    struct pm_leaf *leaf;
    int err = -ENOENT;

    if (!mm)
        return -ENOENT;
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    while (err && pm_table_of(table, mm) && (leaf = pm_table_next_leaf(table, &addr, last))) {
        err = next_in_leaf(leaf, addr, last, ret);
        addr = pm_leaf_first(addr) + PM_HUGE_SIZE;
    }
    pm_unlock(mm);
    pm_mm_put(mm);
    return err;
}

static uint64_t count_leaves(struct pm_table *table)
{
    uint64_t n = 0;

    for (uint64_t addr = 0; pm_table_next_leaf(table, &addr, UINT64_MAX);
         addr = pm_leaf_first(addr) + PM_HUGE_SIZE)
        n++;
    return n;
}

int pm_table_stats(pm_table *table, struct pm_table_stats *ret)
{
    struct pm_mm *mm = pm_table_mm(table);

    memset(ret, 0, sizeof(*ret));
    ret->bytes = sizeof(*table);
    if (!mm)
        return 0;
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    if (pm_table_of(table, mm)) {
        ret->entries = table->entries;
        ret->fenced = table->fenced;
        ret->tlb_hits = table->tlb.hits;
        ret->tlb_misses = table->tlb.misses;
        ret->tlb_flushed = table->tlb.flushed;
        ret->bytes +=
            count_leaves(table) * sizeof(struct pm_leaf) + table->nodes * PM_FANOUT * sizeof(void *);
    }
    pm_unlock(mm);
    pm_mm_put(mm);
    return 0;
}
