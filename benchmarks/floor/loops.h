/* SPDX-License-Identifier: MIT */
/* loops.h - the timed loops that both sides run: floors include it, ours has it as a library, see timed.c. */
#ifndef PM_LOOPS_H
#define PM_LOOPS_H

#include <string.h>

#include "floor.h"

/* One read of each page, each timed by itself. Returns how many read 1, which is what was written there. */
static inline uint64_t touch_each(const char *memory, size_t pages, uint64_t *ns)
{
    const volatile char *at = memory;
    uint64_t right = 0;

    for (size_t i = 0; i < pages; i++) {
        uint64_t start = now();

        right += at[i * PAGE] == 1;
        ns[i] = now() - start;
    }
    return right;
}

static inline int by_time(const void *one, const void *two)
{
    const uint64_t *a = one, *b = two;

    return (*a > *b) - (*a < *b);
}

static inline uint64_t percentile(uint64_t *ns, size_t n, unsigned percent)
{
    qsort(ns, n, sizeof(*ns), by_time);
    return ns[(n - 1) * percent / 100];
}

/* memcpy of all of it into one buffer, piece by piece. Returns nanoseconds. */
static inline uint64_t copy_pieces(const char *memory, size_t size, char *buffer, size_t piece)
{
    uint64_t start = now();

    for (size_t at = 0; at < size; at += piece) {
        memcpy(buffer, memory + at, piece);
        __asm__ volatile("" : : "r"(buffer) : "memory");
    }
    return now() - start;
}

/* MADV_DONTNEED, then munmap, of each 64 pages. Returns nanoseconds of the calls. */
static inline uint64_t remove_each(char *memory, size_t pieces)
{
    const size_t piece = 64 * PAGE;
    uint64_t ns = 0;

    for (size_t i = 0; i < pieces; i++) {
        char *at = memory + i * piece;
        uint64_t start = now();

        must(madvise(at, piece, MADV_DONTNEED), "MADV_DONTNEED");
        ns += now() - start;
        memset(at, 1, piece);
        start = now();
        must(munmap(at, piece), "munmap");
        ns += now() - start;
    }
    return ns;
}

#endif
