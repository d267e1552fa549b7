/* SPDX-License-Identifier: MIT */
/*
 * migrate.c - pages move to device memory.
 *
 * A page moves, and is noted as moved, in one hold of the device lock, so nobody meets one that is nowhere.
 * Before the first page of a 2 MiB range leaves, its holes are made to fault (MISSING): else they would fill
 * with zeroes. The kernel refuses to bring anything into a range, with EAGAIN, while a munmap, mremap,
 * madvise or fork that it has done is not read yet: so what is noted is never out of date where it is used.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "devmem.h"
#include "inline.h"
#include "pagemap.h"
#include "populate.h"

enum { AGAIN_LIMIT = 64 };
static const uint64_t quiet_limit_ns = 1000ULL * 1000 * 1000;

int64_t pm_move_pages(int fd, uint64_t to, uint64_t from, uint64_t len, uint64_t mode)
{
    struct pm_abi_uffdio_move move = {
        .dst = to, .src = from, .len = len, .mode = mode | PM_ABI_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
    int err = pm_sys_ioctl(fd, PM_ABI_UFFDIO_MOVE, &move);

    if (!err)
        return (int64_t)len;
    return move.move > 0 ? move.move : err;
}

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

/* Is a page of a writable vma mapped writable? As pagemap.c has it; what was never touched will be. */
static bool is_writable(struct pm_mm *mm, uint64_t addr, uint64_t entry)
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
            memset(writable, is_writable(mm, addr, seen[0]), n * sizeof(*writable));
        return err;
    }
    err = pm_pagemap_read(mm, addr, n, seen);
    for (uint64_t i = 0; !err && i < n; i++)
        writable[first + i] = is_writable(mm, addr + (i << PM_PAGE_SHIFT), seen[i]);
    return err;
}

/* UFFDIO_MOVE takes pages of locked memory to locked memory only, which the slots are for that long. */
static int64_t move_locked(int fd, uint64_t slot, uint64_t addr, uint64_t len)
{
    int64_t got = pm_sys_mlock(slot, len);

    if (got)
        return got == -EAGAIN ? -EBUSY : got;
    got = pm_move_pages(fd, slot, addr, len, 0);
    pm_sys_munlock(slot, len);
    return got;
}

static int64_t move_run(struct pm_devmem *vram, uint64_t slot, uint64_t addr, uint64_t len)
{
    int fd = vram->mm->arena_fd;
    int64_t got = pm_move_pages(fd, slot, addr, len, 0);

    for (int i = 0; (got == -EAGAIN || got == -EEXIST) && i < AGAIN_LIMIT; i++) {
        /* A slot that could not be emptied when its page went. */
        if (got == -EEXIST)
            pm_sys_madvise(slot, len, MADV_DONTNEED);
        got = pm_move_pages(fd, slot, addr, len, 0);
    }
    return got == -EINVAL && pm_memory_locked() ? move_locked(fd, slot, addr, len) : got;
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
    got = move_run(vram, slot, *addr, n << PM_PAGE_SHIFT);
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
        got = pm_move_pages(vram->mm->arena_fd, slot, addr, n * PM_HUGE_SIZE, 0);
    note_stretch(vram, addr, slot, n, got > 0 ? (uint64_t)got : 0, writable);
    return got;
}

/*
 * From *addr on, huge pages that are alike, by one call. What moves is this process's own, so whether it was
 * writable is what the scan says of its protection. Whatever stops it is for move_out_range() to deal with.
 */
static int move_out_huge(struct pm_devmem *vram, uint64_t *addr, uint64_t end, uint64_t *moved)
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
static int move_out_range(struct pm_devmem *vram, uint64_t addr, uint64_t end, uint64_t *moved)
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

enum way { STAY, MOVE, LIFT };

/* How memory of a vma gets to a device. */
static enum way way_of(const struct pm_mm *mm, const struct pm_vma *vma)
{
    if (vma->flags & (PM_VMA_SHARED | PM_VMA_HUGETLB | PM_VMA_SPECIAL))
        return STAY;
    /* Inline, each touch of a page of the file would be a signal, and each system call on one refused. */
    if (vma->flags & PM_VMA_FILE)
        return pm_is_shmem(vma) && !mm->inline_faults ? LIFT : STAY;
    return (vma->flags & PM_VMA_WRITE) && pm_have(mm, PM_FEAT_UFFD_MOVE) ? MOVE : LIFT;
}

bool pm_movable(const struct pm_mm *mm, const struct pm_vma *vma)
{
    return way_of(mm, vma) != STAY;
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

/* One 2 MiB range, or a part of it, of memory that UFFDIO_MOVE refuses. */
static int lift_range(struct pm_devmem *vram, const struct pm_vma *vma, uint64_t addr, uint64_t end,
                      uint64_t *moved)
{
    uint64_t seen[PM_HUGE_PAGES], n = (end - addr) >> PM_PAGE_SHIFT, start = addr, most = n;
    bool writable[PM_HUGE_PAGES];
    int err = pm_pagemap_read(vram->mm, addr, n, seen);

    for (uint64_t i = 0; !err && i < n; i++)
        writable[i] =
            (vma->flags & PM_VMA_WRITE) && is_writable(vram->mm, addr + (i << PM_PAGE_SHIFT), seen[i]);
    while (!err) {
        const uint64_t *at = seen + ((addr - start) >> PM_PAGE_SHIFT);
        struct pm_lift lift = {.copies = vma->flags & PM_VMA_FILE};
        uint64_t from = addr;

        lift.n = pm_min(most, next_lift(vram, vma, &addr, end, at));
        if (!lift.n || set_missing(vram->mm, vma, addr, addr + (lift.n << PM_PAGE_SHIFT)))
            return 0;
        at += (addr - from) >> PM_PAGE_SHIFT;
        lift.addr = addr;
        lift.writable = writable + (at - seen);
        err = pm_lift(vram, &lift);
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
    int err = move_out_huge(vram, addr, end, moved);

    if (err || *addr != before)
        return err;
    *addr = step_end(vram, before, end);
    return move_out_range(vram, before, *addr, moved);
}

static int lift_step(struct pm_devmem *vram, const struct pm_vma *vma, uint64_t *addr, uint64_t end,
                     uint64_t *moved)
{
    uint64_t before = *addr;

    *addr = step_end(vram, before, end);
    return lift_range(vram, vma, before, *addr, moved);
}

/* With watch_lock held. Memory that cannot be watched, or moved, stays where it is. */
static int move_out_vma(struct pm_devmem *vram, const struct pm_vma *vma, uint64_t start, uint64_t end,
                        uint64_t *moved)
{
    enum way way = way_of(vram->mm, vma);
    int err = 0;

    if (way == STAY || (way == LIFT && pm_memory_locked()) || !pm_watched(vram->mm, start, end))
        return 0;
    if (way == MOVE && set_missing(vram->mm, vma, start, end))
        return 0;
    while (!err && start < end)
        err = way == MOVE ? move_step(vram, &start, end, moved) : lift_step(vram, vma, &start, end, moved);
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
