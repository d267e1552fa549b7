/* SPDX-License-Identifier: MIT */
/*
 * home.c - pages of device memory come home: by call, at a touch of the CPU, and into a forked child.
 *
 * What is noted and what is true change in one hold of the device lock; see migrate.c.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "devmem.h"
#include "pagemap.h"

enum { AGAIN_LIMIT = 64 };
static const uint64_t drain_limit_ns = 1000ULL * 1000 * 1000;
static const uint64_t home_limit_ns = 5000ULL * 1000 * 1000;

static bool is_there(uint64_t entry)
{
    return entry & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED);
}

/* Where UFFDIO_MOVE may not, or is not: the vma is read-only by now, or locked, or the slot is looked at.
 * Pages from the first on that are all there, or all holes: bytes. */
static int64_t copy_home(struct pm_mm *mm, uint64_t addr, uint64_t slot, uint64_t len)
{
    struct uffdio_copy copy = {.dst = addr, .src = slot, .mode = UFFDIO_COPY_MODE_DONTWAKE};
    uint64_t seen[PM_HUGE_PAGES], n = pm_min(len >> PM_PAGE_SHIFT, PM_HUGE_PAGES), run = 1;
    int err = pm_pagemap_fill(mm, slot, n, seen);

    if (err)
        return err;
    while (run < n && is_there(seen[run]) == is_there(seen[0]))
        run++;
    /* Never touched: a hole at home, too. */
    if (!is_there(seen[0])) {
        mm->devices->met_holes = true;
        return (int64_t)(run << PM_PAGE_SHIFT);
    }
    copy.len = run << PM_PAGE_SHIFT;
    err = pm_sys_ioctl(mm->uffd, UFFDIO_COPY, &copy);
    if (err)
        copy.len = copy.copy > 0 ? (uint64_t)copy.copy : 0;
    /* A run that is in two vmas. */
    if (err == -ENOENT && run > 1)
        return copy_home(mm, addr, slot, PM_PAGE_SIZE);
    /* EEXIST: something is there that is younger, a guard page for one. */
    if (!copy.len && err == -EEXIST)
        copy.len = PM_PAGE_SIZE;
    if (!copy.len)
        return err;
    pm_sys_madvise(slot, copy.len, MADV_DONTNEED);
    mm->devices->stats.copied += copy.len >> PM_PAGE_SHIFT;
    return (int64_t)copy.len;
}

/*
 * Pages that were read-only on their device are mapped so at home: protected, which the first write ends.
 * What is read-only by its vma needs no more.
 */
void pm_home_readonly(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_vma vma;

    if (pm_vma_query(mm, start, &vma) == 0 && vma.start <= start && (vma.flags & PM_VMA_WRITE))
        pm_watch_protect(mm, start, end);
}

/* A run of pages. Of one page the kernel says whether its slot is a hole (ENOENT), which a
 * fault on it must fill: the call that would find out is saved. */
static int64_t move_home(struct pm_mm *mm, uint64_t addr, uint64_t slot, uint64_t len, uint64_t mode)
{
    struct pm_abi_uffdio_move move = {.dst = addr, .src = slot, .len = len, .mode = mode};
    int err;

    if (!pm_have(mm, PM_FEAT_UFFD_MOVE))
        return -EOPNOTSUPP;
    if (len > PM_PAGE_SIZE) {
        mm->devices->met_holes = true;
        return pm_move_pages(mm->uffd, addr, slot, len, mode);
    }
    err = pm_sys_ioctl(mm->uffd, PM_ABI_UFFDIO_MOVE, &move);
    return err ? err : PM_PAGE_SIZE;
}

/* Bytes from addr on, before end, that go by one call: huge pages in a row, or what is in one 2 MiB range. */
static uint64_t run_home(struct pm_devices *devices, uint64_t addr, uint64_t end)
{
    uint64_t whole = pm_resident_stretch(devices, addr, end);

    return whole ? whole * PM_HUGE_SIZE : pm_resident_run(devices, addr, end) << PM_PAGE_SHIFT;
}

void pm_wake(struct pm_mm *mm, uint64_t start, uint64_t len)
{
    for (int i = 0; i < AGAIN_LIMIT; i++) {
        struct uffdio_range range = {start, len};

        if (pm_sys_ioctl(mm->uffd, UFFDIO_WAKE, &range) == 0)
            return;
    }
}

/* Pages from a spot on, in slots in a row, come home: bytes, from the first on, or an errno. */
static int64_t bring(struct pm_mm *mm, const struct pm_spot *spot, uint64_t len)
{
    /* What is to be read-only is not touched before it is. */
    bool writable = spot->word & PM_RESIDENT_WRITE, wakes = writable;
    int64_t got;

    if (pm_lifting(mm, spot->slot, len >> PM_PAGE_SHIFT))
        return -EAGAIN;
    got = move_home(mm, spot->addr, spot->slot, len, wakes ? 0 : PM_ABI_UFFDIO_MOVE_MODE_DONTWAKE);
    if (got < 0 && got != -EAGAIN) {
        got = copy_home(mm, spot->addr, spot->slot, len);
        wakes = false;
    }
    if (got < 0)
        return got;
    if (!writable)
        pm_home_readonly(mm, spot->addr, spot->addr + (uint64_t)got);
    if (got == PM_PAGE_SIZE)
        pm_spot_forget(mm, spot);
    else
        pm_devmem_forget(mm, spot->addr, (uint64_t)got >> PM_PAGE_SHIFT);
    if (!wakes && !mm->inline_faults)
        pm_wake(mm, spot->addr, (uint64_t)got);
    mm->devices->stats.to_system += (uint64_t)got >> PM_PAGE_SHIFT;
    return got;
}

int64_t pm_home(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only)
{
    struct pm_devices *devices = mm->devices;
    int64_t total = 0, got;

    for (uint64_t addr = start; pm_resident_next(devices, &addr, end); addr += (uint64_t)got) {
        struct pm_spot spot = pm_spot_at(devices, addr);

        got = PM_PAGE_SIZE;
        if (only && spot.vram != only)
            continue;
        got = bring(mm, &spot, run_home(devices, addr, end));
        if (got < 0)
            return got;
        total += got >> PM_PAGE_SHIFT;
    }
    return total;
}

/* How far one hold of the lock goes: a 2 MiB range, or of huge pages many, which take no longer. */
static uint64_t step_end(struct pm_mm *mm, uint64_t addr, uint64_t end)
{
    uint64_t most = pm_min(end, addr + PM_STRETCH * PM_HUGE_SIZE), slot;
    uint64_t len = pm_resident_stretch(mm->devices, addr, most) * PM_HUGE_SIZE;

    if (len > PM_HUGE_SIZE && pm_have(mm, PM_FEAT_UFFD_MOVE)) {
        slot = pm_resident(mm->devices, addr);
        len = (pm_pagemap_huge_end(mm, slot, slot + len) - slot) & ~(PM_HUGE_SIZE - 1);
        if (len)
            return addr + len;
    }
    return pm_min(end, (addr & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);
}

/* The next step of [*addr, end) that has resident pages. */
static int64_t home_step(struct pm_mm *mm, uint64_t *addr, uint64_t end, const struct pm_devmem *only)
{
    int64_t got = 0;
    uint64_t next = end;

    pm_lock(mm);
    if (pm_resident_next(mm->devices, addr, end)) {
        next = step_end(mm, *addr, end);
        pm_drain_writes(mm, *addr, next - 1, pm_now_ns() + drain_limit_ns);
        got = pm_home(mm, *addr, next, only);
    }
    pm_unlock(mm);
    if (got >= 0)
        *addr = next;
    return got;
}

int pm_home_all(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only, uint64_t *moved)
{
    uint64_t until = pm_now_ns() + home_limit_ns;

    if (!mm->devices)
        return 0;
    while (start < end) {
        int64_t got = home_step(mm, &start, end, only);

        if (got >= 0) {
            *moved += (uint64_t)got;
            until = pm_now_ns() + home_limit_ns;
            continue;
        }
        if (got != -EAGAIN || pm_now_ns() > until)
            return (int)got;
        pm_doze();
    }
    return 0;
}

static int leave_coherent(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only,
                          uint64_t *moved)
{
    int err = 0;

    if (!mm->devices)
        return 0;
    pthread_mutex_lock(&mm->watch_lock);
    for (struct pm_devmem *vram = mm->devices->list; vram && !err; vram = vram->next) {
        if (vram->coherent && (!only || only == vram))
            err = pm_coherent_leave(vram, start, end, moved);
    }
    pthread_mutex_unlock(&mm->watch_lock);
    return err;
}

int pm_migrate_to_system(pm_mm *mm, uint64_t start, uint64_t end, const pm_devmem *only, uint64_t *moved)
{
    int err;

    *moved = 0;
    if (!pm_is_interval(start, end))
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    err = pm_home_all(mm, start, end, only, moved);
    if (!err)
        err = leave_coherent(mm, start, end, only, moved);
    pm_mm_exit(mm);
    return err;
}

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
    got = bring(mm, spot, PM_PAGE_SIZE);
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
    if (mm->inline_faults)
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

/* n pages, as they are in their slots. False if the child does not get all of them. */
static bool copy_to_child(int fd, uint64_t addr, uint64_t slot, uint64_t n)
{
    uint64_t end = addr + (n << PM_PAGE_SHIFT), most = end - addr;
    struct uffd_msg msg;

    for (int again = 0; addr < end && again < AGAIN_LIMIT;) {
        struct uffdio_copy copy = {.dst = addr, .src = slot, .len = pm_min(most, end - addr)};
        int err = pm_sys_ioctl(fd, UFFDIO_COPY, &copy);
        uint64_t done = copy.copy > 0 ? (uint64_t)copy.copy : 0;

        if (err == -ESRCH)
            return true;
        if (err == -ENOENT && copy.len > PM_PAGE_SIZE) {
            /* It ends in another vma. */
            most = copy.len / 2 & ~(uint64_t)(PM_PAGE_SIZE - 1);
            continue;
        }
        most = done ? end - addr : most;
        if (err == -EEXIST || err == -ENOENT)
            done += PM_PAGE_SIZE;
        else if (err == -EAGAIN && !done)
            pm_sys_read(fd, &msg, sizeof(msg)); /* it changes its memory, and waits for a reader */
        else if (err && !done)
            pm_doze(); /* there may be memory in a moment, for one */
        again = done ? 0 : again + 1;
        addr += done;
        slot += done;
    }
    return addr >= end;
}

/* Pages from addr on that have been used, in slots in a row, and those that were not. */
static uint64_t used_run(struct pm_mm *mm, uint64_t slot, uint64_t n, uint64_t *unused)
{
    uint64_t seen[PM_HUGE_PAGES], i = 0, first;

    n = pm_min(n, PM_HUGE_PAGES);
    if (pm_pagemap_fill(mm, slot, n, seen))
        memset(seen, 0xff, sizeof(seen));
    while (i < n && !(seen[i] & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)))
        i++;
    for (*unused = first = i; i < n && (seen[i] & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED));)
        i++;
    return i - first;
}

/* Where the contents of *n slots are, of fewer if some are in their slots and others not yet. */
static uint64_t contents(const struct pm_mm *mm, uint64_t slot, uint64_t *n)
{
    uint64_t first = mm->lift.slot, end = first + mm->lift.len;

    if (!pm_lifting(mm, slot, *n))
        return slot;
    if (slot < first) {
        *n = (first - slot) >> PM_PAGE_SHIFT;
        return slot;
    }
    *n = pm_min(*n, (end - slot) >> PM_PAGE_SHIFT);
    return mm->lift.area ? mm->lift.area + (slot - first) : 0;
}

void pm_home_child(struct pm_mm *mm, int child_uffd)
{
    struct pm_devices *devices = mm->devices;

    if (!devices)
        return;
    for (uint64_t addr = 0; pm_resident_next(devices, &addr, PM_USER_END);) {
        uint64_t slot = pm_resident(devices, addr), n = pm_resident_run(devices, addr, PM_USER_END), unused;
        uint64_t from = contents(mm, slot, &n);

        /* They were at home still when the child was made. */
        unused = n;
        n = from ? used_run(mm, from, n, &unused) : 0;
        addr += unused << PM_PAGE_SHIFT;
        if (n && !copy_to_child(child_uffd, addr, from + (unused << PM_PAGE_SHIFT), n))
            devices->stats.child_lost += n;
        addr += n << PM_PAGE_SHIFT;
    }
}
