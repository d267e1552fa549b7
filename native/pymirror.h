/* SPDX-License-Identifier: MIT */
/*
 * pymirror.h - the native half of pymirror: what must not wait for the GIL.
 *
 * Plain C11. Nothing here knows of Python: the same library is meant to be loaded into foreign
 * processes. Functions return 0 (or a count) and a negative errno on failure; results leave through
 * the last pointer argument. Addresses and lengths are bytes, times are nanoseconds, page arrays
 * have one uint64_t a 4 KiB page.
 *
 * This header is also the cffi declaration: native/build_shim.py feeds it to cdef() without its
 * preprocessor lines, so only plain declarations, enums and comments stand here.
 */
#ifndef PYMIRROR_H
#define PYMIRROR_H

#include <stddef.h>
#include <stdint.h>

const char *pm_version(void);

/* Features. */

enum pm_feature {
    PM_FEAT_UFFD,          /* a userfaultfd of any kind */
    PM_FEAT_UFFD_KERNEL,   /* one that also resolves faults taken inside system calls */
    PM_FEAT_UFFD_WP_ASYNC, /* UFFD_FEATURE_WP_ASYNC: watch any vma, write bits after a fork */
    PM_FEAT_UFFD_WP_UNPOPULATED,
    PM_FEAT_UFFD_EVENTS,     /* REMOVE, UNMAP and REMAP events */
    PM_FEAT_UFFD_EVENT_FORK, /* fork by a raw clone is seen (CAP_SYS_PTRACE) */
    PM_FEAT_UFFD_MOVE,       /* UFFDIO_MOVE */
    PM_FEAT_UFFD_SIGBUS,     /* inline fault delivery */
    PM_FEAT_PAGEMAP,         /* /proc/self/pagemap can be read */
    PM_FEAT_PFN,             /* ... and shows PFNs (CAP_SYS_ADMIN) */
    PM_FEAT_PAGEMAP_SCAN,    /* the PAGEMAP_SCAN ioctl */
    PM_FEAT_PROCMAP_QUERY,   /* the PROCMAP_QUERY ioctl */
    PM_FEAT_POPULATE,        /* MADV_POPULATE_READ and MADV_POPULATE_WRITE */
    PM_FEAT_PROCESS_VM,      /* process_vm_readv and process_vm_writev on oneself */
    PM_FEAT_IO_URING,        /* io_uring with registered buffers: real pins */
    PM_FEAT_GUARD,           /* guard regions in private mappings of files, and /proc/self/mem beyond them */
    PM_FEAT_COUNT
};

struct pm_features {
    uint64_t have;        /* bit i set: feature i of enum pm_feature works */
    int32_t why[32];      /* errno that showed feature i to be missing, 0 if it works */
    uint64_t zero_pfn;    /* PFN of the zero page, 0 if unknown */
    uint32_t uffd_source; /* 0 none, 1 /dev/userfaultfd, 2 system call, 3 user-mode-only */
    uint32_t pad;
    uint64_t uffd_features; /* feature bits the kernel offers for UFFDIO_API */
};

/* Probe, switching off the features whose bits are set in `disable` (tests, PYMIRROR_DISABLE). */
int pm_features_probe(uint64_t disable, struct pm_features *ret);

/* The address space. */

struct pm_mm;
typedef struct pm_mm pm_mm;
struct pm_sub;
typedef struct pm_sub pm_sub;
struct pm_table;
typedef struct pm_table pm_table;
struct pm_inv;
typedef struct pm_inv pm_inv;

enum pm_mm_flag {
    PM_MM_INLINE = 1 /* the thread that touches device memory serves its fault, by SIGBUS */
};

struct pm_mm_options {
    uint64_t disable;      /* feature bits to do without */
    uint32_t queue_length; /* events kept for the dispatcher, 0: 1024 */
    uint32_t flags;        /* enum pm_mm_flag */
};

/*
 * Create the mirror state of this process's mm. Opens /proc files, and a userfaultfd with a monitor
 * thread when the first vma is watched. Counted: pm_mm_close() ends its work (idempotent, wakes every waiter
 * with -ESRCH), pm_mm_put() drops the caller's reference; subs and tables hold references of their own. Every
 * call after close, or in a forked child, is -ESRCH.
 */
int pm_mm_create(const struct pm_mm_options *opt, pm_mm **ret);
int pm_mm_close(pm_mm *mm);
void pm_mm_put(pm_mm *mm);
/* 1: open, 0: closed, -1: inherited by a forked child. */
int pm_mm_alive(const pm_mm *mm);
int pm_mm_features(const pm_mm *mm, struct pm_features *ret);

struct pm_mm_stats {
    uint64_t invalidate_seq; /* odd while an invalidation runs */
    uint64_t active;         /* invalidations running, lingering REMOVEs included */
    uint64_t subs;           /* notifiers and ranges in the interval tree */
    uint64_t watched_ranges;
    uint64_t watched_bytes;
    uint64_t queue_depth;
    uint64_t queue_overflows; /* times that the queue became "everything invalid" */
    uint64_t
        oldest_event_ns;     /* CLOCK_MONOTONIC of the oldest event whose callbacks did not return, 0: none */
    uint64_t events[8];      /* by enum pm_event_type, from the kernel */
    uint64_t swallowed;      /* kernel events that belonged to an open API operation */
    uint64_t detected;       /* changes found by comparing page tables */
    uint64_t access_redone;  /* device reads discarded and done again */
    uint64_t drain_timeouts; /* invalidations that went on without an in-flight write */
    uint64_t monitor_running;
    uint64_t populated_pages; /* pages asked of MADV_POPULATE_* */
    uint64_t inflight;        /* device accesses running */
};
int pm_mm_stats(pm_mm *mm, struct pm_mm_stats *ret);

/* Vmas. */

enum pm_vma_flag {
    PM_VMA_READ = 1,
    PM_VMA_WRITE = 2,
    PM_VMA_EXEC = 4,
    PM_VMA_SHARED = 8,
    PM_VMA_HUGETLB = 16,
    PM_VMA_FILE = 32,   /* has an inode: a file, a memfd or shared anonymous memory */
    PM_VMA_SPECIAL = 64 /* VM_IO or VM_PFNMAP by all that can be seen: vvar, device nodes */
};

struct pm_vma {
    uint64_t start, end;
    uint64_t flags;     /* enum pm_vma_flag */
    uint64_t page_size; /* bytes; 2 MiB on hugetlb */
    uint64_t offset;    /* in the file, bytes */
    uint64_t inode;
    uint32_t dev_major, dev_minor;
    char name[128]; /* as /proc/self/maps has it, cut to fit */
};

/* The vma that holds addr, or the next above it; -ENOENT when there is none. */
int pm_vma_find(pm_mm *mm, uint64_t addr, struct pm_vma *ret);

/* System calls on memory, through the layer where tests inject errors. */
int pm_mmap(pm_mm *mm, uint64_t addr, uint64_t len, int prot, int flags, int fd, uint64_t offset,
            uint64_t *ret);
int pm_munmap(pm_mm *mm, uint64_t addr, uint64_t len);
int pm_mprotect(pm_mm *mm, uint64_t addr, uint64_t len, int prot);
int pm_madvise(pm_mm *mm, uint64_t addr, uint64_t len, int advice);
int pm_mremap(pm_mm *mm, uint64_t addr, uint64_t old_len, uint64_t new_len, int flags, uint64_t new_addr,
              uint64_t *ret);

/* Raw pagemap entries of [start, start + n pages), as the kernel gives them. */
int pm_pagemap_read(pm_mm *mm, uint64_t start, uint64_t n, uint64_t *ret);

/* Watching. */

enum pm_watch_flag {
    PM_WATCH_FILES = 1, /* file mappings too (switches their fault-around off) */
    PM_WATCH_EXACT = 2  /* the interval is a mapping of its own: do not go beyond it */
};

/*
 * Register every vma of [start, end) with the watch descriptor, so that foreign munmap, mremap, madvise and
 * fork are reported. Vmas are watched whole: a registered part would be split off, and an mremap over the
 * whole, which the kernel made in one move before, would fail. Idempotent. Vmas that cannot be watched
 * (another userfaultfd has them) are passed over. Returns the number of bytes now watched in the interval.
 */
int64_t pm_watch(pm_mm *mm, uint64_t start, uint64_t end, uint32_t flags);
/* Is all of it watched? 1, or 0: no, or it cannot be told while an event is unread; or -ESRCH. */
int pm_watch_has(pm_mm *mm, uint64_t start, uint64_t end);
int pm_unwatch(pm_mm *mm, uint64_t start, uint64_t end);

/* Sequence numbers. */

enum pm_event_type { /* as enum mmu_notifier_event */
                     PM_UNMAP,
                     PM_CLEAR,
                     PM_PROTECTION_VMA,
                     PM_PROTECTION_PAGE,
                     PM_SOFT_DIRTY,
                     PM_RELEASE,
                     PM_MIGRATE,
                     PM_EXCLUSIVE
};

enum pm_guarantee { PM_BEFORE, PM_AFTER, PM_DETECTED };

/*
 * A node [start, last] of the interval tree with the kernel's sequence rules: the seq of a sub is odd,
 * and moves with every invalidation that overlaps it. `cookie` is the caller's name for it, `kind` a bit of
 * its choice. last is inclusive, so 0..UINT64_MAX is the whole mm. Insert and remove are O(log n).
 */
int pm_sub_insert(pm_mm *mm, uint64_t start, uint64_t last, uint64_t cookie, uint32_t kind, pm_sub **ret);
/* Take it out of the tree: idempotent. Waiters get -ESRCH. */
int pm_sub_remove(pm_sub *sub);
void pm_sub_put(pm_sub *sub);
/*
 * Wait until no invalidation overlaps, at most timeout_ns, then give the sequence. -ETIMEDOUT, -ESRCH (mm or
 * sub is gone). Returns at the latest after 50 ms with -EINTR, so that a caller can look for signals and call
 * again.
 */
int pm_sub_read_begin(pm_sub *sub, uint64_t timeout_ns, uint64_t *seq);
/*
 * 1 if an invalidation overlapped since seq was given (or one runs now). Takes no lock, but waits for the
 * monitor where it is just reading events.
 */
int pm_sub_read_retry(const pm_sub *sub, uint64_t seq);
uint64_t pm_sub_seq(const pm_sub *sub);

/*
 * Begin an invalidation of [start, end) (end 0: to the end of the address space): sequence numbers move,
 * device entries are fenced, device writes in flight are waited for; on return no entry of before is used
 * again. The caller then runs its callbacks, calls pm_invalidate_delivered(), makes the change and calls
 * pm_invalidate_end().
 */
int pm_invalidate_start(pm_mm *mm, uint64_t start, uint64_t end, int event, int guarantee, pm_inv **ret,
                        uint64_t *seq);
int pm_invalidate_delivered(pm_inv *inv);
/* Frees inv. Without pm_invalidate_delivered() before, a callback refused: entries that inv fenced are
 * dropped. */
int pm_invalidate_end(pm_inv *inv);

/* Cookies of the subs of the given kinds (bit mask) that overlap [start, end), in address order; returns
 * how many there are, which may be more than cap. */
int64_t pm_overlapping(pm_mm *mm, uint64_t start, uint64_t end, uint32_t kinds, uint64_t *cookies,
                       uint64_t cap);

/* Events of the kernel, for the dispatcher. */

enum pm_event_flag {
    PM_EV_OVERFLOW = 1, /* the queue was full: stands for any number of events, everywhere */
    PM_EV_REMAP = 2,    /* new_start is where the memory went */
    PM_EV_FAULT = 4     /* CPU faults on device memory, of any number of pages in a row */
};

struct pm_event {
    uint64_t start, end; /* end 0: to the end of the address space */
    uint64_t seq;        /* the sequence number that it set */
    uint64_t first_seq;  /* ... and the first, when it stands for more than one invalidation */
    uint64_t new_start;
    uint64_t when_ns; /* CLOCK_MONOTONIC at which it was read */
    uint32_t type;    /* enum pm_event_type */
    uint32_t guarantee;
    uint32_t flags; /* enum pm_event_flag */
    uint32_t pad;
    uint64_t owner; /* of the device memory that pages came home from, else 0 */
};

/*
 * The next event: 0, -ETIMEDOUT, -ESRCH once the mm is closed and the queue is empty. 4 ms lie between
 * events of CPU faults, and what the kernel reports waits for more of it, 10 ms at most, unless the time-out
 * is shorter, or something else waits.
 */
int pm_event_wait(pm_mm *mm, uint64_t timeout_ns, struct pm_event *ret);
/* The callbacks of the event last given have returned. */
int pm_event_done(pm_mm *mm);
/* Wait until the events queued at the time of the call are done: 0, -ETIMEDOUT, -EINTR after 50 ms, -ESRCH.
 * *ticket 0 on the first call. */
int pm_event_sync(pm_mm *mm, uint64_t timeout_ns, uint64_t *ticket);

/* The walk: snapshot and fault. */

/* HMM_PFN_VALID, _WRITE, _ERROR are bits 63, 62, 61 of an entry, the order is bits 53-57, the PFN the bits
 * below. */
enum pm_walk_flag {
    PM_WALK_FAULT = 1,   /* fault what is asked for and absent; else only look */
    PM_WALK_NOBLOCK = 2, /* -EAGAIN rather than wait for I/O */
    PM_WALK_STRICT = 4,  /* the series' snapshot: a hole is -EFAULT, an unreadable vma -EPERM */
    PM_WALK_VERIFY = 8   /* compare with device tables and DMA mappings: -ESTALE names what changed unseen */
};

struct pm_walk {
    uint64_t start, end;
    uint64_t *pfns;         /* in: requests per page; out: HMM pfns */
    uint64_t default_flags; /* request = (pfns[i] & pfn_flags_mask) | default_flags */
    uint64_t pfn_flags_mask;
    uint64_t owner; /* pages in device memory of this owner are reported, not faulted; 0: of none */
    uint32_t flags; /* enum pm_walk_flag */
    uint32_t pad;
    pm_sub *sub; /* checked with seq between steps: -EBUSY when it moved; may be 0 */
    uint64_t seq;
    uint64_t fail_start; /* out: the address of a failure, or the interval of -ESTALE */
    uint64_t fail_end;
    uint64_t populated; /* out: pages asked of the kernel */
};

/*
 * One native call for a range, however long. 0; -EINVAL; -EFAULT (hole, no access); -EPERM (write to a
 * read-only vma, or STRICT and unreadable); -EBUSY; -EAGAIN; -ENOMEM; -EHWPOISON; -ESTALE; -ESRCH. On an
 * error pfns from fail_start on are 0.
 */
int pm_walk(pm_mm *mm, struct pm_walk *walk);
/* The same, but bits 58 to 60 of the pfns stay as they were, whatever becomes of the walk. */
int pm_walk_inout(pm_mm *mm, struct pm_walk *walk);

/* The device page table. */

enum pm_entry { /* bits of a device page-table entry; the PFN is below them */
                PM_ENTRY_ORDER_SHIFT = 53,
                PM_ENTRY_FENCED_BIT =
                    61, /* unusable: the low 56 bits are the seq of the invalidation that fenced it */
                PM_ENTRY_WRITE_BIT = 62,
                PM_ENTRY_VALID_BIT = 63
};

struct pm_table_stats {
    uint64_t entries; /* programmed, fenced ones included */
    uint64_t fenced;
    uint64_t bytes;                /* of memory the table keeps */
    uint64_t tlb_hits, tlb_misses; /* pages that the device has translated, with its 64 cached translations */
    uint64_t tlb_flushed;          /* cached translations that an invalidation or the driver took away */
};

int pm_table_create(pm_table **ret);
void pm_table_put(pm_table *table);
/*
 * Program pfns[0..n) at start, if no invalidation overlapped sub since seq and pfns of device memory are of
 * pages that are there: else -EBUSY and nothing is programmed. Entries without VALID are left out. Binds the
 * table to sub's mm while it has entries: -EXDEV if it is another's.
 */
int pm_table_map(pm_table *table, pm_sub *sub, uint64_t seq, uint64_t start, uint64_t n,
                 const uint64_t *pfns);
/* Drop the entries of [start, end) (end 0: to the end); returns how many. */
int64_t pm_table_clear(pm_table *table, uint64_t start, uint64_t end);
/* Raw entries of n pages from start. */
int pm_table_read(pm_table *table, uint64_t start, uint64_t n, uint64_t *ret);
/* The first entry in [start, end), fenced or not: its address, or -ENOENT. */
int pm_table_next(pm_table *table, uint64_t start, uint64_t end, uint64_t *ret);
int pm_table_stats(pm_table *table, struct pm_table_stats *ret);

/* Device access. */

enum pm_access_fault {
    PM_FAULT_NONE,
    PM_FAULT_MISSING,   /* no entry */
    PM_FAULT_READONLY,  /* a write, and the entry is read-only */
    PM_FAULT_FENCED,    /* fenced, its callback has not run yet: an ordinary device fault */
    PM_FAULT_STALE,     /* fenced, its callback returned and did not clear it: a driver bug */
    PM_FAULT_CHANGED,   /* the page table behind [fault_start, fault_end) changed unseen (detected) */
    PM_FAULT_DIRECTION, /* DMA against the direction of the mapping */
    PM_FAULT_MASK,      /* DMA beyond the device's mask */
    PM_FAULT_ATOMIC     /* an atomic on memory that the device has not to itself */
};

struct pm_access {
    uint64_t addr;
    uint64_t len;
    void *buf;
    uint32_t write;
    uint32_t fault;       /* out: enum pm_access_fault */
    uint64_t done;        /* out: bytes copied */
    uint64_t fault_start; /* out */
    uint64_t fault_end;   /* out */
    uint64_t fence_seq;   /* out: seq of the invalidation that fenced the entry */
    uint64_t redone;      /* out: times a read was discarded and done again */
};

/*
 * Read or write process memory as the device, page by page through the table. 0 when all of it was done;
 * -EFAULT with `fault` set at the first page that the table does not serve, or PM_FAULT_NONE when it is `buf`
 * that is not there; -EOPNOTSUPP without process_vm_readv and _writev. What was done before it stays done.
 */
int pm_access(pm_table *table, struct pm_access *access);
enum pm_atomic_op { PM_ATOMIC_ADD, PM_ATOMIC_CAS };

struct pm_atomic {
    uint64_t addr;
    uint32_t size; /* 4 or 8 bytes; addr is a multiple of it */
    uint32_t op;   /* enum pm_atomic_op */
    uint64_t operand, expected;
    uint64_t old;         /* out: what was there */
    uint32_t fault, pad;  /* out: enum pm_access_fault */
    uint64_t fault_start; /* out */
    uint64_t fence_seq;   /* out */
};

/*
 * One atomic of the device, through a writable entry of device memory or of exclusive memory: no thread of
 * the CPU can reach the word meanwhile. 0; -EFAULT with `fault` set; -EINVAL; -ESRCH.
 */
int pm_access_atomic(pm_table *table, struct pm_atomic *atomic);
/* Compare the entries of [start, end) with the page table: 0 alike, -ESTALE and the first changed run. */
int pm_table_verify(pm_table *table, uint64_t start, uint64_t end, uint64_t *changed_start,
                    uint64_t *changed_end);

/* Pins. */

struct pm_pin;
typedef struct pm_pin pm_pin;

struct pm_pin_stats {
    uint64_t pins;  /* made and not released */
    uint64_t pages; /* that these hold */
    uint64_t slots; /* of the ring's table, in use: one for each GiB, or part of it, of a pin */
    uint64_t slots_max;
    uint64_t slots_stuck; /* the kernel did not drop them: tried again at the next pin, and at close */
    uint64_t made, released;
    uint64_t read_bytes, write_bytes; /* through pins */
};

enum pm_pin_flag {
    PM_PIN_REPLACE = 1 /* pages that are shared copy-on-write too */
};

struct pm_pinning {
    uint64_t start, npages;
    uint64_t *pfns; /* out: HMM pfns of the pages; NULL: do not look at the page table */
    uint32_t flags; /* enum pm_pin_flag */
    uint32_t pad;
    uint64_t changed_start, changed_end; /* out: see below; equal for nothing */
};

/*
 * Pin pages, all or none: a registered buffer of the mm's io_uring, which is FOLL_WRITE | FOLL_LONGTERM and
 * charged to RLIMIT_MEMLOCK without CAP_IPC_LOCK. The pages stay what they are whatever is mapped at their
 * addresses later.
 *
 * A page that is shared copy-on-write would be replaced by a copy. Without PM_PIN_REPLACE that is -EAGAIN,
 * and such pages lie in [changed_start, changed_end): announce it, and pin them within the invalidation.
 * After a success that interval is where the kernel moved pages to pin them, which nobody was told of.
 *
 * -EINVAL; -EFAULT (a hole, not writable, special, a shared mapping of a file on disk); -ENOMEM (memory or
 * the limit); -ENOSPC (no slot is left); -EBUSY (an invalidation passed, the pages are unknown); -EINTR (one
 * still runs after 50 ms: look for signals, go again); -EOPNOTSUPP; -ESRCH.
 */
int pm_pin_create(pm_mm *mm, struct pm_pinning *pinning, pm_pin **ret);
/*
 * Give the pages back. Only the first call does: -EALREADY from then on. -EBUSY while it is held, -ESRCH when
 * the mm was closed, which gave them back. Any other error: it is released, but the kernel still has
 * pages, see slots_stuck.
 */
int pm_pin_release(pm_pin *pin);
/* References keep the object; the last to go releases a pin that nobody released. */
void pm_pin_get(pm_pin *pin);
void pm_pin_put(pm_pin *pin);
/* A hold keeps the pages from release, as long as they are mapped for DMA. -EALREADY, -ESRCH as release. */
int pm_pin_hold(pm_pin *pin);
void pm_pin_unhold(pm_pin *pin);
/*
 * Read or write the pinned pages, not what is mapped at their addresses now. Done bytes go to *done, also on
 * an error: -EFAULT (`buf` is not there), -EINVAL (beyond the pin), -EALREADY, -ESRCH, -ETIMEDOUT: the kernel
 * does not complete it. Calls of one mm take turns, a piece at a time.
 */
int pm_pin_access(pm_pin *pin, uint64_t offset, void *buf, uint64_t len, int write, uint64_t *done);
int pm_pin_stats(pm_mm *mm, struct pm_pin_stats *ret);

/* Device memory, and migration. */

struct pm_devmem;
typedef struct pm_devmem pm_devmem;

struct pm_devmem_stats {
    uint64_t resident;   /* pages that are in device memory now */
    uint64_t to_device;  /* pages moved so far */
    uint64_t to_system;  /* ... and home, by faults too */
    uint64_t copied;     /* those of them that had to be copied */
    uint64_t faults;     /* CPU faults that brought pages home */
    uint64_t filled;     /* never-touched pages that were filled at a CPU fault */
    uint64_t dropped;    /* pages unmapped or discarded while they were in device memory */
    uint64_t child_lost; /* pages that a forked child did not get */
};

/*
 * Device memory for at most `size` bytes of this mm's pages. -EOPNOTSUPP without userfaultfd that serves
 * system calls (PM_MM_INLINE: that gives SIGBUS), its events, UFFDIO_MOVE and the pagemap; -EINVAL; -ENOMEM;
 * -ESRCH.
 */
int pm_devmem_create(pm_mm *mm, uint64_t size, uint64_t owner, pm_devmem **ret);
/* Frees it. -EBUSY while pages are in it; -ESRCH in a forked child. */
int pm_devmem_destroy(pm_devmem *vram);
/*
 * Make it memory that the CPU reaches as well (MEMORY_DEVICE_COHERENT), before the first migration: pages
 * that migrate are exchanged for others, and stay mapped. -EOPNOTSUPP without PFNs, -EBUSY once it has pages,
 * or is so already, -ENOSPC beyond 2047 of an mm.
 */
int pm_devmem_coherent(pm_devmem *vram);
/* The least time that pages stay once they have migrated, 1 s at most: a CPU fault waits for it, a call does
 * not. */
int pm_devmem_timeslice(pm_devmem *vram, uint64_t ns);
/* For each of n pages: is it in this memory, of either kind? -EINVAL, -ESRCH. */
int pm_devmem_holds(pm_devmem *vram, uint64_t start, uint64_t n, uint8_t *ret);
/* For each of n pages: is it in coherent memory, of `vram`, or with NULL of any? -EINVAL, -ESRCH. */
int pm_coherent_pages(pm_mm *mm, const pm_devmem *vram, uint64_t start, uint64_t n, uint8_t *ret);
uint64_t pm_devmem_used(pm_devmem *vram); /* pages */
/* Where the pages are that were moved in least recently, within 2 MiB; -ENOENT: it is empty. */
int pm_devmem_next(pm_devmem *vram, uint64_t *start, uint64_t *end);
/* Pages of zeroes for what is in this memory of [start, end) and was never touched. -EINVAL, -ESRCH, -ENOMEM.
 */
int pm_devmem_populate(pm_devmem *vram, uint64_t start, uint64_t end);
/*
 * An arena for exclusive access, one an mm, for at most `size` bytes; used by pm_exclusive() and ended as
 * device memory is.
 */
int pm_exclusive_create(pm_mm *mm, uint64_t size, pm_devmem **ret);
/*
 * Before that, and before notifiers are told: fault [start, *end) for writing, up to the first page that
 * cannot be, where it ends then. 0, or why the first page is not there; -EBUSY: none of it can be had.
 */
int pm_exclusive_fault(pm_devmem *arena, uint64_t start, uint64_t *end);
/*
 * Take the pages of [start, end) away from the CPU, for a device. pfns: for each page what a device maps, 0
 * where it could not be had.
 */
int pm_exclusive(pm_devmem *arena, uint64_t start, uint64_t end, uint64_t *pfns);
/* The same of pages as they are now: 0 where the CPU has the page again. */
int pm_exclusive_pfns(pm_devmem *arena, uint64_t start, uint64_t end, uint64_t *pfns);
/*
 * Slots for those of n pages from start on that are wanted, to be given to pm_migrate_pages(): their PFNs, 0
 * where there is no room. Those that no page is in are given back by pm_devmem_free(). -EINVAL, -ESRCH.
 */
int pm_devmem_alloc(pm_devmem *vram, uint64_t start, uint64_t n, const uint8_t *wanted, uint64_t *pfns);
int pm_devmem_free(pm_devmem *vram, uint64_t n, const uint64_t *pfns);
/* Move n pages from start on to the slots of these PFNs, 0: leave it. moved: which did; none to a slot that
 * is not set aside. */
int pm_migrate_pages(pm_devmem *vram, uint64_t start, uint64_t n, const uint64_t *pfns, uint8_t *moved);
/* All the PFNs of the memory; and the addresses of the pages that are in some of them, 0 for none. */
int pm_devmem_range(pm_devmem *vram, uint64_t *pfn, uint64_t *n);
int pm_devmem_addrs(pm_devmem *vram, uint64_t pfn, uint64_t n, uint64_t *ret);
int pm_devmem_stats(pm_mm *mm, struct pm_devmem_stats *ret);
/*
 * Move the pages of [start, end) into device memory, within an invalidation (PM_MIGRATE) that the caller has
 * open, of memory that is watched. Private anonymous writable pages move; others stay, and so does what is
 * pinned. `moved`, also on an error: -EINVAL at a hole or a vma that cannot be read, after what precedes it
 * has moved; -ENOSPC: it is full; -EBUSY: a fork or madvise does not end, or pm_handler_over(); -ENOMEM;
 * -ESRCH.
 */
int pm_migrate_to_device(pm_devmem *vram, uint64_t start, uint64_t end, uint64_t *moved);
/*
 * Bring home what of [start, end) is in the device memory `only`, NULL: in any. `moved`, also on an error:
 * -EINVAL; -EAGAIN: events were not read for 5 s; -ENOENT, -ENOMEM and what else the kernel refuses it with;
 * -ESRCH.
 */
int pm_migrate_to_system(pm_mm *mm, uint64_t start, uint64_t end, const pm_devmem *only, uint64_t *moved);
/*
 * Make one vma again of [start, end), of which migration has split parts off: an mremap takes one vma. 0
 * where there is nothing to do.
 */
int pm_migrate_level(pm_mm *mm, uint64_t start, uint64_t end);
/* A CPU fault brings home what is in the aligned `bytes` around it: 4 KiB (at first), 64 KiB or 2 MiB. */
int pm_devmem_fault_around(pm_devmem *vram, uint64_t bytes);

/*
 * PM_MM_INLINE: the first migration makes the shim's handler that of SIGBUS, for good, and the first one of a
 * private mapping of a file that of SIGSEGV; what is not their own goes to the one that was there. The
 * address of a handler that was installed over that of `sig` since, 0: none. What needs `sig` stays then.
 */
uint64_t pm_handler_over(int sig);

/* IOVAs: the DMA addresses of a domain. */

struct pm_iova_space;
typedef struct pm_iova_space pm_iova_space;

struct pm_iova_stats {
    uint64_t live; /* given out and not freed */
    uint64_t live_bytes;
    uint64_t cached; /* freed, waiting in a magazine to be given out again */
    uint64_t cached_bytes;
    uint64_t reserved_bytes;
    uint64_t unused_bytes;
    uint64_t unused_runs; /* pieces that these are in */
    uint64_t allocs, frees, failed;
    uint64_t magazine_hits; /* allocations served by a magazine */
    uint64_t memory;        /* bytes that the bookkeeping takes */
};

/*
 * The IOVA space [first, last], whole pages, without page 0, which stands for "not mapped". -EINVAL when that
 * is nothing. Calls take a lock of the space's own, the last of the lock order, and are -ESRCH in a forked
 * child.
 */
int pm_iova_create(uint64_t first, uint64_t last, pm_iova_space **ret);
void pm_iova_destroy(pm_iova_space *space);
/* Never give out the pages of [first, last]. -EBUSY when some are live, -ENOSPC beyond 64 such windows. */
int pm_iova_reserve(pm_iova_space *space, uint64_t first, uint64_t last);
/*
 * An IOVA of whole pages for size bytes, the highest that ends at limit_last or below, aligned to the size as
 * rounded up to a power of two, at most to 1 GiB. Up to 32 pages that many are taken, too. A power of two up
 * to 2 MiB is rather one freed lately. -ENOSPC, -ENOMEM, -EINVAL (size 0).
 */
int pm_iova_alloc(pm_iova_space *space, uint64_t size, uint64_t limit_last, uint64_t *ret);
/* Give it back. -ENOENT when it is not live, -EINVAL when the size is another. */
int pm_iova_free(pm_iova_space *space, uint64_t iova, uint64_t size);
/* The bytes, in whole pages, asked for at that IOVA; -ENOENT when none starts there. */
int64_t pm_iova_size(pm_iova_space *space, uint64_t iova);
int pm_iova_stats(pm_iova_space *space, struct pm_iova_stats *ret);

/* What the DMA API's bookkeeping asks. */

enum pm_area {
    PM_AREA_STACK = 1,  /* the calling thread's, or the main thread's */
    PM_AREA_TEXT = 2,   /* can be executed */
    PM_AREA_RODATA = 4, /* read-only, of a file that is mapped as code right beside it */
    PM_AREA_READONLY = 8,
    PM_AREA_HOLE = 16 /* a part of it is not mapped */
};

/* What kinds of memory are in [addr, addr + len): bits of enum pm_area. */
int pm_memory_area(uint64_t addr, uint64_t len);

struct pm_spans;
typedef struct pm_spans pm_spans;
struct pm_span;
typedef struct pm_span pm_span;

/* A set of intervals [start, last] with cookies, not 0, under a lock of its own. -ESRCH in a forked child. */
int pm_spans_create(pm_spans **ret);
void pm_spans_destroy(pm_spans *spans);
/* `other` becomes the cookie of one that was there and overlaps, 0 without one. */
int pm_spans_add(pm_spans *spans, uint64_t start, uint64_t last, uint64_t cookie, pm_span **ret,
                 uint64_t *other);
/* The cookie of one that holds all of [start, last], else of the first that overlaps it, or -ENOENT. */
int pm_spans_find(pm_spans *spans, uint64_t start, uint64_t last, uint64_t *ret);
/* Frees the span. */
int pm_spans_remove(pm_spans *spans, pm_span *span);

/* DMA: an IOMMU domain, and what is mapped into it. */

struct pm_domain;
typedef struct pm_domain pm_domain;
struct pm_dmap;
typedef struct pm_dmap pm_dmap;

enum pm_dma_direction { /* as enum dma_data_direction */
                        PM_DMA_BIDIRECTIONAL,
                        PM_DMA_TO_DEVICE,
                        PM_DMA_FROM_DEVICE,
                        PM_DMA_NONE
};

enum pm_domain_flag {
    PM_DOMAIN_DIRECT = 1, /* no IOMMU: the DMA address of a page is its own */
    PM_DOMAIN_LAZY = 2    /* unmapping leaves the IOTLB as it is until a batch of IOVAs is flushed */
};

struct pm_domain_options {
    uint64_t first, last; /* the aperture, bytes, inclusive */
    uint32_t flags;
    uint32_t pad;
};

struct pm_domain_stats {
    uint64_t mappings;     /* live */
    uint64_t mapped_pages; /* 4 KiB pages with an entry, fenced ones included */
    uint64_t entries;      /* page-table entries an IOMMU needs for them: one for a whole huge page */
    uint64_t segments;     /* runs of pages next to each other in memory, as mapped */
    uint64_t iotlb_hits, iotlb_misses;
    uint64_t iotlb_flushes; /* by unmapping, by fences, and of whole batches */
    uint64_t iotlb_stale;   /* accesses refused by what was unmapped lazily and not flushed yet */
    uint64_t lazy_pending;  /* mappings that wait for a flush */
    uint64_t fenced;        /* pages fenced by invalidations, so far */
    uint64_t dirtied;       /* pages unmapped as dirty, so far */
    uint64_t bytes;         /* of memory that mappings take */
};

/* Counted: pm_domain_put() drops the caller's reference; mappings hold their own. */
int pm_domain_create(const struct pm_domain_options *opt, pm_domain **ret);
void pm_domain_put(pm_domain *domain);
int pm_domain_stats(pm_domain *domain, struct pm_domain_stats *ret);
/* NULL: direct. Lives as long as the domain. */
pm_iova_space *pm_domain_iovas(pm_domain *domain);
/* Flush the IOTLB: IOVAs whose unmapping was lazy can be given out again. Returns of how many mappings. */
int64_t pm_domain_flush(pm_domain *domain);

enum pm_dma_source {
    PM_DMA_MIRROR, /* process memory by address, fenced by invalidations; no page is held */
    PM_DMA_PIN,    /* pinned pages, which stay what they were; held while they are mapped */
    PM_DMA_KERNEL  /* the driver's own memory, which it keeps until it has unmapped it */
};

enum pm_dmap_flag {
    PM_DMAP_EMPTY = 1, /* IOVAs alone: pages are linked later; not DIRECT */
    PM_DMAP_AT = 2     /* at `iova`, which is the caller's, and stays so; not DIRECT */
};

struct pm_dmap_options {
    pm_domain *domain;
    pm_sub *sub; /* MIRROR: whose sequence is checked */
    uint64_t seq;
    pm_pin *pin;          /* PIN: all of its pages */
    uint64_t start;       /* address of the first page; KERNEL: of the first byte */
    uint64_t n;           /* pages */
    uint64_t size;        /* KERNEL: bytes, from start */
    const uint64_t *pfns; /* HMM pfns: those without VALID are left out. KERNEL: may be 0 but for DIRECT */
    uint64_t *daddrs;     /* out: a DMA address a page, 0 where nothing is mapped; may be 0 */
    uint64_t mask;        /* the device's DMA mask */
    uint64_t iova;        /* with PM_DMAP_AT */
    uint64_t cookie;      /* the caller's name for it */
    uint32_t source;      /* enum pm_dma_source */
    uint32_t direction;   /* pages without WRITE are not written to, whatever it says */
    uint32_t flags;       /* enum pm_dmap_flag */
    uint32_t pad;
};

/*
 * Map pages for a device: one extent of IOVAs for all of them, in one step. 0; -EBUSY: an invalidation
 * overlapped sub since seq; -ENOSPC: no IOVAs below the mask; -EFAULT: a page beyond the mask (DIRECT);
 * -EOPNOTSUPP: PFNs are not to be seen (DIRECT); -EINVAL; -ENOMEM; -ESRCH. On an error nothing is mapped.
 */
int pm_dmap_create(const struct pm_dmap_options *opt, pm_dmap **ret);
/* Pages [first, first + n) of a MIRROR mapping, as pm_dmap_create(); -EEXIST: one of them is linked already.
 */
int pm_dmap_link(pm_dmap *dmap, pm_sub *sub, uint64_t seq, uint64_t first, uint64_t n, const uint64_t *pfns);
/*
 * Take pages out; returns how many had an entry, *writable how many of them a device could write to. Device
 * writes under way are waited for. IOVAs stay until pm_dmap_unmap().
 */
int64_t pm_dmap_unlink(pm_dmap *dmap, uint64_t first, uint64_t n, uint64_t *writable);
/* Unlink all and give the IOVAs back: idempotent, then 0. Returns as pm_dmap_unlink(). */
int64_t pm_dmap_unmap(pm_dmap *dmap, uint64_t *writable);
void pm_dmap_put(pm_dmap *dmap);
void pm_dmap_dirtied(pm_dmap *dmap, uint64_t pages);
/* Raw entries, as of the device page table. */
int pm_dmap_read(pm_dmap *dmap, uint64_t first, uint64_t n, uint64_t *ret);

struct pm_dmap_info {
    uint64_t iova;   /* of the first byte; DIRECT: of the first run */
    uint64_t size;   /* bytes */
    uint64_t linked; /* pages */
    uint64_t bytes;  /* of memory */
    uint64_t segments, entries;
};
int pm_dmap_info(pm_dmap *dmap, struct pm_dmap_info *ret);

struct pm_dma_access {
    uint64_t addr; /* DMA address */
    uint64_t len;
    void *buf;
    uint64_t mask; /* the device's */
    uint32_t write;
    uint32_t fault;       /* out: enum pm_access_fault */
    uint64_t done;        /* out: bytes copied */
    uint64_t cookie;      /* out: of the mapping that the fault is about, 0: none */
    uint64_t fault_start; /* out: process addresses behind the fault */
    uint64_t fault_end;
    uint64_t fence_seq;
    uint64_t redone;
};

/*
 * Read or write as the device, by DMA address, through what is mapped there. 0; -EFAULT with `fault`, or with
 * PM_FAULT_NONE when it is `buf` that is not there; -EOPNOTSUPP for mirrored memory without process_vm_readv
 * and _writev. What was done before stays done.
 */
int pm_dma_access(pm_domain *domain, struct pm_dma_access *access);

/*
 * The status page: a memfd named pymirror-status, for `pymirror inspect`. Whoever adds fields (there is room
 * up to one page) puts them at the end and gives the layout its next number.
 */

enum { PM_STATUS_LAYOUT = 3, PM_STATUS_INVS = 16, PM_STATUS_WATCHED = 64, PM_STATUS_WAITS = 4 };

struct pm_status_inv {
    uint64_t start, end, since_ns;
    uint32_t event, guarantee;
    uint32_t tid;         /* the thread that began it */
    uint32_t undelivered; /* 1: an API operation whose callbacks have not all returned */
};

struct pm_status_range {
    uint64_t start, end;
};

/* A thread that waits for a lock of the program above. */
struct pm_status_wait {
    uint64_t since_ns, held_since_ns; /* since_ns 0: none */
    uint32_t tid, holder_tid;         /* holder_tid 0: unknown */
    char lock[40];
};

enum pm_dispatch_state {
    PM_DISPATCH_NONE,
    PM_DISPATCH_WAITING, /* in pm_event_wait() */
    PM_DISPATCH_AWAY     /* has left it: calls back, or waits for what the caller needs to call again */
};

struct pm_status {
    uint64_t magic;  /* PM_STATUS_MAGIC */
    uint32_t layout; /* PM_STATUS_LAYOUT */
    uint32_t pid;
    uint64_t opened_ns; /* CLOCK_MONOTONIC, as all times here */
    uint64_t seq;
    uint32_t state; /* 1 open, 2 closing, 3 closed */
    uint32_t monitor_tid;
    uint64_t monitor_loop_ns; /* when the monitor last went round */
    uint32_t monitor_state;   /* 0 none, 1 polling, 2 wants the lock, 3 holds it, 4 draining writes */
    uint32_t lock_tid;        /* who holds the device lock, 0: nobody */
    uint64_t lock_since_ns;
    uint64_t queue_depth;
    uint64_t oldest_event_ns;   /* oldest event without its callbacks done, 0: none */
    uint64_t callback_since_ns; /* the dispatcher delivers an event since then, 0: none */
    uint64_t queue_overflows;
    uint64_t active;
    struct pm_status_inv inv[PM_STATUS_INVS]; /* the youngest of the active invalidations; since_ns 0: none */
    uint64_t inflight;
    uint64_t inflight_since_ns; /* the oldest device access in flight */
    uint64_t events[8];
    uint64_t subs, watched_bytes, table_entries;
    char version[16];
    uint32_t dispatch_tid;   /* the last thread to wait for events */
    uint32_t dispatch_state; /* enum pm_dispatch_state */
    uint64_t dispatch_since_ns;
    uint32_t inflight_tid; /* the thread of the oldest device access in flight */
    uint32_t watched_ranges;
    uint64_t lock_addr; /* of the device lock's futex: a thread that sleeps there waits for the lock */
    struct pm_status_range watched[PM_STATUS_WATCHED]; /* the first of watched_ranges, by address */
    struct pm_status_wait wait[PM_STATUS_WAITS];       /* some of the waits for the program's own locks */
};

/* The fd of the status page, -ENOENT if it could not be made. */
int pm_mm_status_fd(const pm_mm *mm);

/* Show these waits, and no others, on the status page. Takes no lock; -ESRCH, -EINVAL beyond PM_STATUS_WAITS.
 */
int pm_status_waits(pm_mm *mm, const struct pm_status_wait *waits, uint32_t n);

/*
 * For a type of objects that export buffers, in CPython: bf_getbuffer, which calls `get`, and
 * bf_releasebuffer. They count the buffers that are held in the word at `offset` of the object, 0 at first.
 */
void pm_export_init(int (*get)(void *object, void *buffer, int flags), uint64_t offset);
int pm_export_get(void *object, void *buffer, int flags);
void pm_export_release(void *object, void *buffer);

/* Give the calling thread a name that /proc and debuggers show, cut to 15 bytes. */
void pm_thread_name(const char *name);

/* Tests. */

enum pm_sys {
    PM_SYS_ANY,
    PM_SYS_OPEN,
    PM_SYS_CLOSE,
    PM_SYS_READ,
    PM_SYS_PREAD,
    PM_SYS_IOCTL,
    PM_SYS_POLL,
    PM_SYS_MMAP,
    PM_SYS_MUNMAP,
    PM_SYS_MPROTECT,
    PM_SYS_MADVISE,
    PM_SYS_MREMAP,
    PM_SYS_USERFAULTFD,
    PM_SYS_TIMERFD,
    PM_SYS_MEMFD,
    PM_SYS_FTRUNCATE,
    PM_SYS_VM_READV,
    PM_SYS_VM_WRITEV,
    PM_SYS_THREAD,
    PM_SYS_MALLOC,
    PM_SYS_WRITE,
    PM_SYS_MINCORE,
    PM_SYS_PWRITE,
    PM_SYS_URING_SETUP,
    PM_SYS_URING_REGISTER,
    PM_SYS_URING_ENTER,
    PM_SYS_SIGACTION,
    PM_SYS_MLOCK,
    PM_SYS_MUNLOCK,
    PM_SYS_COUNT
};

/*
 * Make the nth (from 1) call of kind `sys` from now on fail with err, `times` times in a row; tid 0: of any
 * thread. One injection at a time, for the whole process; pm_inject_clear() ends it and gives how often it
 * struck.
 */
int pm_inject(int sys, uint64_t nth, uint64_t times, int err, int tid);
uint64_t pm_inject_clear(void);
/* How many calls of that kind the shim has made. */
uint64_t pm_sys_calls(int sys);

enum pm_point {
    PM_POINT_MONITOR_BEFORE_READ, /* the device lock is held */
    PM_POINT_MONITOR_AFTER_READ,
    PM_POINT_MONITOR_BEFORE_FENCE,
    PM_POINT_MONITOR_AFTER_FENCE,
    PM_POINT_MONITOR_POLLED,    /* an event is there, the device lock is not taken yet */
    PM_POINT_INVALIDATE_START,  /* before the sequence moves */
    PM_POINT_INVALIDATE_FENCED, /* fenced and drained, no lock held */
    PM_POINT_INVALIDATE_END,
    PM_POINT_WALK_BEFORE_READ, /* before the page table is read */
    PM_POINT_WALK_AFTER_READ,
    PM_POINT_WALK_BEFORE_POPULATE,
    PM_POINT_WALK_AFTER_POPULATE,
    PM_POINT_MAP_BEFORE_COMMIT, /* the lock is not taken yet */
    PM_POINT_MAP_AFTER_COMMIT,
    PM_POINT_ACCESS_LOOKED_UP,      /* entries looked up, access announced, nothing copied */
    PM_POINT_ACCESS_COPIED,         /* copied, not yet checked */
    PM_POINT_DMA_MAP_BEFORE_COMMIT, /* IOVAs and entries are made, the lock is not taken yet */
    PM_POINT_DMA_MAP_AFTER_COMMIT,
    PM_POINT_DMA_UNMAP, /* before entries are taken out */
    PM_POINT_FORK_PREPARE,
    PM_POINT_FORK_PARENT,
    PM_POINT_REMOVE_LINGER, /* a REMOVE is about to be declared over; the lock is not held */
    PM_POINT_PIN_PINNED,    /* pinned, the page table is not looked at again yet */
    PM_POINT_PIN_PIECE,     /* a piece of an access through a pin is about to be copied; no lock is held */
    PM_POINT_INLINE_FAULT,  /* in the handler of SIGBUS, the device lock is not taken yet */
    PM_POINT_LIFT, /* read-only pages have been taken out, and are not in their slots yet; no lock is held */
    PM_POINT_COUNT
};

/* The next thread to pass the point stops there, until release. Each point holds one thread at a time. */
int pm_point_arm(int point);
/* Wait until a thread stands at the point: 0, -ETIMEDOUT. */
int pm_point_wait(int point, uint64_t timeout_ns);
/* Let it go, and disarm. */
int pm_point_release(int point);
/* Release and disarm all points. */
void pm_points_reset(void);

#endif
