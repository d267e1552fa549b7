/* SPDX-License-Identifier: MIT */
/* copy.c - the floor of reading what is on a device or pinned: memcpy of BYTES, in pieces of PIECE bytes. */
#include "loops.h"

static size_t size, piece;
static char *memory, *buffer;

static uint64_t round_of(uint64_t *done)
{
    *done = size / piece * piece;
    return copy_pieces(memory, size, buffer, piece);
}

int main(int argc, char **argv)
{
    size = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;
    piece = argc > 2 ? strtoul(argv[2], NULL, 0) : 1;
    memory = map_small(size);
    buffer = map_small(piece);
    memset(memory, 1, size);
    memset(buffer, 1, piece);
    return serve(round_of);
}
