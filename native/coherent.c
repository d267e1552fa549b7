/* SPDX-License-Identifier: MIT */
/*
 * coherent.c - device memory that the CPU reaches as well: MEMORY_DEVICE_COHERENT.
 *
 * A page that migrates is exchanged for another one: it leaves for the arena, as to other device memory, and
 * its contents come home at once in a new page. Nobody faults on it, and nothing tells of what becomes of it:
 * so it is known by its PFN. As long as that page stands at that address it is the device's; one that the
 * CPU's copy-on-write put in its place is not, as in the kernel.
 */
#include <errno.h>
#include <sys/mman.h>

#include "devmem.h"
#include "pagemap.h"

enum { MAX_COHERENT = 2047, USED = 1 };
static const uint64_t settle_limit_ns = 1000ULL * 1000 * 1000;

static uint64_t note_of(const struct pm_devmem *vram, uint64_t pfn)
{
    return pfn << PM_PAGE_SHIFT | vram->coherent << 1 | USED;
}

static bool is_of(const struct pm_devmem *vram, uint64_t note)
{
    return !vram || (note & (PM_PAGE_SIZE - 1)) >> 1 == vram->coherent;
}

static struct pm_devmem *holder(struct pm_devices *devices, uint64_t note)
{
    struct pm_devmem *vram = devices->list;

    while (vram && (!vram->coherent || !is_of(vram, note)))
        vram = vram->next;
    return vram;
}

static void forget(struct pm_devices *devices, uint64_t *note)
{
    struct pm_devmem *vram = holder(devices, *note);

    if (vram)
        vram->held--;
    *note = 0;
}

/* The note of a page that stands at its address still; one that does not is forgotten. */
static uint64_t current_note(struct pm_mm *mm, uint64_t addr, uint64_t entry)
{
    uint64_t *note = pm_tree_at(mm->devices, mm->devices->coherent, addr, false);

    if (!note || !*note || !(entry & PM_ABI_PAGEMAP_PRESENT))
        return 0;
    if ((entry & PM_ABI_PAGEMAP_PFN_MASK) == *note >> PM_PAGE_SHIFT)
        return *note;
    forget(mm->devices, note);
    return 0;
}

void pm_coherent_drop(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_devices *devices = mm->devices;

    for (uint64_t addr = start; pm_tree_next(devices->coherent, &addr, end); addr += PM_PAGE_SIZE)
        forget(devices, pm_tree_at(devices, devices->coherent, addr, false));
}

void pm_coherent_moved(struct pm_mm *mm, uint64_t from, uint64_t to, uint64_t len)
{
    struct pm_devices *devices = mm->devices;

    for (uint64_t addr = from; pm_tree_next(devices->coherent, &addr, from + len); addr += PM_PAGE_SIZE) {
        uint64_t *old = pm_tree_at(devices, devices->coherent, addr, false);
        uint64_t *note = pm_tree_at(devices, devices->coherent, addr - from + to, true);

        if (!note)
            return;
        if (*note)
            forget(devices, note);
        *note = *old;
        *old = 0;
    }
}

void pm_coherent_first(struct pm_devmem *vram, uint64_t *addr)
{
    struct pm_devices *devices = vram->mm->devices;

    for (*addr = 0; pm_tree_next(devices->coherent, addr, PM_USER_END); *addr += PM_PAGE_SIZE) {
        if (is_of(vram, *pm_tree_at(devices, devices->coherent, *addr, false)))
            return;
    }
}

static bool taken(const struct pm_devices *devices, uint64_t number)
{
    for (const struct pm_devmem *vram = devices->list; vram; vram = vram->next) {
        if (vram->coherent == number)
            return true;
    }
    return false;
}

int pm_devmem_coherent(pm_devmem *vram)
{
    struct pm_mm *mm = vram->mm;
    uint64_t number = 1;
    int err = pm_have(mm, PM_FEAT_PFN) ? pm_mm_check(mm) : -EOPNOTSUPP;

    if (err)
        return err;
    pm_lock(mm);
    while (taken(mm->devices, number))
        number++;
    if (vram->used || vram->coherent)
        err = -EBUSY;
    else if (number > MAX_COHERENT)
        err = -ENOSPC;
    else
        vram->coherent = number;
    pm_unlock(mm);
    return err;
}

static void read_pages(struct pm_mm *mm, const struct pm_devmem *vram, uint64_t start, uint64_t n,
                       const uint64_t *seen, uint8_t *ret)
{
    pm_lock(mm);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t note = mm->devices ? current_note(mm, start + (i << PM_PAGE_SHIFT), seen[i]) : 0;

        ret[i] = note && is_of(vram, note);
    }
    pm_unlock(mm);
}

int pm_coherent_pages(pm_mm *mm, const pm_devmem *vram, uint64_t start, uint64_t n, uint8_t *ret)
{
    uint64_t seen[PM_HUGE_PAGES], step;
    int err = pm_is_pages(start, n) ? pm_mm_enter(mm) : -EINVAL;

    if (err)
        return err;
    for (uint64_t i = 0; !err && i < n; i += step) {
        step = pm_min(n - i, PM_HUGE_PAGES);
        err = pm_pagemap_read(mm, start + (i << PM_PAGE_SHIFT), step, seen);
        if (!err)
            read_pages(mm, vram, start + (i << PM_PAGE_SHIFT), step, seen, ret + i);
    }
    pm_mm_exit(mm);
    return err;
}

/* With the lock held: a staged page comes home in a new one. Its PFN, 0: it is home as it was, or an errno.
 */
static int64_t renew(struct pm_mm *mm, uint64_t addr)
{
    static const char zeroes[PM_PAGE_SIZE] __attribute__((aligned(4096)));
    uint64_t slot = pm_resident(mm->devices, addr), seen;
    bool writable = pm_resident_word(mm->devices, addr) & PM_RESIDENT_WRITE;
    struct uffdio_copy copy = {.dst = addr, .src = slot, .len = PM_PAGE_SIZE};
    int err = pm_pagemap_read(mm, slot, 1, &seen);

    if (!err && !pm_is_there(seen))
        copy.src = (uintptr_t)zeroes;
    if (!err)
        err = pm_sys_ioctl(mm->uffd, UFFDIO_COPY, &copy);
    if (err && err != -EEXIST)
        return err;
    pm_slots_empty(mm, slot, PM_PAGE_SIZE);
    pm_devmem_forget(mm, addr, 1);
    if (!writable)
        pm_home_readonly(mm, addr, addr + PM_PAGE_SIZE);
    if (err || pm_pagemap_read(mm, addr, 1, &seen))
        return 0;
    return (int64_t)(seen & PM_ABI_PAGEMAP_PFN_MASK);
}

/* With the lock held: all staged pages from *addr on, in pages of the device's if `to_device`. */
static int settle_some(struct pm_devmem *vram, uint64_t *addr, uint64_t end, bool to_device,
                       uint64_t *settled)
{
    struct pm_devices *devices = vram->mm->devices;

    for (; pm_resident_next(devices, addr, end); *addr += PM_PAGE_SIZE) {
        uint64_t *note = pm_tree_at(devices, devices->coherent, *addr, true);
        int64_t pfn;

        if (pm_devmem_of(devices, pm_resident(devices, *addr)) != vram)
            continue;
        pfn = note ? renew(vram->mm, *addr) : -ENOMEM;
        if (pfn < 0)
            return (int)pfn;
        if (note && *note)
            forget(devices, note);
        if (pfn && to_device) {
            *note = note_of(vram, (uint64_t)pfn);
            vram->held++;
        }
        *settled += pfn != 0;
    }
    return 0;
}

/* What does not settle in time is at home at the next touch, or at close, as it was. */
static int settle(struct pm_devmem *vram, uint64_t start, uint64_t end, bool to_device, uint64_t *settled)
{
    uint64_t until = pm_now_ns() + settle_limit_ns;
    int err;

    for (;;) {
        pm_lock(vram->mm);
        err = settle_some(vram, &start, end, to_device, settled);
        pm_unlock(vram->mm);
        if (err != -EAGAIN || pm_now_ns() > until)
            return err == -EAGAIN ? -EBUSY : err;
        pm_doze();
    }
}

/* From the first page at or after *addr on that is (`of` its memory, NULL: any) or is not coherent: how many.
 */
static uint64_t next_run(struct pm_mm *mm, const struct pm_devmem *of, bool wanted, uint64_t *addr,
                         uint64_t end)
{
    uint64_t seen[PM_HUGE_PAGES], start = *addr, n = (end - start) >> PM_PAGE_SHIFT, i = 0, first;

    if (pm_pagemap_read(mm, start, n, seen))
        n = 0;
    pm_lock(mm);
    for (uint64_t k = 0; k < n; k++) {
        uint64_t note = current_note(mm, start + (k << PM_PAGE_SHIFT), seen[k]);

        seen[k] = note && is_of(of, note);
    }
    pm_unlock(mm);
    while (i < n && seen[i] != wanted)
        i++;
    for (first = i; i < n && seen[i] == wanted;)
        i++;
    *addr = start + (first << PM_PAGE_SHIFT);
    return i - first;
}

/* One 2 MiB range, or a part of it. */
static int exchange(struct pm_devmem *vram, bool to_device, uint64_t addr, uint64_t end, uint64_t *moved)
{
    const struct pm_devmem *of = to_device ? NULL : vram;
    int err = 0;

    while (!err && addr < end) {
        uint64_t n = next_run(vram->mm, of, !to_device, &addr, end), staged = 0;
        int wrong;

        if (!n)
            break;
        if (to_device)
            n = pm_min(n, vram->limit - vram->held);
        if (!n)
            return -ENOSPC;
        err = pm_move_out(vram, addr, addr + (n << PM_PAGE_SHIFT), &staged);
        wrong = settle(vram, addr, addr + (n << PM_PAGE_SHIFT), to_device, moved);
        err = err ? err : wrong;
        addr += n << PM_PAGE_SHIFT;
    }
    return err;
}

/* Whether any page of [*addr, end) is noted, and the first that is. */
static bool next_note(struct pm_mm *mm, uint64_t *addr, uint64_t end)
{
    bool found;

    pm_lock(mm);
    found = pm_tree_next(mm->devices->coherent, addr, end);
    pm_unlock(mm);
    return found;
}

static int exchange_all(struct pm_devmem *vram, bool to_device, uint64_t start, uint64_t end, uint64_t *moved)
{
    int err = 0;

    while (!err && start < end && (to_device || next_note(vram->mm, &start, end))) {
        uint64_t next = pm_min(end, (start & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);

        err = exchange(vram, to_device, start, next, moved);
        start = next;
    }
    return err;
}

int pm_coherent_take(struct pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved)
{
    return exchange_all(vram, true, start, end, moved);
}

/* Notes of pages that do not move any more go with the memory: it is system memory from here on. */
int pm_coherent_leave(struct pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved)
{
    int err = exchange_all(vram, false, start, end, moved);
    struct pm_devices *devices = vram->mm->devices;

    pm_lock(vram->mm);
    for (uint64_t addr = start; pm_tree_next(devices->coherent, &addr, end); addr += PM_PAGE_SIZE) {
        uint64_t *note = pm_tree_at(devices, devices->coherent, addr, false);

        if (is_of(vram, *note))
            forget(devices, note);
    }
    pm_unlock(vram->mm);
    return err == -EINVAL ? 0 : err;
}
