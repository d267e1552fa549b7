/* SPDX-License-Identifier: MIT */
/* util.h - what the test programs share: memory, a mirrored range, a thread that makes one call. */
#ifndef UTIL_H
#define UTIL_H

#include <dirent.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include "check.h"
#include "pymirror.h"

enum { PAGE = 4096 };

#define SECOND 1000000000ULL
#define MILLISECOND 1000000ULL
#define WANT_READ (1ULL << 63)
#define WANT_WRITE (3ULL << 62)

static inline pm_mm *open_mm_with(const struct pm_mm_options *opt)
{
    pm_mm *mm = NULL;

    CHECK_EQ(pm_mm_create(opt, &mm), 0);
    return mm;
}

static inline pm_mm *open_mm(void)
{
    const struct pm_mm_options opt = {0};

    return open_mm_with(&opt);
}

static inline void close_mm(pm_mm *mm)
{
    CHECK_EQ(pm_mm_close(mm), 0);
    pm_mm_put(mm);
}

static inline bool mm_has(pm_mm *mm, int feature)
{
    struct pm_features features;

    CHECK_EQ(pm_mm_features(mm, &features), 0);
    return (features.have >> feature) & 1;
}

/* Device memory for an mm of these flags. */
static inline bool can_migrate(pm_mm *mm, uint32_t flags)
{
    return mm_has(mm, flags & PM_MM_INLINE ? PM_FEAT_UFFD_SIGBUS : PM_FEAT_UFFD_KERNEL) &&
           mm_has(mm, PM_FEAT_UFFD_EVENTS) && mm_has(mm, PM_FEAT_UFFD_MOVE) && mm_has(mm, PM_FEAT_PAGEMAP);
}

/* Small pages only, so that a test says which pages are there. */
static inline char *new_pages(uint64_t n)
{
    char *mem = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (mem == MAP_FAILED)
        abort();
    madvise(mem, n * PAGE, MADV_NOHUGEPAGE);
    return mem;
}

static inline void free_pages(char *mem, uint64_t n)
{
    munmap(mem, n * PAGE);
}

static inline uint64_t addr_of(const void *mem)
{
    return (uint64_t)(uintptr_t)mem;
}

static inline pm_sub *new_sub(pm_mm *mm, const void *mem, uint64_t n)
{
    pm_sub *sub = NULL;

    CHECK_EQ(pm_sub_insert(mm, addr_of(mem), addr_of(mem) + n * PAGE - 1, 1, 1, &sub), 0);
    return sub;
}

static inline void drop_sub(pm_sub *sub)
{
    CHECK_EQ(pm_sub_remove(sub), 0);
    pm_sub_put(sub);
}

static inline pm_table *new_table(void)
{
    pm_table *table = NULL;

    CHECK_EQ(pm_table_create(&table), 0);
    return table;
}

static inline int read_begin(pm_sub *sub, uint64_t *seq)
{
    int err;

    do
        err = pm_sub_read_begin(sub, 10 * SECOND, seq);
    while (err == -EINTR);
    return err;
}

static inline int walk(pm_mm *mm, pm_sub *sub, uint64_t seq, const void *mem, uint64_t n, uint64_t want,
                       uint64_t *pfns)
{
    struct pm_walk walk = {
        .start = addr_of(mem),
        .end = addr_of(mem) + n * PAGE,
        .pfns = pfns,
        .default_flags = want,
        .flags = want ? PM_WALK_FAULT : 0,
        .sub = sub,
        .seq = seq,
    };

    return pm_walk(mm, &walk);
}

/* The driver's loop: fault, map, again when an invalidation came between. */
static inline int mirror_pages(pm_mm *mm, pm_table *table, pm_sub *sub, const void *mem, uint64_t n,
                               uint64_t want)
{
    uint64_t *pfns = calloc(n, sizeof(*pfns));
    uint64_t seq;
    int err;

    do {
        err = read_begin(sub, &seq);
        if (!err)
            err = walk(mm, sub, seq, mem, n, want, pfns);
        if (!err)
            err = pm_table_map(table, sub, seq, addr_of(mem), n, pfns);
    } while (err == -EBUSY);
    free(pfns);
    return err;
}

static inline struct pm_access device_read(pm_table *table, const void *mem, void *buf, uint64_t len,
                                           int *err)
{
    struct pm_access access = {.addr = addr_of(mem), .len = len, .buf = buf};

    *err = pm_access(table, &access);
    return access;
}

static inline struct pm_access device_write(pm_table *table, void *mem, const void *buf, uint64_t len,
                                            int *err)
{
    struct pm_access access = {.addr = addr_of(mem), .len = len, .buf = (void *)(uintptr_t)buf, .write = 1};

    *err = pm_access(table, &access);
    return access;
}

static inline uint64_t now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * SECOND + (uint64_t)ts.tv_nsec;
}

/* Until something that another thread does has happened, for 10 s at most. */
static inline bool eventually(bool (*fn)(void *), void *arg)
{
    uint64_t until = now_ns() + 10 * SECOND;

    while (!fn(arg)) {
        if (now_ns() > until)
            return false;
        usleep(200);
    }
    return true;
}

static inline int count_dir(const char *path)
{
    DIR *dir = opendir(path);
    int n = 0;

    if (!dir)
        return -1;
    while (readdir(dir))
        n++;
    closedir(dir);
    return n - 2;
}

/* One call in a thread of its own, for what must stop half-way. */
struct call {
    pthread_t thread;
    void (*fn)(struct call *call);
    void *arg[4];
    uint64_t num[4];
    int64_t ret;
    atomic_bool done;
};

static inline void *call_main(void *arg)
{
    struct call *call = arg;

    call->fn(call);
    atomic_store(&call->done, true);
    return NULL;
}

static inline void call_start(struct call *call)
{
    atomic_store(&call->done, false);
    if (pthread_create(&call->thread, NULL, call_main, call))
        abort();
}

static inline int64_t call_join(struct call *call)
{
    pthread_join(call->thread, NULL);
    return call->ret;
}

/* What a forked child found, by its exit status; 1000 and more: it did not exit by itself. */
static inline int in_child(int (*fn)(void))
{
    int status = -1, pid = fork();

    if (pid == 0)
        _exit(fn());
    CHECK(pid > 0);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + status;
}

#endif
