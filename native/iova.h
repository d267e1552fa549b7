/* SPDX-License-Identifier: MIT */
/*
 * iova.h - the parts of an IOVA space, for iova.c and live.c. Other files use pymirror.h.
 */
#ifndef PM_IOVA_H
#define PM_IOVA_H

#include <stdbool.h>
#include <stdint.h>

/* live.c: which IOVAs are given out, by their first page. */
struct pm_live_slot {
    uint64_t page;  /* 0: empty, for page 0 is never given */
    uint64_t pages; /* as asked for, before rounding; 0 while it lies in a magazine */
};

struct pm_live {
    struct pm_live_slot *slots;
    uint64_t room; /* a power of two */
    uint64_t count;
};

/* Room for one more: 0, -ENOMEM. */
int pm_live_grow(struct pm_live *live);
struct pm_live_slot *pm_live_find(const struct pm_live *live, uint64_t page); /* NULL: not there */
void pm_live_add(struct pm_live *live, uint64_t page, uint64_t pages);
void pm_live_remove(struct pm_live *live, struct pm_live_slot *slot);

#endif
