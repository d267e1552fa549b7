/* SPDX-License-Identifier: MIT */
/*
 * note.c - what is noted of pages that are on a device: the tree says in which slot a page is, the block of a
 * slot whose page it is, and both change together. With the device lock held.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "devmem.h"

/* Could it be noted by one word, in the tree and in the block? */
static bool is_whole(const struct pm_block *block, uint64_t addr, uint64_t slot, uint64_t n)
{
    return n == PM_HUGE_PAGES && addr % PM_HUGE_SIZE == 0 && slot % PM_HUGE_SIZE == 0 && !block->used;
}

int pm_devmem_ready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n)
{
    struct pm_devices *devices = vram->mm->devices;

    if (!is_whole(&vram->blocks[pm_block_of(vram, slot)], addr, slot, n))
        return pm_devmem_note(vram, addr, slot, 0, NULL);
    return pm_resident_ready(devices, addr) && pm_node_promise(devices, 2) ? 0 : -ENOMEM;
}

void pm_devmem_unready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n)
{
    if (is_whole(&vram->blocks[pm_block_of(vram, slot)], addr, slot, n))
        vram->mm->devices->promised -= 2;
}

static void count_noted(struct pm_devmem *vram, struct pm_block *block, uint64_t n, uint64_t fresh)
{
    block->used += fresh;
    if (n && vram->timeslice_ns)
        block->until_ns = pm_now_ns() + vram->timeslice_ns;
    block->used_at = ++vram->clock;
    vram->used += fresh;
    vram->mm->devices->stats.resident += n;
}

static void note_whole(struct pm_devmem *vram, uint64_t addr, uint64_t slot, bool writable)
{
    struct pm_devices *devices = vram->mm->devices;
    struct pm_block *block = &vram->blocks[pm_block_of(vram, slot)];

    if (block->back)
        pm_node_free(devices, block->back);
    block->back = NULL;
    block->whole = addr;
    pm_resident_set_whole(devices, addr, slot | PM_RESIDENT | (writable ? PM_RESIDENT_WRITE : 0));
    count_noted(vram, block, PM_HUGE_PAGES, PM_HUGE_PAGES);
}

void pm_devmem_note_ready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n, uint64_t moved,
                          const bool *writable)
{
    bool whole = is_whole(&vram->blocks[pm_block_of(vram, slot)], addr, slot, n);

    if (whole && moved == n && (memchr(writable, !writable[0], n) == NULL)) {
        note_whole(vram, addr, slot, writable[0]);
        return;
    }
    if (whole)
        vram->mm->devices->promised -= 2;
    pm_devmem_note(vram, addr, slot, moved, writable);
}

int pm_devmem_note(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n, const bool *writable)
{
    struct pm_devices *devices = vram->mm->devices;
    struct pm_block *block = &vram->blocks[pm_block_of(vram, slot)];
    uint64_t *entry = pm_resident_at(devices, addr, true), fresh = 0;

    if (!pm_block_back(devices, block))
        block->back = pm_node_new(devices);
    if (!entry || !block->back)
        return -ENOMEM;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t *back = &block->back[pm_place_of(slot) + i];

        fresh += *back != PM_RESERVED;
        *back = addr + (i << PM_PAGE_SHIFT);
        entry[i] = (slot + (i << PM_PAGE_SHIFT)) | PM_RESIDENT | (writable[i] ? PM_RESIDENT_WRITE : 0);
    }
    count_noted(vram, block, n, fresh);
    return 0;
}

struct pm_spot pm_spot_at(struct pm_devices *devices, uint64_t addr)
{
    struct pm_spot spot = {.addr = addr};

    if (devices)
        spot.word = pm_resident_entry(devices, addr, &spot.entry);
    if (spot.word) {
        spot.slot = pm_page_down(spot.word);
        spot.vram = pm_devmem_of(devices, spot.slot);
        spot.block = &spot.vram->blocks[pm_block_of(spot.vram, spot.slot)];
    }
    return spot;
}

void pm_spot_forget(struct pm_mm *mm, const struct pm_spot *spot)
{
    uint64_t block = spot->slot & ~(PM_HUGE_SIZE - 1);

    if (!spot->entry) {
        pm_devmem_forget(mm, spot->addr, 1);
        return;
    }
    *spot->entry = 0;
    mm->devices->stats.resident--;
    pm_block_back(mm->devices, spot->block)[pm_place_of(spot->slot)] = 0;
    if (pm_block_release(mm->devices, spot->vram, spot->block, 1))
        pm_block_drop_tables(block, block + PM_HUGE_SIZE);
}

void pm_devmem_forget(struct pm_mm *mm, uint64_t addr, uint64_t n)
{
    struct pm_devices *devices = mm->devices;
    uint64_t end = addr + (n << PM_PAGE_SHIFT), run, unused = 0, unused_end = 0;

    for (; addr < end; addr += run << PM_PAGE_SHIFT) {
        uint64_t *whole = pm_resident_whole(devices, addr), slot = pm_resident(devices, addr);
        uint64_t block = slot & ~(PM_HUGE_SIZE - 1);

        run = pm_min(PM_HUGE_PAGES - pm_place_of(slot), pm_resident_run(devices, addr, end));
        if (whole && run == PM_HUGE_PAGES) {
            *whole = 0;
            devices->promised--;
        } else {
            memset(pm_resident_at(devices, addr, false), 0, run * sizeof(*whole));
        }
        devices->stats.resident -= run;
        if (!pm_slots_free(devices, pm_devmem_of(devices, slot), slot, run))
            continue;
        if (block != unused_end) {
            pm_block_drop_tables(unused, unused_end);
            unused = block;
        }
        unused_end = block + PM_HUGE_SIZE;
    }
    pm_block_drop_tables(unused, unused_end);
}

void pm_devmem_drop(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    if (!mm->devices)
        return;
    for (uint64_t addr = start, n; pm_resident_next(mm->devices, &addr, end); addr += n << PM_PAGE_SHIFT) {
        n = pm_resident_run(mm->devices, addr, end);
        pm_slots_empty(mm, pm_resident(mm->devices, addr), n << PM_PAGE_SHIFT);
        pm_devmem_forget(mm, addr, n);
        mm->devices->stats.dropped += n;
    }
    pm_coherent_drop(mm, start, end);
}

void pm_devmem_moved(struct pm_mm *mm, uint64_t from, uint64_t to, uint64_t len)
{
    struct pm_devices *devices = mm->devices;

    if (!devices)
        return;
    for (uint64_t addr = from; pm_resident_next(devices, &addr, from + len); addr += PM_PAGE_SIZE) {
        uint64_t *old = pm_resident_at(devices, addr, false);
        uint64_t *entry = pm_resident_at(devices, addr - from + to, true);
        uint64_t slot = pm_page_down(*old);
        struct pm_devmem *vram = pm_devmem_of(devices, slot);

        if (!entry)
            return;
        *entry = *old;
        *old = 0;
        pm_block_back(devices, &vram->blocks[pm_block_of(vram, slot)])[pm_place_of(slot)] = addr - from + to;
    }
    pm_coherent_moved(mm, from, to, len);
}

uint64_t pm_devmem_back(const struct pm_devmem *vram, uint64_t slot)
{
    const struct pm_block *block = &vram->blocks[pm_block_of(vram, slot)];
    uint64_t addr = block->back && !block->whole ? block->back[pm_place_of(slot)] : 0;

    if (block->whole)
        return block->whole + (pm_place_of(slot) << PM_PAGE_SHIFT);
    return addr == PM_RESERVED ? 0 : addr;
}

bool pm_devmem_is_at(struct pm_devices *devices, uint64_t addr, uint64_t slot)
{
    return devices && pm_resident(devices, addr) == slot;
}
