/* SPDX-License-Identifier: MIT */
/* copy.c - the floor of reading pinned pages: memcpy of BYTES, in pieces of PIECE bytes. */
#include <string.h>

#include "floor.h"

static size_t size, piece;
static char *memory, *buffer;

static uint64_t round_of(uint64_t *done)
{
    uint64_t start = now();

    for (size_t at = 0; at < size; at += piece) {
        memcpy(buffer, memory + at, piece);
        *done += piece;
        __asm__ volatile("" : : "r"(buffer) : "memory");
    }
    return now() - start;
}

int main(int argc, char **argv)
{
    size = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;
    piece = argc > 2 ? strtoul(argv[2], NULL, 0) : 0;
    memory = map_small(size);
    buffer = map_small(piece);
    memset(memory, 1, size);
    memset(buffer, 1, piece);
    return serve(round_of);
}
