/* SPDX-License-Identifier: MIT */
/*
 * exclusive.c - pages that a device has to itself, for atomics: make_device_exclusive().
 *
 * The kernel takes the page's mapping away until the CPU touches it again. Here the page moves, without a
 * copy, to an arena that is nobody's device memory, and a touch of the CPU brings it back. Device writes and
 * atomics that are under way are waited for first, so the CPU sees all of each or nothing.
 */
#include <errno.h>

#include "access.h"
#include "devmem.h"
#include "inline.h"
#include "populate.h"
#include "table.h"

enum { AGAIN_LIMIT = 64 };

int pm_exclusive_create(pm_mm *mm, uint64_t size, pm_devmem **ret)
{
    int err = pm_devmem_create(mm, size, 0, ret);

    if (err)
        return err;
    pm_lock(mm);
    (*ret)->exclusive = true;
    mm->devices->exclusive = *ret;
    pm_unlock(mm);
    return 0;
}

/* How far memory goes that may be written, and is not of huge pages that cannot be split. */
static uint64_t writable_end(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    const uint64_t mask = PM_VMA_WRITE | PM_VMA_HUGETLB | PM_VMA_SPECIAL;
    struct pm_vma vma;

    while (start < end && pm_vma_query(mm, start, &vma) == 0 && vma.start <= start &&
           (vma.flags & mask) == PM_VMA_WRITE)
        start = vma.end;
    return pm_min(start, end);
}

/* As get_user_pages(FOLL_WRITE) does: bytes from start on that are there, and this process's own. */
static int fault_pages(struct pm_mm *mm, uint64_t start, uint64_t *end)
{
    int err = pm_populate(mm, start, *end, true);

    if (!err)
        return 0;
    for (uint64_t addr = start; addr < *end; addr += PM_PAGE_SIZE) {
        err = pm_populate(mm, addr, addr + PM_PAGE_SIZE, true);
        if (!err)
            continue;
        *end = addr;
        return addr > start ? 0 : err;
    }
    return 0;
}

static void read_pfns(struct pm_devmem *arena, uint64_t start, uint64_t n, uint64_t *pfns)
{
    struct pm_devices *devices = arena->mm->devices;

    pm_lock(arena->mm);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t slot = pm_resident(devices, start + (i << PM_PAGE_SHIFT));

        pfns[i] = 0;
        if (slot && pm_devmem_of(devices, slot) == arena)
            pfns[i] = PM_PFN_VALID | PM_PFN_WRITE | pm_slot_pfn(devices, slot);
    }
    pm_unlock(arena->mm);
}

/* Is any of it memory that leaves? */
static bool any_movable(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_vma vma;

    while (start < end && pm_vma_query(mm, start, &vma) == 0 && vma.start < end) {
        if (pm_movable(mm, &vma))
            return true;
        start = vma.end;
    }
    return false;
}

int pm_exclusive_fault(pm_devmem *arena, uint64_t start, uint64_t *end)
{
    struct pm_mm *mm = arena->mm;
    int err = pm_is_interval(start, *end) ? pm_mm_enter(mm) : -EINVAL;

    if (err)
        return err;
    *end = writable_end(mm, start, *end);
    pm_home_touch(mm, start, *end);
    err = start < *end ? fault_pages(mm, start, end) : -EFAULT;
    if (!err && !any_movable(mm, start, *end))
        err = -EBUSY;
    pm_mm_exit(mm);
    return err;
}

static bool lacks(const uint64_t *pfns, uint64_t n)
{
    for (uint64_t i = 0; i < n; i++) {
        if (!pfns[i])
            return true;
    }
    return false;
}

int pm_exclusive(pm_devmem *arena, uint64_t start, uint64_t end, uint64_t *pfns)
{
    struct pm_mm *mm = arena->mm;
    uint64_t moved, n = (end - start) >> PM_PAGE_SHIFT;
    int err = pm_is_interval(start, end) ? pm_mm_enter(mm) : -EINVAL;

    if (err)
        return err;
    err = pm_inline_join(mm);
    /* What the CPU touches before it is read here has gone home: it is taken again. */
    for (int i = 0; i < AGAIN_LIMIT; i++) {
        moved = 0;
        if (!err) {
            pthread_mutex_lock(&mm->watch_lock);
            err = pm_move_out(arena, start, end, &moved);
            pthread_mutex_unlock(&mm->watch_lock);
        }
        read_pfns(arena, start, n, pfns);
        if (err || !moved || !lacks(pfns, n))
            break;
    }
    pm_mm_exit(mm);
    return err;
}

int pm_exclusive_pfns(pm_devmem *arena, uint64_t start, uint64_t end, uint64_t *pfns)
{
    int err = pm_is_interval(start, end) ? pm_mm_check(arena->mm) : -EINVAL;

    if (!err)
        read_pfns(arena, start, (end - start) >> PM_PAGE_SHIFT, pfns);
    return err;
}
