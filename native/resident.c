/* SPDX-License-Identifier: MIT */
/*
 * resident.c - which pages of the mm are in device memory, and where: a radix tree of the CPU's own shape.
 *
 * Nodes are pages of a reservation: the monitor, which must not meet malloc's locks, may take one when memory
 * is moved behind our back.
 */
#include <sys/mman.h>

#include "devmem.h"
#include "pagemap.h"

enum { LEVEL_BITS = 9, FANOUT = 1 << LEVEL_BITS, TOP_LEVEL = 3 };

static const uint64_t pool_size = 1ULL << 30;

static unsigned slot_of(uint64_t addr, int level)
{
    return (addr >> (PM_PAGE_SHIFT + level * LEVEL_BITS)) & (FANOUT - 1);
}

static uint64_t *node_at(uint64_t word)
{
    return (uint64_t *)(uintptr_t)word;
}

/* Changes nothing but the new pool: `devices` may be looked at meanwhile. */
int pm_pool_map(uint64_t *ret)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    int err = pm_sys_mmap(0, pool_size, PROT_READ | PROT_WRITE, flags, -1, 0, ret);

    if (err)
        return err;
    err = pm_sys_madvise(*ret, pool_size, MADV_DONTFORK);
    if (err)
        pm_sys_munmap(*ret, pool_size);
    else
        pm_sys_madvise(*ret, pool_size, MADV_NOHUGEPAGE);
    return err;
}

void pm_pool_set(struct pm_devices *devices, uint64_t pool)
{
    devices->pool = pool;
    devices->pool_used = 0;
    devices->pool_free = NULL;
    devices->top = pool ? pm_node_new(devices) : NULL;
    devices->coherent = pool ? pm_node_new(devices) : NULL;
}

void pm_pool_unmap(uint64_t pool)
{
    if (pool)
        pm_sys_munmap(pool, pool_size);
}

uint64_t *pm_node_new(struct pm_devices *devices)
{
    uint64_t *node = devices->pool_free;

    if (node) {
        devices->pool_free = node_at(node[0]);
        node[0] = 0;
        return node;
    }
    if (devices->pool_used == pool_size)
        return NULL;
    node = node_at(devices->pool + devices->pool_used);
    devices->pool_used += PM_PAGE_SIZE;
    return node;
}

/* The node is all zeroes again. */
void pm_node_free(struct pm_devices *devices, uint64_t *node)
{
    node[0] = (uintptr_t)devices->pool_free;
    devices->pool_free = node;
}

uint64_t *pm_tree_at(struct pm_devices *devices, uint64_t *node, uint64_t addr, bool grow)
{
    if (!node || addr >= PM_USER_END)
        return NULL;
    for (int level = TOP_LEVEL; level > 0; level--) {
        uint64_t *below = &node[slot_of(addr, level)];

        if (!*below && grow)
            *below = (uintptr_t)pm_node_new(devices);
        if (!*below)
            return NULL;
        node = node_at(*below);
    }
    return &node[slot_of(addr, 0)];
}

uint64_t *pm_resident_at(struct pm_devices *devices, uint64_t addr, bool grow)
{
    return pm_tree_at(devices, devices->top, addr, grow);
}

/* The end of the leaf that addr is in, or `end`. */
static uint64_t leaf_end(uint64_t addr, uint64_t end)
{
    return pm_min(end, (addr | (PM_HUGE_SIZE - 1)) + 1);
}

/* Of the part of a leaf in [*addr, end): moves *addr to the first entry that is not 0, or to the end. */
static bool next_in_leaf(const uint64_t *leaf, uint64_t *addr, uint64_t end)
{
    end = leaf_end(*addr, end);
    while (*addr < end && !leaf[slot_of(*addr, 0)])
        *addr += PM_PAGE_SIZE;
    return *addr < end;
}

bool pm_tree_next(uint64_t *top, uint64_t *addr, uint64_t end)
{
    end = top ? pm_min(end, PM_USER_END) : 0;
    while (*addr < end) {
        uint64_t *node = top, span;
        int level = TOP_LEVEL;

        while (level > 0 && node[slot_of(*addr, level)])
            node = node_at(node[slot_of(*addr, level--)]);
        if (level == 0 && next_in_leaf(node, addr, end))
            return true;
        if (level == 0)
            continue;
        span = 1ULL << (PM_PAGE_SHIFT + level * LEVEL_BITS);
        *addr = (*addr & ~(span - 1)) + span;
    }
    return false;
}

bool pm_resident_next(struct pm_devices *devices, uint64_t *addr, uint64_t end)
{
    return pm_tree_next(devices->top, addr, end);
}

uint64_t pm_resident_run(struct pm_devices *devices, uint64_t addr, uint64_t end)
{
    uint64_t *entry = pm_resident_at(devices, addr, false), first = *entry, n = 0;

    while (entry && addr < end) {
        uint64_t last = leaf_end(addr, end);

        while (addr < last && *entry == first + (n << PM_PAGE_SHIFT)) {
            entry++;
            n++;
            addr += PM_PAGE_SIZE;
        }
        if (addr < last)
            break;
        entry = addr < end ? pm_resident_at(devices, addr, false) : NULL;
    }
    return n;
}

bool pm_resident_huge(struct pm_mm *mm, uint64_t addr)
{
    uint64_t slot = pm_resident(mm->devices, addr);

    return (addr - slot) % PM_HUGE_SIZE == 0 && pm_devmem_full(mm->devices, slot) &&
           pm_pagemap_is(mm, slot, PM_ABI_PAGE_IS_HUGE);
}

static uint64_t shown(struct pm_devices *devices, uint64_t entry)
{
    uint64_t write = entry & PM_RESIDENT_WRITE ? PM_PFN_WRITE : 0;

    return PM_PFN_VALID | write | pm_slot_pfn(devices, pm_page_down(entry));
}

bool pm_resident_show(struct pm_mm *mm, uint64_t owner, uint64_t start, uint64_t n, uint64_t keep,
                      uint64_t *pfns)
{
    uint64_t end = start + (n << PM_PAGE_SHIFT), huge = UINT64_MAX, order = 0;
    bool any = false;

    if (!owner)
        return false;
    pm_lock(mm);
    for (uint64_t addr = start; pm_resident_next(mm->devices, &addr, end); addr += PM_PAGE_SIZE) {
        uint64_t entry = *pm_resident_at(mm->devices, addr, false);

        if (pm_devmem_of(mm->devices, entry)->owner != owner)
            continue;
        if (huge != addr / PM_HUGE_SIZE)
            order = pm_resident_huge(mm, addr) ? (uint64_t)PM_HUGE_ORDER << PM_PFN_ORDER_SHIFT : 0;
        huge = addr / PM_HUGE_SIZE;
        pfns[(addr - start) >> PM_PAGE_SHIFT] = (shown(mm->devices, entry) | order) & keep;
        any = true;
    }
    pm_unlock(mm);
    return any;
}

void pm_resident_present(struct pm_mm *mm, uint64_t start, uint64_t n, uint64_t *pagemap)
{
    uint64_t end = start + (n << PM_PAGE_SHIFT);

    if (!mm->devices)
        return;
    for (uint64_t addr = start; pm_resident_next(mm->devices, &addr, end); addr += PM_PAGE_SIZE)
        pagemap[(addr - start) >> PM_PAGE_SHIFT] =
            PM_ABI_PAGEMAP_PRESENT | pm_slot_pfn(mm->devices, pm_resident(mm->devices, addr));
}

void pm_resident_protect(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    if (!mm->devices)
        return;
    for (uint64_t addr = start; pm_resident_next(mm->devices, &addr, end); addr += PM_PAGE_SIZE)
        *pm_resident_at(mm->devices, addr, false) &= ~PM_RESIDENT_WRITE;
}
