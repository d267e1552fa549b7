/* SPDX-License-Identifier: MIT */
/*
 * lift.c - to device memory, from where UFFDIO_MOVE may not take pages: memory that is read-only, and the
 * copies that a process has of pages of a file. On a kernel without it, from all memory.
 *
 * mremap(MREMAP_DONTUNMAP) takes the pages out in one step, so no write of the CPU can fall between reading
 * and taking. What touches the hole meanwhile faults, and waits: the pages are noted as gone before, and
 * nothing brings them home until they have been copied. The events of our own mremap are nobody's news.
 *
 * A page that is pinned would be copied away from what it is pinned for: it stays, and no pin is made
 * meanwhile. Of pins that others make the kernel tells nobody.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "alone.h"
#include "devmem.h"
#include "pagemap.h"

enum { AGAIN_LIMIT = 64 };
static const int lift_flags = MREMAP_MAYMOVE | MREMAP_FIXED | PM_ABI_MREMAP_DONTUNMAP;

bool pm_lifting(const struct pm_mm *mm, uint64_t slot, uint64_t n)
{
    uint64_t end = slot + (n << PM_PAGE_SHIFT);

    return mm->lift.len && pm_overlap(slot, end - 1, mm->lift.slot, mm->lift.slot + mm->lift.len - 1);
}

/* Others may move and unmap the same memory meanwhile: what is theirs is told. */
bool pm_lift_claims(const struct pm_mm *mm, const struct uffd_msg *msg)
{
    uint64_t area = mm->lift.area, end = area + mm->lift.len;

    if (!mm->lift.len || !area)
        return false;
    if (msg->event == UFFD_EVENT_REMAP)
        return (msg->arg.remap.from == mm->lift.addr && msg->arg.remap.to == area) ||
               (msg->arg.remap.from >= area && msg->arg.remap.from < end);
    if (msg->event != UFFD_EVENT_UNMAP)
        return false;
    return (msg->arg.remove.start >= area && msg->arg.remove.end <= end) ||
           (msg->arg.remove.start == mm->lift.back && msg->arg.remove.end == mm->lift.back_end);
}

/* mremap would take the lock from a vma that is locked, and nothing tells which one that is. */
bool pm_memory_locked(void)
{
    char text[4096], *at;
    int fd = pm_sys_open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? fd : pm_sys_read(fd, text, sizeof(text) - 1);

    if (fd >= 0)
        pm_sys_close(fd);
    text[n > 0 ? n : 0] = 0;
    at = strstr(text, "VmLck:");
    return !at || strtoull(at + strlen("VmLck:"), NULL, 10) > pm_alone_locked() >> 10;
}

static bool is_copied(const struct pm_mm *mm, uint64_t entry)
{
    uint64_t zero = mm->features.zero_pfn;

    if (entry & PM_ABI_PAGEMAP_SWAPPED)
        return true;
    return (entry & PM_ABI_PAGEMAP_PRESENT) && !(zero && (entry & PM_ABI_PAGEMAP_PFN_MASK) == zero);
}

/* EAGAIN: the page table has just gone, with the last page that the monitor has emptied a slot of. */
static int copy_run(struct pm_mm *mm, uint64_t to, uint64_t from, uint64_t len)
{
    for (int again = 0; len && again < AGAIN_LIMIT; again++) {
        struct uffdio_copy copy = {.dst = to, .src = from, .len = len};
        int err = pm_sys_ioctl(mm->arena_fd, UFFDIO_COPY, &copy);
        uint64_t done = !err ? len : copy.copy > 0 ? (uint64_t)copy.copy : 0;

        if (err && err != -EAGAIN && !done)
            return err;
        to += done;
        from += done;
        len -= done;
    }
    return len ? -EBUSY : 0;
}

/* The pages that are there, now that nobody can change them. */
static int copy_pages(struct pm_mm *mm, uint64_t to, uint64_t from, uint64_t n)
{
    uint64_t seen[PM_HUGE_PAGES];
    int err = pm_pagemap_read(mm, from, n, seen);

    for (uint64_t i = 0, run; !err && i < n; i += run ? run : 1) {
        uint64_t at = i << PM_PAGE_SHIFT;

        for (run = 0; i + run < n && is_copied(mm, seen[i + run]);)
            run++;
        err = copy_run(mm, to + at, from + at, run << PM_PAGE_SHIFT);
    }
    return err;
}

/* Room of the size of a run, at the same place in its 2 MiB, so that huge pages are not split. */
static int reserve(uint64_t addr, uint64_t len, uint64_t *area, uint64_t *to)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    int err = pm_sys_mmap(0, len + PM_HUGE_SIZE, PROT_NONE, flags, -1, 0, area);

    *to = err ? 0 : *area + (addr - *area) % PM_HUGE_SIZE;
    return err;
}

/* Not registered any more, the area goes without an event. */
static void drop_area(struct pm_mm *mm, uint64_t area, uint64_t to, uint64_t len)
{
    pm_sys_ioctl(mm->uffd, UFFDIO_UNREGISTER, &(struct uffdio_range){to, len});
    pm_sys_munmap(area, len + PM_HUGE_SIZE);
}

/* From the i-th page on: how many belong to addresses in a row, or to none any more. */
static uint64_t back_run(struct pm_devmem *vram, uint64_t i, uint64_t *addr)
{
    struct pm_mm *mm = vram->mm;
    uint64_t n = mm->lift.len >> PM_PAGE_SHIFT, slot = mm->lift.slot, run = 1;

    pm_lock(mm);
    *addr = pm_devmem_back(vram, slot + (i << PM_PAGE_SHIFT));
    while (i + run < n && pm_devmem_back(vram, slot + ((i + run) << PM_PAGE_SHIFT)) ==
                              (*addr ? *addr + (run << PM_PAGE_SHIFT) : 0))
        run++;
    mm->lift.back = *addr;
    mm->lift.back_end = *addr + (run << PM_PAGE_SHIFT);
    pm_unlock(mm);
    return run;
}

/* To where they belong by now. */
static void put_back(struct pm_devmem *vram, uint64_t to)
{
    uint64_t n = vram->mm->lift.len >> PM_PAGE_SHIFT, addr, ret;

    for (uint64_t i = 0, run; i < n; i += run) {
        run = back_run(vram, i, &addr);
        if (addr)
            pm_sys_mremap(to + (i << PM_PAGE_SHIFT), run << PM_PAGE_SHIFT, run << PM_PAGE_SHIFT,
                          MREMAP_MAYMOVE | MREMAP_FIXED, addr, &ret);
    }
}

static int carry(struct pm_devmem *vram, uint64_t addr, uint64_t len, uint64_t to)
{
    struct pm_mm *mm = vram->mm;
    uint64_t ret;
    int err;

    pm_lock(mm);
    mm->lift.area = to;
    pm_unlock(mm);
    err = pm_sys_mremap(addr, len, len, lift_flags, to, &ret);
    pm_point(PM_POINT_LIFT);
    if (err)
        return err;
    err = copy_pages(mm, mm->lift.slot, to, len >> PM_PAGE_SHIFT);
    if (err)
        put_back(vram, to);
    return err;
}

/* With the lock held, as the pages are noted already, or about to be: -EAGAIN if one is not what it was. */
static int look(struct pm_mm *mm, const struct pm_lift *lift, bool *any)
{
    uint64_t seen[PM_HUGE_PAGES];
    int err = pm_pagemap_read(mm, lift->addr, lift->n, seen);

    *any = false;
    for (uint64_t i = 0; !err && i < lift->n; i++) {
        bool copy = (seen[i] & PM_ABI_PAGEMAP_PRESENT) && !(seen[i] & PM_ABI_PAGEMAP_FILE);

        *any |= pm_is_there(seen[i]);
        err = lift->copies && !copy ? -EAGAIN : 0;
    }
    return err;
}

/* As many as there is room for. */
static int begin(struct pm_devmem *vram, struct pm_lift *lift, bool *any)
{
    struct pm_mm *mm = vram->mm;
    int err = pm_lock_quiet(mm, lift->addr, lift->addr + (lift->n << PM_PAGE_SHIFT));
    uint64_t slot = 0;

    if (err)
        return err;
    err = look(mm, lift, any);
    if (!err)
        slot = pm_devmem_room(vram, lift->addr, &lift->n);
    if (!err)
        err = slot ? pm_devmem_note(vram, lift->addr, slot, lift->n, lift->writable) : -ENOSPC;
    if (!err) {
        mm->lift.addr = lift->addr;
        mm->lift.len = lift->n << PM_PAGE_SHIFT;
        mm->lift.slot = slot;
    }
    pm_unlock(mm);
    return err;
}

/* Slots whose pages went while they were filled are emptied; after an error all are. */
static void end(struct pm_devmem *vram, int err)
{
    struct pm_mm *mm = vram->mm;

    pm_lock(mm);
    for (uint64_t slot = mm->lift.slot; slot < mm->lift.slot + mm->lift.len; slot += PM_PAGE_SIZE) {
        uint64_t addr = pm_devmem_back(vram, slot);

        if (addr && !err)
            continue;
        pm_slots_empty(mm, slot, PM_PAGE_SIZE);
        if (addr)
            pm_devmem_forget(mm, addr, 1);
    }
    if (!err)
        mm->devices->stats.to_device += mm->lift.len >> PM_PAGE_SHIFT;
    memset(&mm->lift, 0, sizeof(mm->lift));
    pm_unlock(mm);
}

static int lift_masked(struct pm_devmem *vram, struct pm_lift *lift)
{
    struct pm_mm *mm = vram->mm;
    uint64_t len, area = 0, to = 0;
    bool any;
    int err = begin(vram, lift, &any);

    if (err)
        return err;
    len = lift->n << PM_PAGE_SHIFT;
    if (any)
        err = reserve(lift->addr, len, &area, &to);
    if (any && !err)
        err = carry(vram, lift->addr, len, to);
    end(vram, err);
    if (area)
        drop_area(mm, area, to, len);
    pm_wake(mm, lift->addr, len);
    return err;
}

/* The handler of a signal that touched what this thread is about to copy would wait for it, for ever. */
static int lift_unpinned(struct pm_devmem *vram, struct pm_lift *lift)
{
    sigset_t all, outside;
    int err;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &outside);
    err = lift_masked(vram, lift);
    pthread_sigmask(SIG_SETMASK, &outside, NULL);
    return err;
}

int pm_lift(struct pm_devmem *vram, struct pm_lift *lift)
{
    uint64_t end = lift->addr + (lift->n << PM_PAGE_SHIFT);
    int err = -EAGAIN;

    pthread_mutex_lock(&vram->mm->ring_lock);
    if (!pm_pinned(vram->mm, lift->addr, end))
        err = lift_unpinned(vram, lift);
    pthread_mutex_unlock(&vram->mm->ring_lock);
    return err;
}
