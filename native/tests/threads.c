/* SPDX-License-Identifier: MIT */
/* Everything at once: devices, API invalidations, foreign changes, a dispatcher. Most of its worth comes with
 * TSan. */
#include "util.h"

enum { CHANGED = 16, STEADY = 16, PAGES = CHANGED + STEADY };

static const uint64_t duration_ns = 2 * SECOND;

static pm_mm *mm;
static pm_sub *sub;
static pm_table *table;
static char *mem;
static atomic_uint_least64_t generation;
static atomic_bool stop;

static char *page_at(uint64_t i)
{
    return mem + i * PAGE;
}

static uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
    return *state >> 33;
}

/* As a device does: access, and on a fault mirror the page and go again. */
static int access_and_fault(char *at, uint64_t *value, bool write)
{
    int err, tries = 0;

    do {
        struct pm_access access;

        if (write)
            access = device_write(table, at, value, sizeof(*value), &err);
        else
            access = device_read(table, at, value, sizeof(*value), &err);
        if (err != -EFAULT)
            return err;
        if (access.fault == PM_FAULT_CHANGED)
            pm_table_clear(table, access.fault_start, access.fault_end);
        err = mirror_pages(mm, table, sub, (char *)(uintptr_t)access.fault_start, 1, WANT_WRITE);
        if (err)
            return err;
    } while (!atomic_load(&stop) && ++tries < 100000);
    return atomic_load(&stop) ? 1 : -ELOOP;
}

/* Pages 0 to 7 hold the generation: a read never gives an older one than was current before it began. */
static void call_read_on(struct call *call)
{
    uint64_t random = call->num[0], before, value;

    while (!atomic_load(&stop) && call->ret == 0) {
        before = atomic_load(&generation);
        call->ret = access_and_fault(page_at(next_random(&random) % (CHANGED / 2)), &value, false);
        if (call->ret == 0 && value < before)
            call->ret = -EIO;
        call->num[1]++;
    }
}

static int change(uint64_t first, uint64_t n, uint64_t value)
{
    uint64_t start = addr_of(page_at(first)), end = start + n * PAGE, seq;
    pm_inv *inv = NULL;
    int err = pm_invalidate_start(mm, start, end, PM_CLEAR, PM_BEFORE, &inv, &seq);

    if (err)
        return err;
    pm_table_clear(table, start, end);
    pm_invalidate_delivered(inv);
    if (value) {
        err = pm_madvise(mm, start, n * PAGE, MADV_DONTNEED);
        for (uint64_t i = 0; i < n; i++)
            __atomic_store_n((uint64_t *)page_at(first + i), value, __ATOMIC_SEQ_CST);
    }
    pm_invalidate_end(inv);
    return err;
}

static void call_change_on(struct call *call)
{
    uint64_t random = 5, value = 1;

    while (!atomic_load(&stop) && call->ret == 0) {
        call->ret = change(0, CHANGED / 2, ++value);
        atomic_store(&generation, value);
        if (call->ret == 0)
            call->ret = change(CHANGED + next_random(&random) % STEADY, 1, 0);
        call->num[1]++;
    }
}

/* Nobody changes the upper pages, only their entries come and go: what the device wrote must be there. */
static void call_write_on(struct call *call)
{
    uint64_t random = 11, last[STEADY] = {0}, value;

    while (!atomic_load(&stop) && call->ret == 0) {
        uint64_t i = next_random(&random) % STEADY;

        call->ret = access_and_fault(page_at(CHANGED + i), &value, false);
        if (call->ret == 0 && value != last[i])
            call->ret = -EIO;
        value = last[i] + 1;
        if (call->ret == 0)
            call->ret = access_and_fault(page_at(CHANGED + i), &value, true);
        if (call->ret == 0)
            last[i] = value;
        call->num[1]++;
    }
}

static void call_foreign(struct call *call)
{
    uint64_t random = 7;

    while (!atomic_load(&stop)) {
        char *at = page_at(CHANGED / 2 + next_random(&random) % (CHANGED / 2));
        int prot = PROT_READ | PROT_WRITE;

        if (next_random(&random) % 4)
            madvise(at, PAGE, MADV_DONTNEED);
        else if (mmap(at, PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
            call->ret = -errno;
        call->num[1]++;
        usleep(100);
    }
}

static void call_touch_foreign(struct call *call)
{
    uint64_t random = 13, value;

    while (!atomic_load(&stop) && call->ret == 0) {
        uint64_t i = CHANGED / 2 + next_random(&random) % (CHANGED / 2);

        value = i;
        call->ret = access_and_fault(page_at(i), &value, next_random(&random) % 2);
        if (next_random(&random) % 16 == 0)
            pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0);
        call->num[1]++;
    }
}

static void call_dispatch(struct call *call)
{
    struct pm_event event;
    int err;

    while ((err = pm_event_wait(mm, 10 * MILLISECOND, &event)) != -ESRCH && !atomic_load(&stop)) {
        if (err)
            continue;
        pm_table_clear(table, event.start, event.end);
        pm_event_done(mm);
        call->num[1]++;
    }
}

static void call_churn_subs(struct call *call)
{
    while (!atomic_load(&stop)) {
        uint64_t cookies[8], seq, from, to;
        struct pm_mm_stats stats;
        pm_sub *own = new_sub(mm, mem, PAGES);

        read_begin(own, &seq);
        pm_overlapping(mm, addr_of(mem), addr_of(mem) + PAGE, 1, cookies, COUNT_OF(cookies));
        pm_mm_stats(mm, &stats);
        pm_table_verify(table, addr_of(mem), addr_of(mem) + PAGES * PAGE, &from, &to);
        drop_sub(own);
        call->num[1]++;
    }
}

static bool is_quiet(void *arg)
{
    struct pm_mm_stats *stats = arg;

    return pm_mm_stats(mm, stats) == 0 && stats->active == 0 && stats->inflight == 0;
}

static void everything_at_once(void)
{
    struct call calls[] = {
        {.fn = call_read_on, .num = {1}},
        {.fn = call_read_on, .num = {2}},
        {.fn = call_change_on},
        {.fn = call_write_on},
        {.fn = call_foreign},
        {.fn = call_touch_foreign},
        {.fn = call_dispatch},
        {.fn = call_churn_subs},
    };
    struct pm_mm_stats stats;

    pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0);
    atomic_store(&stop, false);
    for (size_t i = 0; i < COUNT_OF(calls); i++)
        call_start(&calls[i]);
    usleep(duration_ns / 1000);
    atomic_store(&stop, true);
    for (size_t i = 0; i < COUNT_OF(calls); i++) {
        int64_t ret = call_join(&calls[i]);

        if (!CHECK(ret == 0 || ret == 1) || calls[i].num[1] == 0)
            fprintf(stderr, "thread %zu: %" PRId64 " after %" PRIu64 " rounds\n", i, ret, calls[i].num[1]);
        CHECK(calls[i].num[1] > 0);
    }
    CHECK(eventually(is_quiet, &stats));
    /* None but where a writer gets no processor for 100 ms. */
    CHECK(stats.drain_timeouts < 5);
}

/* The same up to its end: closing while everybody is at work. */
static void close_in_the_middle(void)
{
    struct call calls[] = {{.fn = call_read_on, .num = {1}},
                           {.fn = call_write_on},
                           {.fn = call_dispatch},
                           {.fn = call_touch_foreign},
                           {.fn = call_foreign}};

    pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0);
    atomic_store(&stop, false);
    for (size_t i = 0; i < COUNT_OF(calls); i++)
        call_start(&calls[i]);
    usleep(100000);
    CHECK_EQ(pm_mm_close(mm), 0);
    usleep(10000);
    atomic_store(&stop, true);
    for (size_t i = 0; i < COUNT_OF(calls); i++) {
        int64_t ret = call_join(&calls[i]);

        if (!CHECK(ret == 0 || ret == 1 || ret == -ESRCH))
            fprintf(stderr, "thread %zu: %" PRId64 "\n", i, ret);
    }
}

static void set_up(void)
{
    mm = open_mm();
    mem = new_pages(PAGES);
    sub = new_sub(mm, mem, PAGES);
    table = new_table();
    atomic_store(&generation, 0);
}

static void tear_down(void)
{
    CHECK_EQ(pm_sub_remove(sub), 0);
    pm_sub_put(sub);
    pm_table_put(table);
    close_mm(mm);
    free_pages(mem, PAGES);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(everything_at_once),
        TEST(close_in_the_middle),
    };

    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
