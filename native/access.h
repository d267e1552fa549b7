/* SPDX-License-Identifier: MIT */
/*
 * access.h - a device access to process memory by address, through entries that an invalidation fences: those
 * of a device page table, or of a DMA mapping.
 */
#ifndef PM_ACCESS_H
#define PM_ACCESS_H

#include "internal.h"

enum { PM_ACCESS_PAGES = 256 };

struct pm_access_span;

/* The entry of the page at addr, with the device lock held. */
typedef uint64_t (*pm_entry_at)(const struct pm_access_span *span, uint64_t addr);

struct pm_access_span {
    struct pm_mm *mm;
    void *from; /* whose entries they are */
    pm_entry_at entry_at;
    uint64_t addr, len; /* bytes, at most PM_ACCESS_PAGES pages; len shrinks to what the entries serve */
    uint64_t at;        /* where these bytes are: at addr, or in device memory */
    bool write;
    uint64_t entry[PM_ACCESS_PAGES];
    struct pm_inflight flight;
    bool masked; /* signals are blocked while it is in flight; `mask` is from before */
    sigset_t mask;
};

/* Why a span was not served. */
struct pm_access_why {
    uint32_t fault; /* enum pm_access_fault */
    uint64_t start, end;
    uint64_t fence_seq;
    uint64_t redone; /* times a read was discarded and done again */
};

/* How much of [addr, addr + len) one span takes. */
uint64_t pm_access_span_len(uint64_t addr, uint64_t len);
/* Bytes copied, 0 to try again, -EFAULT with the fault set, or another errno. */
int64_t pm_access_span_do(struct pm_access_span *span, struct pm_access_why *fault, char *buf);
/* The entry of a struct pm_table: `from` of a span. */
uint64_t pm_table_entry(const struct pm_access_span *span, uint64_t addr);
/*
 * Do something else than a copy at span->at, announced as the access that it is: only where that is device
 * memory, else -EFAULT with PM_FAULT_ATOMIC.
 */
int pm_access_span_with(struct pm_access_span *span, struct pm_access_why *fault,
                        int (*work)(struct pm_access_span *span, void *arg), void *arg);
/* Only what the entries say: -EFAULT with the fault, or 0. */
int pm_access_span_look(struct pm_access_span *span, struct pm_access_why *fault);
/* Device reads under way in [start, last] are void, writes are waited for. With the device lock held. */
void pm_access_expel(struct pm_mm *mm, uint64_t start, uint64_t last);

#endif
