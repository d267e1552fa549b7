/* SPDX-License-Identifier: MIT */
/*
 * home_fault.c - a touch of a page that is on a device: it comes home, or waits until it may, and drivers are
 * told. Whether the monitor or the toucher itself does that is their business.
 */
#include <errno.h>

#include "devmem.h"

static const uint64_t drain_limit_ns = 1000ULL * 1000 * 1000;
static const uint64_t home_limit_ns = 5000ULL * 1000 * 1000;

/* How much comes home with a page. */
static void span_around(struct pm_mm *mm, const struct pm_spot *spot, uint64_t *start, uint64_t *end)
{
    /* A huge page that comes home in pieces would be split. */
    bool huge = spot->block->used == PM_HUGE_PAGES && pm_resident_huge(mm, spot->addr, spot->slot);
    uint64_t around = huge ? PM_HUGE_SIZE : mm->devices->around;

    *start = spot->addr & ~(around - 1);
    *end = *start + around;
}

/* Other threads' device writes to what is to come home. The monitor has waited for all, and must not again:
 * one may wait for it to fault in what it writes from. */
static void drain_inline(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t n, until;

    if (!mm->inline_faults || !mm->inflight)
        return;
    until = pm_now_ns() + drain_limit_ns;
    for (uint64_t addr = start; pm_resident_next(mm->devices, &addr, end); addr += n << PM_PAGE_SHIFT) {
        n = pm_resident_run(mm->devices, addr, end);
        pm_drain_writes(mm, addr, addr + (n << PM_PAGE_SHIFT) - 1, until);
    }
}

/* Pages of one memory that come home at a touch: the invalidation that this is, and what drivers are told. */
struct coming {
    struct pm_inv inv;
    struct pm_event event;
};

static void begin_coming(struct pm_mm *mm, const struct pm_devmem *vram, uint64_t start, uint64_t end,
                         struct coming *coming)
{
    struct pm_event *event = &coming->event;

    *coming = (struct coming){0};
    event->start = start;
    event->end = end;
    event->type = vram->exclusive ? PM_EXCLUSIVE : PM_MIGRATE;
    event->guarantee = PM_BEFORE;
    event->owner = vram->owner;
    event->flags = PM_EV_FAULT;
    event->seq = pm_inv_open(mm, &coming->inv, start, end - 1, (int)event->type, PM_BEFORE);
    event->when_ns = coming->inv.since_ns;
}

static void end_coming(struct pm_mm *mm, struct coming *coming)
{
    pm_inv_close(mm, &coming->inv);
    mm->stats.events[coming->event.type]++;
    pm_queue_push(mm, &coming->event);
}

/* The pages of [start, end) that are in one memory come home, and drivers are told. */
static int64_t home_of(struct pm_mm *mm, const struct pm_devmem *vram, uint64_t start, uint64_t end)
{
    struct coming coming;
    int64_t got;

    begin_coming(mm, vram, start, end, &coming);
    got = pm_home(mm, start, end, vram);
    end_coming(mm, &coming);
    return got;
}

/* The same of one page: 0, or an errno. */
static int home_page(struct pm_mm *mm, const struct pm_spot *spot)
{
    struct coming coming;
    int64_t got;

    begin_coming(mm, spot->vram, spot->addr, spot->addr + PM_PAGE_SIZE, &coming);
    got = pm_home_run(mm, spot, PM_PAGE_SIZE);
    end_coming(mm, &coming);
    mm->devices->stats.faults += got > 0;
    return got < 0 ? (int)got : 0;
}

int64_t pm_home_told(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    int64_t total = 0, got = 1, all = (int64_t)((end - start) >> PM_PAGE_SHIFT);
    uint64_t first;

    drain_inline(mm, start, end);
    while (got > 0 && total < all && pm_resident_next(mm->devices, (first = start, &first), end)) {
        got = home_of(mm, pm_devmem_of(mm->devices, pm_resident(mm->devices, first)), start, end);
        total += got > 0 ? got : 0;
    }
    mm->devices->stats.faults += total > 0;
    return got < 0 ? got : total;
}

/* With the lock held: the next run of [*addr, end) in one 2 MiB range and one memory. */
static int64_t touch_step(struct pm_mm *mm, uint64_t *addr, uint64_t end)
{
    uint64_t limit;
    int64_t got;

    if (!pm_resident_next(mm->devices, addr, end)) {
        *addr = end;
        return 0;
    }
    limit = pm_min(end, (*addr & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);
    limit = *addr + (pm_resident_run(mm->devices, *addr, limit) << PM_PAGE_SHIFT);
    pm_drain_writes(mm, *addr, limit - 1, pm_now_ns() + drain_limit_ns);
    got = pm_home_told(mm, *addr, limit);
    *addr = got >= 0 ? limit : *addr;
    return got;
}

void pm_home_touch(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t until = pm_now_ns() + home_limit_ns;

    while (mm->devices && start < end) {
        int64_t got;

        pm_lock(mm);
        got = touch_step(mm, &start, end);
        pm_status_update(mm);
        pm_unlock(mm);
        /* What cannot come now, a fault will bring, or tell of. */
        if (got < 0 && (got != -EAGAIN || pm_now_ns() > until))
            return;
        if (got < 0)
            pm_doze();
    }
}

/* A page that is in no device memory: of a file in memory what the file has, else zeroes. */
static int fill_hole(struct pm_mm *mm, uint64_t addr)
{
    struct uffdio_continue mapped = {.range = {addr, PM_PAGE_SIZE}};
    struct uffdio_zeropage zero = {.range = {addr, PM_PAGE_SIZE}};
    int err = -EINVAL;

    if (mm->devices && mm->devices->minor)
        err = pm_sys_ioctl(mm->uffd, UFFDIO_CONTINUE, &mapped);
    /* No file in memory, or a hole of one. Any other refusal says nothing of what is there. */
    if (err != -EINVAL && err != -EFAULT)
        return err;
    err = pm_sys_ioctl(mm->uffd, UFFDIO_ZEROPAGE, &zero);
    if (!err && mm->devices)
        mm->devices->stats.filled++;
    return err;
}

static uint64_t resident(struct pm_mm *mm, uint64_t addr)
{
    return mm->devices ? pm_resident(mm->devices, addr) : 0;
}

/* Has the page to stay for now? Its toucher waits, unless there are too many of them. */
static bool defer(struct pm_mm *mm, const struct pm_spot *spot)
{
    uint64_t until = spot->vram->timeslice_ns ? spot->block->until_ns : 0;

    if (!until || until <= pm_now_ns())
        return false;
    if (mm->inline_faults || (spot->word & PM_RESIDENT_GUARD))
        return true;
    if (mm->ndeferred == PM_DEFERRED_MAX)
        return false;
    mm->deferred[mm->ndeferred++] = (struct pm_deferred){spot->addr, until};
    return true;
}

static int serve(struct pm_mm *mm, const struct pm_spot *spot)
{
    uint64_t start = spot->addr, end = start + PM_PAGE_SIZE;
    bool there = spot->word, fill = !there;
    int64_t err = 0;

    if (there) {
        span_around(mm, spot, &start, &end);
        mm->devices->met_holes = false;
        /* To wait for writes the lock is let go, and the spot may then be another. */
        if (end - start == PM_PAGE_SIZE && !(mm->inline_faults && mm->inflight)) {
            err = home_page(mm, spot);
            there = err < 0;
        } else {
            err = pm_home_told(mm, start, end);
            there = resident(mm, spot->addr);
        }
        fill = !there && mm->devices->met_holes;
    }
    if (fill)
        err = fill_hole(mm, spot->addr);
    /* Whatever did not work is tried again when the thread faults again; what did has woken it. */
    if (!mm->inline_faults && (there || err < 0))
        pm_wake(mm, start, end - start);
    return err < 0 ? (int)err : 0;
}

int pm_home_fault(struct pm_mm *mm, const struct pm_spot *spot)
{
    return spot->word && defer(mm, spot) ? -EAGAIN : serve(mm, spot);
}

/* Not later than was told at first: others that come to the same 2 MiB have theirs to stay longer. */
static bool is_due(const struct pm_deferred *deferred)
{
    return deferred->until_ns <= pm_now_ns();
}

int pm_home_deferred_ms(struct pm_mm *mm)
{
    uint64_t first = UINT64_MAX, now;

    if (!mm->ndeferred)
        return -1;
    now = pm_now_ns();
    pm_lock(mm);
    for (unsigned i = 0; i < mm->ndeferred; i++)
        first = pm_min(first, resident(mm, mm->deferred[i].addr) ? mm->deferred[i].until_ns : 0);
    pm_unlock(mm);
    return first > now ? (int)pm_min(1000, (first - now) / 1000000 + 1) : 0;
}

void pm_home_deferred(struct pm_mm *mm)
{
    unsigned n = mm->ndeferred;

    if (!n)
        return;
    pm_lock(mm);
    pm_drain_writes(mm, 0, UINT64_MAX, pm_now_ns() + drain_limit_ns);
    mm->ndeferred = 0;
    for (unsigned i = 0; i < n; i++) {
        struct pm_deferred deferred = mm->deferred[i];
        struct pm_spot spot = pm_spot_at(mm->devices, deferred.addr);

        if (!spot.word || is_due(&deferred))
            serve(mm, &spot);
        else
            mm->deferred[mm->ndeferred++] = deferred;
    }
    pm_status_update(mm);
    pm_unlock(mm);
}
