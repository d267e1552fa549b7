/* SPDX-License-Identifier: MIT */
/*
 * queue.c - the bounded queue of kernel events for the dispatcher.
 *
 * By the time that an event is queued, sequence numbers have moved and device entries are fenced: the queue
 * only carries the news to callbacks. When it is full the queued events become one that says "everything is
 * invalid", and everything is made invalid, so that no invalidation is ever lost. The monitor pushes and must
 * not allocate.
 */
#include <errno.h>

#include "internal.h"

static uint64_t oldest_event(const struct pm_mm *mm)
{
    if (mm->delivering)
        return mm->current.when_ns;
    if (mm->overflowed)
        return mm->overflow.when_ns;
    return mm->queue_count ? mm->queue[mm->queue_head].when_ns : 0;
}

static void publish(struct pm_mm *mm)
{
    mm->stats.queue_depth = mm->queue_count + (mm->overflowed ? 1 : 0);
    mm->stats.oldest_event_ns = oldest_event(mm);
    pm_status_update(mm);
}

static void overflow(struct pm_mm *mm, const struct pm_event *event)
{
    struct pm_inv everything = {0};
    uint64_t oldest = oldest_event(mm);

    mm->overflow = (struct pm_event){
        .seq = pm_inv_open(mm, &everything, 0, UINT64_MAX, PM_UNMAP, PM_AFTER),
        .when_ns = mm->delivering || !oldest ? event->when_ns : oldest,
        .type = PM_UNMAP,
        .guarantee = PM_AFTER,
        .flags = PM_EV_OVERFLOW,
    };
    pm_inv_close(mm, &everything);
    if (!mm->overflowed) {
        /* The events that it stands for count as one from here on. */
        mm->queued_total = mm->queued_total - mm->queue_count + 1;
        mm->stats.queue_overflows++;
    }
    mm->overflowed = true;
    mm->queue_count = 0;
}

void pm_queue_push(struct pm_mm *mm, const struct pm_event *event)
{
    if (mm->overflowed || mm->queue_count == mm->queue_len) {
        overflow(mm, event);
    } else {
        mm->queue[(mm->queue_head + mm->queue_count) % mm->queue_len] = *event;
        mm->queue_count++;
        mm->queued_total++;
    }
    publish(mm);
    pthread_cond_broadcast(&mm->queued);
}

static bool queue_pop(struct pm_mm *mm, struct pm_event *ret)
{
    if (mm->overflowed) {
        *ret = mm->overflow;
        mm->overflowed = false;
    } else if (mm->queue_count) {
        *ret = mm->queue[mm->queue_head];
        mm->queue_head = (mm->queue_head + 1) % mm->queue_len;
        mm->queue_count--;
    } else {
        return false;
    }
    mm->current = *ret;
    mm->delivering = true;
    mm->delivering_ns = pm_now_ns();
    publish(mm);
    return true;
}

int pm_event_wait(pm_mm *mm, uint64_t timeout_ns, struct pm_event *ret)
{
    uint64_t now = pm_now_ns();
    uint64_t until = timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
    int err = 0;

    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    pm_status_dispatch(mm, PM_DISPATCH_WAITING);
    while (!queue_pop(mm, ret)) {
        err = pm_mm_check(mm);
        if (!err)
            err = pm_wait(mm, &mm->queued, until);
        if (err)
            break;
    }
    pm_status_dispatch(mm, PM_DISPATCH_AWAY);
    pm_unlock(mm);
    return err;
}

int pm_event_done(pm_mm *mm)
{
    int err = 0;

    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    if (mm->delivering) {
        mm->delivering = false;
        mm->done_total++;
        publish(mm);
        pthread_cond_broadcast(&mm->done);
    } else {
        err = -EINVAL;
    }
    pm_unlock(mm);
    return err;
}

int pm_event_sync(pm_mm *mm, uint64_t timeout_ns, uint64_t *ticket)
{
    uint64_t now = pm_now_ns();
    uint64_t until = timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
    uint64_t slice = pm_min(until, now + 50ULL * 1000 * 1000);
    int err = 0;

    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    if (*ticket == 0)
        *ticket = mm->queued_total + 1; /* so that 0 stays "none yet" */
    /* An overflow after the ticket was drawn makes the total smaller, never the rest longer. */
    while (mm->done_total < pm_min(*ticket - 1, mm->queued_total)) {
        err = pm_mm_check(mm);
        if (!err && pm_wait(mm, &mm->done, slice) == -ETIMEDOUT)
            err = slice == until ? -ETIMEDOUT : -EINTR;
        if (err)
            break;
    }
    pm_unlock(mm);
    return err;
}
