/* SPDX-License-Identifier: MIT */
/*
 * home.c - pages of device memory come home: the move itself, and the call that asks for it.
 *
 * What is noted and what is true change in one hold of the device lock; see migrate.c.
 */
#include <errno.h>
#include <sys/mman.h>

#include "devmem.h"
#include "pagemap.h"

enum { AGAIN_LIMIT = 64 };
static const uint64_t drain_limit_ns = 1000ULL * 1000 * 1000;
static const uint64_t home_limit_ns = 5000ULL * 1000 * 1000;

/* Where UFFDIO_MOVE may not, or is not: the vma is read-only by now, or locked, or the slot is looked at.
 * Pages from the first on that are all there, or all holes: bytes. */
static int64_t copy_home(struct pm_mm *mm, uint64_t addr, uint64_t slot, uint64_t len)
{
    struct uffdio_copy copy = {.dst = addr, .src = slot, .mode = UFFDIO_COPY_MODE_DONTWAKE};
    uint64_t seen[PM_HUGE_PAGES], n = pm_min(len >> PM_PAGE_SHIFT, PM_HUGE_PAGES), run = 1;
    int err = pm_pagemap_fill(mm, slot, n, seen);

    if (err)
        return err;
    while (run < n && pm_is_there(seen[run]) == pm_is_there(seen[0]))
        run++;
    /* Never touched: a hole at home, too. */
    if (!pm_is_there(seen[0])) {
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
    pm_slots_empty(mm, slot, copy.len);
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
int64_t pm_home_run(struct pm_mm *mm, const struct pm_spot *spot, uint64_t len)
{
    /* What is to be read-only is not touched before it is. */
    bool writable = spot->word & PM_RESIDENT_WRITE, wakes = writable;
    int64_t got;

    if (pm_lifting(mm, spot->slot, len >> PM_PAGE_SHIFT))
        return -EAGAIN;
    if (spot->word & PM_RESIDENT_GUARD)
        got = pm_guard_home(mm, spot->addr, spot->slot, len);
    else
        got = move_home(mm, spot->addr, spot->slot, len, wakes ? 0 : PM_ABI_UFFDIO_MOVE_MODE_DONTWAKE);
    if (got < 0 && got != -EAGAIN && !(spot->word & PM_RESIDENT_GUARD)) {
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
        got = pm_home_run(mm, &spot, run_home(devices, addr, end));
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
