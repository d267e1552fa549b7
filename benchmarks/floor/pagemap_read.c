/* SPDX-License-Identifier: MIT */
/* pagemap_read.c - the floor of a warm fault: one pread of the pagemap of process PID over BYTES of memory at
 * ADDR: of the very pages that our side has faulted, since what a read costs depends on where they lie. */
#include <fcntl.h>
#include <unistd.h>

#include "floor.h"

static uint64_t memory, size, *entries;
static int pagemap;

static uint64_t round_of(uint64_t *done)
{
    size_t len = size / PAGE * sizeof(*entries);
    off_t at = (off_t)(memory / PAGE * sizeof(*entries));
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
    char path[64];

    if (argc < 4)
        return 1;
    snprintf(path, sizeof(path), "/proc/%s/pagemap", argv[1]);
    memory = strtoull(argv[2], NULL, 0);
    size = strtoull(argv[3], NULL, 0);
    entries = calloc(size / PAGE, sizeof(*entries));
    pagemap = (int)must(open(path, O_RDONLY), path);
    return entries ? serve(round_of) : 1;
}
