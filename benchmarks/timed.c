/* SPDX-License-Identifier: MIT */
/* timed.c - the timed loops for our side, as a library: Python's own cost is not in what they measure. */
#include "floor/loops.h"

uint64_t timed_touches(const char *memory, size_t pages, uint64_t *ns);
uint64_t timed_copy(const char *memory, size_t size, char *buffer, size_t piece);
uint64_t timed_removes(char *memory, size_t pieces);

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
