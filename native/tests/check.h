/* SPDX-License-Identifier: MIT */
/*
 * check.h - the smallest test framework that does the job.
 *
 * A program is a table of functions handed to run_tests(), with what to call before and after each. CHECK
 * notes a failure and goes on, NEED ends the test function, LEAVE_OUT ends it with a reason why this machine
 * cannot run it (a failure if PYMIRROR_REQUIRE_ALL=1). Each test has a minute; after it the program dies with
 * its name on stderr.
 */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TEST_SECONDS = 60 };

struct test {
    const char *name;
    void (*fn)(void);
};

static const char *check_name;
static int check_failures;
static const char *check_left_out;

static inline bool check_note(bool ok, const char *file, int line, const char *what)
{
    if (!ok && ++check_failures <= 10)
        fprintf(stderr, "\n%s:%d: %s: %s\n", file, line, check_name, what);
    return ok;
}

static inline bool check_equal(int64_t got, int64_t want, const char *file, int line, const char *what)
{
    char text[512];

    snprintf(text, sizeof(text), "%s: %" PRId64 " (0x%" PRIx64 "), want %" PRId64 " (0x%" PRIx64 ")", what,
             got, (uint64_t)got, want, (uint64_t)want);
    return check_note(got == want, file, line, text);
}

#define CHECK(cond) check_note((cond), __FILE__, __LINE__, #cond)
#define CHECK_EQ(got, want) check_equal((int64_t)(got), (int64_t)(want), __FILE__, __LINE__, #got)
#define NEED(cond)                                                                                           \
    do {                                                                                                     \
        if (!CHECK(cond))                                                                                    \
            return;                                                                                          \
    } while (0)
#define NEED_EQ(got, want)                                                                                   \
    do {                                                                                                     \
        if (!CHECK_EQ(got, want))                                                                            \
            return;                                                                                          \
    } while (0)
#define LEAVE_OUT(reason)                                                                                    \
    do {                                                                                                     \
        check_left_out = (reason);                                                                           \
        return;                                                                                              \
    } while (0)
#define TEST(fn) {#fn, fn}
#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

static void check_timeout(int sig)
{
    (void)sig;
    dprintf(2, "\n%s: no end after %d s\n", check_name, TEST_SECONDS);
    _exit(3);
}

static inline int run_tests_with(void (*before)(void), void (*after)(void), const struct test *tests,
                                 size_t n, int argc, char **argv)
{
    const char *strict = getenv("PYMIRROR_REQUIRE_ALL");
    int passed = 0, failed = 0, left_out = 0;

    signal(SIGALRM, check_timeout);
    for (size_t i = 0; i < n; i++) {
        if (argc > 1 && !strstr(tests[i].name, argv[1]))
            continue;
        check_name = tests[i].name;
        check_failures = 0;
        check_left_out = NULL;
        alarm(TEST_SECONDS);
        before();
        tests[i].fn();
        after();
        alarm(0);
        if (check_left_out && strict && strcmp(strict, "1") == 0)
            check_note(false, __FILE__, __LINE__, check_left_out);
        if (check_failures) {
            failed++;
        } else if (check_left_out) {
            left_out++;
            fprintf(stderr, "\n%s left out: %s\n", check_name, check_left_out);
        } else {
            passed++;
        }
    }
    printf("%d passed, %d failed", passed, failed);
    printf(left_out ? ", %d left out\n" : "\n", left_out);
    fflush(stdout);
    return failed ? 1 : 0;
}

static inline void check_nothing(void)
{
}

static inline int run_tests(const struct test *tests, size_t n, int argc, char **argv)
{
    return run_tests_with(check_nothing, check_nothing, tests, n, argc, argv);
}

#endif
