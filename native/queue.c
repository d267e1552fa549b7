/* SPDX-License-Identifier: MIT */
/*
 * queue.c - the bounded queue of kernel events for the dispatcher.
 *
 * By the time that an event is queued, sequence numbers have moved and device entries are fenced: the queue
 * only carries the news to callbacks. When it is full the queued events become one that says "everything is
 * invalid", and everything is made invalid, so that no invalidation is ever lost. The monitor pushes and must
 * not allocate.
 *
 * Events come in storms. A dispatcher that woke for each would be what their threads wait for: it takes a
 * processor, beside which the monitor wakes on another one, and each page that moves interrupts that. So
 *   - of CPU faults on device memory the first is told at once, and what comes in the 4 ms after it
 *     together, with neighbours as one event;
 *   - what the monitor reads is told when it has had nothing to read for a moment, or after 10 ms.
 * What was told of once is taken, whatever comes then.
 */
#include <errno.h>

#include "internal.h"

static const uint64_t faults_apart_ns = 4 * 1000 * 1000;

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
    pm_status_queue(mm);
}

static void overflow(struct pm_mm *mm, const struct pm_event *event)
{
    struct pm_inv everything = {0};
    uint64_t oldest = oldest_event(mm);
    uint64_t first = mm->queue_count ? mm->queue[mm->queue_head].first_seq : event->seq;

    mm->overflow = (struct pm_event){
        .first_seq = mm->overflowed ? mm->overflow.first_seq : first,
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
    mm->ready = 0;
}

static bool is_fault(const struct pm_event *event)
{
    return event->flags & PM_EV_FAULT;
}

/* Make it one with the last in the queue, if that is its neighbour and nothing happened in between. */
static bool append(struct pm_mm *mm, const struct pm_event *event)
{
    struct pm_event *last;

    if (mm->queue_count == 0)
        return false;
    last = &mm->queue[(mm->queue_head + mm->queue_count - 1) % mm->queue_len];
    if (!is_fault(event) || !is_fault(last) || event->seq != last->seq + 2)
        return false;
    if (event->type != last->type || event->owner != last->owner)
        return false;
    if (event->start > last->end || last->start > event->end)
        return false;
    last->start = pm_min(last->start, event->start);
    last->end = pm_max(last->end, event->end);
    last->seq = event->seq;
    return true;
}

static bool enqueue(struct pm_mm *mm, const struct pm_event *event)
{
    struct pm_event *slot = &mm->queue[(mm->queue_head + mm->queue_count) % mm->queue_len];

    if (mm->queue_count == mm->queue_len)
        return false;
    *slot = *event;
    slot->first_seq = event->seq;
    mm->queue_count++;
    mm->queued_total++;
    return true;
}

/* Until when the dispatcher need not look. */
static uint64_t rest_until(const struct pm_mm *mm)
{
    if (mm->overflowed || mm->ready || mm->queue_count > mm->queue_len / 2)
        return 0;
    if (mm->syncing || pm_mm_check(mm))
        return 0;
    return mm->held_ns ? mm->held_ns + PM_HELD_MAX_NS : mm->fault_event_ns + faults_apart_ns;
}

static void add(struct pm_mm *mm, const struct pm_event *event)
{
    if (mm->overflowed || (!append(mm, event) && !enqueue(mm, event)))
        overflow(mm, event);
    publish(mm);
}

static void wake(struct pm_mm *mm, uint64_t now)
{
    if (rest_until(mm) <= now)
        pthread_cond_broadcast(&mm->queued);
}

void pm_queue_push(struct pm_mm *mm, const struct pm_event *event)
{
    add(mm, event);
    if (!is_fault(event))
        mm->ready = mm->queue_count;
    wake(mm, event->when_ns);
}

void pm_queue_hold(struct pm_mm *mm, const struct pm_event *event)
{
    if (!mm->held_ns)
        mm->held_ns = event->when_ns;
    add(mm, event);
    wake(mm, event->when_ns);
}

void pm_queue_tell(struct pm_mm *mm)
{
    mm->held_ns = 0;
    mm->ready = mm->queue_count;
    if (mm->ready)
        pthread_cond_broadcast(&mm->queued);
}

/* The dispatcher rests, if its time-out allows. */
static bool resting(const struct pm_mm *mm, uint64_t until)
{
    uint64_t rest = rest_until(mm);

    return rest <= until && rest > pm_now_ns();
}

static bool queue_pop(struct pm_mm *mm, uint64_t until, struct pm_event *ret)
{
    if (resting(mm, until))
        return false;
    if (mm->overflowed) {
        *ret = mm->overflow;
        mm->overflowed = false;
    } else if (mm->queue_count) {
        *ret = mm->queue[mm->queue_head];
        mm->queue_head = (mm->queue_head + 1) % mm->queue_len;
        mm->queue_count--;
        if (mm->ready)
            mm->ready--;
    } else {
        return false;
    }
    mm->current = *ret;
    mm->delivering = true;
    mm->delivering_ns = pm_now_ns();
    if (is_fault(ret))
        mm->fault_event_ns = mm->delivering_ns;
    publish(mm);
    return true;
}

/* Until something is pushed that will not wait, or the rest is over. */
static int wait_queued(struct pm_mm *mm, uint64_t until)
{
    bool rest = resting(mm, until);
    int err = pm_wait(mm, &mm->queued, rest ? rest_until(mm) : until);

    return rest ? 0 : err;
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
    while (!queue_pop(mm, until, ret)) {
        err = pm_mm_check(mm);
        if (!err)
            err = wait_queued(mm, until);
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
    mm->syncing++;
    pthread_cond_broadcast(&mm->queued);
    if (rest_until(mm) == 0 && mm->queue_count)
        pthread_cond_broadcast(&mm->queued);
    /* An overflow after the ticket was drawn makes the total smaller, never the rest longer. */
    while (mm->done_total < pm_min(*ticket - 1, mm->queued_total)) {
        err = pm_mm_check(mm);
        if (!err && pm_wait(mm, &mm->done, slice) == -ETIMEDOUT)
            err = slice == until ? -ETIMEDOUT : -EINTR;
        if (err)
            break;
    }
    mm->syncing--;
    pm_unlock(mm);
    return err;
}
