/* SPDX-License-Identifier: MIT */
/*
 * transfer.c - copies between a registered buffer and the caller's memory.
 *
 * The only way to the pages of a registered buffer is a request that copies between it and a file. The file
 * is a memfd of one piece's size: WRITE_FIXED and pread() read the pages, pwrite() and READ_FIXED write them.
 * So a wrong address of the caller is -EFAULT, and nothing of it is mapped that a fork would have to leave
 * out. One request is under way at a time.
 */
#include <errno.h>
#include <linux/io_uring.h>

#include "ring.h"

static const uint64_t complete_limit_ns = 5000ULL * 1000 * 1000;
static const uint64_t slice_ns = 200ULL * 1000 * 1000;

/* Take what has completed; true, and its result, if the request `want` is among it. */
static bool reap(struct pm_ring *ring, uint64_t want, int *res)
{
    unsigned head = atomic_load_explicit(ring->cq_head, memory_order_relaxed);
    bool found = false;

    while (head != atomic_load_explicit(ring->cq_tail, memory_order_acquire)) {
        const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];

        if (cqe->user_data == want) {
            *res = cqe->res;
            found = true;
        }
        atomic_store_explicit(ring->cq_head, ++head, memory_order_release);
    }
    return found;
}

/* Submit what the kernel has not taken yet, and wait a while for a completion. */
static int enter_ring(struct pm_mm *mm, struct pm_ring *ring)
{
    int64_t timeout[2] = {0, (int64_t)slice_ns};
    struct pm_abi_getevents_arg arg = {.ts = (uintptr_t)timeout};
    unsigned pending = atomic_load_explicit(ring->sq_tail, memory_order_relaxed) -
                       atomic_load_explicit(ring->sq_head, memory_order_acquire);

    return pm_sys_io_uring_enter(mm->ring_fd, pending, 1,
                                 PM_ABI_IORING_ENTER_GETEVENTS | PM_ABI_IORING_ENTER_EXT_ARG, &arg,
                                 sizeof(arg));
}

static bool worth_another_try(int err)
{
    return err >= 0 || err == -EINTR || err == -EAGAIN || err == -EBUSY || err == -ETIME;
}

/* Until the youngest request has completed: 0 and its result, or why it has not. */
static int wait_for_it(struct pm_mm *mm, struct pm_ring *ring, int *res)
{
    uint64_t until = pm_now_ns() + complete_limit_ns;
    int err;

    for (;;) {
        err = enter_ring(mm, ring);
        if (reap(ring, ring->last, res))
            return 0;
        if (!worth_another_try(err))
            return err;
        if (pm_now_ns() >= until)
            return -ETIMEDOUT;
    }
}

/* Take the request back if the kernel has not seen it; false: it has. */
static bool withdraw(struct pm_ring *ring)
{
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed);

    if (tail == atomic_load_explicit(ring->sq_head, memory_order_acquire))
        return false;
    atomic_store_explicit(ring->sq_tail, tail - 1, memory_order_release);
    return true;
}

/* The staging file is free again, once a request that was given up has completed. */
static int settle(struct pm_mm *mm, struct pm_ring *ring)
{
    int res, err;

    if (!ring->outstanding)
        return 0;
    err = reap(ring, ring->last, &res) ? 0 : wait_for_it(mm, ring, &res);
    if (!err)
        ring->outstanding = false;
    return err;
}

static int request(struct pm_mm *mm, struct pm_ring *ring, const struct io_uring_sqe *sqe)
{
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed), at = tail & ring->sq_mask;
    int res, err;

    ring->sqes[at] = *sqe;
    ring->sqes[at].user_data = ++ring->last;
    ring->sq_array[at] = at;
    atomic_store_explicit(ring->sq_tail, tail + 1, memory_order_release);
    err = wait_for_it(mm, ring, &res);
    if (!err)
        return res;
    ring->outstanding = !withdraw(ring);
    return err;
}

/* Between the buffer and the start of the staging file: bytes, or a negative errno. */
static int transfer(struct pm_mm *mm, uint32_t slot, uint64_t addr, uint32_t len, bool write)
{
    struct io_uring_sqe sqe = {
        .opcode = write ? PM_ABI_IORING_OP_READ_FIXED : PM_ABI_IORING_OP_WRITE_FIXED,
        .fd = mm->stage_fd,
        .addr = addr,
        .len = len,
        .buf_index = (uint16_t)slot,
    };
    int n = -EINTR;

    for (int i = 0; i < PM_EINTR_LIMIT && (n == -EINTR || n == -EAGAIN); i++)
        n = request(mm, mm->ring, &sqe);
    return n ? n : -EIO;
}

/* Between the start of the staging file and the caller's memory: bytes, fewer where that memory ends. */
static int64_t stage(struct pm_mm *mm, char *buf, uint64_t len, bool write)
{
    uint64_t done = 0;
    int interrupted = 0;

    while (done < len) {
        ssize_t n = write ? pm_sys_pwrite(mm->stage_fd, buf + done, len - done, done)
                          : pm_sys_pread(mm->stage_fd, buf + done, len - done, done);

        if (n == -EINTR && interrupted++ < PM_EINTR_LIMIT)
            continue;
        if (n <= 0)
            return done ? (int64_t)done : n ? n : -EIO;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

int64_t pm_ring_copy(struct pm_mm *mm, uint32_t slot, uint64_t addr, void *buf, uint64_t len, bool write)
{
    int64_t n = settle(mm, mm->ring);

    if (n)
        return n;
    len = pm_min(len, PM_STAGE_SIZE);
    n = write ? stage(mm, buf, len, true) : transfer(mm, slot, addr, (uint32_t)len, false);
    if (n <= 0)
        return n;
    return write ? transfer(mm, slot, addr, (uint32_t)n, true) : stage(mm, buf, (uint64_t)n, false);
}
