/* SPDX-License-Identifier: MIT */
/* fault_back_inline.c - the floor of inline delivery: touches of PAGES pages that were moved away, a handler
 * of SIGBUS moves the page back. The nanoseconds are a touch's, at PERCENT. */
#include <signal.h>
#include <string.h>

#include "loops.h"
#include "uffd.h"

static size_t pages;
static unsigned percent;
static char *memory, *arena;
static uint64_t *ns;
static int fd, arena_fd;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
    char *at = (char *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1));

    uffd_move(fd, at, arena + (at - memory), PAGE);
    (void)sig;
    (void)context;
}

static uint64_t round_of(uint64_t *done)
{
    uffd_move(arena_fd, arena, memory, pages * PAGE);
    *done = touch_each(memory, pages, ns);
    return percentile(ns, pages, percent);
}

int main(int argc, char **argv)
{
    struct sigaction act = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};

    pages = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;
    percent = argc > 2 ? (unsigned)strtoul(argv[2], NULL, 0) : 0;
    memory = map_small(pages * PAGE);
    arena = map_small(pages * PAGE);
    ns = calloc(pages, sizeof(*ns));
    memset(memory, 1, pages * PAGE);
    must(sigaction(SIGBUS, &act, NULL), "sigaction");
    fd = uffd_open(PM_ABI_UFFD_FEATURE_MOVE | PM_ABI_UFFD_FEATURE_SIGBUS);
    arena_fd = uffd_open(PM_ABI_UFFD_FEATURE_MOVE);
    uffd_register(fd, memory, pages * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    uffd_register(arena_fd, arena, pages * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    return serve(round_of);
}
