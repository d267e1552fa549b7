/* SPDX-License-Identifier: MIT */
/* munmap.c - the floor of a notified munmap: munmap of BYTES that were touched, TIMES over; only the munmap
 * is timed. */
#include <string.h>

#include "floor.h"

static size_t size;
static unsigned long times;

static uint64_t round_of(uint64_t *done)
{
    uint64_t ns = 0;

    for (unsigned long i = 0; i < times; i++) {
        char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint64_t start;

        must(memory == MAP_FAILED ? -1 : 0, "mmap");
        memset(memory, 1, size);
        start = now();
        must(munmap(memory, size), "munmap");
        ns += now() - start;
        *done += 1;
    }
    return ns;
}

int main(int argc, char **argv)
{
    size = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;
    times = argc > 2 ? strtoul(argv[2], NULL, 0) : 0;
    return serve(round_of);
}
