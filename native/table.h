/* SPDX-License-Identifier: MIT */
/*
 * table.h - the device page table as its users inside the shim see it.
 *
 * A radix tree of the CPU's own shape (9 bits a level, 8 bytes an entry). Upper nodes live as long as the
 * table, leaves as long as they hold an entry. Growing is ordered by `grow`; everything else by the device
 * lock of the mm that the table is bound to.
 */
#ifndef PM_TABLE_H
#define PM_TABLE_H

#include "internal.h"

#include "tlb.h"

enum { PM_LEVEL_BITS = 9, PM_FANOUT = 1 << PM_LEVEL_BITS, PM_TOP_LEVEL = 3 };

struct pm_leaf {
    uint32_t used;
    uint32_t fenced;
    uint64_t entry[PM_FANOUT];
};

struct pm_table {
    struct pm_table *next; /* of mm->tables */
    atomic_int refs;
    atomic_uint_least64_t owner; /* pm_process() when it was bound */
    pthread_mutex_t grow;
    struct pm_mm *mm;               /* under `grow` */
    _Atomic(struct pm_mm *) linked; /* whose list has it; changes under that mm's device lock */
    _Atomic(void *) top[PM_FANOUT];
    uint64_t entries, fenced; /* under the device lock */
    atomic_uint_least64_t nodes;
    struct pm_tlb tlb; /* under the device lock */
};

static inline uint64_t pm_leaf_first(uint64_t addr)
{
    return addr & ~(PM_HUGE_SIZE - 1);
}

static inline unsigned pm_leaf_slot(uint64_t addr)
{
    return (addr >> PM_PAGE_SHIFT) & (PM_FANOUT - 1);
}

/* Pages of the leaf of addr that lie in [addr, addr + n pages). */
static inline uint64_t pm_leaf_pages(uint64_t addr, uint64_t n)
{
    return pm_min(n, PM_FANOUT - pm_leaf_slot(addr));
}

/* The slots of the leaf at addr that lie in [addr, last]; gives the last of them. */
static inline unsigned pm_leaf_last(uint64_t addr, uint64_t last)
{
    return pm_leaf_slot(pm_min(last, pm_leaf_first(addr) + PM_HUGE_SIZE - 1));
}

/* Made by the process that this one was forked from: its mm and its lock may be gone. */
static inline bool pm_table_inherited(const struct pm_table *table)
{
    uint64_t owner = atomic_load(&table->owner);

    return owner && owner != pm_process();
}

struct pm_leaf *pm_table_leaf(struct pm_table *table, uint64_t addr);
/* The first leaf at or after *addr and before `last`; moves *addr to the first address of it inside. */
struct pm_leaf *pm_table_next_leaf(struct pm_table *table, uint64_t *addr, uint64_t last);
/* Have a leaf at addr: 0 or -ENOMEM. With `grow` held. */
int pm_table_grow(struct pm_table *table, uint64_t addr);
/* Take an empty leaf out of its parent; the caller frees it after the lock. */
void pm_table_unlink(struct pm_table *table, uint64_t addr);
/* 0, or -EXDEV: it has entries of another mm. With `grow` held. */
int pm_table_bind(struct pm_table *table, struct pm_mm *mm);
/* The mm that the table is bound to, referenced, or NULL; NULL too in a forked child, where `grow` may be
 * held for ever. */
struct pm_mm *pm_table_mm(struct pm_table *table);
/* With the device lock of mm held: is it mm's table? Another thread may have bound it to another since. */
bool pm_table_of(const struct pm_table *table, const struct pm_mm *mm);
/* And does `entry` still stand at addr? */
bool pm_table_has(struct pm_table *table, const struct pm_mm *mm, uint64_t addr, uint64_t entry);
/* Is the page behind a usable entry another than the pagemap shows? */
bool pm_entry_changed(uint64_t entry, uint64_t pagemap);

#endif
