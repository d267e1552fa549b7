/* SPDX-License-Identifier: MIT */
/* open_close.c - the floor of an address space: what one keeps open, opened and closed TIMES over. */
#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "floor.h"

static unsigned long times;

static void open_close(void)
{
    int fds[] = {
        (int)must(open("/proc/self/maps", O_RDONLY | O_CLOEXEC), "maps"),
        (int)must(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), "pagemap"),
        (int)must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"),
        (int)must(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), "eventfd"),
        (int)must(memfd_create("floor-status", MFD_CLOEXEC), "memfd_create"),
    };
    char *status;

    must(ftruncate(fds[4], PAGE), "ftruncate");
    status = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fds[4], 0);
    must(status == MAP_FAILED ? -1 : 0, "mmap");
    must(madvise(status, PAGE, MADV_DONTFORK), "madvise");
    *status = 1;
    munmap(status, PAGE);
    for (unsigned i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
        close(fds[i]);
}

static uint64_t round_of(uint64_t *done)
{
    uint64_t start = now();

    for (; *done < times; ++*done)
        open_close();
    return now() - start;
}

int main(int argc, char **argv)
{
    times = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
    return serve(round_of);
}
