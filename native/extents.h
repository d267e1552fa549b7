/* SPDX-License-Identifier: MIT */
/*
 * extents.h - a set of disjoint runs of pages, from which the highest that fits is found in O(log n).
 *
 * No locks of its own. Neighbours are merged, so n is the number of gaps. Nodes are reserved beforehand:
 * adding and taking cannot fail.
 */
#ifndef PM_EXTENTS_H
#define PM_EXTENTS_H

#include <stdbool.h>
#include <stdint.h>

struct pm_extent {
    uint64_t first, pages;
    uint64_t max_pages; /* of the longest run at or below this node */
    uint32_t left, right;
    uint32_t max_order; /* of the largest naturally aligned power of two at or below this node */
};

struct pm_extents {
    struct pm_extent *nodes; /* from 1; index 0 is "none" */
    uint32_t root, unused, room, count;
    uint64_t pages;
};

/* Make room for n runs in all: 0, -ENOMEM. */
int pm_extents_reserve(struct pm_extents *set, uint64_t n);
void pm_extents_free(struct pm_extents *set);
/* Put in pages that are not in the set. */
void pm_extents_add(struct pm_extents *set, uint64_t first, uint64_t pages);
/* Take out pages that are all in the set, next to each other. */
void pm_extents_take(struct pm_extents *set, uint64_t first, uint64_t pages);
/* The highest place, aligned to a power of two of pages, of a run that ends at `last` or below. */
bool pm_extents_find(const struct pm_extents *set, uint64_t pages, uint64_t align, uint64_t last,
                     uint64_t *first);
/* The run that holds the page, or the next above it. */
bool pm_extents_next(const struct pm_extents *set, uint64_t page, uint64_t *first, uint64_t *last);

#endif
