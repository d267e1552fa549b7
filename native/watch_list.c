/* SPDX-License-Identifier: MIT */
/*
 * watch_list.c - the list of what is registered with the watch descriptor.
 *
 * The monitor changes it too, which cannot allocate: it always has room to spare.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "alone.h"
#include "watch.h"

enum { LIST_SLACK = 64 };

int pm_watch_reserve(struct pm_mm *mm)
{
    uint32_t cap = mm->watched_cap * 2 + 2 * LIST_SLACK;
    struct pm_watch_range *grown, *old = mm->watched;
    bool room;

    pm_lock(mm);
    room = mm->nwatched + LIST_SLACK <= mm->watched_cap;
    pm_unlock(mm);
    if (room)
        return 0;
    grown = pm_sys_calloc(cap, sizeof(*grown));
    if (!grown)
        return -ENOMEM;
    pm_lock(mm);
    if (old)
        memcpy(grown, old, mm->nwatched * sizeof(*grown));
    mm->watched = grown;
    mm->watched_cap = cap;
    pm_unlock(mm);
    free(old);
    return 0;
}

/* The first range that ends beyond addr. */
static uint32_t range_at(const struct pm_mm *mm, uint64_t addr)
{
    uint32_t low = 0, high = mm->nwatched;

    while (low < high) {
        uint32_t mid = low + (high - low) / 2;

        if (mm->watched[mid].end > addr)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

static void count_watched(struct pm_mm *mm)
{
    mm->watched_bytes = 0;
    for (uint32_t i = 0; i < mm->nwatched; i++)
        mm->watched_bytes += mm->watched[i].end - mm->watched[i].start;
    pm_status_watched(mm);
}

static void drop_ranges(struct pm_mm *mm, uint32_t first, uint32_t n)
{
    memmove(&mm->watched[first], &mm->watched[first + n],
            (mm->nwatched - first - n) * sizeof(mm->watched[0]));
    mm->nwatched -= n;
}

/* Registered still, and to be unregistered at the end: then a child may hold the descriptor, and nobody reads
 * events. */
static void keep_unlisted(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    if (mm->unlisted.end == 0)
        mm->unlisted.start = start;
    mm->unlisted.start = pm_min(mm->unlisted.start, start);
    mm->unlisted.end = pm_max(mm->unlisted.end, end);
}

/*
 * Take [start, end) out of the list. Without room to split a range its upper part is dropped too: it is
 * then registered once more some day, which does no harm.
 */
static void forget(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint32_t i = range_at(mm, start), first;

    if (i == mm->nwatched)
        return;
    if (mm->watched[i].start < start) {
        struct pm_watch_range high = {end, mm->watched[i].end};

        mm->watched[i].end = start;
        i++;
        if (high.end > end) {
            if (mm->nwatched == mm->watched_cap) {
                keep_unlisted(mm, high.start, high.end);
                return;
            }
            memmove(&mm->watched[i + 1], &mm->watched[i], (mm->nwatched - i) * sizeof(high));
            mm->watched[i] = high;
            mm->nwatched++;
            return;
        }
    }
    for (first = i; i < mm->nwatched && mm->watched[i].end <= end; i++)
        continue;
    if (i < mm->nwatched && mm->watched[i].start < end)
        mm->watched[i].start = end;
    drop_ranges(mm, first, i - first);
}

static void add(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint32_t i, last;

    i = last = range_at(mm, start ? start - 1 : 0);
    while (last < mm->nwatched && mm->watched[last].start <= end) {
        start = pm_min(start, mm->watched[last].start);
        end = pm_max(end, mm->watched[last].end);
        last++;
    }
    if (last > i) {
        mm->watched[i] = (struct pm_watch_range){start, end};
        drop_ranges(mm, i + 1, last - i - 1);
        return;
    }
    if (mm->nwatched == mm->watched_cap) {
        keep_unlisted(mm, start, end);
        return;
    }
    memmove(&mm->watched[i + 1], &mm->watched[i], (mm->nwatched - i) * sizeof(mm->watched[0]));
    mm->watched[i] = (struct pm_watch_range){start, end};
    mm->nwatched++;
}

void pm_watch_forget(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    forget(mm, start, end);
    pm_alone_forget(mm, start, pm_last(end));
    count_watched(mm);
}

void pm_watch_remember(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    add(mm, start, end);
    count_watched(mm);
}

/* The old place is unmapped with a message of its own, or with MREMAP_DONTUNMAP stays mapped and registered.
 */
void pm_watch_moved(struct pm_mm *mm, uint64_t to, uint64_t len)
{
    pm_watch_remember(mm, to, to + len);
}

bool pm_watch_lists(const struct pm_mm *mm, uint64_t addr)
{
    uint32_t i = range_at(mm, addr);

    if (i < mm->nwatched && mm->watched[i].start <= addr)
        return true;
    return mm->unlisted.start <= addr && addr < mm->unlisted.end;
}

bool pm_watch_covers(const struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint32_t i = range_at(mm, start);

    return i < mm->nwatched && mm->watched[i].start <= start && mm->watched[i].end >= end;
}

bool pm_watched(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    bool covered;

    pm_lock(mm);
    covered = pm_watch_covers(mm, start, end);
    pm_unlock(mm);
    return covered;
}

bool pm_watch_next(struct pm_mm *mm, uint64_t addr, struct pm_watch_range *ret)
{
    bool found;
    uint32_t i;

    pm_lock(mm);
    i = range_at(mm, addr);
    found = i < mm->nwatched;
    if (found)
        *ret = mm->watched[i];
    pm_unlock(mm);
    return found;
}
