/* SPDX-License-Identifier: MIT */
/*
 * home_child.c - a forked child has what was on a device at the fork: the monitor copies it there.
 */
#include <errno.h>
#include <string.h>

#include "devmem.h"
#include "pagemap.h"

enum { AGAIN_LIMIT = 64 };

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
    while (i < n && !pm_is_there(seen[i]))
        i++;
    for (*unused = first = i; i < n && pm_is_there(seen[i]);)
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

        /* Only memory that userfaultfd serves can be filled in the child. */
        if (pm_guarded(devices, addr)) {
            devices->stats.child_lost += n;
            addr += n << PM_PAGE_SHIFT;
            continue;
        }
        /* They were at home still when the child was made. */
        unused = n;
        n = from ? used_run(mm, from, n, &unused) : 0;
        addr += unused << PM_PAGE_SHIFT;
        if (n && !copy_to_child(child_uffd, addr, from + (unused << PM_PAGE_SHIFT), n))
            devices->stats.child_lost += n;
        addr += n << PM_PAGE_SHIFT;
    }
}
