/* SPDX-License-Identifier: MIT */
/*
 * migrate.c - pages move to device memory and home again.
 *
 * A page moves, and is noted as moved, in one hold of the device lock, so nobody meets one that is nowhere.
 * Before the first page of a 2 MiB range leaves, its holes are made to fault (MISSING): else they would fill
 * with zeroes. The kernel refuses to bring anything into a range, with EAGAIN, while a munmap, mremap,
 * madvise or fork that it has done is not read yet: so what is noted is never out of date where it is used.
 */
#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include "devmem.h"
#include "populate.h"

enum { AGAIN_LIMIT = 64 };
static const uint64_t quiet_limit_ns = 1000ULL * 1000 * 1000;
static const uint64_t home_limit_ns = 5000ULL * 1000 * 1000;

/* Bytes moved, from the start on, or an errno when that is none. */
static int64_t move_pages(int fd, uint64_t to, uint64_t from, uint64_t len)
{
    struct pm_abi_uffdio_move move = {
        .dst = to, .src = from, .len = len, .mode = PM_ABI_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
    int err = pm_sys_ioctl(fd, PM_ABI_UFFDIO_MOVE, &move);

    if (!err)
        return (int64_t)len;
    return move.move > 0 ? move.move : err;
}

static void doze(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 20 * 1000}, NULL);
}

static bool lingering(const struct pm_mm *mm, uint64_t start, uint64_t end)
{
    for (const struct pm_inv *inv = mm->invs; inv; inv = inv->next) {
        if (inv->linger && pm_overlap(inv->start, inv->last, start, end - 1))
            return true;
    }
    return false;
}

/* Take the lock at a moment at which no fork and no madvise is half done, and every event has been read. */
static int lock_quiet(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t until = pm_now_ns() + quiet_limit_ns;

    for (;;) {
        pm_lock(mm);
        if (!mm->fork_tid && !lingering(mm, start, end) && !pm_events_unread(mm))
            return 0;
        pm_unlock(mm);
        if (pm_now_ns() > until)
            return -EBUSY;
        doze();
    }
}

/* Pages of [*addr, end), in one 2 MiB range, from *addr on. -EBUSY at one that does not move. */
static int move_out(struct pm_devmem *vram, uint64_t *addr, uint64_t end, uint64_t *moved)
{
    struct pm_devices *devices = vram->mm->devices;
    uint64_t next = *addr, slot, n;
    int64_t got;

    if (pm_resident(devices, *addr)) {
        *addr += PM_PAGE_SIZE;
        return 0;
    }
    if (pm_resident_next(devices, &next, end))
        end = next;
    n = pm_min((end - *addr) >> PM_PAGE_SHIFT, vram->limit - vram->used);
    slot = n ? pm_devmem_slots(vram, *addr, n) : 0;
    if (!slot)
        return -ENOSPC;
    /* So that noting cannot fail once they have moved. */
    if (pm_devmem_note(vram, *addr, slot, 0))
        return -ENOMEM;
    got = move_pages(vram->mm->arena_fd, slot, *addr, n << PM_PAGE_SHIFT);
    for (int i = 0; (got == -EAGAIN || got == -EEXIST) && i < AGAIN_LIMIT; i++) {
        /* A slot that could not be emptied when its page went. */
        if (got == -EEXIST)
            pm_sys_madvise(slot, n << PM_PAGE_SHIFT, MADV_DONTNEED);
        got = move_pages(vram->mm->arena_fd, slot, *addr, n << PM_PAGE_SHIFT);
    }
    if (got < 0)
        return got == -EAGAIN ? -EBUSY : (int)got;
    pm_devmem_note(vram, *addr, slot, (uint64_t)got >> PM_PAGE_SHIFT);
    devices->stats.to_device += (uint64_t)got >> PM_PAGE_SHIFT;
    *moved += (uint64_t)got >> PM_PAGE_SHIFT;
    *addr += (uint64_t)got;
    return 0;
}

/* Pages that a fork has shared do not move, not even when the child has gone. Not known for sure, but likely.
 */
static bool may_be_shared(const struct pm_mm *mm, uint64_t entry)
{
    uint64_t zero = mm->features.zero_pfn;

    if (!(entry & PM_ABI_PAGEMAP_PRESENT) || (zero && (entry & PM_ABI_PAGEMAP_PFN_MASK) == zero))
        return false;
    return !(entry & PM_ABI_PAGEMAP_EXCLUSIVE) || (entry & PM_ABI_PAGEMAP_UFFD_WP);
}

/* Make the page at addr, which did not move, and those after it this process's own. */
static void break_cow(struct pm_mm *mm, uint64_t addr, uint64_t end)
{
    uint64_t seen[PM_HUGE_PAGES], n = (end - addr) >> PM_PAGE_SHIFT, i = 1;

    if (pm_pagemap_read(mm, addr, n, seen))
        return;
    while (i < n && may_be_shared(mm, seen[i]))
        i++;
    pm_populate(mm, addr, addr + (i << PM_PAGE_SHIFT), true);
}

/* One 2 MiB range, or a part of it. A page that is pinned stays. */
static int move_out_range(struct pm_devmem *vram, uint64_t addr, uint64_t end, uint64_t *moved)
{
    uint64_t tried = UINT64_MAX;

    while (addr < end) {
        int err = lock_quiet(vram->mm, addr, end);

        if (err)
            return err;
        while (!err && addr < end)
            err = move_out(vram, &addr, end, moved);
        pm_unlock(vram->mm);
        if (err == -EINVAL || err == -ENOENT)
            return 0; /* another kind of memory than when it was looked up */
        if (err != -EBUSY)
            return err;
        if (tried == addr)
            addr += PM_PAGE_SIZE;
        else
            break_cow(vram->mm, tried = addr, end);
    }
    return 0;
}

/* Holes of the 2 MiB ranges that [start, end) touches fault from here on; without room for more vmas, those
 * of the whole vma. */
static int set_missing(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end)
{
    const uint64_t mode = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING;
    uint64_t first = pm_max(vma->start, start & ~(PM_HUGE_SIZE - 1));
    uint64_t last = pm_min(vma->end, (end + PM_HUGE_SIZE - 1) & ~(PM_HUGE_SIZE - 1));
    struct uffdio_register reg = {.range = {first, last - first}, .mode = mode};
    int err = pm_sys_ioctl(mm->uffd, UFFDIO_REGISTER, &reg);

    if (err != -ENOMEM)
        return err;
    reg.range = (struct uffdio_range){vma->start, vma->end - vma->start};
    return pm_sys_ioctl(mm->uffd, UFFDIO_REGISTER, &reg);
}

static bool movable(const struct pm_vma *vma)
{
    return (vma->flags & PM_VMA_WRITE) &&
           !(vma->flags & (PM_VMA_SHARED | PM_VMA_FILE | PM_VMA_HUGETLB | PM_VMA_SPECIAL));
}

/* With watch_lock held. Memory that cannot be watched, or moved, stays where it is. */
static int move_out_vma(struct pm_devmem *vram, const struct pm_vma *vma, uint64_t start, uint64_t end,
                        uint64_t *moved)
{
    int err = 0;

    if (!movable(vma) || !pm_watched(vram->mm, start, end))
        return 0;
    if (set_missing(vram->mm, vma, start, end))
        return 0;
    while (!err && start < end) {
        uint64_t next = pm_min(end, (start & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);

        err = move_out_range(vram, start, next, moved);
        start = next;
    }
    return err;
}

static int move_out_vmas(struct pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved)
{
    struct pm_vma vma;
    int err = 0;

    while (!err && start < end) {
        err = pm_vma_query(vram->mm, start, &vma);
        if (err == -ENOENT || (!err && (vma.start > start || !(vma.flags & PM_VMA_READ))))
            err = -EINVAL;
        if (!err)
            err = move_out_vma(vram, &vma, start, pm_min(end, vma.end), moved);
        start = vma.end;
    }
    return err;
}

static bool is_interval(uint64_t start, uint64_t end)
{
    return start % PM_PAGE_SIZE == 0 && end % PM_PAGE_SIZE == 0 && start < end && end <= PM_USER_END;
}

int pm_migrate_to_device(pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved)
{
    struct pm_mm *mm = vram->mm;
    int err;

    *moved = 0;
    if (!is_interval(start, end))
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    pthread_mutex_lock(&mm->watch_lock);
    err = move_out_vmas(vram, start, end, moved);
    pthread_mutex_unlock(&mm->watch_lock);
    pm_mm_exit(mm);
    return err;
}

/* Where UFFDIO_MOVE may not: the vma is read-only by now, or locked, or the slot is looked at. */
static int64_t copy_home(struct pm_mm *mm, uint64_t addr, uint64_t slot)
{
    struct uffdio_copy copy = {.dst = addr, .src = slot, .len = PM_PAGE_SIZE};
    uint64_t seen;
    int err = pm_pagemap_read(mm, slot, 1, &seen);

    if (err)
        return err;
    /* Never touched: a hole at home, too. */
    if (!(seen & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)))
        return PM_PAGE_SIZE;
    err = pm_sys_ioctl(mm->uffd, UFFDIO_COPY, &copy);
    /* EEXIST: something is there that is younger, a guard page for one. */
    if (err && err != -EEXIST)
        return err;
    pm_sys_madvise(slot, PM_PAGE_SIZE, MADV_DONTNEED);
    mm->devices->stats.copied++;
    return PM_PAGE_SIZE;
}

int64_t pm_home(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only)
{
    struct pm_devices *devices = mm->devices;
    int64_t total = 0, got;

    for (uint64_t addr = start; pm_resident_next(devices, &addr, end); addr += (uint64_t)got) {
        uint64_t slot = pm_resident(devices, addr);
        uint64_t limit = pm_min(end, (addr & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);

        got = PM_PAGE_SIZE;
        if (only && pm_devmem_of(devices, slot) != only)
            continue;
        got = move_pages(mm->uffd, addr, slot, pm_resident_run(devices, addr, limit) << PM_PAGE_SHIFT);
        if (got < 0 && got != -EAGAIN)
            got = copy_home(mm, addr, slot);
        if (got < 0)
            return got;
        pm_devmem_forget(mm, addr, (uint64_t)got >> PM_PAGE_SHIFT);
        devices->stats.to_system += (uint64_t)got >> PM_PAGE_SHIFT;
        total += got >> PM_PAGE_SHIFT;
    }
    return total;
}

/* The next 2 MiB range of [*addr, end) that has resident pages. */
static int64_t home_step(struct pm_mm *mm, uint64_t *addr, uint64_t end, const struct pm_devmem *only)
{
    int64_t got = 0;
    uint64_t next = end;

    pm_lock(mm);
    if (pm_resident_next(mm->devices, addr, end)) {
        next = pm_min(end, (*addr & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);
        pm_drain_writes(mm, *addr, next - 1, pm_now_ns() + quiet_limit_ns);
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
        doze();
    }
    return 0;
}

int pm_migrate_to_system(pm_mm *mm, uint64_t start, uint64_t end, const pm_devmem *only, uint64_t *moved)
{
    int err;

    *moved = 0;
    if (!is_interval(start, end))
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    err = pm_home_all(mm, start, end, only, moved);
    pm_mm_exit(mm);
    return err;
}

/* A huge page that comes home in pieces would be split. */
static bool in_huge_page(struct pm_mm *mm, uint64_t addr)
{
    uint64_t slot = pm_resident(mm->devices, addr), first = slot & ~(PM_HUGE_SIZE - 1);
    uint64_t pfn[2];

    if (!pm_have(mm, PM_FEAT_PFN) || (addr - slot) % PM_HUGE_SIZE || !pm_devmem_full(mm->devices, slot))
        return false;
    for (int i = 0; i < 2; i++) {
        if (pm_pagemap_read(mm, first + (uint64_t)i * (PM_HUGE_SIZE - PM_PAGE_SIZE), 1, &pfn[i]))
            return false;
        pfn[i] &= PM_ABI_PAGEMAP_PFN_MASK;
    }
    return pfn[0] && pfn[0] % PM_HUGE_PAGES == 0 && pfn[1] == pfn[0] + PM_HUGE_PAGES - 1;
}

/* How much comes home with the page at addr. */
static void span_around(struct pm_mm *mm, uint64_t addr, uint64_t *start, uint64_t *end)
{
    uint64_t around = in_huge_page(mm, addr) ? PM_HUGE_SIZE : mm->devices->around;

    *start = addr & ~(around - 1);
    *end = *start + around;
}

void pm_home_fault(struct pm_mm *mm, uint64_t addr)
{
    struct uffdio_zeropage zero = {.range = {addr, PM_PAGE_SIZE}};
    struct pm_inv inv = {0};
    uint64_t start = addr, end = addr + PM_PAGE_SIZE;

    if (mm->devices && pm_resident(mm->devices, addr)) {
        struct pm_event event = {.type = PM_CLEAR, .guarantee = PM_BEFORE};

        span_around(mm, addr, &start, &end);
        event.start = start;
        event.end = end;
        event.seq = pm_inv_open(mm, &inv, start, end - 1, PM_CLEAR, PM_BEFORE);
        event.when_ns = inv.since_ns;
        pm_home(mm, start, end, NULL);
        pm_inv_close(mm, &inv);
        mm->devices->stats.faults++;
        mm->stats.events[PM_CLEAR]++;
        pm_queue_push(mm, &event);
    }
    if (!mm->devices || !pm_resident(mm->devices, addr)) {
        if (pm_sys_ioctl(mm->uffd, UFFDIO_ZEROPAGE, &zero) == 0 && mm->devices)
            mm->devices->stats.filled++;
    }
    /* Whatever did not work is tried again when the thread faults again. */
    pm_sys_ioctl(mm->uffd, UFFDIO_WAKE, &(struct uffdio_range){start, end - start});
}

static bool copy_to_child(int fd, uint64_t addr, uint64_t slot)
{
    struct uffdio_copy copy = {.dst = addr, .src = slot, .len = PM_PAGE_SIZE};
    struct uffd_msg msg;

    for (int i = 0; i < AGAIN_LIMIT; i++) {
        int err = pm_sys_ioctl(fd, UFFDIO_COPY, &copy);

        if (err != -EAGAIN)
            return err == 0 || err == -EEXIST || err == -ENOENT || err == -ESRCH;
        /* The child has begun to change its memory: it waits for a reader. */
        pm_sys_read(fd, &msg, sizeof(msg));
    }
    return false;
}

void pm_home_child(struct pm_mm *mm, int child_uffd)
{
    struct pm_devices *devices = mm->devices;
    uint64_t seen;

    if (!devices)
        return;
    for (uint64_t addr = 0; pm_resident_next(devices, &addr, PM_USER_END); addr += PM_PAGE_SIZE) {
        uint64_t slot = pm_resident(devices, addr);

        if (pm_pagemap_read(mm, slot, 1, &seen) == 0 &&
            !(seen & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)))
            continue;
        if (!copy_to_child(child_uffd, addr, slot))
            devices->stats.child_lost++;
    }
}
