/* SPDX-License-Identifier: MIT */
/*
 * devmem.c - the memory of a device: an arena in this mm, which a forked child does not get.
 *
 * UFFDIO_MOVE wants its target registered with a userfaultfd. The arena's is another than the one that
 * watches: it has no events, so the monitor can give slots back without waiting for itself.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "devmem.h"

static const uint64_t arena_max = 1ULL << 40;

static uint64_t block_of(const struct pm_devmem *vram, uint64_t slot)
{
    return (slot - vram->base) / PM_HUGE_SIZE;
}

static uint64_t place_of(uint64_t slot)
{
    return slot % PM_HUGE_SIZE >> PM_PAGE_SHIFT;
}

struct pm_devmem *pm_devmem_of(struct pm_devices *devices, uint64_t slot)
{
    struct pm_devmem *vram = devices->list;

    while (slot < vram->base || slot >= vram->base + vram->nblocks * PM_HUGE_SIZE)
        vram = vram->next;
    return vram;
}

uint64_t pm_slot_pfn(struct pm_devices *devices, uint64_t slot)
{
    uint64_t kind = pm_devmem_of(devices, slot)->exclusive ? PM_PFN_EXCLUSIVE : 0;

    return PM_PFN_DEVICE | kind | slot >> PM_PAGE_SHIFT;
}

bool pm_devmem_full(struct pm_devices *devices, uint64_t slot)
{
    const struct pm_devmem *vram = pm_devmem_of(devices, slot);

    return vram->blocks[block_of(vram, slot)].used == PM_HUGE_PAGES;
}

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
    uint64_t first = addr & ~(PM_HUGE_SIZE - 1), place = place_of(addr), block;

    for (uint64_t at = first; pm_resident_next(devices, &at, first + PM_HUGE_SIZE); at += PM_PAGE_SIZE) {
        uint64_t slot = pm_resident(devices, at);

        if (pm_devmem_of(devices, slot) != vram)
            continue;
        block = block_of(vram, slot);
        if (is_free(&vram->blocks[block], place, n))
            return vram->base + block * PM_HUGE_SIZE + (place << PM_PAGE_SHIFT);
        break;
    }
    block = unused_block(vram);
    return block == vram->nblocks ? 0 : vram->base + block * PM_HUGE_SIZE + (place << PM_PAGE_SHIFT);
}

static bool has_slot(const struct pm_devmem *vram, uint64_t slot)
{
    return slot >= vram->base && block_of(vram, slot) < vram->nblocks;
}

/* How many slots from this one on, in its block, are set aside, and not in use. */
static uint64_t reserved_run(const struct pm_devmem *vram, uint64_t slot, uint64_t n)
{
    const struct pm_block *block;
    uint64_t place = place_of(slot), run = 0;

    if (!has_slot(vram, slot))
        return 0;
    block = &vram->blocks[block_of(vram, slot)];
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
static uint64_t *back_of(struct pm_devices *devices, struct pm_block *block)
{
    if (!block->whole)
        return block->back;
    block->back = pm_node_promised(devices);
    for (uint64_t i = 0; i < PM_HUGE_PAGES; i++)
        block->back[i] = block->whole + (i << PM_PAGE_SHIFT);
    block->whole = 0;
    return block->back;
}

/* Could it be noted by one word, in the tree and in the block? */
static bool is_whole(const struct pm_block *block, uint64_t addr, uint64_t slot, uint64_t n)
{
    return n == PM_HUGE_PAGES && addr % PM_HUGE_SIZE == 0 && slot % PM_HUGE_SIZE == 0 && !block->used;
}

int pm_devmem_ready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n)
{
    struct pm_devices *devices = vram->mm->devices;

    if (!is_whole(&vram->blocks[block_of(vram, slot)], addr, slot, n))
        return pm_devmem_note(vram, addr, slot, 0, NULL);
    return pm_resident_ready(devices, addr) && pm_node_promise(devices, 2) ? 0 : -ENOMEM;
}

void pm_devmem_unready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n)
{
    if (is_whole(&vram->blocks[block_of(vram, slot)], addr, slot, n))
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
    struct pm_block *block = &vram->blocks[block_of(vram, slot)];

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
    bool whole = is_whole(&vram->blocks[block_of(vram, slot)], addr, slot, n);

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
    struct pm_block *block = &vram->blocks[block_of(vram, slot)];
    uint64_t *entry = pm_resident_at(devices, addr, true), fresh = 0;

    if (!back_of(devices, block))
        block->back = pm_node_new(devices);
    if (!entry || !block->back)
        return -ENOMEM;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t *back = &block->back[place_of(slot) + i];

        fresh += *back != PM_RESERVED;
        *back = addr + (i << PM_PAGE_SHIFT);
        entry[i] = (slot + (i << PM_PAGE_SHIFT)) | PM_RESIDENT | (writable[i] ? PM_RESIDENT_WRITE : 0);
    }
    count_noted(vram, block, n, fresh);
    return 0;
}

/* The page tables of unused blocks go: where one is, a huge page would have to be split to be moved in. */
static void drop_tables(uint64_t start, uint64_t end)
{
    if (start < end)
        pm_sys_madvise(start, end - start, MADV_DONTNEED);
}

/* Is the block unused now that so many slots of it are free? */
static bool count_free(struct pm_devices *devices, struct pm_devmem *vram, struct pm_block *block, uint64_t n)
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
static bool free_slots(struct pm_devices *devices, struct pm_devmem *vram, uint64_t slot, uint64_t n)
{
    struct pm_block *block = &vram->blocks[block_of(vram, slot)];

    if (block->whole && n == PM_HUGE_PAGES) {
        block->whole = 0;
        devices->promised--;
    } else {
        memset(back_of(devices, block) + place_of(slot), 0, n * sizeof(*block->back));
    }
    return count_free(devices, vram, block, n);
}

/* Slots for a run of pages: how many there was room for. */
static uint64_t reserve(struct pm_devmem *vram, uint64_t addr, uint64_t n, uint64_t *pfns)
{
    struct pm_devices *devices = vram->mm->devices;
    uint64_t slot = pm_devmem_room(vram, addr, &n);

    if (!slot || pm_devmem_note(vram, addr, slot, 0, NULL))
        return 0;
    for (uint64_t i = 0; i < n; i++) {
        struct pm_block *block = &vram->blocks[block_of(vram, slot)];

        block->back[place_of(slot) + i] = PM_RESERVED;
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

    n = pm_min(n, PM_HUGE_PAGES - place_of(addr));
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

        if (reserved_run(vram, slot, 1) && free_slots(mm->devices, vram, slot, 1))
            drop_tables(slot & ~(PM_HUGE_SIZE - 1), (slot | (PM_HUGE_SIZE - 1)) + 1);
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
    if (slot < vram->base || block_of(vram, slot) >= vram->nblocks ||
        n > (vram->nblocks << PM_HUGE_ORDER) - ((slot - vram->base) >> PM_PAGE_SHIFT))
        return -EINVAL;
    pm_lock(mm);
    for (uint64_t i = 0; i < n; i++, slot += PM_PAGE_SIZE)
        ret[i] = pm_devmem_back(vram, slot);
    pm_unlock(mm);
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
        spot.block = &spot.vram->blocks[block_of(spot.vram, spot.slot)];
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
    back_of(mm->devices, spot->block)[place_of(spot->slot)] = 0;
    if (count_free(mm->devices, spot->vram, spot->block, 1))
        drop_tables(block, block + PM_HUGE_SIZE);
}

void pm_devmem_forget(struct pm_mm *mm, uint64_t addr, uint64_t n)
{
    struct pm_devices *devices = mm->devices;
    uint64_t end = addr + (n << PM_PAGE_SHIFT), run, unused = 0, unused_end = 0;

    for (; addr < end; addr += run << PM_PAGE_SHIFT) {
        uint64_t *whole = pm_resident_whole(devices, addr), slot = pm_resident(devices, addr);
        uint64_t block = slot & ~(PM_HUGE_SIZE - 1);

        run = pm_min(PM_HUGE_PAGES - place_of(slot), pm_resident_run(devices, addr, end));
        if (whole && run == PM_HUGE_PAGES) {
            *whole = 0;
            devices->promised--;
        } else {
            memset(pm_resident_at(devices, addr, false), 0, run * sizeof(*whole));
        }
        devices->stats.resident -= run;
        if (!free_slots(devices, pm_devmem_of(devices, slot), slot, run))
            continue;
        if (block != unused_end) {
            drop_tables(unused, unused_end);
            unused = block;
        }
        unused_end = block + PM_HUGE_SIZE;
    }
    drop_tables(unused, unused_end);
}

void pm_devmem_drop(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    if (!mm->devices)
        return;
    for (uint64_t addr = start, n; pm_resident_next(mm->devices, &addr, end); addr += n << PM_PAGE_SHIFT) {
        n = pm_resident_run(mm->devices, addr, end);
        pm_sys_madvise(pm_resident(mm->devices, addr), n << PM_PAGE_SHIFT, MADV_DONTNEED);
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
        back_of(devices, &vram->blocks[block_of(vram, slot)])[place_of(slot)] = addr - from + to;
    }
    pm_coherent_moved(mm, from, to, len);
}

uint64_t pm_devmem_back(const struct pm_devmem *vram, uint64_t slot)
{
    const struct pm_block *block = &vram->blocks[block_of(vram, slot)];
    uint64_t addr = block->back && !block->whole ? block->back[place_of(slot)] : 0;

    if (block->whole)
        return block->whole + (place_of(slot) << PM_PAGE_SHIFT);
    return addr == PM_RESERVED ? 0 : addr;
}

bool pm_devmem_is_at(struct pm_devices *devices, uint64_t addr, uint64_t slot)
{
    return devices && pm_resident(devices, addr) == slot;
}

static void fill(struct pm_mm *mm, uint64_t at, uint64_t end)
{
    struct uffdio_zeropage zero = {.range = {at, end - at}};

    pm_sys_ioctl(mm->arena_fd, UFFDIO_ZEROPAGE, &zero);
}

void pm_devmem_fill(struct pm_mm *mm, uint64_t at, uint64_t len)
{
    uint64_t addr = pm_page_down(at), end = pm_page_up(at + len), seen;

    for (; addr < end; addr += PM_PAGE_SIZE) {
        if (pm_pagemap_read(mm, addr, 1, &seen) == 0 &&
            !(seen & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)))
            fill(mm, addr, addr + PM_PAGE_SIZE);
    }
}

static bool can_migrate(const struct pm_mm *mm)
{
    int serves = mm->inline_faults ? PM_FEAT_UFFD_SIGBUS : PM_FEAT_UFFD_KERNEL;

    return pm_have(mm, serves) && pm_have(mm, PM_FEAT_UFFD_EVENTS) && pm_have(mm, PM_FEAT_PAGEMAP);
}

static int open_arena_fd(struct pm_mm *mm)
{
    uint32_t source;
    int fd = pm_uffd_open(mm->disable, &source);
    int err = fd < 0 ? fd : pm_uffd_api(fd, PM_ABI_UFFD_FEATURE_SIGBUS);

    if (err && fd >= 0)
        pm_sys_close(fd);
    return err ? err : fd;
}

/* With watch_lock held. */
static int open_devices(struct pm_mm *mm)
{
    struct pm_devices *devices = mm->devices;
    uint64_t pool;
    int fd = mm->arena_fd, err = pm_watch_open(mm);

    if (err || (devices && devices->pool))
        return err;
    if (!devices) {
        devices = pm_sys_calloc(1, sizeof(*devices));
        if (!devices)
            return -ENOMEM;
        devices->around = PM_PAGE_SIZE;
        fd = open_arena_fd(mm);
    }
    err = fd < 0 ? fd : pm_pool_map(&pool);
    if (err && !mm->devices) {
        if (fd >= 0)
            pm_sys_close(fd);
        free(devices);
    }
    if (err)
        return err;
    pm_lock(mm);
    pm_pool_set(devices, pool);
    mm->devices = devices;
    mm->arena_fd = fd;
    pm_unlock(mm);
    return 0;
}

static int map_arena(struct pm_devmem *vram)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint64_t len = vram->nblocks * PM_HUGE_SIZE, at, head;
    struct uffdio_register reg = {.mode = UFFDIO_REGISTER_MODE_MISSING};
    int err = pm_sys_mmap(0, len + PM_HUGE_SIZE, PROT_READ | PROT_WRITE, flags, -1, 0, &at);

    if (err)
        return err;
    head = -at % PM_HUGE_SIZE;
    if (head)
        pm_sys_munmap(at, head);
    pm_sys_munmap(at + head + len, PM_HUGE_SIZE - head);
    vram->base = at + head;
    reg.range = (struct uffdio_range){vram->base, len};
    err = pm_sys_madvise(vram->base, len, MADV_DONTFORK);
    if (!err)
        err = pm_sys_ioctl(vram->mm->arena_fd, UFFDIO_REGISTER, &reg);
    if (err)
        pm_sys_munmap(vram->base, len);
    return err;
}

/* With watch_lock held: without device memory there is no tree. */
static void drop_pool(struct pm_mm *mm)
{
    uint64_t pool = 0;

    pm_lock(mm);
    if (mm->devices && !mm->devices->list) {
        pool = mm->devices->pool;
        pm_pool_set(mm->devices, 0);
    }
    pm_unlock(mm);
    pm_pool_unmap(pool);
}

static int make(struct pm_mm *mm, uint64_t size, uint64_t owner, pm_devmem **ret)
{
    struct pm_devmem *vram = pm_sys_calloc(1, sizeof(*vram));
    int err = vram ? open_devices(mm) : -ENOMEM;

    if (!err) {
        vram->mm = mm;
        vram->owner = owner;
        vram->limit = size >> PM_PAGE_SHIFT;
        vram->nblocks = pm_min(vram->limit, arena_max / PM_HUGE_SIZE);
        vram->nblocks = pm_max(vram->nblocks, (size + PM_HUGE_SIZE - 1) / PM_HUGE_SIZE);
        vram->blocks = pm_sys_calloc(vram->nblocks, sizeof(*vram->blocks));
        err = vram->blocks ? map_arena(vram) : -ENOMEM;
    }
    if (err) {
        drop_pool(mm);
        if (vram)
            free(vram->blocks);
        free(vram);
        return err;
    }
    pm_mm_get(mm);
    pm_lock(mm);
    vram->next = mm->devices->list;
    mm->devices->list = vram;
    pm_unlock(mm);
    *ret = vram;
    return 0;
}

int pm_devmem_create(pm_mm *mm, uint64_t size, uint64_t owner, pm_devmem **ret)
{
    int err;

    if (size == 0 || size % PM_PAGE_SIZE || size >= PM_USER_END)
        return -EINVAL;
    if (!can_migrate(mm))
        return -EOPNOTSUPP;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    pthread_mutex_lock(&mm->watch_lock);
    err = make(mm, size, owner, ret);
    pthread_mutex_unlock(&mm->watch_lock);
    pm_mm_exit(mm);
    return err;
}

/* The first page that is in a block, 0: slots are set aside there, for pages that have not moved. */
static uint64_t first_in(const struct pm_block *block)
{
    if (block->whole)
        return block->whole;
    for (uint64_t i = 0; block->used && i < PM_HUGE_PAGES; i++) {
        if (block->back[i] > PM_RESERVED)
            return block->back[i];
    }
    return 0;
}

int pm_devmem_next(pm_devmem *vram, uint64_t *start, uint64_t *end)
{
    struct pm_mm *mm = vram->mm;
    uint64_t oldest = UINT64_MAX, first = 0;
    int err = pm_mm_check(mm);

    if (err)
        return err;
    pm_lock(mm);
    if (vram->held) {
        pm_coherent_first(vram, start);
        *end = (*start & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE;
        pm_unlock(mm);
        return 0;
    }
    for (uint64_t i = 0; i < vram->nblocks; i++) {
        const struct pm_block *block = &vram->blocks[i];

        if (block->used && block->used_at < oldest && first_in(block)) {
            oldest = block->used_at;
            first = first_in(block);
        }
    }
    pm_unlock(mm);
    *start = first;
    *end = (first & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE;
    return first ? 0 : -ENOENT;
}

uint64_t pm_devmem_used(pm_devmem *vram)
{
    uint64_t used;

    if (!pm_mm_owned(vram->mm))
        return 0;
    pm_lock(vram->mm);
    used = vram->used + vram->held;
    pm_unlock(vram->mm);
    return used;
}

int pm_devmem_destroy(pm_devmem *vram)
{
    struct pm_mm *mm = vram->mm;
    struct pm_devmem **link;

    if (!pm_mm_owned(mm))
        return -ESRCH;
    pthread_mutex_lock(&mm->watch_lock);
    pm_lock(mm);
    if (vram->used || vram->held) {
        pm_unlock(mm);
        pthread_mutex_unlock(&mm->watch_lock);
        return -EBUSY;
    }
    for (link = &mm->devices->list; *link != vram; link = &(*link)->next)
        continue;
    *link = vram->next;
    /* Made for pages that did not move. */
    for (uint64_t i = 0; i < vram->nblocks; i++) {
        if (vram->blocks[i].back)
            pm_node_free(mm->devices, vram->blocks[i].back);
    }
    if (vram->exclusive)
        mm->devices->exclusive = NULL;
    pm_unlock(mm);
    drop_pool(mm);
    pthread_mutex_unlock(&mm->watch_lock);
    pm_sys_munmap(vram->base, vram->nblocks * PM_HUGE_SIZE);
    free(vram->blocks);
    free(vram);
    pm_mm_put(mm);
    return 0;
}

/* The CPU faults that it keeps waiting are to end. */
static const uint64_t timeslice_limit_ns = 1000ULL * 1000 * 1000;

int pm_devmem_timeslice(pm_devmem *vram, uint64_t ns)
{
    if (ns > timeslice_limit_ns)
        return -EINVAL;
    if (!pm_mm_owned(vram->mm))
        return -ESRCH;
    pm_lock(vram->mm);
    vram->timeslice_ns = ns;
    pm_unlock(vram->mm);
    return 0;
}

int pm_devmem_holds(pm_devmem *vram, uint64_t start, uint64_t n, uint8_t *ret)
{
    struct pm_mm *mm = vram->mm;
    int err = pm_coherent_pages(mm, vram, start, n, ret);

    if (err)
        return err;
    pm_lock(mm);
    for (uint64_t i = 0; i < n && !vram->coherent; i++) {
        uint64_t slot = pm_resident(mm->devices, start + (i << PM_PAGE_SHIFT));

        ret[i] = slot && pm_devmem_of(mm->devices, slot) == vram;
    }
    pm_unlock(mm);
    return 0;
}

static int populate_slot(struct pm_mm *mm, uint64_t slot)
{
    static const char zeroes[PM_PAGE_SIZE] __attribute__((aligned(4096)));
    struct uffdio_copy copy = {.dst = slot, .src = (uintptr_t)zeroes, .len = PM_PAGE_SIZE};
    uint64_t seen;
    int err = pm_pagemap_read(mm, slot, 1, &seen);

    if (err || (seen & PM_ABI_PAGEMAP_EXCLUSIVE))
        return err;
    if (!(seen & (PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED)))
        return pm_sys_ioctl(mm->arena_fd, UFFDIO_COPY, &copy);
    /* The zero page becomes one of its own; what else is there, or swapped out, keeps what is in it. */
    return pm_sys_madvise(slot, PM_PAGE_SIZE, PM_ABI_MADV_POPULATE_WRITE);
}

static int populate_run(struct pm_mm *mm, uint64_t slot, uint64_t n)
{
    int err = 0;

    for (uint64_t i = 0; !err && i < n; i++)
        err = populate_slot(mm, slot + (i << PM_PAGE_SHIFT));
    return err;
}

int pm_devmem_populate(pm_devmem *vram, uint64_t start, uint64_t end)
{
    struct pm_mm *mm = vram->mm;
    int err = pm_is_interval(start, end) ? pm_mm_enter(mm) : -EINVAL;

    if (err)
        return err;
    pm_lock(mm);
    for (uint64_t addr = start, n; !err && pm_resident_next(mm->devices, &addr, end);
         addr += n << PM_PAGE_SHIFT) {
        uint64_t slot = pm_resident(mm->devices, addr);

        n = pm_resident_run(mm->devices, addr, end);
        if (pm_devmem_of(mm->devices, slot) == vram)
            err = populate_run(mm, slot, n);
    }
    pm_unlock(mm);
    pm_mm_exit(mm);
    return err;
}

int pm_devmem_stats(pm_mm *mm, struct pm_devmem_stats *ret)
{
    *ret = (struct pm_devmem_stats){0};
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    if (mm->devices)
        *ret = mm->devices->stats;
    pm_unlock(mm);
    return 0;
}

int pm_devmem_fault_around(pm_devmem *vram, uint64_t bytes)
{
    struct pm_mm *mm = vram->mm;

    if (bytes != PM_PAGE_SIZE && bytes != 16 * PM_PAGE_SIZE && bytes != PM_HUGE_SIZE)
        return -EINVAL;
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    mm->devices->around = bytes;
    pm_unlock(mm);
    return 0;
}
