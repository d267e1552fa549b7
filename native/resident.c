/* SPDX-License-Identifier: MIT */
/*
 * resident.c - which pages of the mm are in device memory, and where: a radix tree of the CPU's own shape.
 *
 * Nodes are pages of a reservation: the monitor, which must not meet malloc's locks, may take one when memory
 * is moved behind our back. A 2 MiB range that is resident as a whole is one word, in the place of a leaf,
 * until somebody wants the word of a page in it: the node for that is promised.
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
    devices->pool_used = devices->promised = 0;
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
    if (devices->pool_used + (devices->promised << PM_PAGE_SHIFT) >= pool_size)
        return NULL;
    node = node_at(devices->pool + devices->pool_used);
    devices->pool_used += PM_PAGE_SIZE;
    return node;
}

bool pm_node_promise(struct pm_devices *devices, uint64_t n)
{
    if (devices->pool_used + ((devices->promised + n) << PM_PAGE_SHIFT) > pool_size)
        return false;
    devices->promised += n;
    return true;
}

uint64_t *pm_node_promised(struct pm_devices *devices)
{
    devices->promised--;
    return pm_node_new(devices);
}

/* The node is all zeroes again. */
void pm_node_free(struct pm_devices *devices, uint64_t *node)
{
    node[0] = (uintptr_t)devices->pool_free;
    devices->pool_free = node;
}

static bool is_whole(uint64_t word)
{
    return word & PM_RESIDENT;
}

static uint64_t split(struct pm_devices *devices, uint64_t word)
{
    uint64_t *leaf = pm_node_promised(devices);

    for (uint64_t i = 0; i < FANOUT; i++)
        leaf[i] = word + (i << PM_PAGE_SHIFT);
    return (uintptr_t)leaf;
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
        if (is_whole(*below))
            *below = split(devices, *below);
        node = node_at(*below);
    }
    return &node[slot_of(addr, 0)];
}

/* The word in the place of a leaf, or NULL. */
static uint64_t *leaf_word(struct pm_devices *devices, uint64_t addr, bool grow)
{
    uint64_t *node = devices->top;

    if (!node || addr >= PM_USER_END)
        return NULL;
    for (int level = TOP_LEVEL; level > 1; level--) {
        uint64_t *below = &node[slot_of(addr, level)];

        if (!*below && grow)
            *below = (uintptr_t)pm_node_new(devices);
        if (!*below)
            return NULL;
        node = node_at(*below);
    }
    return &node[slot_of(addr, 1)];
}

uint64_t *pm_resident_whole(struct pm_devices *devices, uint64_t addr)
{
    uint64_t *word = leaf_word(devices, addr, false);

    return word && is_whole(*word) ? word : NULL;
}

uint64_t pm_resident_entry(struct pm_devices *devices, uint64_t addr, uint64_t **entry)
{
    uint64_t *word = leaf_word(devices, addr, false);

    *entry = NULL;
    if (!word || !*word)
        return 0;
    if (is_whole(*word))
        return *word + (addr & (PM_HUGE_SIZE - 1) & ~(uint64_t)(PM_PAGE_SIZE - 1));
    *entry = &node_at(*word)[slot_of(addr, 0)];
    return **entry;
}

uint64_t pm_resident_word(struct pm_devices *devices, uint64_t addr)
{
    uint64_t *entry;

    return pm_resident_entry(devices, addr, &entry);
}

bool pm_resident_ready(struct pm_devices *devices, uint64_t addr)
{
    return leaf_word(devices, addr, true);
}

void pm_resident_set_whole(struct pm_devices *devices, uint64_t addr, uint64_t value)
{
    uint64_t *word = leaf_word(devices, addr, false);

    if (*word)
        pm_node_free(devices, node_at(*word));
    *word = value;
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

        while (level > 0 && node[slot_of(*addr, level)]) {
            if (is_whole(node[slot_of(*addr, level)]))
                return true;
            node = node_at(node[slot_of(*addr, level--)]);
        }
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
    uint64_t *entry, first, n = 0;

    end = leaf_end(addr, end);
    if (end - addr == PM_PAGE_SIZE)
        return 1;
    if (pm_resident_whole(devices, addr))
        return (end - addr) >> PM_PAGE_SHIFT;
    entry = pm_resident_at(devices, addr, false);
    first = *entry;
    for (; addr < end && *entry == first + (n << PM_PAGE_SHIFT); addr += PM_PAGE_SIZE) {
        entry++;
        n++;
    }
    return n;
}

uint64_t pm_resident_stretch(struct pm_devices *devices, uint64_t addr, uint64_t end)
{
    const uint64_t *word = addr % PM_HUGE_SIZE ? NULL : pm_resident_whole(devices, addr);
    uint64_t first = word ? *word : 0, n = 0;
    const struct pm_devmem *vram = word ? pm_devmem_of(devices, pm_page_down(first)) : NULL;

    for (; word && addr + PM_HUGE_SIZE <= end; addr += PM_HUGE_SIZE) {
        if (*word != first + n * PM_HUGE_SIZE || *word - vram->base >= vram->nblocks * PM_HUGE_SIZE)
            break;
        n++;
        word = pm_resident_whole(devices, addr + PM_HUGE_SIZE);
    }
    return n;
}

bool pm_resident_huge(struct pm_mm *mm, uint64_t addr, uint64_t slot)
{
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
        uint64_t entry = pm_resident_word(mm->devices, addr);

        if (pm_devmem_of(mm->devices, entry)->owner != owner)
            continue;
        if (huge != addr / PM_HUGE_SIZE)
            order = pm_resident_huge(mm, addr, pm_page_down(entry))
                        ? (uint64_t)PM_HUGE_ORDER << PM_PFN_ORDER_SHIFT
                        : 0;
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
    for (uint64_t addr = start, step; pm_resident_next(mm->devices, &addr, end); addr += step) {
        uint64_t *word = pm_resident_whole(mm->devices, addr);

        step = PM_HUGE_SIZE;
        if (!word || addr % PM_HUGE_SIZE || end - addr < PM_HUGE_SIZE) {
            word = pm_resident_at(mm->devices, addr, false);
            step = PM_PAGE_SIZE;
        }
        *word &= ~PM_RESIDENT_WRITE;
    }
}

bool pm_resident_stand(struct pm_mm *mm, uint64_t start, uint64_t n, const uint64_t *pfns)
{
    const uint64_t both = PM_PFN_VALID | PM_PFN_DEVICE;

    for (uint64_t i = 0; i < n; i++) {
        uint64_t word;

        if ((pfns[i] & both) != both)
            continue;
        word = mm->devices ? pm_resident_word(mm->devices, start + (i << PM_PAGE_SHIFT)) : 0;
        if (!word || pm_page_down(word) != pm_pfn_slot(pfns[i]))
            return false;
    }
    return true;
}
