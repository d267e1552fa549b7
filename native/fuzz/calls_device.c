/* SPDX-License-Identifier: MIT */
/* calls_device.c - pins, device memory, migration, exclusive access. */
#include <string.h>

#include "world.h"

void call_pins(void)
{
    int i = next() % SLOTS;
    struct pm_pinning pinning = {.start = own_addr(), .npages = few(), .flags = next() % 3};
    uint64_t done;

    if (!w.pin[i]) {
        pinning.pfns = next() % 2 ? w.pfns : NULL;
        pm_pin_create(w.mm, &pinning, &w.pin[i]);
        return;
    }
    switch (next() % 4) {
    case 0:
        pm_pin_release(w.pin[i]);
        break;
    case 1:
        pm_pin_put(w.pin[i]);
        w.pin[i] = NULL;
        break;
    case 2:
        if (pm_pin_hold(w.pin[i]) == 0)
            pm_pin_unhold(w.pin[i]);
        break;
    default:
        pm_pin_access(w.pin[i], next() < 250 ? few() * 1000 : wide(), w.buf, few() % 4 * PAGE, 0, &done);
    }
}

void give_back(int i)
{
    pm_devmem_free(w.vram[i], ARRAY, w.slots[i]);
    memset(w.slots[i], 0, sizeof(w.slots[i]));
}

void call_memories(void)
{
    int i = next() % SLOTS;
    uint64_t start, end, pfn, n;

    if (!w.vram[i]) {
        if (pm_devmem_create(w.mm, next() < 250 ? few() * PAGE : wide(), 1 + next() % 2, &w.vram[i]) == 0 &&
            next() % 4 == 0)
            pm_devmem_coherent(w.vram[i]);
        return;
    }
    switch (next() % 7) {
    case 0:
        give_back(i);
        if (pm_devmem_destroy(w.vram[i]) == 0)
            w.vram[i] = NULL;
        break;
    case 1:
        start = addr();
        pm_devmem_populate(w.vram[i], start, until(start));
        break;
    case 2:
        pm_devmem_next(w.vram[i], &start, &end);
        pm_devmem_range(w.vram[i], &pfn, &n);
        pm_devmem_addrs(w.vram[i], next() % 2 ? pfn : wide(), few(), w.others);
        break;
    case 3:
        give_back(i);
        pm_devmem_alloc(w.vram[i], own_addr(), few(), w.bytes, w.slots[i]);
        memcpy(w.pfns, w.slots[i], sizeof(w.pfns));
        break;
    case 4:
        pm_devmem_free(w.vram[i], few(), pfns());
        break;
    case 5:
        pm_devmem_fault_around(w.vram[i], (uint64_t)next() << (next() % 20));
        break;
    default:
        pm_devmem_holds(w.vram[i], addr(), few(), w.bytes);
    }
}

void call_migration(void)
{
    int i = next() % SLOTS;
    uint64_t start = own_addr(), end = until(start), moved, seq;
    pm_inv *inv;

    if (pm_invalidate_start(w.mm, start, end, PM_MIGRATE, PM_BEFORE, &inv, &seq))
        return;
    pm_invalidate_delivered(inv);
    if (next() % 3 == 0)
        pm_migrate_to_system(w.mm, start, end, next() % 2 ? w.vram[i] : NULL, &moved);
    else if (!w.vram[i])
        pm_migrate_level(w.mm, start, end);
    else if (next() % 4 == 0)
        pm_migrate_pages(w.vram[i], start, few(), pfns(), w.bytes);
    else
        pm_migrate_to_device(w.vram[i], start, end, &moved);
    pm_invalidate_end(inv);
}

void call_exclusive(void)
{
    uint64_t start = own_addr(), end = until(start);

    if (!w.arena) {
        pm_exclusive_create(w.mm, (1 + few()) * PAGE, &w.arena);
        return;
    }
    if (next() % 3 == 0)
        pm_exclusive_pfns(w.arena, start, end, w.pfns);
    else if (pm_exclusive_fault(w.arena, start, &end) == 0)
        pm_exclusive(w.arena, start, end, w.pfns);
}
