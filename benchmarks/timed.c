/* SPDX-License-Identifier: MIT */
/* timed.c - the timed loops for our side, as a library: Python's own cost is not in what they measure. */
#include "floor/loops.h"

uint64_t timed_touches(const char *memory, size_t pages, uint64_t *ns);
uint64_t timed_copy(const char *memory, size_t size, char *buffer, size_t piece);
uint64_t timed_removes(char *memory, size_t pieces);
uint64_t timed_writes(char *memory, size_t size);
uint64_t timed_churn(size_t times);
uint64_t timed_check(const uint64_t *pfns, size_t n, uint64_t bits);

uint64_t timed_touches(const char *memory, size_t pages, uint64_t *ns)
{
    return touch_each(memory, pages, ns);
}

uint64_t timed_copy(const char *memory, size_t size, char *buffer, size_t piece)
{
    return copy_pieces(memory, size, buffer, piece);
}

uint64_t timed_removes(char *memory, size_t pieces)
{
    return remove_each(memory, pieces);
}

/* One byte of each page. */
uint64_t timed_writes(char *memory, size_t size)
{
    volatile char *at = memory;
    uint64_t start = now();

    for (size_t i = 0; i < size; i += PAGE)
        at[i] = 1;
    return now() - start;
}

/* malloc and free of blocks of 16 bytes to 1 MiB, most of them small, with 1024 live. */
uint64_t timed_churn(size_t times)
{
    static char *live[1024];
    uint64_t state = 1, start = now();

    for (size_t i = 0; i < times; i++) {
        char **at;

        state = state * 6364136223846793005u + 1442695040888963407u;
        at = &live[state >> 54];
        free(*at);
        *at = malloc((size_t)16 << (state >> 40 & 15 & state >> 44));
        if (*at)
            **at = 1;
    }
    for (size_t i = 0; i < sizeof(live) / sizeof(live[0]); i++) {
        free(live[i]);
        live[i] = NULL;
    }
    return now() - start;
}

/* How many of the pfns have all of the bits: as light on the caches as the floor's own check. */
uint64_t timed_check(const uint64_t *pfns, size_t n, uint64_t bits)
{
    uint64_t have = 0;

    for (size_t i = 0; i < n; i++)
        have += (pfns[i] & bits) == bits;
    return have;
}
