/* SPDX-License-Identifier: MIT */
/*
 * ring.h - the io_uring of an mm: a table of registered buffers, and copies between a buffer and the caller's
 * memory. It knows nothing of who owns a slot.
 *
 * Every call has the ring lock of the mm held. That lock comes before the registry lock, and so before the
 * device lock.
 */
#ifndef PM_RING_H
#define PM_RING_H

#include "internal.h"

enum {
    PM_RING_SLOTS = PM_ABI_IORING_MAX_BUFFERS,
    PM_STAGE_SIZE = 256 * 1024, /* in the second-level cache between the two copies */
};

struct pm_ring {
    uint64_t map, map_len, sqes_map, sqes_len;
    uint32_t sq_mask, cq_mask;
    atomic_uint *sq_head, *sq_tail, *cq_head, *cq_tail;
    uint32_t *sq_array;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    uint64_t last;    /* user_data of the youngest request */
    bool outstanding; /* it was never seen to complete: the staging file is its */
    uint32_t hint;
    uint64_t used[PM_RING_SLOTS / 64];
    uint64_t stuck[PM_RING_SLOTS / 64]; /* used, by nobody: the kernel refused to drop the buffer */
    struct pm_pin *pins;
    struct pm_pin_stats stats;
};

/* Make the ring, unless it is there. */
int pm_ring_open(struct pm_mm *mm);
/* Every buffer is dropped, the ring and its descriptors go. Buffers first: a forked child that kept the
 * descriptor would keep them. */
void pm_ring_close(struct pm_mm *mm);
/* Register [addr, addr + len), at most PM_ABI_IORING_BUFFER_MAX bytes, in a free slot. -ENOSPC: none. */
int pm_ring_register(struct pm_mm *mm, uint64_t addr, uint64_t len, uint32_t *slot);
/* Drop it. The slot is the caller's no more, whatever comes back. */
int pm_ring_drop(struct pm_mm *mm, uint32_t slot);
/* transfer.c: copy up to len bytes between the buffer, at the address it was registered by, and buf. Bytes
 * done, or a negative errno. */
int64_t pm_ring_copy(struct pm_mm *mm, uint32_t slot, uint64_t addr, void *buf, uint64_t len, bool write);

#endif
