/* SPDX-License-Identifier: MIT */
/*
 * ring.c - the io_uring of an mm.
 *
 * The only way to the pages of a registered buffer is a request that copies between it and a file. The file
 * is a memfd of one piece's size: WRITE_FIXED and pread() read the pages, pwrite() and READ_FIXED write them.
 * So a wrong address of the caller is -EFAULT, and nothing of it is mapped that a fork would have to leave
 * out. One request is under way at a time.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "ring.h"

enum { ENTRIES = 2 };

static int map_ring(struct pm_mm *mm, struct pm_ring *ring, const struct io_uring_params *params)
{
    const int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    uint64_t sq = params->sq_off.array + params->sq_entries * sizeof(uint32_t);
    uint64_t cq = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    char *base;
    int err;

    ring->map_len = pm_max(sq, cq);
    ring->sqes_len = params->sq_entries * sizeof(struct io_uring_sqe);
    err = pm_sys_mmap(0, ring->map_len, prot, flags, mm->ring_fd, PM_ABI_IORING_OFF_SQ_RING, &ring->map);
    if (err)
        return err;
    err = pm_sys_madvise(ring->map, ring->map_len, MADV_DONTFORK);
    if (!err)
        err =
            pm_sys_mmap(0, ring->sqes_len, prot, flags, mm->ring_fd, PM_ABI_IORING_OFF_SQES, &ring->sqes_map);
    if (!err)
        err = pm_sys_madvise(ring->sqes_map, ring->sqes_len, MADV_DONTFORK);
    if (err)
        return err;
    base = (char *)(uintptr_t)ring->map;
    ring->sq_head = (atomic_uint *)(void *)(base + params->sq_off.head);
    ring->sq_tail = (atomic_uint *)(void *)(base + params->sq_off.tail);
    ring->cq_head = (atomic_uint *)(void *)(base + params->cq_off.head);
    ring->cq_tail = (atomic_uint *)(void *)(base + params->cq_off.tail);
    ring->sq_array = (uint32_t *)(void *)(base + params->sq_off.array);
    ring->cqes = (struct io_uring_cqe *)(void *)(base + params->cq_off.cqes);
    ring->sqes = (struct io_uring_sqe *)(uintptr_t)ring->sqes_map;
    ring->sq_mask = params->sq_entries - 1;
    ring->cq_mask = params->cq_entries - 1;
    return 0;
}

static void unmap_ring(struct pm_ring *ring)
{
    if (ring->map)
        pm_sys_munmap(ring->map, ring->map_len);
    if (ring->sqes_map)
        pm_sys_munmap(ring->sqes_map, ring->sqes_len);
    ring->map = ring->sqes_map = 0;
}

static void close_fds(struct pm_mm *mm)
{
    if (mm->stage_fd >= 0)
        pm_sys_close(mm->stage_fd);
    if (mm->ring_fd >= 0)
        pm_sys_close(mm->ring_fd);
    mm->stage_fd = mm->ring_fd = -1;
}

/*
 * Opened again for direct I/O without blocking: then the kernel copies in the submitting thread. A plain
 * descriptor has it done by a worker thread of its own, in seven times the time for small pieces. Kernels
 * before 6.6 and a missing /proc have the plain one.
 */
static int open_direct(int fd)
{
    char path[32];

    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return pm_sys_open(path, O_RDWR | O_DIRECT | O_NONBLOCK);
}

static int open_stage(struct pm_mm *mm)
{
    int fd = pm_sys_memfd("pymirror-stage");
    int direct, err;

    if (fd < 0)
        return fd;
    err = pm_sys_ftruncate(fd, PM_STAGE_SIZE);
    if (!err)
        err = pm_sys_seal(fd, F_SEAL_SHRINK | F_SEAL_GROW);
    if (err) {
        pm_sys_close(fd);
        return err;
    }
    direct = open_direct(fd);
    if (direct >= 0)
        pm_sys_close(fd);
    mm->stage_fd = direct >= 0 ? direct : fd;
    return 0;
}

static int set_up(struct pm_mm *mm, struct pm_ring *ring)
{
    const uint32_t needed = PM_ABI_IORING_FEAT_SINGLE_MMAP | PM_ABI_IORING_FEAT_EXT_ARG;
    struct pm_abi_rsrc_register table = {.nr = PM_RING_SLOTS, .flags = PM_ABI_IORING_RSRC_REGISTER_SPARSE};
    struct io_uring_params params;
    int fd;

    memset(&params, 0, sizeof(params));
    fd = pm_sys_io_uring_setup(ENTRIES, &params);
    if (fd < 0)
        return fd;
    mm->ring_fd = fd;
    if ((params.features & needed) != needed)
        return -EOPNOTSUPP;
    fd = open_stage(mm);
    if (fd < 0)
        return fd;
    fd = map_ring(mm, ring, &params);
    return fd ? fd
              : pm_sys_io_uring_register(mm->ring_fd, PM_ABI_IORING_REGISTER_BUFFERS2, &table, sizeof(table));
}

int pm_ring_open(struct pm_mm *mm)
{
    struct pm_ring *ring;
    int err;

    if (mm->ring)
        return 0;
    ring = pm_sys_calloc(1, sizeof(*ring));
    if (!ring)
        return -ENOMEM;
    /* No fork meanwhile: its child has to know the descriptors. */
    pm_registry_lock();
    err = set_up(mm, ring);
    if (err) {
        close_fds(mm);
        unmap_ring(ring);
    }
    pm_registry_unlock();
    if (err) {
        free(ring);
        return err;
    }
    ring->stats.slots_max = PM_RING_SLOTS;
    mm->ring = ring;
    return 0;
}

static int registered(struct pm_mm *mm, unsigned opcode, void *arg, unsigned count)
{
    int err = -EINTR;

    for (int i = 0; i < PM_EINTR_LIMIT && (err == -EINTR || err == -EAGAIN); i++)
        err = pm_sys_io_uring_register(mm->ring_fd, opcode, arg, count);
    return err;
}

static int update(struct pm_mm *mm, uint32_t slot, uint64_t addr, uint64_t len)
{
    struct iovec buffer = {(void *)(uintptr_t)addr, len};
    struct pm_abi_rsrc_update2 change = {.offset = slot, .data = (uintptr_t)&buffer, .nr = 1};
    int n = registered(mm, PM_ABI_IORING_REGISTER_BUFFERS_UPDATE, &change, sizeof(change));

    if (n < 0)
        return n;
    return n == 1 ? 0 : -EIO;
}

/* What was dropped from the table may still be had by a request that does not end. */
static int empty_slot(struct pm_mm *mm, uint32_t slot)
{
    int err = 0;

    for (int i = 0; i < PM_EINTR_LIMIT; i++) {
        err = update(mm, slot, 0, 0);
        if (!err)
            return 0;
    }
    return err;
}

static void mark(uint64_t *bits, uint32_t slot, bool set)
{
    if (set)
        bits[slot / 64] |= 1ULL << slot % 64;
    else
        bits[slot / 64] &= ~(1ULL << slot % 64);
}

static void drop_stuck(struct pm_mm *mm)
{
    struct pm_ring *ring = mm->ring;

    for (uint32_t slot = 0; ring->stats.slots_stuck && slot < PM_RING_SLOTS; slot++) {
        if (!(ring->stuck[slot / 64] >> slot % 64 & 1))
            continue;
        if (update(mm, slot, 0, 0))
            return;
        mark(ring->stuck, slot, false);
        mark(ring->used, slot, false);
        ring->stats.slots_stuck--;
        ring->stats.slots--;
    }
}

static int find_slot(struct pm_ring *ring, uint32_t *slot)
{
    for (uint32_t i = 0; i < PM_RING_SLOTS / 64; i++) {
        uint32_t word = (ring->hint + i) % (PM_RING_SLOTS / 64);

        if (ring->used[word] == UINT64_MAX)
            continue;
        ring->hint = word;
        *slot = word * 64 + (uint32_t)__builtin_ctzll(~ring->used[word]);
        return 0;
    }
    return -ENOSPC;
}

int pm_ring_register(struct pm_mm *mm, uint64_t addr, uint64_t len, uint32_t *slot)
{
    struct pm_ring *ring = mm->ring;
    int err;

    drop_stuck(mm);
    err = find_slot(ring, slot);
    if (!err)
        err = update(mm, *slot, addr, len);
    if (err)
        return err;
    mark(ring->used, *slot, true);
    ring->stats.slots++;
    return 0;
}

int pm_ring_drop(struct pm_mm *mm, uint32_t slot)
{
    struct pm_ring *ring = mm->ring;
    int err = empty_slot(mm, slot);

    if (err) {
        mark(ring->stuck, slot, true);
        ring->stats.slots_stuck++;
        return err;
    }
    mark(ring->used, slot, false);
    ring->stats.slots--;
    return 0;
}

void pm_ring_close(struct pm_mm *mm)
{
    struct pm_ring *ring = mm->ring;

    if (!ring)
        return;
    mm->ring = NULL;
    for (int i = 0; i < PM_EINTR_LIMIT; i++) {
        if (registered(mm, PM_ABI_IORING_UNREGISTER_BUFFERS, NULL, 0) == 0)
            break;
    }
    pm_registry_lock();
    unmap_ring(ring);
    close_fds(mm);
    pm_registry_unlock();
    free(ring);
}
