/* SPDX-License-Identifier: MIT */
/*
 * internal.h - what the files of the shim share.
 *
 * Lock order: the ring lock of an mm, registry lock, a device lock (struct pm_mm.lock), then the lock of an
 * IOVA space. The device lock is never held across a system call that can raise a userfaultfd event, nor
 * while mirrored memory is touched, nor over malloc.
 */
#ifndef PM_INTERNAL_H
#define PM_INTERNAL_H

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "kernel_abi.h"
#include "pymirror.h"

enum {
    PM_PAGE_SHIFT = 12,
    PM_PAGE_SIZE = 1 << PM_PAGE_SHIFT,
    PM_HUGE_ORDER = 9,
    PM_HUGE_PAGES = 1 << PM_HUGE_ORDER,
};

#define PM_HUGE_SIZE ((uint64_t)PM_HUGE_PAGES << PM_PAGE_SHIFT)
#define PM_USER_END (1ULL << 47)

#define PM_PFN_VALID (1ULL << 63)
#define PM_PFN_WRITE (1ULL << 62)
#define PM_PFN_ERROR (1ULL << 61)
#define PM_PFN_STICKY (7ULL << 58) /* kept by walks: DMA_MAPPED, P2PDMA, P2PDMA_BUS */
#define PM_PFN_ORDER_SHIFT 53
#define PM_PFN_ORDER_MASK 31
#define PM_PFN_MASK ((1ULL << 52) - 1)

#define PM_ENTRY_VALID (1ULL << PM_ENTRY_VALID_BIT)
#define PM_ENTRY_WRITE (1ULL << PM_ENTRY_WRITE_BIT)
#define PM_ENTRY_FENCED (1ULL << PM_ENTRY_FENCED_BIT)
#define PM_ENTRY_SEQ_MASK ((1ULL << 56) - 1)

#define PM_STATUS_MAGIC 0x3130726f7272696dULL /* "mirror01" */

static inline uint64_t pm_page_down(uint64_t addr)
{
    return addr & ~(uint64_t)(PM_PAGE_SIZE - 1);
}

static inline uint64_t pm_page_up(uint64_t addr)
{
    return pm_page_down(addr + PM_PAGE_SIZE - 1);
}

/* `end` of an interval as the API has it, 0 for the end of the address space, as an inclusive last. */
static inline uint64_t pm_last(uint64_t end)
{
    return end - 1;
}

static inline bool pm_overlap(uint64_t start, uint64_t last, uint64_t start2, uint64_t last2)
{
    return start <= last2 && start2 <= last;
}

static inline uint64_t pm_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static inline uint64_t pm_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

/* How often an interrupted call on a /proc file is made again. */
enum { PM_EINTR_LIMIT = 16 };

/* sys.c: every system call of the shim; each returns a result >= 0 or a negative errno. */
int pm_sys_open(const char *path, int flags);
int pm_sys_close(int fd);
ssize_t pm_sys_read(int fd, void *buf, size_t len);
ssize_t pm_sys_write(int fd, const void *buf, size_t len);
ssize_t pm_sys_pread(int fd, void *buf, size_t len, uint64_t offset);
ssize_t pm_sys_pwrite(int fd, const void *buf, size_t len, uint64_t offset);
int pm_sys_nofile(const struct rlimit *set, struct rlimit *old); /* counted as open */
int pm_sys_ioctl(int fd, unsigned long request, void *arg);
int pm_sys_poll(struct pollfd *fds, nfds_t n, uint64_t timeout_ns); /* UINT64_MAX: none */
int pm_sys_mmap(uint64_t addr, uint64_t len, int prot, int flags, int fd, uint64_t offset, uint64_t *ret);
int pm_sys_munmap(uint64_t addr, uint64_t len);
int pm_sys_mprotect(uint64_t addr, uint64_t len, int prot);
int pm_sys_madvise(uint64_t addr, uint64_t len, int advice);
int pm_sys_mlock(uint64_t addr, uint64_t len); /* mlock2(MLOCK_ONFAULT) */
int pm_sys_munlock(uint64_t addr, uint64_t len);
int pm_sys_mremap(uint64_t addr, uint64_t old_len, uint64_t new_len, int flags, uint64_t new_addr,
                  uint64_t *ret);
int pm_sys_mincore(uint64_t addr, uint64_t len, unsigned char *vec);
int pm_sys_userfaultfd(int flags);
int pm_sys_timerfd(void); /* CLOCK_MONOTONIC */
int pm_sys_timerfd_set(int fd, uint64_t first_ns, uint64_t every_ns);
int pm_sys_memfd(const char *name); /* of this user alone */
int pm_sys_seal(int fd, int seals); /* F_SEAL_*, for good; counted as memfd */
int pm_sys_ftruncate(int fd, uint64_t len);
ssize_t pm_sys_vm_readv(void *buf, uint64_t addr, size_t len);        /* of this process */
ssize_t pm_sys_vm_writev(const void *buf, uint64_t addr, size_t len); /* of this process */
int pm_sys_thread(pthread_t *thread, void *(*fn)(void *), void *arg); /* with every signal blocked */
int pm_sys_sigaction(int sig, const struct sigaction *act, struct sigaction *old);
void *pm_sys_calloc(size_t n, size_t size); /* NULL on failure */
void *pm_sys_malloc(size_t size);           /* counted with it */
int pm_sys_io_uring_setup(unsigned entries, void *params);
int pm_sys_io_uring_register(int fd, unsigned opcode, void *arg, unsigned count);
int pm_sys_io_uring_enter(int fd, unsigned submit, unsigned wait, unsigned flags, void *arg, size_t len);
void pm_sys_name_thread(const char *name); /* the calling one; cannot fail, not counted */
int pm_gettid(void);
uint64_t pm_now_ns(void);        /* CLOCK_MONOTONIC */
uint64_t pm_inject_struck(void); /* times that the present injection has struck */

/* testing.c: named points. One relaxed load when nothing is armed. */
extern atomic_int pm_points_armed;
void pm_point_stop(int point);

static inline void pm_point(int point)
{
    if (atomic_load_explicit(&pm_points_armed, memory_order_relaxed) != 0)
        pm_point_stop(point);
}

/* itree.c: a treap of intervals, augmented with the greatest `last` below each node. No allocation. */
struct pm_inode {
    uint64_t start, last, max_last;
    uint32_t prio;
    struct pm_inode *left, *right;
};

typedef bool (*pm_itree_fn)(struct pm_inode *node, void *arg); /* false ends the visit */

void pm_itree_insert(struct pm_inode **root, struct pm_inode *node);
void pm_itree_remove(struct pm_inode **root, struct pm_inode *node);
/* Visit the nodes that overlap [start, last], in order of start. */
void pm_itree_visit(struct pm_inode *root, uint64_t start, uint64_t last, pm_itree_fn fn, void *arg);

struct pm_sub {
    struct pm_inode node; /* first: the tree hands out nodes */
    struct pm_mm *mm;
    uint64_t cookie;
    uint32_t kind;
    bool inserted; /* under the device lock */
    atomic_uint_least64_t seq;
    atomic_bool removed;
    atomic_int refs;
};

/* Are n pages from start on, which are in the address space, its? */
static inline bool pm_sub_covers(const struct pm_sub *sub, uint64_t start, uint64_t n)
{
    return start >= sub->node.start && start + (n << PM_PAGE_SHIFT) - 1 <= sub->node.last;
}

struct pm_inv {
    struct pm_inv *next;
    struct pm_mm *mm;
    uint64_t start, last;
    uint64_t seq;
    uint64_t since_ns;
    uint32_t tid;      /* the thread that began it, for the status page; 0 without one */
    uint64_t until_ns; /* a lingering REMOVE: when it ends whatever the pagemap shows */
    uint64_t earliest_ns;
    uint64_t removed; /* an API operation: up to where REMOVEs have been taken for its own */
    int event, guarantee;
    bool undelivered; /* an API operation whose callbacks have not returned */
    bool linger;      /* a REMOVE read by the monitor */
    bool used;        /* slot of a pool is taken */
};

/* walk.c: can its array be looked at? */
bool pm_walk_is_sane(const struct pm_mm *mm, const struct pm_walk *walk);

struct pm_inflight {
    struct pm_inflight *next;
    uint64_t start, last;
    uint64_t since_ns;
    uint32_t tid; /* as of struct pm_inv */
    bool write;
    bool voided; /* an invalidation passed: a read is discarded */
};

enum { PM_DEFERRED_MAX = 64, PM_HELD_MAX_NS = 10 * 1000 * 1000 };
enum { PM_FORK_PIECES = 16, PM_LINGER_MAX = 64, PM_QUEUE_DEFAULT = 1024, PM_ALONE_MAX = 64 };

struct pm_watch_range {
    uint64_t start, end;
};

struct pm_mm {
    struct pm_mm *next; /* registry */
    atomic_int refs;
    atomic_int state; /* enum pm_mm_state */
    atomic_int users; /* calls that use the descriptors: close waits for them */
    uint64_t owner;   /* pm_process() of the process that made it */
    struct pm_features features;

    uint64_t disable;   /* features to do without */
    bool inline_faults; /* a CPU fault on device memory is a signal, see inline.c */
    bool met_unread;    /* ... and the last one met an event that was unread; under the device lock */
    int maps_fd, pagemap_fd, uffd, tick_fd, spare_fd, status_fd;
    struct pm_status *status;

    pthread_mutex_t lock; /* the device lock */
    pthread_cond_t idle;  /* an invalidation ended, a sub was removed, the mm was closed */
    pthread_cond_t drained;
    pthread_cond_t queued;
    pthread_cond_t done;

    atomic_uint_least64_t seq;     /* odd while an invalidation runs */
    atomic_uint_least64_t all_seq; /* seq of the last invalidation of the whole mm */
    atomic_uint_least64_t active;  /* length of invs */
    struct pm_inv *invs;
    struct pm_inv linger[PM_LINGER_MAX];
    uint32_t nlinger; /* slots of it that are used: the monitor's own */
    struct pm_inv fork_inv[PM_FORK_PIECES];
    uint32_t fork_pieces;
    int fork_tid; /* thread inside a libc fork */

    struct pm_inode *subs;
    uint64_t nsubs;
    struct pm_table *tables;
    atomic_int ntables;
    struct pm_inode *dmaps; /* DMA mappings, by address */
    atomic_int ndmaps;      /* length of dmaps */
    struct pm_inflight *inflight;
    /* The monitor reads events: their system calls may have returned before sequence numbers have moved. */
    atomic_bool reading;
    unsigned draining; /* invalidations that wait for writes: no new write begins */

    struct pm_event *queue;
    uint32_t queue_len, queue_head, queue_count;
    uint32_t ready;          /* of queue_count, from the head on: not put off, see queue.c */
    uint64_t held_ns;        /* since when the monitor has not told of what it pushed; 0: it has of all */
    uint64_t fault_event_ns; /* when the last event with PM_EV_FAULT was taken */
    uint32_t syncing;        /* calls that wait for the queue */
    bool overflowed;
    struct pm_event overflow;
    bool delivering;
    struct pm_event current; /* the event whose callbacks run */
    uint64_t delivering_ns;  /* ... since then */
    uint64_t queued_total, done_total;

    pthread_mutex_t ring_lock; /* orders pins and what goes through them; see ring.h */
    struct pm_ring *ring;      /* from the first pin on; under the ring lock */
    int ring_fd, stage_fd;     /* ... and the registry lock, for the child of a fork */

    struct pm_watch_range alone[PM_ALONE_MAX]; /* under the device lock; see alone.c */
    uint32_t alone_next;
    atomic_uint_least64_t canary; /* a page of our own, from the first that was to be learnt on */
    int ksm_fd;                   /* or a negative errno */
    bool canary_locked;

    struct pm_devices *devices; /* from the first device memory on; see devmem.h */
    int arena_fd;               /* the userfaultfd of arenas */
    int mem_fd;                 /* /proc/self/mem, from the first guarded page on; see guard.c */
    /* What lift.c has under way, under the device lock: `len` bytes from `addr` to `slot`, 0: nothing. They
     * are in `area` meanwhile; [back, back_end): what goes back. */
    struct {
        uint64_t addr, len, slot, area, back, back_end;
    } lift;
    struct pm_deferred {
        uint64_t addr, until_ns;
    } deferred[PM_DEFERRED_MAX]; /* the monitor's own: pages whose touchers wait, and how long at most */
    unsigned ndeferred;

    pthread_mutex_t watch_lock;     /* orders watch and unwatch; never taken by the monitor */
    struct pm_watch_range *watched; /* sorted, disjoint; under the device lock */
    uint32_t nwatched, watched_cap;
    uint64_t watched_bytes;
    struct pm_watch_range
        unlisted; /* from the first to the last that is registered and found no room in the list */

    pthread_t monitor;
    bool monitor_running;
    atomic_bool stop_monitor;
    bool protect_after_fork; /* a raw clone was seen; the monitor's own */
    atomic_bool protecting;  /* ... and it write-protects what is watched */

    struct pm_mm_stats stats; /* under the device lock, but for populated_pages */
    atomic_uint_least64_t populated;
};

enum pm_mm_state { PM_MM_OPEN, PM_MM_CLOSING, PM_MM_CLOSED };

/* mm.c */
int pm_mm_check(const struct pm_mm *mm); /* 0, or -ESRCH: closed, or inherited by a child */
/* The same, and hold the descriptors open until pm_mm_exit(). */
int pm_mm_enter(struct pm_mm *mm);
void pm_mm_exit(struct pm_mm *mm);
void pm_mm_get(struct pm_mm *mm);
bool pm_mm_owned(const struct pm_mm *mm); /* false in a forked child */
/* A number of this process that a child, also one of a raw clone, does not have: one load, no system call. */
uint64_t pm_process(void);
/* The same, which is 0 until somebody asked this way: for what is made without an mm. */
int pm_process_mark(uint64_t *ret);
void pm_lock(struct pm_mm *mm); /* blocks asynchronous signals too: a handler must not meet the lock */
void pm_unlock(struct pm_mm *mm);
void pm_all_blocked(void); /* this thread has every signal blocked, and keeps it so */
void pm_unlock_masked(struct pm_mm *mm, sigset_t *outside); /* signals stay blocked; what was before */
/* Wait on a condition under the lock until `until_ns` (CLOCK_MONOTONIC): 0 or -ETIMEDOUT. */
int pm_wait(struct pm_mm *mm, pthread_cond_t *cond, uint64_t until_ns);
void pm_cond_init(pthread_cond_t *cond);
/* The registry of contexts: fork holds it from prepare to parent or child. */
void pm_registry_lock(void);
void pm_registry_unlock(void);
struct pm_mm *pm_registry_list(void);
void pm_registry_reset(void); /* in a forked child: it has no context */

/* feature.c */
static inline bool pm_have(const struct pm_mm *mm, int feature)
{
    return (mm->features.have >> feature) & 1;
}
/* Open a userfaultfd: /dev/userfaultfd, the system call, user-mode-only. fd or negative errno. */
int pm_uffd_open(uint64_t disable, uint32_t *source);
/* UFFDIO_API asking for what mm's features name. */
int pm_uffd_api(int fd, uint64_t features);

/* vma.c: as pm_vma_find, without the check of the mm's state */
int pm_vma_query(struct pm_mm *mm, uint64_t addr, struct pm_vma *ret);
int pm_vma_prot(const struct pm_vma *vma); /* PROT_* */

/* invalidate.c: with the device lock held */
uint64_t pm_inv_open(struct pm_mm *mm, struct pm_inv *inv, uint64_t start, uint64_t last, int event,
                     int guarantee);
void pm_inv_close(struct pm_mm *mm, struct pm_inv *inv);
/* Is the event the doing of an API operation that is open? It belongs to it then, and is not told again. */
bool pm_inv_claims(struct pm_mm *mm, uint64_t start, uint64_t last, int event);
void pm_drain_writes(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t until_ns);
bool pm_sub_stale(const struct pm_sub *sub, uint64_t seq);
bool pm_seq_undelivered(const struct pm_mm *mm, uint64_t seq);

/* queue.c: with the device lock held; never allocates. first_seq is its own business. */
void pm_queue_push(struct pm_mm *mm, const struct pm_event *event);
/* The monitor's: push without a wake of the dispatcher, and tell of all that was pushed so. */
void pm_queue_hold(struct pm_mm *mm, const struct pm_event *event);
void pm_queue_tell(struct pm_mm *mm);

/* table.c: with the device lock held */
void pm_tables_fence(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq);
/* Drop the entries that seq fenced: its callbacks were not all asked to. */
void pm_tables_drop(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq);

/* verify.c: pfns of [start, end) as just read against the device tables and the DMA mappings: 0, -ESTALE and
 * the first changed run, or -EBUSY: one of them has what is newer than pfns */
int pm_tables_verify(struct pm_mm *mm, uint64_t start, uint64_t end, const uint64_t *pfns, uint64_t *cs,
                     uint64_t *ce);

/* watch.c */
int pm_watch_open(struct pm_mm *mm);
void pm_unwatch_all(struct pm_mm *mm);
void pm_watch_forget(struct pm_mm *mm, uint64_t start, uint64_t end); /* device lock held */
void pm_watch_moved(struct pm_mm *mm, uint64_t to, uint64_t len);     /* device lock held */
bool pm_events_unread(struct pm_mm *mm); /* the kernel refuses with EAGAIN while a message is on its way */
bool pm_watch_lists(const struct pm_mm *mm, uint64_t addr);      /* device lock held; or it cannot be told */
bool pm_watched(struct pm_mm *mm, uint64_t start, uint64_t end); /* all of it, without a gap */
bool pm_watch_covers(const struct pm_mm *mm, uint64_t start, uint64_t end); /* the same, device lock held */
/* Write-protect the present pages of watched private memory, so that writes after a fork show. */
void pm_watch_after_fork(struct pm_mm *mm);
/* Write-protect what is present of [start, end), which is watched. */
void pm_watch_protect(struct pm_mm *mm, uint64_t start, uint64_t end);
/*
 * The shared mappings that are watched, in order of address, the first `cap` of them, each with a page of the
 * hole below, if there is one. Returns how many.
 */
uint32_t pm_watch_shared(struct pm_mm *mm, struct pm_watch_range *ret, uint32_t cap);

/* monitor.c */
int pm_monitor_start(struct pm_mm *mm);
void pm_monitor_stop(struct pm_mm *mm);

/* pin.c */
int pm_pin_make(struct pm_mm *mm, uint64_t start, uint64_t npages, pm_pin **ret);
bool pm_pinned(struct pm_mm *mm, uint64_t start, uint64_t end); /* any of it; with the ring lock held */
void pm_pins_close(struct pm_mm *mm);                           /* all pages go back, and the ring goes */

/* fork.c */
int pm_fork_install(void); /* pthread_atfork, once a process */

/* status.c: with the device lock held; plain stores to the status page */
int pm_status_open(struct pm_mm *mm);
void pm_status_close(struct pm_mm *mm);
void pm_status_update(struct pm_mm *mm);
void pm_status_lock(struct pm_mm *mm, bool held); /* this thread has taken or is leaving the device lock */
uint32_t pm_status_tid(const struct pm_mm *mm);   /* of this thread, which holds the device lock */
uint64_t pm_status_since(const struct pm_mm *mm); /* ... since then, CLOCK_MONOTONIC: near enough to now */
void pm_status_queue(struct pm_mm *mm);           /* of pm_status_update(), what the queue has changed */
void pm_status_watched(struct pm_mm *mm);
void pm_status_inflight(struct pm_mm *mm);
void pm_status_dispatch(struct pm_mm *mm, uint32_t state); /* of this thread, which takes events */

#endif
