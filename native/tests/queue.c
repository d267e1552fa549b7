/* SPDX-License-Identifier: MIT */
/* The queue of kernel events: order, what sync waits for, and that an overflow loses no invalidation. */
#include "internal.h"
#include "util.h"

enum { LENGTH = 4 };

static pm_mm *open_small_queue(void)
{
    const struct pm_mm_options opt = {.queue_length = LENGTH};

    return open_mm_with(&opt);
}

/* As the monitor does it: the sequence moves, the entries are fenced, the event is queued. */
static uint64_t push(pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_inv inv = {0};
    struct pm_event event = {.start = start, .end = end, .type = PM_UNMAP, .guarantee = PM_AFTER};

    event.when_ns = pm_now_ns();
    pm_lock(mm);
    event.seq = pm_inv_open(mm, &inv, start, pm_last(end), PM_UNMAP, PM_AFTER);
    pm_inv_close(mm, &inv);
    pm_queue_push(mm, &event);
    pm_unlock(mm);
    return event.seq;
}

static void events_come_in_order(void)
{
    pm_mm *mm = open_small_queue();
    struct pm_event event;
    uint64_t seqs[LENGTH];

    CHECK_EQ(pm_event_wait(mm, 0, &event), -ETIMEDOUT);
    CHECK_EQ(pm_event_done(mm), -EINVAL);
    for (int round = 0; round < 3; round++) {
        for (uint64_t i = 0; i < LENGTH; i++)
            seqs[i] = push(mm, (i + 1) * PAGE, (i + 2) * PAGE);
        for (uint64_t i = 0; i < LENGTH; i++) {
            NEED_EQ(pm_event_wait(mm, 0, &event), 0);
            CHECK_EQ(event.start, (i + 1) * PAGE);
            CHECK_EQ(event.seq, seqs[i]);
            CHECK_EQ(event.flags, 0);
            CHECK_EQ(pm_event_done(mm), 0);
        }
    }
    CHECK_EQ(pm_event_wait(mm, 0, &event), -ETIMEDOUT);
    close_mm(mm);
}

static void overflow_stands_for_all(void)
{
    pm_mm *mm = open_small_queue();
    char *mem = new_pages(4);
    pm_sub *sub = new_sub(mm, mem, 4);
    pm_table *table = new_table();
    struct pm_mm_stats stats;
    struct pm_event event;
    uint64_t seq, pfn = PM_PFN_VALID | 1, entry = 0, last = 0;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(pm_table_map(table, sub, seq, addr_of(mem), 1, &pfn), 0);
    for (uint64_t i = 0; i < LENGTH; i++)
        push(mm, (i + 1) * PAGE, (i + 2) * PAGE);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 0);
    for (uint64_t i = 0; i < 3; i++)
        last = push(mm, (i + 1) * PAGE, (i + 2) * PAGE);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 1);
    CHECK_EQ(pm_table_read(table, addr_of(mem), 1, &entry), 0);
    CHECK(entry & PM_ENTRY_FENCED);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.queue_overflows, 1);
    CHECK_EQ(stats.queue_depth, 1);
    NEED_EQ(pm_event_wait(mm, 0, &event), 0);
    CHECK(event.flags & PM_EV_OVERFLOW);
    CHECK_EQ(event.start, 0);
    CHECK_EQ(event.end, 0);
    CHECK(event.seq >= last);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(pm_event_wait(mm, 0, &event), -ETIMEDOUT);
    push(mm, PAGE, 2 * PAGE);
    CHECK_EQ(pm_event_wait(mm, 0, &event), 0);
    CHECK_EQ(event.flags, 0);
    CHECK_EQ(pm_event_done(mm), 0);
    drop_sub(sub);
    pm_table_put(table);
    close_mm(mm);
    free_pages(mem, 4);
}

static int sync_all(pm_mm *mm, uint64_t timeout_ns)
{
    uint64_t ticket = 0, until = now_ns() + timeout_ns;
    int err;

    do
        err = pm_event_sync(mm, until - pm_min(until, now_ns()), &ticket);
    while (err == -EINTR);
    return err;
}

static void call_sync(struct call *call)
{
    call->ret = sync_all(call->arg[0], 10 * SECOND);
}

static void sync_waits_for_the_callbacks(void)
{
    pm_mm *mm = open_small_queue();
    struct call syncer = {.fn = call_sync, .arg = {mm}};
    struct pm_event event;

    CHECK_EQ(sync_all(mm, 0), 0);
    push(mm, PAGE, 2 * PAGE);
    push(mm, PAGE, 2 * PAGE);
    CHECK_EQ(sync_all(mm, MILLISECOND), -ETIMEDOUT);
    CHECK_EQ(pm_event_wait(mm, 0, &event), 0);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(pm_event_wait(mm, 0, &event), 0);
    call_start(&syncer);
    usleep(20000);
    CHECK(!atomic_load(&syncer.done));
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(call_join(&syncer), 0);
    close_mm(mm);
}

/* More events than fit, drawn after the ticket: the one that stands for them still has to end the wait. */
static void sync_over_an_overflow(void)
{
    pm_mm *mm = open_small_queue();
    struct call syncer = {.fn = call_sync, .arg = {mm}};
    struct pm_event event;

    for (uint64_t i = 0; i < LENGTH; i++)
        push(mm, PAGE, 2 * PAGE);
    call_start(&syncer);
    usleep(20000);
    CHECK(!atomic_load(&syncer.done));
    push(mm, PAGE, 2 * PAGE);
    CHECK_EQ(pm_event_wait(mm, SECOND, &event), 0);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(call_join(&syncer), 0);
    close_mm(mm);
}

/* What is queued after a sync began must not lengthen it, nor an overflow shorten it. */
static void sync_is_not_fooled_by_an_overflow(void)
{
    pm_mm *mm = open_small_queue();
    struct call syncer = {.fn = call_sync, .arg = {mm}};
    struct pm_event event;

    push(mm, PAGE, 2 * PAGE);
    CHECK_EQ(pm_event_wait(mm, 0, &event), 0);
    for (uint64_t i = 0; i < LENGTH; i++)
        push(mm, PAGE, 2 * PAGE);
    call_start(&syncer);
    usleep(20000);
    push(mm, PAGE, 2 * PAGE);
    CHECK_EQ(pm_event_done(mm), 0);
    usleep(20000);
    CHECK(!atomic_load(&syncer.done));
    CHECK_EQ(pm_event_wait(mm, 0, &event), 0);
    CHECK(event.flags & PM_EV_OVERFLOW);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(call_join(&syncer), 0);
    close_mm(mm);
}

static void close_wakes_the_waiters(void)
{
    pm_mm *mm = open_small_queue();
    struct call syncer = {.fn = call_sync, .arg = {mm}};
    struct pm_event event;

    push(mm, PAGE, 2 * PAGE);
    call_start(&syncer);
    CHECK_EQ(pm_mm_close(mm), 0);
    CHECK_EQ(call_join(&syncer), -ESRCH);
    while (pm_event_wait(mm, SECOND, &event) == 0)
        CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(pm_event_wait(mm, SECOND, &event), -ESRCH);
    pm_mm_put(mm);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(events_come_in_order),
        TEST(overflow_stands_for_all),
        TEST(sync_waits_for_the_callbacks),
        TEST(sync_over_an_overflow),
        TEST(sync_is_not_fooled_by_an_overflow),
        TEST(close_wakes_the_waiters),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
