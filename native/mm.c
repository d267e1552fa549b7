/* SPDX-License-Identifier: MIT */
/*
 * mm.c - a context: the mirror state of this process's mm, and its life.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "alone.h"
#include "devmem.h"
#include "inline.h"

static struct {
    pthread_mutex_t lock;
    struct pm_mm *list;
    bool fork_installed;
    _Atomic(atomic_uint_least64_t *) process; /* on a page that a child finds zeroed */
} registry = {.lock = PTHREAD_MUTEX_INITIALIZER};

static const uint64_t close_limit_ns = 5000ULL * 1000 * 1000;

void pm_registry_lock(void)
{
    pthread_mutex_lock(&registry.lock);
}

void pm_registry_unlock(void)
{
    pthread_mutex_unlock(&registry.lock);
}

struct pm_mm *pm_registry_list(void)
{
    return registry.list;
}

void pm_registry_reset(void)
{
    registry.list = NULL;
}

const char *pm_version(void)
{
    return PM_VERSION_STRING;
}

uint64_t pm_process(void)
{
    atomic_uint_least64_t *process = atomic_load_explicit(&registry.process, memory_order_acquire);

    return process ? atomic_load_explicit(process, memory_order_relaxed) : 0;
}

bool pm_mm_owned(const struct pm_mm *mm)
{
    return pm_process() == mm->owner;
}

int pm_mm_alive(const pm_mm *mm)
{
    if (!pm_mm_owned(mm))
        return -1;
    return atomic_load(&mm->state) == PM_MM_OPEN;
}

int pm_mm_check(const struct pm_mm *mm)
{
    return pm_mm_alive(mm) == 1 ? 0 : -ESRCH;
}

int pm_mm_enter(struct pm_mm *mm)
{
    if (!pm_mm_owned(mm))
        return -ESRCH;
    atomic_fetch_add(&mm->users, 1);
    if (atomic_load(&mm->state) == PM_MM_OPEN)
        return 0;
    pm_mm_exit(mm);
    return -ESRCH;
}

void pm_mm_exit(struct pm_mm *mm)
{
    atomic_fetch_sub(&mm->users, 1);
}

/* With the registry lock held. */
static int mark_process(void)
{
    atomic_uint_least64_t *process = atomic_load(&registry.process);
    uint64_t at;
    int err;

    if (process) {
        if (atomic_load(process) == 0) {
            /* The child of a raw clone, where no fork handler ran: the contexts in the list are its parent's.
             */
            registry.list = NULL;
            atomic_store(process, pm_now_ns() | 1);
        }
        return 0;
    }
    err = pm_sys_mmap(0, PM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &at);
    if (err)
        return err;
    err = pm_sys_madvise(at, PM_PAGE_SIZE, MADV_WIPEONFORK);
    if (err) {
        pm_sys_munmap(at, PM_PAGE_SIZE);
        return err;
    }
    process = (atomic_uint_least64_t *)(uintptr_t)at;
    atomic_store(process, pm_now_ns() | 1);
    atomic_store(&registry.process, process);
    return 0;
}

int pm_process_mark(uint64_t *ret)
{
    int err;

    pm_registry_lock();
    err = mark_process();
    *ret = pm_process();
    pm_registry_unlock();
    return err;
}

static int open_files(struct pm_mm *mm)
{
    mm->maps_fd = pm_sys_open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (mm->maps_fd < 0)
        return mm->maps_fd;
    if (pm_have(mm, PM_FEAT_PAGEMAP)) {
        mm->pagemap_fd = pm_sys_open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        if (mm->pagemap_fd < 0)
            return mm->pagemap_fd;
    }
    mm->tick_fd = pm_sys_timerfd();
    if (mm->tick_fd < 0)
        return mm->tick_fd;
    mm->spare_fd = pm_sys_timerfd();
    if (mm->spare_fd < 0)
        return mm->spare_fd;
    return pm_status_open(mm);
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        pm_sys_close(*fd);
    *fd = -1;
}

static void close_files(struct pm_mm *mm)
{
    /* Not pm_lock(): that writes to the status page. */
    pthread_mutex_lock(&mm->lock);
    pm_status_close(mm);
    pthread_mutex_unlock(&mm->lock);
    close_fd(&mm->uffd);
    close_fd(&mm->maps_fd);
    close_fd(&mm->pagemap_fd);
    close_fd(&mm->tick_fd);
    close_fd(&mm->spare_fd);
    close_fd(&mm->arena_fd);
    close_fd(&mm->mem_fd);
    pm_alone_close(mm);
    close_fd(&mm->ksm_fd);
}

/* In one step for a fork, whose child closes the descriptors of what is in the list. */
static void retire(struct pm_mm *mm)
{
    struct pm_mm **link = &registry.list;

    pm_registry_lock();
    close_files(mm);
    while (*link && *link != mm)
        link = &(*link)->next;
    if (*link)
        *link = mm->next;
    pm_registry_unlock();
}

static void free_mm(struct pm_mm *mm)
{
    pm_pins_close(mm);
    retire(mm);
    pthread_cond_destroy(&mm->idle);
    pthread_cond_destroy(&mm->drained);
    pthread_cond_destroy(&mm->queued);
    pthread_cond_destroy(&mm->done);
    pthread_mutex_destroy(&mm->lock);
    pthread_mutex_destroy(&mm->watch_lock);
    pthread_mutex_destroy(&mm->ring_lock);
    free(mm->devices);
    free(mm->watched);
    free(mm->queue);
    free(mm);
}

static int enlist(struct pm_mm *mm)
{
    int err = 0;

    pm_registry_lock();
    if (!registry.fork_installed)
        err = pm_fork_install();
    if (!err) {
        registry.fork_installed = true;
        err = mark_process();
    }
    if (!err) {
        mm->owner = pm_process();
        mm->next = registry.list;
        registry.list = mm;
    }
    pm_registry_unlock();
    return err;
}

static void init_mm(struct pm_mm *mm, const struct pm_mm_options *opt)
{
    mm->disable = opt->disable;
    mm->inline_faults = opt->flags & PM_MM_INLINE;
    mm->queue_len = opt->queue_length ? opt->queue_length : PM_QUEUE_DEFAULT;
    mm->maps_fd = mm->pagemap_fd = mm->uffd = mm->tick_fd = mm->spare_fd = mm->status_fd = -1;
    mm->ring_fd = mm->stage_fd = mm->arena_fd = mm->mem_fd = mm->ksm_fd = -1;
    atomic_init(&mm->refs, 1);
    atomic_init(&mm->seq, 2);
    pthread_mutex_init(&mm->lock, NULL);
    pthread_mutex_init(&mm->watch_lock, NULL);
    pthread_mutex_init(&mm->ring_lock, NULL);
    pm_cond_init(&mm->idle);
    pm_cond_init(&mm->drained);
    pm_cond_init(&mm->queued);
    pm_cond_init(&mm->done);
}

int pm_mm_create(const struct pm_mm_options *opt, pm_mm **ret)
{
    struct pm_mm *mm;
    int err;

    if ((opt->flags & ~(uint32_t)PM_MM_INLINE) || opt->queue_length > 1U << 20)
        return -EINVAL;
    mm = pm_sys_calloc(1, sizeof(*mm));
    if (!mm)
        return -ENOMEM;
    init_mm(mm, opt);
    mm->queue = pm_sys_calloc(mm->queue_len, sizeof(*mm->queue));
    err = mm->queue ? pm_features_probe(opt->disable, &mm->features) : -ENOMEM;
    if (!err)
        err = open_files(mm);
    if (!err)
        err = enlist(mm);
    if (err) {
        free_mm(mm);
        return err;
    }
    *ret = mm;
    return 0;
}

void pm_mm_get(struct pm_mm *mm)
{
    atomic_fetch_add(&mm->refs, 1);
}

void pm_mm_put(pm_mm *mm)
{
    if (!pm_mm_owned(mm) || atomic_fetch_sub(&mm->refs, 1) != 1)
        return;
    pm_mm_close(mm);
    free_mm(mm);
}

/* Everything is invalid from here on, and every waiter learns that the mm is gone. */
static bool begin_close(struct pm_mm *mm)
{
    struct pm_inv release = {0};
    int open = PM_MM_OPEN;

    pm_lock(mm);
    if (!atomic_compare_exchange_strong(&mm->state, &open, PM_MM_CLOSING)) {
        pm_unlock(mm);
        return false;
    }
    if (mm->status)
        mm->status->state = 2;
    pm_inv_open(mm, &release, 0, UINT64_MAX, PM_RELEASE, PM_BEFORE);
    pm_drain_writes(mm, 0, UINT64_MAX, pm_now_ns() + close_limit_ns);
    pm_inv_close(mm, &release);
    pthread_cond_broadcast(&mm->queued);
    pthread_cond_broadcast(&mm->done);
    pm_unlock(mm);
    return true;
}

/* Calls under way still use the descriptors: 0 once they have returned. */
static int wait_for_users(struct pm_mm *mm)
{
    uint64_t until = pm_now_ns() + close_limit_ns;

    while (atomic_load(&mm->users) != 0) {
        if (pm_now_ns() > until)
            return -ETIMEDOUT;
        nanosleep(&(struct timespec){.tv_nsec = 50 * 1000}, NULL);
    }
    return 0;
}

/* They stay where they are, as memory of the system. */
static void forget_coherent(struct pm_mm *mm)
{
    pm_lock(mm);
    if (mm->devices)
        pm_coherent_drop(mm, 0, PM_USER_END);
    pm_unlock(mm);
}

/*
 * The watch descriptor is unregistered while the monitor still runs, so that no system call waits for an
 * event that nobody reads. Descriptors that a stuck call still uses are closed with the last reference.
 */
int pm_mm_close(pm_mm *mm)
{
    uint64_t moved = 0;
    int err;

    if (!pm_mm_owned(mm))
        return -ESRCH;
    if (!begin_close(mm))
        return 0;
    wait_for_users(mm);
    pm_pins_close(mm);
    pthread_mutex_lock(&mm->watch_lock);
    err = pm_home_all(mm, 0, PM_USER_END, NULL, &moved);
    if (err) {
        /* What does not come home is served as before, until the process ends. */
        pm_mm_get(mm);
        pthread_mutex_unlock(&mm->watch_lock);
        return err;
    }
    forget_coherent(mm);
    pm_unwatch_all(mm);
    pm_inline_leave(mm);
    pm_monitor_stop(mm);
    pthread_mutex_unlock(&mm->watch_lock);
    if (atomic_load(&mm->users) == 0)
        retire(mm);
    atomic_store(&mm->state, PM_MM_CLOSED);
    return 0;
}

int pm_mm_features(const pm_mm *mm, struct pm_features *ret)
{
    *ret = mm->features;
    return 0;
}

int pm_mm_stats(pm_mm *mm, struct pm_mm_stats *ret)
{
    if (!pm_mm_owned(mm))
        return -ESRCH;
    pm_lock(mm);
    *ret = mm->stats;
    ret->invalidate_seq = atomic_load(&mm->seq);
    ret->active = atomic_load(&mm->active);
    ret->subs = mm->nsubs;
    ret->watched_ranges = mm->nwatched;
    ret->watched_bytes = mm->watched_bytes;
    ret->monitor_running = mm->monitor_running;
    ret->populated_pages = atomic_load(&mm->populated);
    pm_unlock(mm);
    return 0;
}
