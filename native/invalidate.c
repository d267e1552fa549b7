/* SPDX-License-Identifier: MIT */
/*
 * invalidate.c - sequence numbers: what begins and ends an invalidation, and how a driver learns of it.
 *
 * The rules are those of mmu_interval_notifier, with one difference: the kernel's read_begin waits for
 * every invalidation that runs, since its notifiers only remember a number; here the running ones are a list,
 * so it waits for those that overlap, and each gets an odd number of its own. Nothing here allocates under
 * the lock.
 */
#include <errno.h>
#include <stdlib.h>

#include "alone.h"
#include "domain.h"

enum { WAIT_SLICE_NS = 50 * 1000 * 1000 };
static const uint64_t drain_limit_ns = 1000ULL * 1000 * 1000;

/* What only who holds the device lock changes, and others read: no bus lock is needed for it. */
static void publish(atomic_uint_least64_t *at, uint64_t value)
{
    atomic_store_explicit(at, value, memory_order_release);
}

static bool stamp_sub(struct pm_inode *node, void *arg)
{
    struct pm_sub *sub = (struct pm_sub *)node;

    publish(&sub->seq, *(uint64_t *)arg);
    return true;
}

static bool is_whole(uint64_t start, uint64_t last)
{
    return start == 0 && last == UINT64_MAX;
}

uint64_t pm_inv_open(struct pm_mm *mm, struct pm_inv *inv, uint64_t start, uint64_t last, int event,
                     int guarantee)
{
    uint64_t seq = atomic_load(&mm->seq);

    seq += (seq & 1) ? 2 : 1;
    inv->mm = mm;
    inv->start = start;
    inv->last = last;
    inv->event = event;
    inv->guarantee = guarantee;
    inv->seq = seq;
    inv->since_ns = pm_status_since(mm);
    inv->tid = pm_status_tid(mm);
    inv->next = mm->invs;
    mm->invs = inv;
    /* Before the stamps: a reader that meets the new stamp must also see that an invalidation runs. */
    publish(&mm->active, atomic_load(&mm->active) + 1);
    publish(&mm->seq, seq);
    if (is_whole(start, last))
        publish(&mm->all_seq, seq);
    else
        pm_itree_visit(mm->subs, start, last, stamp_sub, &seq);
    pm_alone_forget(mm, start, last);
    pm_tables_fence(mm, start, last, seq);
    pm_dmaps_fence(mm, start, last, seq);
    for (struct pm_inflight *access = mm->inflight; access; access = access->next) {
        if (pm_overlap(start, last, access->start, access->last))
            access->voided = true;
    }
    return seq;
}

void pm_inv_close(struct pm_mm *mm, struct pm_inv *inv)
{
    struct pm_inv **link = &mm->invs;

    while (*link != inv)
        link = &(*link)->next;
    *link = inv->next;
    if (!mm->invs)
        publish(&mm->seq, atomic_load(&mm->seq) + 1);
    publish(&mm->active, atomic_load(&mm->active) - 1);
    pthread_cond_broadcast(&mm->idle);
}

/* One system call's REMOVEs do not overlap: of two that do, one is another thread's. */
static bool removes(struct pm_inv *inv, uint64_t start, uint64_t last)
{
    if (inv->event != PM_CLEAR && inv->event != PM_MIGRATE && inv->event != PM_EXCLUSIVE)
        return false;
    if (start < inv->removed)
        return false;
    inv->removed = last + 1;
    return true;
}

bool pm_inv_claims(struct pm_mm *mm, uint64_t start, uint64_t last, int event)
{
    for (struct pm_inv *inv = mm->invs; inv; inv = inv->next) {
        if (inv->linger || start < inv->start || inv->last < last)
            continue;
        if (event == PM_CLEAR ? removes(inv, start, last) : inv->event == event)
            return true;
    }
    return false;
}

/* Not of this thread, which would wait for itself: the handler of a signal may have come in the middle of it.
 */
static bool write_in_flight(const struct pm_mm *mm, uint64_t start, uint64_t last)
{
    uint32_t self = pm_status_tid(mm);

    for (const struct pm_inflight *access = mm->inflight; access; access = access->next) {
        if (self && access->tid == self)
            continue;
        if (access->write && pm_overlap(start, last, access->start, access->last))
            return true;
    }
    return false;
}

void pm_drain_writes(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t until_ns)
{
    if (!write_in_flight(mm, start, last))
        return;
    mm->draining++;
    pm_status_update(mm);
    while (write_in_flight(mm, start, last)) {
        if (pm_wait(mm, &mm->drained, until_ns) != -ETIMEDOUT)
            continue;
        mm->stats.drain_timeouts++;
        break;
    }
    mm->draining--;
    pthread_cond_broadcast(&mm->idle);
}

int pm_invalidate_start(pm_mm *mm, uint64_t start, uint64_t end, int event, int guarantee, pm_inv **ret,
                        uint64_t *seq)
{
    struct pm_inv *inv;
    int err = pm_mm_check(mm);

    if (err)
        return err;
    if (pm_last(end) < start || event < PM_UNMAP || event > PM_EXCLUSIVE || guarantee < PM_BEFORE ||
        guarantee > PM_DETECTED)
        return -EINVAL;
    inv = pm_sys_calloc(1, sizeof(*inv));
    if (!inv)
        return -ENOMEM;
    inv->undelivered = true;
    pm_point(PM_POINT_INVALIDATE_START);
    pm_mm_get(mm);
    pm_lock(mm);
    *seq = pm_inv_open(mm, inv, start, pm_last(end), event, guarantee);
    if (guarantee == PM_DETECTED)
        mm->stats.detected++;
    pm_drain_writes(mm, start, pm_last(end), pm_now_ns() + drain_limit_ns);
    pm_status_update(mm);
    pm_unlock(mm);
    pm_point(PM_POINT_INVALIDATE_FENCED);
    *ret = inv;
    return 0;
}

int pm_invalidate_delivered(pm_inv *inv)
{
    struct pm_mm *mm = inv->mm;

    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    inv->undelivered = false;
    pm_status_update(mm);
    pm_unlock(mm);
    return 0;
}

int pm_invalidate_end(pm_inv *inv)
{
    struct pm_mm *mm = inv->mm;

    /* In a forked child the lock may be held by a thread that is not there: leave it all as it is. */
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_point(PM_POINT_INVALIDATE_END);
    pm_lock(mm);
    /* A callback refused, or was interrupted: what was left fenced is nobody's mistake. */
    if (inv->undelivered) {
        pm_tables_drop(mm, inv->start, inv->last, inv->seq);
        pm_dmaps_drop(mm, inv->start, inv->last, inv->seq);
    }
    pm_inv_close(mm, inv);
    pm_status_update(mm);
    pm_unlock(mm);
    free(inv);
    pm_mm_put(mm);
    return 0;
}

static bool event_is_of(const struct pm_event *event, uint64_t seq)
{
    return event->first_seq <= seq && seq <= event->seq;
}

bool pm_seq_undelivered(const struct pm_mm *mm, uint64_t seq)
{
    for (const struct pm_inv *inv = mm->invs; inv; inv = inv->next) {
        if (inv->undelivered && inv->seq == seq)
            return true;
    }
    if (mm->delivering && event_is_of(&mm->current, seq))
        return true;
    if (mm->overflowed && event_is_of(&mm->overflow, seq))
        return true;
    for (uint32_t i = 0; i < mm->queue_count; i++) {
        if (event_is_of(&mm->queue[(mm->queue_head + i) % mm->queue_len], seq))
            return true;
    }
    return false;
}

int pm_sub_insert(pm_mm *mm, uint64_t start, uint64_t last, uint64_t cookie, uint32_t kind, pm_sub **ret)
{
    struct pm_sub *sub;
    int err = pm_mm_check(mm);

    if (err)
        return err;
    if (last < start || kind == 0)
        return -EINVAL;
    sub = pm_sys_calloc(1, sizeof(*sub));
    if (!sub)
        return -ENOMEM;
    sub->node.start = start;
    sub->node.last = last;
    sub->mm = mm;
    sub->cookie = cookie;
    sub->kind = kind;
    atomic_init(&sub->refs, 1);
    pm_mm_get(mm);
    pm_lock(mm);
    err = pm_mm_check(mm);
    if (err) {
        pm_unlock(mm);
        free(sub);
        pm_mm_put(mm);
        return err;
    }
    /* Odd, and unlike any seq an invalidation will set from now on. */
    atomic_init(&sub->seq, (atomic_load(&mm->seq) - 1) | 1);
    pm_itree_insert(&mm->subs, &sub->node);
    sub->inserted = true;
    mm->nsubs++;
    pm_unlock(mm);
    *ret = sub;
    return 0;
}

int pm_sub_remove(pm_sub *sub)
{
    struct pm_mm *mm = sub->mm;

    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    if (sub->inserted) {
        pm_itree_remove(&mm->subs, &sub->node);
        sub->inserted = false;
        mm->nsubs--;
        atomic_store(&sub->removed, true);
        pthread_cond_broadcast(&mm->idle);
    }
    pm_unlock(mm);
    return 0;
}

void pm_sub_put(pm_sub *sub)
{
    struct pm_mm *mm = sub->mm;

    if (!pm_mm_owned(mm) || atomic_fetch_sub(&sub->refs, 1) != 1)
        return;
    pm_sub_remove(sub);
    free(sub);
    pm_mm_put(mm);
}

static uint64_t sub_seq(const struct pm_sub *sub)
{
    return pm_max(atomic_load(&sub->seq), atomic_load(&sub->mm->all_seq));
}

uint64_t pm_sub_seq(const pm_sub *sub)
{
    return sub_seq(sub);
}

static bool sub_invalidating(const struct pm_sub *sub)
{
    for (const struct pm_inv *inv = sub->mm->invs; inv; inv = inv->next) {
        if (pm_overlap(inv->start, inv->last, sub->node.start, sub->node.last))
            return true;
    }
    return false;
}

/* With the device lock held: may nothing be programmed under seq? */
bool pm_sub_stale(const struct pm_sub *sub, uint64_t seq)
{
    return atomic_load(&sub->removed) || sub_seq(sub) != seq || sub_invalidating(sub);
}

static int sub_dead(const struct pm_sub *sub)
{
    if (atomic_load(&sub->removed))
        return -ESRCH;
    return pm_mm_check(sub->mm);
}

int pm_sub_read_begin(pm_sub *sub, uint64_t timeout_ns, uint64_t *seq)
{
    struct pm_mm *mm = sub->mm;
    uint64_t now, until, slice;
    int err = sub_dead(sub);

    if (err)
        return err;
    /* The order matters: were an invalidation to begin before the load, `active` would show it. */
    *seq = sub_seq(sub);
    if (atomic_load(&mm->active) == 0)
        return 0;
    now = pm_now_ns();
    until = timeout_ns > UINT64_MAX - now ? UINT64_MAX : now + timeout_ns;
    slice = pm_min(until, now + WAIT_SLICE_NS);
    pm_lock(mm);
    while (!(err = sub_dead(sub)) && sub_invalidating(sub)) {
        if (pm_wait(mm, &mm->idle, slice) == -ETIMEDOUT) {
            err = slice == until ? -ETIMEDOUT : -EINTR;
            break;
        }
    }
    *seq = sub_seq(sub);
    pm_unlock(mm);
    return err;
}

int pm_sub_read_retry(const pm_sub *sub, uint64_t seq)
{
    struct pm_mm *mm = sub->mm;

    if (sub_dead(sub))
        return 1;
    if (atomic_load(&mm->reading)) {
        /* A munmap that has returned to its caller must show: let the monitor finish. */
        pm_lock(mm);
        pm_unlock(mm);
    }
    return sub_seq(sub) != seq;
}

struct collect {
    uint64_t *cookies;
    uint64_t cap;
    int64_t n;
    uint32_t kinds;
};

static bool collect_sub(struct pm_inode *node, void *arg)
{
    struct pm_sub *sub = (struct pm_sub *)node;
    struct collect *into = arg;

    if (!(sub->kind & into->kinds))
        return true;
    if ((uint64_t)into->n < into->cap)
        into->cookies[into->n] = sub->cookie;
    into->n++;
    return true;
}

int64_t pm_overlapping(pm_mm *mm, uint64_t start, uint64_t end, uint32_t kinds, uint64_t *cookies,
                       uint64_t cap)
{
    struct collect into = {cookies, cap, 0, kinds};

    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    pm_itree_visit(mm->subs, start, pm_last(end), collect_sub, &into);
    pm_unlock(mm);
    return into.n;
}
