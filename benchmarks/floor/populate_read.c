/* SPDX-License-Identifier: MIT */
/* populate_read.c - the floor of a cold fault: MADV_POPULATE_WRITE of BYTES never touched, then pread of the
 * pagemap. */
#include <fcntl.h>
#include <unistd.h>

#include "floor.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static size_t size;
static uint64_t *entries;
static int pagemap;

static uint64_t round_of(uint64_t *done)
{
    size_t len = size / PAGE * sizeof(*entries);
    char *memory = map_small(size);
    off_t at = (uintptr_t)memory / PAGE * sizeof(*entries);
    uint64_t start = now(), ns;

    must(madvise(memory, size, MADV_POPULATE_WRITE), "populate");
    if (pread(pagemap, entries, len, at) != (ssize_t)len)
        must(-1, "pread");
    ns = now() - start;
    for (size_t i = 0; i < size / PAGE; i++)
        *done += entries[i] >> 63;
    munmap(memory, size);
    return ns;
}

int main(int argc, char **argv)
{
    size = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
    entries = calloc(size / PAGE, sizeof(*entries));
    pagemap = (int)must(open("/proc/self/pagemap", O_RDONLY), "pagemap");
    return entries ? serve(round_of) : 1;
}
