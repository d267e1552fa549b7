/* SPDX-License-Identifier: MIT */
/* query_read.c - the floor of faulting one present page: PROCMAP_QUERY and an 8 byte pread of the pagemap,
 * TIMES over. */
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "floor.h"
#include "kernel_abi.h"

static unsigned long times;
static char *memory;
static int pagemap, maps;

static uint64_t round_of(uint64_t *done)
{
    off_t at = (uintptr_t)memory / PAGE * sizeof(uint64_t);
    uint64_t start = now(), entry;

    for (unsigned long i = 0; i < times; i++) {
        struct pm_abi_procmap_query query = {.size = sizeof(query), .query_addr = (uintptr_t)memory};

        must(ioctl(maps, PM_ABI_PROCMAP_QUERY, &query), "PROCMAP_QUERY");
        if (pread(pagemap, &entry, sizeof(entry), at) != sizeof(entry))
            must(-1, "pread");
        *done += entry >> 63;
    }
    return now() - start;
}

int main(int argc, char **argv)
{
    times = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
    memory = map_small(PAGE);
    *memory = 1;
    maps = (int)must(open("/proc/self/maps", O_RDONLY), "maps");
    pagemap = (int)must(open("/proc/self/pagemap", O_RDONLY), "pagemap");
    return serve(round_of);
}
