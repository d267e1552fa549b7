/* SPDX-License-Identifier: MIT */
/*
 * live.c - the IOVAs that are given out: a hash table with open addressing.
 *
 * Four pages in a row share a cache line, for neighbours are given out and freed together.
 */
#include <errno.h>
#include <stdlib.h>

#include "internal.h"
#include "iova.h"

enum { FIRST_ROOM = 256 };

static uint64_t home_of(const struct pm_live *live, uint64_t page)
{
    uint64_t x = (page >> 2) * 0x9e3779b97f4a7c15ULL;

    x ^= x >> 32;
    return (x << 2 | (page & 3)) & (live->room - 1);
}

static struct pm_live_slot *slot_for(const struct pm_live *live, uint64_t page)
{
    uint64_t at = home_of(live, page);

    while (live->slots[at].page && live->slots[at].page != page)
        at = (at + 1) & (live->room - 1);
    return &live->slots[at];
}

int pm_live_grow(struct pm_live *live)
{
    struct pm_live bigger = {.room = live->room ? live->room * 2 : FIRST_ROOM, .count = live->count};

    if (live->count + 1 <= live->room / 8 * 5)
        return 0;
    bigger.slots = pm_sys_calloc(bigger.room, sizeof(*bigger.slots));
    if (!bigger.slots)
        return -ENOMEM;
    for (uint64_t i = 0; i < live->room; i++) {
        if (live->slots[i].page)
            *slot_for(&bigger, live->slots[i].page) = live->slots[i];
    }
    free(live->slots);
    *live = bigger;
    return 0;
}

struct pm_live_slot *pm_live_find(const struct pm_live *live, uint64_t page)
{
    struct pm_live_slot *slot;

    if (!live->count || !page)
        return NULL;
    slot = slot_for(live, page);
    return slot->page ? slot : NULL;
}

void pm_live_add(struct pm_live *live, uint64_t page, uint64_t pages)
{
    *slot_for(live, page) = (struct pm_live_slot){page, pages};
    live->count++;
}

/* No tombstones: those behind move up, as far as their home allows. */
void pm_live_remove(struct pm_live *live, struct pm_live_slot *slot)
{
    uint64_t mask = live->room - 1, hole = (uint64_t)(slot - live->slots);

    for (uint64_t at = (hole + 1) & mask; live->slots[at].page; at = (at + 1) & mask) {
        uint64_t home = home_of(live, live->slots[at].page);

        if (((at - home) & mask) < ((at - hole) & mask))
            continue;
        live->slots[hole] = live->slots[at];
        hole = at;
    }
    live->slots[hole] = (struct pm_live_slot){0};
    live->count--;
}
