/* SPDX-License-Identifier: MIT */
/*
 * lock.c - the device lock and waiting under it.
 */
#include <errno.h>
#include <signal.h>

#include "internal.h"

/*
 * The signal mask from before the device lock; the lock does not nest. Static TLS: the dynamic kind of a
 * loaded library is allocated at a thread's first access, and the monitor must not meet malloc's locks, which
 * fork() holds while it waits for it.
 */
static _Thread_local sigset_t mask_outside __attribute__((tls_model("initial-exec")));

/* Two system calls less for each hold of the lock. */
static _Thread_local bool all_blocked __attribute__((tls_model("initial-exec")));

void pm_all_blocked(void)
{
    all_blocked = true;
}

void pm_lock(struct pm_mm *mm)
{
    sigset_t all;

    if (!all_blocked) {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &mask_outside);
    }
    pthread_mutex_lock(&mm->lock);
    pm_status_lock(mm, true);
}

void pm_unlock_masked(struct pm_mm *mm, sigset_t *outside)
{
    *outside = mask_outside;
    pm_status_lock(mm, false);
    pthread_mutex_unlock(&mm->lock);
}

void pm_unlock(struct pm_mm *mm)
{
    pm_status_lock(mm, false);
    pthread_mutex_unlock(&mm->lock);
    if (!all_blocked)
        pthread_sigmask(SIG_SETMASK, &mask_outside, NULL);
}

int pm_wait(struct pm_mm *mm, pthread_cond_t *cond, uint64_t until_ns)
{
    struct timespec until = {
        .tv_sec = (time_t)pm_min(until_ns / 1000000000, INT32_MAX),
        .tv_nsec = (long)(until_ns % 1000000000),
    };
    int err;

    /* The kernel would put the thread to sleep for a time that is over, too: 0.1 ms. */
    if (pm_now_ns() >= until_ns)
        return -ETIMEDOUT;
    pm_status_lock(mm, false);
    err = pthread_cond_timedwait(cond, &mm->lock, &until);
    pm_status_lock(mm, true);
    return err == ETIMEDOUT ? -ETIMEDOUT : 0;
}

void pm_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attr;

    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(cond, &attr);
    pthread_condattr_destroy(&attr);
}
