/* SPDX-License-Identifier: MIT */
/*
 * devmem.h - device memory as the files of the shim share it: arenas, and which page of the mm is in one.
 *
 * Everything here is under the device lock.
 */
#ifndef PM_DEVMEM_H
#define PM_DEVMEM_H

#include "internal.h"

/* An entry of the tree: the address of the slot, and these. */
#define PM_RESIDENT 1ULL
#define PM_RESIDENT_WRITE 2ULL /* the CPU's mapping of the page was writable, and is to be so again */
#define PM_RESIDENT_GUARD 4ULL /* a guard stands where it was, see guard.c */

/* PFNs of device memory stand above those of any RAM: this bit, and the number of the slot's page. */
#define PM_PFN_DEVICE (1ULL << 51)
#define PM_PFN_EXCLUSIVE (1ULL << 50) /* ... and memory that a device has exclusive access to */

static inline uint64_t pm_pfn_slot(uint64_t pfn)
{
    return (pfn & (PM_PFN_EXCLUSIVE - 1)) << PM_PAGE_SHIFT;
}

enum { PM_RESERVED = 1 };
/* 2 MiB ranges of huge pages that move in one hold of the device lock, at most. */
enum { PM_STRETCH = 32 };

struct pm_block {
    uint64_t whole; /* a 2 MiB range is in all of it, from this address on, and `back` is promised; or 0 */
    uint64_t
        *back; /* the address of each slot's page, 0: free, PM_RESERVED; NULL while the block is unused */
    uint64_t used;
    uint64_t used_at;  /* of the device memory's clock, for LRU */
    uint64_t until_ns; /* a CPU fault does not bring its pages home before: see timeslice_ns */
};

/*
 * An arena of 2 MiB blocks. A block serves the pages of one 2 MiB range of the mm, each at the same place in
 * it, so runs stay runs and huge pages whole. Blocks cost address space only, so there are more than `limit`
 * needs.
 */
struct pm_devmem {
    struct pm_devmem *next;
    struct pm_mm *mm;
    uint64_t owner;    /* as events and walks name it */
    uint64_t coherent; /* memory that the CPU reaches too: a number of its own from 1 on */
    uint64_t held;     /* ... and pages of it in use, mapped at their addresses */
    bool exclusive;    /* no memory of a device's own: pages are here while a device has them to itself */
    uint64_t base, nblocks;
    uint64_t limit, used; /* pages */
    uint64_t clock, hint;
    uint64_t timeslice_ns; /* the least time that pages stay */
    uint64_t aim_addr,
        aim_slot; /* where pages go that move now, under watch_lock; 0: wherever there is room */
    struct pm_block *blocks;
};

/* Where a page is, found once for all that is done with it: good until the tree or its block changes. */
struct pm_spot {
    uint64_t addr;
    uint64_t word;   /* its entry in the tree; 0: it is at home, and what follows is not set */
    uint64_t *entry; /* ... where that stands, NULL: it is noted with all of its 2 MiB */
    uint64_t slot;
    struct pm_devmem *vram;
    struct pm_block *block;
};

static inline uint64_t pm_block_of(const struct pm_devmem *vram, uint64_t slot)
{
    return (slot - vram->base) / PM_HUGE_SIZE;
}

static inline uint64_t pm_place_of(uint64_t slot)
{
    return slot % PM_HUGE_SIZE >> PM_PAGE_SHIFT;
}

struct pm_devices {
    struct pm_devmem *list;
    struct pm_devmem *exclusive; /* the one of the list that is */
    uint64_t pool, pool_used; /* pages for nodes, of a reservation of their own: the monitor takes some too */
    uint64_t promised;        /* nodes that must be there when they are wanted */
    uint64_t *pool_free;
    uint64_t *top;
    uint64_t *coherent; /* another such tree: see coherent.c */
    uint64_t around;    /* bytes that a CPU fault brings home */
    bool leftover;      /* a slot may not be empty, though no page is noted in it */
    bool met_holes;     /* some of what has come home last may have been holes */
    bool minor;         /* memory of files has left: its holes are the file's pages */
    struct pm_devmem_stats stats;
};

/* resident.c */
int pm_pool_map(uint64_t *ret);
/* Nodes come from this pool from here on, and all pages are at home; 0: there is no device memory. */
void pm_pool_set(struct pm_devices *devices, uint64_t pool);
void pm_pool_unmap(uint64_t pool);
uint64_t *pm_node_new(struct pm_devices *devices); /* a zeroed page, or NULL */
void pm_node_free(struct pm_devices *devices, uint64_t *node);
bool pm_node_promise(struct pm_devices *devices, uint64_t n);
uint64_t *pm_node_promised(struct pm_devices *devices); /* one of those; it is there */
/* The entry of an address in a tree, NULL: none, or with `grow` no memory; the first at or after *addr that
 * is not 0. */
uint64_t *pm_tree_at(struct pm_devices *devices, uint64_t *top, uint64_t addr, bool grow);
bool pm_tree_next(uint64_t *top, uint64_t *addr, uint64_t end);
/* The entry of a page, 0: at home. NULL: none, or with `grow` no memory. */
uint64_t *pm_resident_at(struct pm_devices *devices, uint64_t addr, bool grow);
/* Its value, 0: at home. */
uint64_t pm_resident_word(struct pm_devices *devices, uint64_t addr);
/* Its value, and where it stands, NULL: with all of the page's 2 MiB. */
uint64_t pm_resident_entry(struct pm_devices *devices, uint64_t addr, uint64_t **entry);
/* The one word of the 2 MiB range that addr is in, if it has one. */
uint64_t *pm_resident_whole(struct pm_devices *devices, uint64_t addr);
/* So that a range can be noted by one; then do it: nothing of it is resident, and two nodes are promised. */
bool pm_resident_ready(struct pm_devices *devices, uint64_t addr);
void pm_resident_set_whole(struct pm_devices *devices, uint64_t addr, uint64_t value);
static inline uint64_t pm_resident(struct pm_devices *devices, uint64_t addr)
{
    return pm_page_down(pm_resident_word(devices, addr));
}
/* The first resident page at or after *addr and before end. */
bool pm_resident_next(struct pm_devices *devices, uint64_t *addr, uint64_t end);
/* How many whole 2 MiB ranges in a row, from addr on and before end, have blocks in a row of one memory. */
uint64_t pm_resident_stretch(struct pm_devices *devices, uint64_t addr, uint64_t end);
/* How many pages from addr on, before end and in its 2 MiB, have slots in a row, and the same bits. */
uint64_t pm_resident_run(struct pm_devices *devices, uint64_t addr, uint64_t end);
/* Is it, in this slot, in a huge page of device memory, mapped whole when it comes home? With the device lock
 * held. */
bool pm_resident_huge(struct pm_mm *mm, uint64_t addr, uint64_t slot);
/*
 * What a walk of that owner reads for pages of its own that are in device memory; `keep`: bits that they may
 * have. Takes the lock. True if there was one.
 */
bool pm_resident_show(struct pm_mm *mm, uint64_t owner, uint64_t start, uint64_t n, uint64_t keep,
                      uint64_t *pfns);
/* Entries of the pagemap, with resident pages as present. */
void pm_resident_present(struct pm_mm *mm, uint64_t start, uint64_t n, uint64_t *pagemap);
/* Is each page that a pfn of device memory is for in that slot still? With the device lock held. */
bool pm_resident_stand(struct pm_mm *mm, uint64_t start, uint64_t n, const uint64_t *pfns);
/* Resident pages of [start, end) are read-only from here on, at home too. */
void pm_resident_protect(struct pm_mm *mm, uint64_t start, uint64_t end);

/* devmem.c */
struct pm_devmem *pm_devmem_of(struct pm_devices *devices, uint64_t slot);
uint64_t pm_slot_pfn(struct pm_devices *devices, uint64_t slot);
bool pm_devmem_full(struct pm_devices *devices, uint64_t slot); /* the whole block of a slot */
/* Slots that no page was ever in become pages of zeroes: a device is about to use them. With the device lock
 * held: a slot whose page has gone home stays empty, or what is there would be taken for the next page. */
void pm_devmem_fill(struct pm_mm *mm, uint64_t addr, uint64_t at, uint64_t len);

/* slots.c */
/* A slot for each of n pages of one 2 MiB range, in a row: the address of the first, or 0. */
uint64_t pm_devmem_slots(struct pm_devmem *vram, uint64_t addr, uint64_t n);
/* The same, or as a migration aims, at slots set aside for it; 0 where there is no room. *n becomes what
 * there is room for. */
uint64_t pm_devmem_room(struct pm_devmem *vram, uint64_t addr, uint64_t *n);
/* The same for whole 2 MiB ranges in a row, *n of them: the first of unused blocks in a row. */
uint64_t pm_devmem_blocks(struct pm_devmem *vram, uint64_t *n);
/* The addresses of a block's slots; NULL while it is unused. */
uint64_t *pm_block_back(struct pm_devices *devices, struct pm_block *block);
/* Slots in a row, in one block, are free; or are so already, and are counted. Is the block unused now? */
bool pm_slots_free(struct pm_devices *devices, struct pm_devmem *vram, uint64_t slot, uint64_t n);
bool pm_block_release(struct pm_devices *devices, struct pm_devmem *vram, struct pm_block *block, uint64_t n);
/* The page tables of unused blocks go. */
/* Slots that pages are about to come to are empty: 0 or -EBUSY. */
int pm_slots_ready(struct pm_mm *mm, uint64_t slot, uint64_t len);
/* What is in slots goes. */
void pm_slots_empty(struct pm_mm *mm, uint64_t slot, uint64_t len);
void pm_block_drop_tables(uint64_t start, uint64_t end);

/* note.c */
/* So that noting pages there will not fail: 0 or -ENOMEM. Undone by the note, or by pm_devmem_unready(). */
int pm_devmem_ready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n);
void pm_devmem_unready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n);
/* ... of n that are ready these have moved. */
void pm_devmem_note_ready(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n, uint64_t moved,
                          const bool *writable);
/* Pages that are in their slots, and for each whether it was writable. -ENOMEM: none is noted. */
int pm_devmem_note(struct pm_devmem *vram, uint64_t addr, uint64_t slot, uint64_t n, const bool *writable);
struct pm_spot pm_spot_at(struct pm_devices *devices, uint64_t addr); /* of devices that may be NULL */
/* Pages that are in their slots no more. */
void pm_devmem_forget(struct pm_mm *mm, uint64_t addr, uint64_t n);
void pm_spot_forget(struct pm_mm *mm, const struct pm_spot *spot); /* the same, of one */
/* ... and whose contents go. */
void pm_devmem_drop(struct pm_mm *mm, uint64_t start, uint64_t end);
void pm_devmem_moved(struct pm_mm *mm, uint64_t from, uint64_t to, uint64_t len);
/* The address of the page that is in a slot, 0: none. */
uint64_t pm_devmem_back(const struct pm_devmem *vram, uint64_t slot);
bool pm_devmem_is_at(struct pm_devices *devices, uint64_t addr, uint64_t slot);

/* migrate.c: with watch_lock held; pages that moved, from start on */
int pm_move_out(struct pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved);
bool pm_movable(const struct pm_mm *mm, const struct pm_vma *vma);
bool pm_is_interval(uint64_t start, uint64_t end); /* whole pages of user memory */
bool pm_is_pages(uint64_t start, uint64_t n);      /* the same, of n pages */
void pm_doze(void);
/* Take the lock at a moment at which no fork and no madvise is half done, and every event has been read. */
int pm_lock_quiet(struct pm_mm *mm, uint64_t start, uint64_t end);

/* move_out.c */
/* UFFDIO_MOVE: bytes moved, from the start on, or an errno when that is none. */
int64_t pm_move_pages(int fd, uint64_t to, uint64_t from, uint64_t len, uint64_t mode);
/* Is a page of a writable vma mapped writable, by its entry of the pagemap? */
bool pm_is_writable(struct pm_mm *mm, uint64_t addr, uint64_t entry);
/* One 2 MiB range, or a part of it; what is pinned stays. *moved counts pages. */
int pm_move_range(struct pm_devmem *vram, uint64_t addr, uint64_t end, uint64_t *moved);
/* From *addr on, huge pages that are alike, by one call, if there are any: *addr is behind them then. */
int pm_move_huge(struct pm_devmem *vram, uint64_t *addr, uint64_t end, uint64_t *moved);

/* lift.c: n pages of one 2 MiB range, which becomes how many there is room for; `copies`: of a file, and they
 * leave only as this process's own. -EAGAIN: some of them stay. */
struct pm_lift {
    uint64_t addr, n;
    bool copies;
    const bool *writable;
};

int pm_lift(struct pm_devmem *vram, struct pm_lift *lift);
/* Whether n slots are being filled, of some of them. */
bool pm_lifting(const struct pm_mm *mm, uint64_t slot, uint64_t n);
struct uffd_msg;
bool pm_lift_claims(const struct pm_mm *mm, const struct uffd_msg *msg);
bool pm_memory_locked(void);

/* guard.c */
bool pm_can_guard(const struct pm_mm *mm, const struct pm_vma *vma);
bool pm_guarded(struct pm_devices *devices, uint64_t addr); /* with the lock held */
/* As pm_lift(), of private mappings of files; also -EBUSY: another handler of SIGSEGV would get the faults.
 */
int pm_guard_out(struct pm_devmem *vram, struct pm_lift *lift);
/* With the lock held, guarded pages that have slots in a row: bytes that are home, from the first on, or an
 * errno. */
int64_t pm_guard_home(struct pm_mm *mm, uint64_t addr, uint64_t slot, uint64_t len);
/* The monitor's, at an event REMOVE: the pages become the file's, so no guard is to stand there. */
void pm_guard_removed(struct pm_mm *mm, uint64_t start, uint64_t end);
/* The next guarded pages at or after *addr, in a row. Takes the lock. */
bool pm_guard_next(struct pm_mm *mm, uint64_t *addr, uint64_t *end);

/* coherent.c */
int pm_coherent_take(struct pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved);
int pm_coherent_leave(struct pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved);
/* Pages whose contents have gone, or moved. With the lock held. */
void pm_coherent_drop(struct pm_mm *mm, uint64_t start, uint64_t end);
void pm_coherent_first(struct pm_devmem *vram, uint64_t *addr); /* of those it holds */
void pm_coherent_moved(struct pm_mm *mm, uint64_t from, uint64_t to, uint64_t len);

/* home.c */
/* Wake who waits for these pages: whoever is not woken sleeps for ever. */
void pm_wake(struct pm_mm *mm, uint64_t start, uint64_t len);
/* Pages from a spot on, in slots in a row, come home: bytes, from the first on, or an errno. */
int64_t pm_home_run(struct pm_mm *mm, const struct pm_spot *spot, uint64_t len);
/* Bring home the pages in `only`, NULL: in any device memory: how many, -EAGAIN while an event is unread, or
 * what the kernel refuses it with. */
int64_t pm_home(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only);
/* The same for callers without the lock, that wait until events are read: 0 or an errno. */
int pm_home_all(struct pm_mm *mm, uint64_t start, uint64_t end, const struct pm_devmem *only,
                uint64_t *moved);
/* Pages that have come home as read-only ones. */
void pm_home_readonly(struct pm_mm *mm, uint64_t start, uint64_t end);

/* home_fault.c */
/* As pm_home() for any device memory, and drivers are told as of a CPU fault. With inline delivery device
 * writes under way in [start, end) are waited for, without the lock; 0 when none is there. */
int64_t pm_home_told(struct pm_mm *mm, uint64_t start, uint64_t end);
/* What a device or the kernel is about to fault comes home at once, as a CPU fault would bring it. */
void pm_home_touch(struct pm_mm *mm, uint64_t start, uint64_t end);
/* A CPU fault in a range where holes fault: 0, or what the kernel refuses it with. */
int pm_home_fault(struct pm_mm *mm, const struct pm_spot *spot);
/* The monitor's: faults on pages whose least time on the device is not over wait; in how many ms the first is
 * to be served, or -1. */
void pm_home_deferred(struct pm_mm *mm);
int pm_home_deferred_ms(struct pm_mm *mm);

/* home_child.c: the monitor's: what is on a device is to be in the child, too. */
void pm_home_child(struct pm_mm *mm, int child_uffd);

#endif
