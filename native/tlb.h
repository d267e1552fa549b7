/* SPDX-License-Identifier: MIT */
/*
 * tlb.h - the translations that a device has cached of its page table: direct-mapped, and counted. With the
 * device lock held.
 *
 * An invalidation flushes here what it fences in the table, so a driver that forgets the flush is not obeyed;
 * the counts tell what a device would have had to walk and to flush.
 */
#ifndef PM_TLB_H
#define PM_TLB_H

#include "internal.h"

enum { PM_TLB_ENTRIES = 64 };

struct pm_tlb {
    uint64_t page[PM_TLB_ENTRIES]; /* the address | 1; 0: empty */
    uint64_t hits, misses, flushed;
};

static inline uint64_t *pm_tlb_at(struct pm_tlb *tlb, uint64_t addr)
{
    return &tlb->page[(addr >> PM_PAGE_SHIFT) % PM_TLB_ENTRIES];
}

/* The device translates addr; `entry` is what the table has. */
static inline void pm_tlb_use(struct pm_tlb *tlb, uint64_t addr, uint64_t entry)
{
    uint64_t *page = pm_tlb_at(tlb, addr);

    if (*page == (addr | 1)) {
        tlb->hits++;
        return;
    }
    tlb->misses++;
    if (entry & PM_ENTRY_VALID)
        *page = addr | 1;
}

/* The entry of addr is not what it was. */
static inline void pm_tlb_flush(struct pm_tlb *tlb, uint64_t addr)
{
    uint64_t *page = pm_tlb_at(tlb, addr);

    if (*page != (addr | 1))
        return;
    *page = 0;
    tlb->flushed++;
}

#endif
