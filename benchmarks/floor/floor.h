/* SPDX-License-Identifier: MIT */
/* floor.h - the loop that every floor runs: one round a line on stdin, "<nanoseconds> <work done>" in answer.
 */
#ifndef PM_FLOOR_H
#define PM_FLOOR_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, HUGE_PAGE = 2 << 20 };

static inline uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline long must(long ret, const char *what)
{
    if (ret >= 0)
        return ret;
    perror(what);
    exit(1);
}

/* Private anonymous memory in 4 KiB pages, on a 2 MiB boundary, as the Python side has it. */
static inline char *map_small(size_t size)
{
    char *at = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    must(at == MAP_FAILED ? -1 : 0, "mmap");
    at += -(uintptr_t)at % HUGE_PAGE;
    must(madvise(at, size, MADV_NOHUGEPAGE), "madvise");
    return at;
}

/* The same, in huge pages or not. */
static inline char *map_pages(size_t size, int huge)
{
    char *at = map_small(size);

    must(madvise(at, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE), "madvise");
    return at;
}

/* round() gives the nanoseconds of the work and stores how much of it was done. */
static inline int serve(uint64_t (*round)(uint64_t *done))
{
    char line[16];

    while (fgets(line, sizeof(line), stdin)) {
        uint64_t done = 0, ns = round(&done);

        printf("%ju %ju\n", (uintmax_t)ns, (uintmax_t)done);
        fflush(stdout);
    }
    return 0;
}

#endif
