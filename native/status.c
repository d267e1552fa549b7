/* SPDX-License-Identifier: MIT */
/*
 * status.c - the status page: what is waiting for what, readable from outside while this process hangs.
 *
 * A memfd: `pymirror inspect` finds it by its name among the descriptors of the process. Sealed, so that
 * whoever may read it cannot write to it, nor cut it off, at which this process would die. Plain stores, for
 * a reader that can live with a torn value.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "table.h"

_Static_assert(sizeof(struct pm_status) <= PM_PAGE_SIZE, "the status is one page");

int pm_status_open(struct pm_mm *mm)
{
    uint64_t at;
    int fd = pm_sys_memfd("pymirror-status");
    int err;

    if (fd < 0)
        return fd;
    err = pm_sys_ftruncate(fd, PM_PAGE_SIZE);
    if (!err)
        err = pm_sys_mmap(0, PM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0, &at);
    if (err) {
        pm_sys_close(fd);
        return err;
    }
    err = pm_sys_seal(fd, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE);
    if (err) {
        pm_sys_munmap(at, PM_PAGE_SIZE);
        pm_sys_close(fd);
        return err;
    }
    /* A child must not write what its parent's reader sees. */
    pm_sys_madvise(at, PM_PAGE_SIZE, MADV_DONTFORK);
    mm->status_fd = fd;
    mm->status = (struct pm_status *)(uintptr_t)at;
    mm->status->layout = PM_STATUS_LAYOUT;
    mm->status->pid = (uint32_t)getpid();
    mm->status->opened_ns = pm_now_ns();
    mm->status->state = 1;
    mm->status->lock_addr = (uintptr_t)&mm->lock;
    strncpy(mm->status->version, pm_version(), sizeof(mm->status->version) - 1);
    mm->status->magic = PM_STATUS_MAGIC;
    return 0;
}

void pm_status_close(struct pm_mm *mm)
{
    struct pm_status *status = mm->status;

    if (!status)
        return;
    mm->status = NULL;
    status->state = 3;
    pm_sys_munmap((uint64_t)(uintptr_t)status, PM_PAGE_SIZE);
    pm_sys_close(mm->status_fd);
    mm->status_fd = -1;
}

void pm_status_lock(struct pm_mm *mm, bool held)
{
    struct pm_status *status = mm->status;

    if (!status)
        return;
    status->lock_since_ns = held ? pm_now_ns() : 0;
    status->lock_tid = held ? (uint32_t)pm_gettid() : 0;
}

uint32_t pm_status_tid(const struct pm_mm *mm)
{
    return mm->status ? mm->status->lock_tid : 0;
}

uint64_t pm_status_since(const struct pm_mm *mm)
{
    return mm->status ? mm->status->lock_since_ns : pm_now_ns();
}

void pm_thread_name(const char *name)
{
    pm_sys_name_thread(name);
}

static void write_active(struct pm_mm *mm, struct pm_status *status)
{
    size_t n = PM_STATUS_INVS, i = 0;

    for (struct pm_inv *inv = mm->invs; inv && i < n; inv = inv->next, i++) {
        status->inv[i] = (struct pm_status_inv){
            .start = inv->start,
            .end = inv->last + 1,
            .since_ns = inv->since_ns,
            .event = (uint32_t)inv->event,
            .guarantee = (uint32_t)inv->guarantee,
            .tid = inv->tid,
            .undelivered = inv->undelivered,
        };
    }
    for (; i < n && status->inv[i].since_ns; i++)
        memset(&status->inv[i], 0, sizeof(status->inv[i]));
}

void pm_status_inflight(struct pm_mm *mm)
{
    struct pm_status *status = mm->status;
    const struct pm_inflight *oldest = mm->inflight;

    if (!status)
        return;
    for (const struct pm_inflight *access = oldest; access; access = access->next) {
        if (access->since_ns < oldest->since_ns)
            oldest = access;
    }
    status->inflight = mm->stats.inflight;
    status->inflight_since_ns = oldest ? oldest->since_ns : 0;
    status->inflight_tid = oldest ? oldest->tid : 0;
}

void pm_status_watched(struct pm_mm *mm)
{
    struct pm_status *status = mm->status;
    uint32_t n = mm->nwatched < PM_STATUS_WATCHED ? mm->nwatched : PM_STATUS_WATCHED;

    if (!status)
        return;
    status->watched_bytes = mm->watched_bytes;
    status->watched_ranges = mm->nwatched;
    for (uint32_t i = 0; i < n; i++)
        status->watched[i] = (struct pm_status_range){mm->watched[i].start, mm->watched[i].end};
}

void pm_status_dispatch(struct pm_mm *mm, uint32_t state)
{
    struct pm_status *status = mm->status;

    if (!status)
        return;
    status->dispatch_tid = status->lock_tid;
    status->dispatch_since_ns = pm_now_ns();
    status->dispatch_state = state;
}

static uint64_t table_entries(const struct pm_mm *mm)
{
    uint64_t n = 0;

    for (const struct pm_table *table = mm->tables; table; table = table->next)
        n += table->entries;
    return n;
}

void pm_status_queue(struct pm_mm *mm)
{
    struct pm_status *status = mm->status;

    if (!status)
        return;
    status->queue_depth = mm->stats.queue_depth;
    status->oldest_event_ns = mm->stats.oldest_event_ns;
    status->callback_since_ns = mm->delivering ? mm->delivering_ns : 0;
    status->queue_overflows = mm->stats.queue_overflows;
}

void pm_status_update(struct pm_mm *mm)
{
    struct pm_status *status = mm->status;

    if (!status)
        return;
    pm_status_queue(mm);
    status->seq = atomic_load(&mm->seq);
    status->active = atomic_load(&mm->active);
    status->subs = mm->nsubs;
    status->table_entries = table_entries(mm);
    memcpy(status->events, mm->stats.events, sizeof(status->events));
    write_active(mm, status);
}

int pm_status_waits(pm_mm *mm, const struct pm_status_wait *waits, uint32_t n)
{
    int err;

    if (n > PM_STATUS_WAITS)
        return -EINVAL;
    /* The page stays mapped while its user count is not 0. */
    err = pm_mm_enter(mm);
    if (err)
        return err;
    if (mm->status) {
        memset(mm->status->wait, 0, sizeof(mm->status->wait));
        memcpy(mm->status->wait, waits, n * sizeof(*waits));
    }
    pm_mm_exit(mm);
    return 0;
}

int pm_mm_status_fd(const pm_mm *mm)
{
    return mm->status_fd >= 0 ? mm->status_fd : -ENOENT;
}
