/* SPDX-License-Identifier: MIT */
/*
 * migrate.c - pages move to device memory, vma by vma, each in the way that its kind allows.
 *
 * A page moves, and is noted as moved, in one hold of the device lock, so nobody meets one that is nowhere.
 * Before the first page of a 2 MiB range leaves, its holes are made to fault (MISSING): else they would fill
 * with zeroes. The kernel refuses to bring anything into a range, with EAGAIN, while a munmap, mremap,
 * madvise or fork that it has done is not read yet: so what is noted is never out of date where it is used.
 */
#include <errno.h>
#include <time.h>

#include "devmem.h"
#include "inline.h"
#include "populate.h"

static const uint64_t quiet_limit_ns = 1000ULL * 1000 * 1000;

void pm_doze(void)
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

int pm_lock_quiet(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t until = pm_now_ns() + quiet_limit_ns;

    for (;;) {
        pm_lock(mm);
        if (!mm->fork_tid && !lingering(mm, start, end) && !pm_events_unread(mm))
            return 0;
        pm_unlock(mm);
        if (pm_now_ns() > until)
            return -EBUSY;
        pm_doze();
    }
}

/* Holes of the 2 MiB ranges that [start, end) touches fault from here on; without room for more vmas, those
 * of the whole vma. */
static int set_missing(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end)
{
    const uint64_t minor = vma->flags & PM_VMA_FILE ? UFFDIO_REGISTER_MODE_MINOR : 0;
    const uint64_t mode = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING | minor;
    uint64_t first = pm_max(vma->start, start & ~(PM_HUGE_SIZE - 1));
    uint64_t last = pm_min(vma->end, (end + PM_HUGE_SIZE - 1) & ~(PM_HUGE_SIZE - 1));
    struct uffdio_register reg = {.range = {first, last - first}, .mode = mode};
    int err;

    if (minor && !(mm->features.uffd_features & PM_ABI_UFFD_FEATURE_MINOR_SHMEM))
        return -EOPNOTSUPP;
    if (minor) {
        pm_lock(mm);
        mm->devices->minor = true;
        pm_unlock(mm);
    }
    /* No hole of others' memory, which may be touched where SIGBUS is blocked. */
    if (mm->inline_faults)
        reg.range = (struct uffdio_range){start, end - start};
    err = pm_sys_ioctl(mm->uffd, UFFDIO_REGISTER, &reg);
    if (err != -ENOMEM || mm->inline_faults)
        return err;
    reg.range = (struct uffdio_range){vma->start, vma->end - vma->start};
    return pm_sys_ioctl(mm->uffd, UFFDIO_REGISTER, &reg);
}

int pm_migrate_level(pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_vma vma;
    int err = pm_is_interval(start, end) ? pm_mm_enter(mm) : -EINVAL;

    if (err)
        return err;
    err = pm_inline_join(mm); /* holes fault from here on */
    if (err) {
        pm_mm_exit(mm);
        return err;
    }
    pthread_mutex_lock(&mm->watch_lock);
    if (mm->devices && pm_watched(mm, start, end) && pm_vma_query(mm, start, &vma) == 0) {
        vma.start = start;
        vma.end = end;
        err = set_missing(mm, &vma, start, end);
    }
    pthread_mutex_unlock(&mm->watch_lock);
    pm_mm_exit(mm);
    return err;
}

enum way { STAY, MOVE, LIFT, GUARD };

/* How memory of a vma gets to a device. */
static enum way way_of(const struct pm_mm *mm, const struct pm_vma *vma)
{
    if (vma->flags & (PM_VMA_SHARED | PM_VMA_HUGETLB | PM_VMA_SPECIAL))
        return STAY;
    /* Inline, each touch of a page of the file would be a signal, and each system call on one refused. */
    if ((vma->flags & PM_VMA_FILE) && pm_is_shmem(vma) && !mm->inline_faults)
        return LIFT;
    if (vma->flags & PM_VMA_FILE)
        return pm_can_guard(mm, vma) ? GUARD : STAY;
    return (vma->flags & PM_VMA_WRITE) && pm_have(mm, PM_FEAT_UFFD_MOVE) ? MOVE : LIFT;
}

bool pm_movable(const struct pm_mm *mm, const struct pm_vma *vma)
{
    enum way way = way_of(mm, vma);

    return way == MOVE || way == LIFT;
}

/* Of a mapping of a file only what is a copy of this process's own; of other memory all. */
static bool leaves(const struct pm_vma *vma, uint64_t entry)
{
    return !(vma->flags & PM_VMA_FILE) ||
           ((entry & PM_ABI_PAGEMAP_PRESENT) && !(entry & PM_ABI_PAGEMAP_FILE));
}

/* From the first page at or after *addr that leaves: how many do in a row. */
static uint64_t next_lift(struct pm_devmem *vram, const struct pm_vma *vma, uint64_t *addr, uint64_t end,
                          const uint64_t *seen)
{
    struct pm_mm *mm = vram->mm;
    uint64_t start = *addr, n = 0;

    pm_lock(mm);
    while (*addr < end &&
           (pm_resident(mm->devices, *addr) || !leaves(vma, seen[(*addr - start) >> PM_PAGE_SHIFT])))
        *addr += PM_PAGE_SIZE;
    while (*addr + (n << PM_PAGE_SHIFT) < end && !pm_resident(mm->devices, *addr + (n << PM_PAGE_SHIFT)) &&
           leaves(vma, seen[((*addr - start) >> PM_PAGE_SHIFT) + n]))
        n++;
    pm_unlock(mm);
    return n;
}

static int lift_by(enum way way, struct pm_devmem *vram, const struct pm_vma *vma, struct pm_lift *lift)
{
    if (way == GUARD)
        return pm_guard_out(vram, lift);
    if (set_missing(vram->mm, vma, lift->addr, lift->addr + (lift->n << PM_PAGE_SHIFT)))
        return -EOPNOTSUPP;
    return pm_lift(vram, lift);
}

/* One 2 MiB range, or a part of it, of memory that UFFDIO_MOVE refuses. */
static int lift_range(struct pm_devmem *vram, enum way way, const struct pm_vma *vma, uint64_t addr,
                      uint64_t end, uint64_t *moved)
{
    uint64_t seen[PM_HUGE_PAGES], n = (end - addr) >> PM_PAGE_SHIFT, start = addr, most = n;
    bool writable[PM_HUGE_PAGES];
    int err = pm_pagemap_read(vram->mm, addr, n, seen);

    for (uint64_t i = 0; !err && i < n; i++)
        writable[i] =
            (vma->flags & PM_VMA_WRITE) && pm_is_writable(vram->mm, addr + (i << PM_PAGE_SHIFT), seen[i]);
    while (!err) {
        const uint64_t *at = seen + ((addr - start) >> PM_PAGE_SHIFT);
        struct pm_lift lift = {.copies = vma->flags & PM_VMA_FILE};
        uint64_t from = addr;

        lift.n = pm_min(most, next_lift(vram, vma, &addr, end, at));
        if (!lift.n)
            return 0;
        at += (addr - from) >> PM_PAGE_SHIFT;
        lift.addr = addr;
        lift.writable = writable + (at - seen);
        err = lift_by(way, vram, vma, &lift);
        if (err == -EAGAIN && lift.n > 1) {
            most = 1;
            err = 0;
            continue;
        }
        *moved += err ? 0 : lift.n;
        addr += lift.n << PM_PAGE_SHIFT;
        /* What the kernel refuses stays. */
        err = err == -ENOSPC || err == -EBUSY ? err : 0;
    }
    return err;
}

/* How far the next step goes. What a device has to itself moves without its huge page, which is split. */
static uint64_t step_end(const struct pm_devmem *vram, uint64_t addr, uint64_t end)
{
    uint64_t step = vram->exclusive ? PM_HUGE_SIZE / 2 : PM_HUGE_SIZE;

    return pm_min(end, (addr & ~(step - 1)) + step);
}

/* Huge pages in a row by one call, or what is in one 2 MiB range. */
static int move_step(struct pm_devmem *vram, uint64_t *addr, uint64_t end, uint64_t *moved)
{
    uint64_t before = *addr;
    int err = pm_move_huge(vram, addr, end, moved);

    if (err || *addr != before)
        return err;
    *addr = step_end(vram, before, end);
    return pm_move_range(vram, before, *addr, moved);
}

static int lift_step(struct pm_devmem *vram, enum way way, const struct pm_vma *vma, uint64_t *addr,
                     uint64_t end, uint64_t *moved)
{
    uint64_t before = *addr;

    *addr = step_end(vram, before, end);
    return lift_range(vram, way, vma, before, *addr, moved);
}

/* With watch_lock held. Memory that cannot be watched, or moved, stays where it is. */
static int move_out_vma(struct pm_devmem *vram, const struct pm_vma *vma, uint64_t start, uint64_t end,
                        uint64_t *moved)
{
    enum way way = way_of(vram->mm, vma);
    int err = 0;

    if (way == STAY || !pm_watched(vram->mm, start, end))
        return 0;
    /* From there pages go home by ioctls on the watch descriptor, which files on a disk have none of. */
    if (way == GUARD && (vram->exclusive || vram->coherent))
        return 0;
    if (way != MOVE && pm_memory_locked())
        return 0;
    if (way == MOVE && set_missing(vram->mm, vma, start, end))
        return 0;
    while (!err && start < end)
        err =
            way == MOVE ? move_step(vram, &start, end, moved) : lift_step(vram, way, vma, &start, end, moved);
    return err;
}

int pm_move_out(struct pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved)
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

bool pm_is_interval(uint64_t start, uint64_t end)
{
    return start % PM_PAGE_SIZE == 0 && end % PM_PAGE_SIZE == 0 && start < end && end <= PM_USER_END;
}

bool pm_is_pages(uint64_t start, uint64_t n)
{
    return n <= PM_USER_END >> PM_PAGE_SHIFT && pm_is_interval(start, start + (n << PM_PAGE_SHIFT));
}

/* Pages from addr on, to slots in a row. Where memory has gone meanwhile the others move all the same. */
static void move_to(struct pm_devmem *vram, uint64_t addr, uint64_t n, uint64_t slot)
{
    uint64_t end = addr + (n << PM_PAGE_SHIFT), moved = 0;
    struct pm_vma vma;

    vram->aim_addr = addr;
    vram->aim_slot = slot;
    while (addr < end && pm_vma_query(vram->mm, addr, &vma) == 0 && vma.start < end) {
        pm_move_out(vram, pm_max(addr, vma.start), pm_min(end, vma.end), &moved);
        addr = vma.end;
    }
    vram->aim_slot = 0;
}

int pm_migrate_pages(pm_devmem *vram, uint64_t start, uint64_t n, const uint64_t *pfns, uint8_t *moved)
{
    struct pm_mm *mm = vram->mm;
    int err = pm_is_pages(start, n) ? pm_mm_enter(mm) : -EINVAL;
    uint64_t last;

    if (err)
        return err;
    err = pm_inline_join(mm);
    if (!err) {
        pthread_mutex_lock(&mm->watch_lock);
        for (uint64_t i = 0; i < n; i = last) {
            for (last = i + 1; last < n && pfns[i] && pfns[last] == pfns[i] + (last - i);)
                last++;
            if (pm_pfn_slot(pfns[i])) /* 0 would be no aim */
                move_to(vram, start + (i << PM_PAGE_SHIFT), last - i, pm_pfn_slot(pfns[i]));
        }
        pthread_mutex_unlock(&mm->watch_lock);
    }
    pm_lock(mm);
    for (uint64_t i = 0; i < n; i++)
        moved[i] = pfns[i] && pm_resident(mm->devices, start + (i << PM_PAGE_SHIFT)) == pm_pfn_slot(pfns[i]);
    pm_unlock(mm);
    pm_mm_exit(mm);
    return err;
}

int pm_migrate_to_device(pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved)
{
    struct pm_mm *mm = vram->mm;
    int err;

    *moved = 0;
    if (!pm_is_interval(start, end))
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    err = pm_inline_join(mm);
    if (!err) {
        pthread_mutex_lock(&mm->watch_lock);
        err =
            vram->coherent ? pm_coherent_take(vram, start, end, moved) : pm_move_out(vram, start, end, moved);
        pthread_mutex_unlock(&mm->watch_lock);
    }
    pm_mm_exit(mm);
    return err;
}
