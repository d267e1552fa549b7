/* SPDX-License-Identifier: MIT */
/*
 * testing.c - named points at which tests stop a thread, so that a race is written down as an order of steps.
 * Injected errors are in sys.c, where the calls are.
 *
 * Futexes and atomics only: a thread may stop here with any lock of the shim held, also inside a fork.
 */
#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum { POINT_IDLE, POINT_ARMED, POINT_STANDING, POINT_STATES = 4 };

/* A test that died with a thread standing must not hang the process for ever. */
static const uint64_t stand_max_ns = 30000000000u;

atomic_int pm_points_armed;

/* State in the low bits; the rest counts changes, so that a sleeper tells its stop from the next one's. */
static atomic_uint points[PM_POINT_COUNT];

static unsigned state_of(unsigned word)
{
    return word % POINT_STATES;
}

static unsigned next_word(unsigned word, unsigned state)
{
    return word - state_of(word) + POINT_STATES + state;
}

static void wake(int point)
{
    syscall(SYS_futex, &points[point], FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* Sleep while the point's word is `word`, at most until `until_ns`; returns early for any reason. */
static void sleep_on(int point, unsigned word, uint64_t until_ns)
{
    uint64_t now = pm_now_ns();
    struct timespec left;

    if (now >= until_ns)
        return;
    left.tv_sec = (time_t)((until_ns - now) / 1000000000u);
    left.tv_nsec = (long)((until_ns - now) % 1000000000u);
    syscall(SYS_futex, &points[point], FUTEX_WAIT_PRIVATE, word, &left, NULL, 0);
}

/* Change the state from `word`; false if another thread was faster. */
static bool change(int point, unsigned word, unsigned state)
{
    bool was_idle = state_of(word) == POINT_IDLE;

    if (!atomic_compare_exchange_strong(&points[point], &word, next_word(word, state)))
        return false;
    if (was_idle && state != POINT_IDLE)
        atomic_fetch_add(&pm_points_armed, 1);
    if (!was_idle && state == POINT_IDLE)
        atomic_fetch_sub(&pm_points_armed, 1);
    wake(point);
    return true;
}

static bool bad(int point)
{
    return point < 0 || point >= PM_POINT_COUNT;
}

void pm_point_stop(int point)
{
    uint64_t until = pm_now_ns() + stand_max_ns;
    int saved = errno;
    unsigned word;

    if (bad(point))
        return;
    word = atomic_load(&points[point]);
    if (state_of(word) != POINT_ARMED || !change(point, word, POINT_STANDING))
        return;
    word = next_word(word, POINT_STANDING);
    while (atomic_load(&points[point]) == word && pm_now_ns() < until)
        sleep_on(point, word, until);
    change(point, word, POINT_IDLE);
    errno = saved;
}

int pm_point_arm(int point)
{
    unsigned word;

    if (bad(point))
        return -EINVAL;
    do {
        word = atomic_load(&points[point]);
        if (state_of(word) != POINT_IDLE)
            return -EBUSY;
    } while (!change(point, word, POINT_ARMED));
    return 0;
}

int pm_point_wait(int point, uint64_t timeout_ns)
{
    uint64_t now = pm_now_ns();
    uint64_t until = timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
    unsigned word;

    if (bad(point))
        return -EINVAL;
    for (;;) {
        word = atomic_load(&points[point]);
        if (state_of(word) == POINT_STANDING)
            return 0;
        if (pm_now_ns() >= until)
            return -ETIMEDOUT;
        sleep_on(point, word, until);
    }
}

int pm_point_release(int point)
{
    unsigned word;

    if (bad(point))
        return -EINVAL;
    do {
        word = atomic_load(&points[point]);
        if (state_of(word) == POINT_IDLE)
            return 0;
    } while (!change(point, word, POINT_IDLE));
    return 0;
}

void pm_points_reset(void)
{
    for (int i = 0; i < PM_POINT_COUNT; i++)
        pm_point_release(i);
}
