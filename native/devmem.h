/* SPDX-License-Identifier: MIT */
/*
 * devmem.h - device memory as the files of the shim share it: arenas, and which page of the mm is in one.
 *
 * Everything here is under the device lock.
 */
#ifndef PM_DEVMEM_H
#define PM_DEVMEM_H

#include "internal.h"

#define PM_RESIDENT 1ULL

struct pm_block {
    uint64_t *back; /* the address of each slot's page, 0: free; NULL while the block is unused */
    uint64_t used;
    uint64_t used_at; /* of the device memory's clock, for LRU */
};

/*
 * An arena of 2 MiB blocks. A block serves the pages of one 2 MiB range of the mm, each at the same place in
 * it, so runs stay runs and huge pages whole. Blocks cost address space only, so there are more than `limit`
 * needs.
 */
struct pm_devmem {
    struct pm_devmem *next;
    struct pm_mm *mm;
    uint64_t base, nblocks;
    uint64_t limit, used; /* pages */
    uint64_t clock, hint;
    struct pm_block *blocks;
};

struct pm_devices {
    struct pm_devmem *list;
    uint64_t pool, pool_used; /* pages for nodes, of a reservation of their own: the monitor takes some too */
    uint64_t *pool_free;
    uint64_t *top;
    uint64_t around; /* bytes that a CPU fault brings home */
    struct pm_devmem_stats stats;
};

/* resident.c */
int pm_pool_map(uint64_t *ret);
/* Nodes come from this pool from here on, and all pages are at home; 0: there is no device memory. */
void pm_pool_set(struct pm_devices *devices, uint64_t pool);
void pm_pool_unmap(uint64_t pool);
uint64_t *pm_node_new(struct pm_devices *devices); /* a zeroed page, or NULL */
void pm_node_free(struct pm_devices *devices, uint64_t *node);
/* The entry of a page: the address of its slot | PM_RESIDENT, or 0. NULL: none, or with `grow` no memory. */
uint64_t *pm_resident_at(struct pm_devices *devices, uint64_t addr, bool grow);
static inline uint64_t pm_resident(struct pm_devices *devices, uint64_t addr)
{
    uint64_t *entry = pm_resident_at(devices, addr, false);

    return entry ? *entry & ~PM_RESIDENT : 0;
}
/* The first resident page at or after *addr and before end. */
bool pm_resident_next(struct pm_devices *devices, uint64_t *addr, uint64_t end);
/* How many pages from addr on, before end, have slots in a row. */
uint64_t pm_resident_run(struct pm_devices *devices, uint64_t addr, uint64_t end);

/* devmem.c */
struct pm_devmem *pm_devmem_of(struct pm_devices *devices, uint64_t slot);
/* A slot for each of n pages of one 2 MiB range, in a row: the address of the first, or 0. */
uint64_t pm_devmem_slots(struct pm_devmem *vram, uint64_t addr, uint64_t n);
bool pm_devmem_full(struct pm_devices *devices, uint64_t slot); /* the whole block of a slot */
/* Pages that are in their slots. -ENOMEM: none is noted. */
int pm_devmem_note(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n);
/* Pages that are in their slots no more. */
void pm_devmem_forget(struct pm_mm *mm, uint64_t addr, uint64_t n);
/* ... and whose contents go. */
void pm_devmem_drop(struct pm_mm *mm, uint64_t start, uint64_t end);
void pm_devmem_moved(struct pm_mm *mm, uint64_t from, uint64_t to, uint64_t len);

/* migrate.c */
bool pm_is_interval(uint64_t start, uint64_t end); /* whole pages of user memory */
void pm_doze(void);
/* UFFDIO_MOVE: bytes moved, from the start on, or an errno when that is none. */
int64_t pm_move_pages(int fd, uint64_t to, uint64_t from, uint64_t len);

/* home.c */
/* Bring home the pages in `only`, NULL: in any device memory: how many, -EAGAIN while an event is unread, or
 * what the kernel refuses it with. */
int64_t pm_home(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only);
/* The same for callers without the lock, that wait until events are read: 0 or an errno. */
int pm_home_all(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only,
                uint64_t *moved);
/* The same for any device memory, and drivers are told as of a CPU fault. With inline delivery device writes
 * under way in [start, end) are waited for, without the lock; 0 when none is there. */
int64_t pm_home_told(struct pm_mm *mm, uint64_t start, uint64_t end);
/* A CPU fault in a range where holes fault: 0, or what the kernel refuses it with. */
int pm_home_fault(struct pm_mm *mm, uint64_t addr);
/* The monitor's: what is on a device is to be in the child, too. */
void pm_home_child(struct pm_mm *mm, int child_uffd);

#endif
