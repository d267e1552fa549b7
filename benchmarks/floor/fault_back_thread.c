/* SPDX-License-Identifier: MIT */
/* fault_back_thread.c - the floor of thread delivery: touches of PAGES pages that were moved away, a thread
 * polls the userfaultfd, moves the page back and so wakes. The nanoseconds are a touch's, at PERCENT. */
#include <poll.h>
#include <pthread.h>
#include <string.h>

#include "loops.h"
#include "uffd.h"

static size_t pages;
static unsigned percent;
static char *memory, *arena;
static uint64_t *ns;
static int fd, arena_fd;

static void *serve_faults(void *unused)
{
    struct pollfd pollfd = {.fd = fd, .events = POLLIN};
    struct uffd_msg msg;

    for (;;) {
        char *at;

        must(poll(&pollfd, 1, -1), "poll");
        must(read(fd, &msg, sizeof(msg)), "read");
        at = (char *)(uintptr_t)(msg.arg.pagefault.address & ~(uint64_t)(PAGE - 1));
        uffd_move(fd, at, arena + (at - memory), PAGE);
    }
    return unused;
}

static uint64_t round_of(uint64_t *done)
{
    uffd_move(arena_fd, arena, memory, pages * PAGE);
    *done = touch_each(memory, pages, ns);
    return percentile(ns, pages, percent);
}

int main(int argc, char **argv)
{
    pthread_t thread;

    pages = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;
    percent = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 0;
    memory = map_small(pages * PAGE);
    arena = map_small(pages * PAGE);
    ns = calloc(pages, sizeof(*ns));
    memset(memory, 1, pages * PAGE);
    fd = uffd_open(PM_ABI_UFFD_FEATURE_MOVE);
    arena_fd = uffd_open(PM_ABI_UFFD_FEATURE_MOVE);
    uffd_register(fd, memory, pages * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    uffd_register(arena_fd, arena, pages * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    pthread_create(&thread, NULL, serve_faults, NULL);
    return serve(round_of);
}
