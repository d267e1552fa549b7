/* SPDX-License-Identifier: MIT */
/* pagemap_read.c - the floor of a warm fault: one pread of the pagemap over BYTES of present memory, of 4 KiB
 * pages (KIND 0, the default), huge pages (1) or hugetlb (2). */
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "floor.h"

static size_t size;
static char *memory;
static uint64_t *entries;
static int pagemap;

static uint64_t round_of(uint64_t *done)
{
    size_t len = size / PAGE * sizeof(*entries);
    off_t at = (uintptr_t)memory / PAGE * sizeof(*entries);
    uint64_t start = now(), ns;

    if (pread(pagemap, entries, len, at) != (ssize_t)len)
        must(-1, "pread");
    ns = now() - start;
    for (size_t i = 0; i < size / PAGE; i++)
        *done += entries[i] >> 63;
    return ns;
}

int main(int argc, char **argv)
{
    size = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
    memory = map_pages(size, argc > 2 ? strtoul(argv[2], NULL, 0) : SMALL);
    memset(memory, 1, size);
    entries = calloc(size / PAGE, sizeof(*entries));
    pagemap = (int)must(open("/proc/self/pagemap", O_RDONLY), "pagemap");
    return entries ? serve(round_of) : 1;
}
