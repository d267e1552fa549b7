/* SPDX-License-Identifier: MIT */
/*
 * move_out.c - UFFDIO_MOVE to device memory: what is in one 2 MiB range, or huge pages in a row.
 *
 * A page that does not move gets a copy of its own first, if a fork may have shared it, and else stays.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "devmem.h"
#include "pagemap.h"
#include "populate.h"

enum { AGAIN_LIMIT = 64 };

int64_t pm_move_pages(int fd, uint64_t to, uint64_t from, uint64_t len, uint64_t mode)
{
    struct pm_abi_uffdio_move move = {
        .dst = to, .src = from, .len = len, .mode = mode | PM_ABI_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
    int err = pm_sys_ioctl(fd, PM_ABI_UFFDIO_MOVE, &move);

    if (!err)
        return (int64_t)len;
    return move.move > 0 ? move.move : err;
}

/* Is a page of a writable vma mapped writable? As pagemap.c has it; what was never touched will be. */
bool pm_is_writable(struct pm_mm *mm, uint64_t addr, uint64_t entry)
{
    uint64_t zero = mm->features.zero_pfn;

    if (!(entry & PM_ABI_PAGEMAP_PRESENT))
        return !(entry & PM_ABI_PAGEMAP_SWAPPED);
    if (entry & PM_ABI_PAGEMAP_EXCLUSIVE)
        return !(entry & PM_ABI_PAGEMAP_UFFD_WP);
    return (zero && (entry & PM_ABI_PAGEMAP_PFN_MASK) == zero) ||
           pm_pagemap_is(mm, addr, PM_ABI_PAGE_IS_PFNZERO);
}

/* Of the pages of [addr, end), in one 2 MiB range, by their place in it. */
static int learn_writable(struct pm_mm *mm, uint64_t addr, uint64_t end, bool *writable)
{
    uint64_t seen[PM_HUGE_PAGES], first = addr % PM_HUGE_SIZE >> PM_PAGE_SHIFT;
    uint64_t n = (end - addr) >> PM_PAGE_SHIFT;
    int err;

    /* Of a huge page one entry says it for all. */
    if (n == PM_HUGE_PAGES && pm_pagemap_is(mm, addr, PM_ABI_PAGE_IS_HUGE)) {
        err = pm_pagemap_read(mm, addr, 1, seen);
        if (!err)
            memset(writable, pm_is_writable(mm, addr, seen[0]), n * sizeof(*writable));
        return err;
    }
    err = pm_pagemap_read(mm, addr, n, seen);
    for (uint64_t i = 0; !err && i < n; i++)
        writable[first + i] = pm_is_writable(mm, addr + (i << PM_PAGE_SHIFT), seen[i]);
    return err;
}

/*
 * Pages to slots: bytes, from the first on, or an errno. Once Linux 6.18 has met a page that is busy for a
 * moment, it forgets in the same call what it moves next, tries to move it again, finds it at its target
 * (-EEXIST), and tells only of what it had moved before. The slots were empty, so what is there has moved.
 */
static int64_t take(struct pm_mm *mm, uint64_t slot, uint64_t addr, uint64_t len)
{
    uint64_t done;
    int64_t got = pm_slots_ready(mm, slot, len);

    if (got)
        return got;
    got = pm_move_pages(mm->arena_fd, slot, addr, len, 0);
    done = got > 0 ? (uint64_t)got : 0;
    if (done < len)
        done += pm_pagemap_there(mm, slot + done, len - done);
    return done ? (int64_t)done : got;
}

/* UFFDIO_MOVE takes pages of locked memory to locked memory only, which the slots are for that long. */
static int64_t move_locked(struct pm_mm *mm, uint64_t slot, uint64_t addr, uint64_t len)
{
    int64_t got = pm_sys_mlock(slot, len);

    if (got)
        return got == -EAGAIN ? -EBUSY : got;
    got = take(mm, slot, addr, len);
    pm_sys_munlock(slot, len);
    return got;
}

static int64_t move_run(struct pm_mm *mm, uint64_t slot, uint64_t addr, uint64_t len)
{
    int64_t got = take(mm, slot, addr, len);

    for (int i = 0; got == -EAGAIN && i < AGAIN_LIMIT; i++)
        got = take(mm, slot, addr, len);
    return got == -EINVAL && pm_memory_locked() ? move_locked(mm, slot, addr, len) : got;
}

/* Pages of [*addr, end), in one 2 MiB range, from *addr on. -EBUSY at one that does not move. */
static int move_out(struct pm_devmem *vram, uint64_t *addr, uint64_t end, const bool *writable,
                    uint64_t *moved)
{
    struct pm_devices *devices = vram->mm->devices;
    uint64_t next = *addr, place = *addr % PM_HUGE_SIZE >> PM_PAGE_SHIFT, slot, n;
    int64_t got;

    if (pm_resident(devices, *addr)) {
        *addr += PM_PAGE_SIZE;
        return 0;
    }
    if (pm_resident_next(devices, &next, end))
        end = next;
    n = (end - *addr) >> PM_PAGE_SHIFT;
    slot = pm_devmem_room(vram, *addr, &n);
    if (!slot)
        return -ENOSPC;
    /* So that noting cannot fail once they have moved. */
    if (pm_devmem_ready(vram, *addr, slot, n))
        return -ENOMEM;
    got = move_run(vram->mm, slot, *addr, n << PM_PAGE_SHIFT);
    if (got < 0) {
        pm_devmem_unready(vram, *addr, slot, n);
        return got == -EAGAIN ? -EBUSY : (int)got;
    }
    pm_devmem_note_ready(vram, *addr, slot, n, (uint64_t)got >> PM_PAGE_SHIFT, writable + place);
    devices->stats.to_device += (uint64_t)got >> PM_PAGE_SHIFT;
    *moved += (uint64_t)got >> PM_PAGE_SHIFT;
    *addr += (uint64_t)got;
    return 0;
}

/* How many of n 2 MiB ranges in a row have nothing on a device, and will be noted without fail. */
static uint64_t ready_stretch(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n)
{
    uint64_t ready = 0;

    for (uint64_t at; ready < n; ready++, addr += PM_HUGE_SIZE, slot += PM_HUGE_SIZE) {
        at = addr;
        if (pm_resident_next(vram->mm->devices, &at, addr + PM_HUGE_SIZE) ||
            pm_devmem_ready(vram, addr, slot, PM_HUGE_PAGES))
            break;
    }
    return ready;
}

/* Of n 2 MiB ranges that are ready this many bytes have moved. */
static void note_stretch(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n, uint64_t bytes,
                         bool writable)
{
    bool all[PM_HUGE_PAGES];

    memset(all, writable, sizeof(all));
    vram->mm->devices->stats.to_device += bytes >> PM_PAGE_SHIFT;
    for (uint64_t moved; n; n--, addr += PM_HUGE_SIZE, slot += PM_HUGE_SIZE, bytes -= moved) {
        moved = pm_min(bytes, PM_HUGE_SIZE);
        if (moved)
            pm_devmem_note_ready(vram, addr, slot, PM_HUGE_PAGES, moved >> PM_PAGE_SHIFT, all);
        else
            pm_devmem_unready(vram, addr, slot, PM_HUGE_PAGES);
    }
}

/* With the lock held: bytes that moved, 0: none, or an errno. */
static int64_t move_stretch(struct pm_devmem *vram, uint64_t addr, uint64_t end, bool writable)
{
    uint64_t n = (end - addr) / PM_HUGE_SIZE, slot = pm_devmem_blocks(vram, &n);
    int64_t got = 0;

    n = ready_stretch(vram, addr, slot, n);
    if (n)
        got = take(vram->mm, slot, addr, n * PM_HUGE_SIZE);
    note_stretch(vram, addr, slot, n, got > 0 ? (uint64_t)got : 0, writable);
    return got;
}

/*
 * From *addr on, huge pages that are alike, by one call. What moves is this process's own, so whether it was
 * writable is what the scan says of its protection. Whatever stops it is for pm_move_range() to deal with.
 */
int pm_move_huge(struct pm_devmem *vram, uint64_t *addr, uint64_t end, uint64_t *moved)
{
    const uint64_t kinds = PM_ABI_PAGE_IS_WRITTEN | PM_ABI_PAGE_IS_PFNZERO;
    uint64_t most = pm_min(end, *addr + PM_STRETCH * PM_HUGE_SIZE), kind = 0;
    int64_t got;
    int err;

    if (*addr % PM_HUGE_SIZE || end - *addr < PM_HUGE_SIZE || vram->exclusive || vram->aim_slot)
        return 0;
    most = pm_pagemap_huge_alike(vram->mm, *addr, most & ~(PM_HUGE_SIZE - 1), kinds, &kind);
    most &= ~(PM_HUGE_SIZE - 1);
    if (most <= *addr)
        return 0;
    err = pm_lock_quiet(vram->mm, *addr, most);
    if (err)
        return err;
    got = move_stretch(vram, *addr, most, kind != 0);
    pm_unlock(vram->mm);
    if (got > 0) {
        *addr += (uint64_t)got;
        *moved += (uint64_t)got >> PM_PAGE_SHIFT;
    }
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

/* Where in its 2 MiB a page of a huge page would be. */
static bool may_be_part(struct pm_mm *mm, uint64_t addr)
{
    uint64_t entry, first = addr & ~(PM_HUGE_SIZE - 1);

    if (pm_pagemap_read(mm, addr, 1, &entry) || !(entry & PM_ABI_PAGEMAP_PRESENT))
        return false;
    entry &= PM_ABI_PAGEMAP_PFN_MASK;
    return entry % PM_HUGE_PAGES == (addr - first) >> PM_PAGE_SHIFT;
}

/* One 2 MiB range, or a part of it. A page that is pinned stays. */
int pm_move_range(struct pm_devmem *vram, uint64_t addr, uint64_t end, uint64_t *moved)
{
    bool writable[PM_HUGE_PAGES];
    uint64_t tried = UINT64_MAX, all = UINT64_MAX;
    int wrong = learn_writable(vram->mm, addr, end, writable);

    if (wrong)
        return wrong;
    while (addr < end) {
        int err = pm_lock_quiet(vram->mm, addr, end);

        if (err)
            return err;
        while (!err && addr < end)
            err = move_out(vram, &addr, end, writable, moved);
        pm_unlock(vram->mm);
        if (err == -EINVAL || err == -ENOENT)
            return 0; /* another kind of memory than when it was looked up */
        if (err != -EBUSY)
            return err;
        if (tried != addr) {
            break_cow(vram->mm, tried = addr, end);
        } else if (all != addr && may_be_part(vram->mm, addr)) {
            /* Of a large folio all pages have to be this process's own. */
            all = addr;
            pm_populate(vram->mm, addr & ~(PM_HUGE_SIZE - 1), (addr | (PM_HUGE_SIZE - 1)) + 1, true);
        } else {
            addr += PM_PAGE_SIZE;
        }
    }
    return 0;
}
