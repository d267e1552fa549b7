/* SPDX-License-Identifier: MIT */
/* migrate.c - the floor of migration: UFFDIO_MOVE of BYTES of 4 KiB pages after one pread of their pagemap,
 * or (HUGE 1) of 2 MiB pages after UFFDIO_REGISTER. WAYS: 1 is the way out, 2 the way home, 3 both. */
#include <stdbool.h>
#include <string.h>

#include "uffd.h"

static size_t size;
static bool huge;
static unsigned long ways;
static char *memory, *arena;
static uint64_t *entries;
static int fd, arena_fd, pagemap;

static uint64_t way(int to_fd, char *to, char *from, bool again)
{
    size_t bytes = size / PAGE * sizeof(*entries);
    uint64_t start;

    if (again)
        uffd_unregister(to_fd == fd ? arena_fd : fd, from, size);
    start = now();
    if (again)
        uffd_register(to_fd == fd ? arena_fd : fd, from, size, UFFDIO_REGISTER_MODE_MISSING);
    if (!huge)
        must(pread(pagemap, entries, bytes, (off_t)((uintptr_t)from / PAGE * sizeof(*entries))), "pread");
    uffd_move(to_fd, to, from, size);
    return now() - start;
}

static uint64_t round_of(uint64_t *done)
{
    uint64_t out = way(arena_fd, arena, memory, huge), home = way(fd, memory, arena, huge);

    /* One byte of each page, of what size it is: more would drive our side's interpreter out of the caches.
     */
    for (size_t at = 0; at < size; at += huge ? HUGE_PAGE : PAGE)
        *done += memory[at] == 1;
    return (ways & 1 ? out : 0) + (ways & 2 ? home : 0);
}

int main(int argc, char **argv)
{
    size = argc > 3 ? strtoul(argv[1], NULL, 0) : 0;
    huge = argc > 3 && strtoul(argv[2], NULL, 0);
    ways = argc > 3 ? strtoul(argv[3], NULL, 0) : 0;
    memory = map_pages(size, huge);
    arena = map_pages(size, huge);
    entries = calloc(size / PAGE, sizeof(*entries));
    memset(memory, 1, size);
    pagemap = (int)must(open("/proc/self/pagemap", O_RDONLY), "pagemap");
    fd = uffd_open(PM_ABI_UFFD_FEATURE_MOVE);
    arena_fd = uffd_open(PM_ABI_UFFD_FEATURE_MOVE);
    uffd_register(fd, memory, size, UFFDIO_REGISTER_MODE_MISSING);
    uffd_register(arena_fd, arena, size, UFFDIO_REGISTER_MODE_MISSING);
    return serve(round_of);
}
