/* SPDX-License-Identifier: MIT */
/*
 * devmem.c - the memory of a device: an arena in this mm, which a forked child does not get.
 *
 * UFFDIO_MOVE wants its target registered with a userfaultfd. The arena's is another than the one that
 * watches: it has no events, so the monitor can give slots back without waiting for itself.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "devmem.h"
#include "pagemap.h"

static const uint64_t arena_max = 1ULL << 40;

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

    return vram->blocks[pm_block_of(vram, slot)].used == PM_HUGE_PAGES;
}

void pm_devmem_fill(struct pm_mm *mm, uint64_t addr, uint64_t at, uint64_t len)
{
    uint64_t slot = pm_page_down(at), end = pm_page_up(at + len), seen;

    for (addr = pm_page_down(addr); slot < end; addr += PM_PAGE_SIZE, slot += PM_PAGE_SIZE) {
        struct uffdio_zeropage zero = {.range = {slot, PM_PAGE_SIZE}};

        if (pm_devmem_is_at(mm->devices, addr, slot) && pm_pagemap_read(mm, slot, 1, &seen) == 0 &&
            !pm_is_there(seen))
            pm_sys_ioctl(mm->arena_fd, UFFDIO_ZEROPAGE, &zero);
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
    if (!pm_is_there(seen))
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
