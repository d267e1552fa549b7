/* SPDX-License-Identifier: MIT */
/*
 * slots.c - the slots of device memory: which are free, set aside or in use, block by block.
 *
 * A page goes to the slot at its own place in a 2 MiB block, so a run of pages needs a run of slots. What a
 * driver has set aside (pm_devmem_alloc()) is in use, but no page is noted in it: see note.c.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "devmem.h"

static bool is_free(const struct pm_block *block, uint64_t place, uint64_t n)
{
    for (uint64_t i = place; block->back && i < place + n; i++) {
        if (block->back[i])
            return false;
    }
    return !block->whole;
}

static uint64_t unused_block(struct pm_devmem *vram)
{
    for (uint64_t i = 0; i < vram->nblocks; i++) {
        uint64_t block = (vram->hint + i) % vram->nblocks;

        if (vram->blocks[block].used)
            continue;
        vram->hint = block;
        return block;
    }
    return vram->nblocks;
}

uint64_t pm_devmem_slots(struct pm_devmem *vram, uint64_t addr, uint64_t n)
{
    struct pm_devices *devices = vram->mm->devices;
    uint64_t first = addr & ~(PM_HUGE_SIZE - 1), place = pm_place_of(addr), block;

    for (uint64_t at = first; pm_resident_next(devices, &at, first + PM_HUGE_SIZE); at += PM_PAGE_SIZE) {
        uint64_t slot = pm_resident(devices, at);

        if (pm_devmem_of(devices, slot) != vram)
            continue;
        block = pm_block_of(vram, slot);
        if (is_free(&vram->blocks[block], place, n))
            return vram->base + block * PM_HUGE_SIZE + (place << PM_PAGE_SHIFT);
        break;
    }
    block = unused_block(vram);
    return block == vram->nblocks ? 0 : vram->base + block * PM_HUGE_SIZE + (place << PM_PAGE_SHIFT);
}

static bool has_slot(const struct pm_devmem *vram, uint64_t slot)
{
    return slot >= vram->base && pm_block_of(vram, slot) < vram->nblocks;
}

/* How many slots from this one on, in its block, are set aside, and not in use. */
static uint64_t reserved_run(const struct pm_devmem *vram, uint64_t slot, uint64_t n)
{
    const struct pm_block *block;
    uint64_t place = pm_place_of(slot), run = 0;

    if (!has_slot(vram, slot))
        return 0;
    block = &vram->blocks[pm_block_of(vram, slot)];
    n = block->back ? pm_min(n, PM_HUGE_PAGES - place) : 0;
    while (run < n && block->back[place + run] == PM_RESERVED)
        run++;
    return run;
}

uint64_t pm_devmem_room(struct pm_devmem *vram, uint64_t addr, uint64_t *n)
{
    if (vram->aim_slot) {
        uint64_t slot = vram->aim_slot + (addr - vram->aim_addr);

        *n = reserved_run(vram, slot, *n);
        return *n ? slot : 0;
    }
    *n = pm_min(*n, vram->limit - vram->used);
    return *n ? pm_devmem_slots(vram, addr, *n) : 0;
}

uint64_t pm_devmem_blocks(struct pm_devmem *vram, uint64_t *n)
{
    uint64_t first = unused_block(vram), run = 0;
    uint64_t most = pm_min(*n, (vram->limit - vram->used) >> PM_HUGE_ORDER);

    most = pm_min(most, vram->nblocks - first);
    while (run < most && !vram->blocks[first + run].used)
        run++;
    *n = run;
    return vram->base + first * PM_HUGE_SIZE;
}

/* The addresses of a block's slots. */
uint64_t *pm_block_back(struct pm_devices *devices, struct pm_block *block)
{
    if (!block->whole)
        return block->back;
    block->back = pm_node_promised(devices);
    for (uint64_t i = 0; i < PM_HUGE_PAGES; i++)
        block->back[i] = block->whole + (i << PM_PAGE_SHIFT);
    block->whole = 0;
    return block->back;
}

int pm_slots_ready(struct pm_mm *mm, uint64_t slot, uint64_t len)
{
    return mm->devices->leftover && pm_sys_madvise(slot, len, MADV_DONTNEED) ? -EBUSY : 0;
}

void pm_slots_empty(struct pm_mm *mm, uint64_t slot, uint64_t len)
{
    if (pm_sys_madvise(slot, len, MADV_DONTNEED))
        mm->devices->leftover = true;
}

/* The page tables of unused blocks go: where one is, a huge page would have to be split to be moved in. */
void pm_block_drop_tables(uint64_t start, uint64_t end)
{
    if (start < end)
        pm_sys_madvise(start, end - start, MADV_DONTNEED);
}

/* Is the block unused now that so many slots of it are free? */
bool pm_block_release(struct pm_devices *devices, struct pm_devmem *vram, struct pm_block *block, uint64_t n)
{
    vram->used -= n;
    block->used -= n;
    if (block->used)
        return false;
    if (block->back)
        pm_node_free(devices, block->back);
    block->back = NULL;
    return true;
}

/* Slots in a row, in one block. Is the block unused now? */
bool pm_slots_free(struct pm_devices *devices, struct pm_devmem *vram, uint64_t slot, uint64_t n)
{
    struct pm_block *block = &vram->blocks[pm_block_of(vram, slot)];

    if (block->whole && n == PM_HUGE_PAGES) {
        block->whole = 0;
        devices->promised--;
    } else {
        memset(pm_block_back(devices, block) + pm_place_of(slot), 0, n * sizeof(*block->back));
    }
    return pm_block_release(devices, vram, block, n);
}

/* Slots for a run of pages: how many there was room for. */
static uint64_t reserve(struct pm_devmem *vram, uint64_t addr, uint64_t n, uint64_t *pfns)
{
    struct pm_devices *devices = vram->mm->devices;
    uint64_t slot = pm_devmem_room(vram, addr, &n);

    if (!slot || pm_devmem_note(vram, addr, slot, 0, NULL))
        return 0;
    for (uint64_t i = 0; i < n; i++) {
        struct pm_block *block = &vram->blocks[pm_block_of(vram, slot)];

        block->back[pm_place_of(slot) + i] = PM_RESERVED;
        block->used++;
        vram->used++;
        pfns[i] = pm_slot_pfn(devices, slot + (i << PM_PAGE_SHIFT));
    }
    return n;
}

/* How many pages in a row are wanted, in one 2 MiB range. */
static uint64_t wanted_run(uint64_t addr, uint64_t n, const uint8_t *wanted)
{
    uint64_t run = 0;

    n = pm_min(n, PM_HUGE_PAGES - pm_place_of(addr));
    while (run < n && wanted[run])
        run++;
    return run;
}

int pm_devmem_alloc(pm_devmem *vram, uint64_t start, uint64_t n, const uint8_t *wanted, uint64_t *pfns)
{
    struct pm_mm *mm = vram->mm;
    int err = pm_is_pages(start, n) ? pm_mm_enter(mm) : -EINVAL;

    if (err)
        return err;
    memset(pfns, 0, n * sizeof(*pfns));
    pm_lock(mm);
    for (uint64_t i = 0, run; i < n; i += run ? run : 1) {
        uint64_t addr = start + (i << PM_PAGE_SHIFT);

        run = wanted_run(addr, n - i, wanted + i);
        if (run)
            reserve(vram, addr, run, pfns + i);
    }
    pm_unlock(mm);
    pm_mm_exit(mm);
    return 0;
}

int pm_devmem_free(pm_devmem *vram, uint64_t n, const uint64_t *pfns)
{
    struct pm_mm *mm = vram->mm;
    int err = n <= PM_USER_END >> PM_PAGE_SHIFT ? pm_mm_check(mm) : -EINVAL;

    if (err)
        return err;
    pm_lock(mm);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t slot = pm_pfn_slot(pfns[i]);

        if (reserved_run(vram, slot, 1) && pm_slots_free(mm->devices, vram, slot, 1))
            pm_block_drop_tables(slot & ~(PM_HUGE_SIZE - 1), (slot | (PM_HUGE_SIZE - 1)) + 1);
    }
    pm_unlock(mm);
    return 0;
}

int pm_devmem_range(pm_devmem *vram, uint64_t *pfn, uint64_t *n)
{
    int err = pm_mm_owned(vram->mm) ? 0 : -ESRCH;

    if (err)
        return err;
    pm_lock(vram->mm);
    *pfn = pm_slot_pfn(vram->mm->devices, vram->base);
    *n = vram->nblocks << PM_HUGE_ORDER;
    pm_unlock(vram->mm);
    return 0;
}

int pm_devmem_addrs(pm_devmem *vram, uint64_t pfn, uint64_t n, uint64_t *ret)
{
    struct pm_mm *mm = vram->mm;
    uint64_t slot = pm_pfn_slot(pfn);
    int err = pm_mm_check(mm);

    if (err)
        return err;
    if (slot < vram->base || pm_block_of(vram, slot) >= vram->nblocks ||
        n > (vram->nblocks << PM_HUGE_ORDER) - ((slot - vram->base) >> PM_PAGE_SHIFT))
        return -EINVAL;
    pm_lock(mm);
    for (uint64_t i = 0; i < n; i++, slot += PM_PAGE_SIZE)
        ret[i] = pm_devmem_back(vram, slot);
    pm_unlock(mm);
    return 0;
}
