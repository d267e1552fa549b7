/* SPDX-License-Identifier: MIT */
/*
 * monitor.c - the thread that reads the watch descriptor and fences before it lets the world go on.
 *
 * The system call behind an event is released when its message is read. So the monitor takes the device lock
 * and waits for device writes in flight first, then reads, then fences, then unlocks: no device access slips
 * in between. It never allocates, prints, or takes a lock but the device lock, since the thread that it
 * serves may hold any other.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <time.h>

#include "devmem.h"
#include "monitor.h"

enum { LINGER_MIN_NS = 100 * 1000, LINGER_MAX_NS = 10 * 1000 * 1000 };
enum { STEP_NS = 1000 * 1000, QUIET_NS = 200 * 1000 };
static const uint64_t drain_limit_ns = 100ULL * 1000 * 1000, round_ns = 1000ULL * 1000 * 1000;

static void set_state(struct pm_mm *mm, uint32_t state)
{
    if (mm->status)
        mm->status->monitor_state = state;
}

static void push(struct pm_mm *mm, uint64_t start, uint64_t end, int type, int guarantee, uint64_t seq,
                 uint64_t moved_to)
{
    struct pm_event event = {
        .start = start,
        .end = end,
        .seq = seq,
        .new_start = moved_to,
        .when_ns = pm_now_ns(),
        .type = (uint32_t)type,
        .guarantee = (uint32_t)guarantee,
        .flags = moved_to ? PM_EV_REMAP : 0,
    };

    mm->stats.events[type]++;
    pm_queue_hold(mm, &event);
}

/* What the message tells has happened: begin and end at once. */
static void invalidate_now(struct pm_mm *mm, uint64_t start, uint64_t end, int type, uint64_t moved_to)
{
    struct pm_inv inv = {0};
    uint64_t seq;

    if (pm_inv_claims(mm, start, pm_last(end), type)) {
        mm->stats.swallowed++;
        return;
    }
    seq = pm_inv_open(mm, &inv, start, pm_last(end), type, PM_AFTER);
    pm_inv_close(mm, &inv);
    push(mm, start, end, type, PM_AFTER, seq, moved_to);
}

/*
 * A free slot, or that of the oldest linger that has lasted its least time: under a storm of REMOVEs each
 * lasts shorter, and what it might still miss the comparison of PFNs finds. Stretching instead would keep the
 * memory between them invalidating for as long as the storm goes on.
 */
static struct pm_inv *linger_slot(struct pm_mm *mm, uint64_t now)
{
    struct pm_inv *oldest = &mm->linger[0];

    for (int i = 0; i < PM_LINGER_MAX; i++) {
        if (!mm->linger[i].used) {
            mm->nlinger++;
            return &mm->linger[i];
        }
        if (mm->linger[i].earliest_ns < oldest->earliest_ns)
            oldest = &mm->linger[i];
    }
    if (now < oldest->earliest_ns)
        return NULL;
    pm_inv_close(mm, oldest);
    oldest->used = false;
    return oldest;
}

/*
 * No slot is free: stretch the youngest over this interval too, and fence again. The event is of the whole,
 * for what lies between is fenced with it.
 */
static void linger_stretch(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t now)
{
    struct pm_inv *inv = &mm->linger[PM_LINGER_MAX - 1];
    struct pm_inv again = {0};
    uint64_t first = pm_min(inv->start, start), last = pm_max(inv->last, pm_last(end));
    uint64_t seq = pm_inv_open(mm, &again, first, last, PM_CLEAR, PM_BEFORE);

    pm_inv_close(mm, &again);
    inv->start = first;
    inv->last = last;
    inv->earliest_ns = now + LINGER_MIN_NS;
    inv->until_ns = now + LINGER_MAX_NS;
    push(mm, first, last + 1, PM_CLEAR, PM_BEFORE, seq, 0);
}

/*
 * A REMOVE is told before the pages go, and nothing tells when they have gone: its interval stays
 * invalidating until the pagemap shows them gone, for a bounded time.
 */
static void invalidate_lingering(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_inv *inv;
    uint64_t seq, now;

    if (pm_inv_claims(mm, start, pm_last(end), PM_CLEAR)) {
        mm->stats.swallowed++;
        return;
    }
    now = pm_now_ns();
    inv = linger_slot(mm, now);
    if (!inv) {
        linger_stretch(mm, start, end, now);
        return;
    }
    memset(inv, 0, sizeof(*inv));
    inv->used = inv->linger = true;
    inv->earliest_ns = now + LINGER_MIN_NS;
    inv->until_ns = now + LINGER_MAX_NS;
    seq = pm_inv_open(mm, inv, start, pm_last(end), PM_CLEAR, PM_BEFORE);
    push(mm, start, end, PM_CLEAR, PM_BEFORE, seq, 0);
}

static void handle_fork(struct pm_mm *mm, int child_uffd)
{
    pm_home_child(mm, child_uffd);
    /* Kept open, it would keep the registrations of the child alive. */
    pm_sys_close(child_uffd);
    if (mm->fork_tid) {
        mm->stats.swallowed++;
        return;
    }
    mm->protect_after_fork = true;
    pm_resident_protect(mm, 0, PM_USER_END);
    invalidate_now(mm, 0, 0, PM_PROTECTION_PAGE, 0);
}

/* An mremap() from an old size of 0 maps memory once more. None moves memory over itself: to follow that
 * would take for ever. */
static bool has_moved(const struct uffd_msg *msg)
{
    uint64_t from = msg->arg.remap.from, to = msg->arg.remap.to, len = msg->arg.remap.len;

    return len && !pm_overlap(from, from + len - 1, to, to + len - 1);
}

static void handle(struct pm_mm *mm, const struct uffd_msg *msg)
{
    /* Its part comes after that of all others. */
    if (msg->event == UFFD_EVENT_PAGEFAULT)
        return;
    if (pm_lift_claims(mm, msg))
        return;
    switch (msg->event) {
    case UFFD_EVENT_UNMAP:
        pm_watch_forget(mm, msg->arg.remove.start, msg->arg.remove.end);
        pm_devmem_drop(mm, msg->arg.remove.start, msg->arg.remove.end);
        invalidate_now(mm, msg->arg.remove.start, msg->arg.remove.end, PM_UNMAP, 0);
        break;
    case UFFD_EVENT_REMOVE:
        pm_guard_removed(mm, msg->arg.remove.start, msg->arg.remove.end);
        pm_devmem_drop(mm, msg->arg.remove.start, msg->arg.remove.end);
        invalidate_lingering(mm, msg->arg.remove.start, msg->arg.remove.end);
        break;
    case UFFD_EVENT_REMAP:
        if (!has_moved(msg))
            break;
        pm_watch_moved(mm, msg->arg.remap.to, msg->arg.remap.len);
        pm_devmem_moved(mm, msg->arg.remap.from, msg->arg.remap.to, msg->arg.remap.len);
        invalidate_now(mm, msg->arg.remap.from, msg->arg.remap.from + msg->arg.remap.len, PM_UNMAP,
                       msg->arg.remap.to);
        break;
    case UFFD_EVENT_FORK:
        handle_fork(mm, (int)msg->arg.fork.ufd);
        break;
    default:
        break;
    }
}

static void serve_fault(struct pm_mm *mm, const struct uffd_msg *msg)
{
    struct pm_spot spot = pm_spot_at(mm->devices, pm_page_down(msg->arg.pagefault.address));

    pm_home_fault(mm, &spot);
}

static void read_messages(struct pm_mm *mm)
{
    struct uffd_msg msgs[PM_MESSAGES];
    ssize_t n;

    pm_point(PM_POINT_MONITOR_BEFORE_READ);
    n = pm_monitor_read(mm, msgs);
    pm_point(PM_POINT_MONITOR_AFTER_READ);
    if (n <= 0)
        return;
    pm_point(PM_POINT_MONITOR_BEFORE_FENCE);
    for (ssize_t i = 0; i < n / (ssize_t)sizeof(msgs[0]); i++)
        handle(mm, &msgs[i]);
    /* After the events, which say where pages belong. */
    for (ssize_t i = 0; i < n / (ssize_t)sizeof(msgs[0]); i++) {
        if (msgs[i].event == UFFD_EVENT_PAGEFAULT)
            serve_fault(mm, &msgs[i]);
    }
    pm_point(PM_POINT_MONITOR_AFTER_FENCE);
}

static void take_events(struct pm_mm *mm)
{
    bool protect;

    pm_point(PM_POINT_MONITOR_POLLED);
    set_state(mm, 2);
    pm_lock(mm);
    set_state(mm, 4);
    if (mm->inflight)
        pm_drain_writes(mm, 0, UINT64_MAX, pm_now_ns() + drain_limit_ns);
    set_state(mm, 3);
    /* Seen by who has returned from the call behind an event: the kernel orders it with the read. */
    atomic_store_explicit(&mm->reading, true, memory_order_release);
    read_messages(mm);
    atomic_store_explicit(&mm->reading, false, memory_order_release);
    protect = mm->protect_after_fork;
    mm->protect_after_fork = false;
    atomic_store(&mm->protecting, protect);
    pm_status_update(mm);
    if (mm->status)
        mm->status->monitor_loop_ns = pm_status_since(mm);
    set_state(mm, 1);
    pm_unlock(mm);
    if (protect)
        pm_watch_after_fork(mm);
    atomic_store(&mm->protecting, false);
}

/*
 * Is every page of a lingering REMOVE gone, or its time over? Looks at the pagemap with no lock held. It may
 * be of terabytes, and other events wait for this thread meanwhile.
 */
static bool linger_over(struct pm_mm *mm, const struct pm_inv *inv)
{
    uint64_t seen[512];

    for (uint64_t addr = inv->start; addr < inv->last;
         addr += sizeof(seen) / sizeof(seen[0]) * PM_PAGE_SIZE) {
        uint64_t n = pm_min(512, (inv->last + 1 - addr) >> PM_PAGE_SHIFT);
        uint64_t now = pm_now_ns();

        if (now >= inv->until_ns)
            return true;
        if (now < inv->earliest_ns || pm_pagemap_read(mm, addr, n, seen))
            return false;
        for (uint64_t i = 0; i < n; i++) {
            if (seen[i] >> 63)
                return false;
        }
    }
    return true;
}

static void end_lingering(struct pm_mm *mm)
{
    for (int i = 0; mm->nlinger && i < PM_LINGER_MAX; i++) {
        struct pm_inv *inv = &mm->linger[i];

        /* Only this thread opens, stretches and ends these. */
        if (!inv->used || !linger_over(mm, inv))
            continue;
        pm_point(PM_POINT_REMOVE_LINGER);
        pm_lock(mm);
        pm_inv_close(mm, inv);
        inv->used = false;
        mm->nlinger--;
        pm_status_update(mm);
        pm_unlock(mm);
    }
}

static void announce_start(struct pm_mm *mm)
{
    if (mm->status) {
        mm->status->monitor_tid = (uint32_t)pm_gettid();
        mm->status->monitor_loop_ns = pm_now_ns();
    }
    set_state(mm, 1);
    pm_lock(mm);
    mm->monitor_running = true;
    pthread_cond_broadcast(&mm->idle);
    pm_unlock(mm);
}

/* No time-out, as a rule: it would be set up and taken down with each fault. */
static uint64_t poll_ns(struct pm_mm *mm, uint64_t now)
{
    int deferred = pm_home_deferred_ms(mm);
    uint64_t wait = mm->nlinger ? STEP_NS : UINT64_MAX;

    /* Longer when events have been coming for longer. */
    if (mm->held_ns)
        wait = pm_min(pm_max(now - mm->held_ns, QUIET_NS), STEP_NS);
    return deferred >= 0 ? pm_min((uint64_t)deferred * 1000 * 1000, wait) : wait;
}

static void tell(struct pm_mm *mm)
{
    pm_lock(mm);
    pm_queue_tell(mm);
    pm_unlock(mm);
}

static void go_round(struct pm_mm *mm, bool tick)
{
    uint64_t ticks;

    if (tick)
        pm_sys_read(mm->tick_fd, &ticks, sizeof(ticks));
    if (mm->status)
        mm->status->monitor_loop_ns = pm_now_ns();
}

static void *monitor_main(void *arg)
{
    struct pm_mm *mm = arg;
    struct pollfd fds[2] = {{.fd = mm->uffd, .events = POLLIN}, {.fd = mm->tick_fd, .events = POLLIN}};
    uint64_t looked = 0;

    pm_thread_name("pymirror-mon");
    pm_all_blocked();
    announce_start(mm);
    while (!atomic_load(&mm->stop_monitor)) {
        uint64_t now = mm->held_ns || mm->nlinger ? pm_now_ns() : 0;
        int n = pm_sys_poll(fds, 2, poll_ns(mm, now));

        if (n < 0)
            nanosleep(&(struct timespec){.tv_nsec = 1000 * 1000}, NULL);
        if (n > 0 && (fds[0].revents & POLLIN))
            take_events(mm);
        else
            go_round(mm, fds[1].revents);
        if (mm->held_ns && (n == 0 || now >= mm->held_ns + PM_HELD_MAX_NS))
            tell(mm);
        if (mm->nlinger && (n == 0 || now >= looked + STEP_NS)) {
            end_lingering(mm);
            looked = now;
        }
        if (pm_home_deferred_ms(mm) == 0)
            pm_home_deferred(mm);
        if (mm->spare_fd < 0)
            mm->spare_fd = pm_sys_timerfd();
    }
    set_state(mm, 0);
    return NULL;
}

/*
 * Returns when the thread runs: libc may allocate while it starts one, and must not when the first event
 * comes, which may be a fork that holds malloc's locks.
 */
int pm_monitor_start(struct pm_mm *mm)
{
    int err = pm_sys_timerfd_set(mm->tick_fd, round_ns, round_ns);

    if (!err)
        err = pm_sys_thread(&mm->monitor, monitor_main, mm);
    if (err)
        return err;
    pm_lock(mm);
    while (!mm->monitor_running)
        pm_wait(mm, &mm->idle, UINT64_MAX);
    pm_unlock(mm);
    return 0;
}

void pm_monitor_stop(struct pm_mm *mm)
{
    if (!mm->monitor_running)
        return;
    atomic_store(&mm->stop_monitor, true);
    pm_sys_timerfd_set(mm->tick_fd, 1, round_ns);
    pthread_join(mm->monitor, NULL);
    mm->monitor_running = false;
}
