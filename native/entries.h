/* SPDX-License-Identifier: MIT */
/*
 * entries.h - loops over arrays of page-table entries. They know nothing of vmas and make no system call.
 */
#ifndef PM_ENTRIES_H
#define PM_ENTRIES_H

#include "internal.h"

/* How raw pagemap entries become HMM pfns. */
struct pm_conversion {
    uint64_t keep; /* bits of an entry that go over */
    uint64_t order;
    uint64_t shared; /* WRITE in a shared mapping, where the bits of the page say nothing against it */
    uint64_t write;  /* WRITE where the vma is writable */
    uint64_t zero;   /* what the zero page becomes: never writable */
};

/* The entries first, first + step, first + 2 * step, ... */
struct pm_run {
    uint64_t first, step;
};

/* In place. Returns the bits that all of the pfns have. */
uint64_t pm_entries_convert(uint64_t *entries, uint64_t n, const struct pm_conversion *conversion);
/*
 * Overwrite entries that should be those of the run `old`, but for the bits of `loose`. True if they were;
 * *common: the loose bits that all of them had.
 */
bool pm_entries_replace(uint64_t *entries, uint64_t n, struct pm_run old, struct pm_run new, uint64_t loose,
                        uint64_t *common);
/* Make them those of a run. */
void pm_entries_set(uint64_t *entries, uint64_t n, struct pm_run run);
/* Take the PFN out of raw entries of present pages. In others the field is a place in swap: it stays. */
void pm_entries_hide(uint64_t *entries, uint64_t n);
/*
 * Requests are (pfns & mask) | flags, taken as the VALID and WRITE bits that are wanted: none where VALID is
 * not asked for. Do all pages want the same, *ret? False may mean that they do. Then, what each of them
 * wants.
 */
bool pm_entries_same_requests(const uint64_t *pfns, uint64_t n, uint64_t mask, uint64_t flags, uint64_t *ret);
void pm_entries_requests(const uint64_t *pfns, uint64_t n, uint64_t mask, uint64_t flags, uint64_t *ret);
/* The bits that are wanted somewhere and not there. */
uint64_t pm_entries_lacking(const uint64_t *pfns, const uint64_t *wanted, uint64_t n);
/* Is it the page after that one in memory, both being valid? */
static inline bool pm_pfn_continues(uint64_t pfn, uint64_t before)
{
    return (pfn & before & PM_PFN_VALID) && (pfn & PM_PFN_MASK) == (before & PM_PFN_MASK) + 1;
}

/*
 * Entries of a DMA mapping: the pfns that are valid, with the bits of `keep`, 0 elsewhere. Returns how many
 * are valid; *runs: in how many stretches of pages that lie one after the other in memory.
 */
uint64_t pm_entries_fill(uint64_t *entries, const uint64_t *pfns, uint64_t n, uint64_t keep, uint64_t *runs);
/* Where a device finds them: the address of the run `at` for each valid entry, 0 for others. */
void pm_entries_place(const uint64_t *entries, uint64_t n, struct pm_run at, uint64_t *ret);
/* Make all 0. Returns how many were not; *writable: how many of them with WRITE. */
uint64_t pm_entries_clear(uint64_t *entries, uint64_t n, uint64_t *writable);

#endif
