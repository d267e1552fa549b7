/* SPDX-License-Identifier: MIT */
/* event_reader.c - the floor of removing watched memory: MADV_DONTNEED and munmap of 64 pages, PIECES times,
 * a thread polls the userfaultfd and reads the events. */
#include <poll.h>
#include <pthread.h>

#include "loops.h"
#include "uffd.h"

static size_t pieces;
static int fd;

static void *read_events(void *unused)
{
    struct pollfd pollfd = {.fd = fd, .events = POLLIN};
    struct uffd_msg msg[32];

    for (;;) {
        must(poll(&pollfd, 1, -1), "poll");
        must(read(fd, msg, sizeof(msg)), "read");
    }
    return unused;
}

static uint64_t round_of(uint64_t *done)
{
    size_t size = pieces * 64 * PAGE;
    char *memory = map_small(size);

    memset(memory, 1, size);
    uffd_register(fd, memory, size, UFFDIO_REGISTER_MODE_WP);
    *done = pieces;
    return remove_each(memory, pieces);
}

int main(int argc, char **argv)
{
    pthread_t thread;

    pieces = argc > 1 ? strtoul(argv[1], NULL, 0) : 0;
    fd = uffd_open(PM_ABI_UFFD_FEATURE_PAGEFAULT_FLAG_WP | PM_ABI_UFFD_FEATURE_EVENT_REMOVE |
                   PM_ABI_UFFD_FEATURE_EVENT_UNMAP | PM_ABI_UFFD_FEATURE_WP_ASYNC);
    pthread_create(&thread, NULL, read_events, NULL);
    return serve(round_of);
}
