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

typedef void (*push_fn)(struct pm_mm *mm, const struct pm_event *event);

/* The sequence moves, the entries are fenced, the event is queued. */
static uint64_t push_by(pm_mm *mm, push_fn fn, struct pm_event event)
{
    struct pm_inv inv = {0};

    event.when_ns = pm_now_ns();
    pm_lock(mm);
    event.seq = pm_inv_open(mm, &inv, event.start, pm_last(event.end), (int)event.type, (int)event.guarantee);
    pm_inv_close(mm, &inv);
    fn(mm, &event);
    pm_unlock(mm);
    return event.seq;
}

static uint64_t push_event(pm_mm *mm, struct pm_event event)
{
    return push_by(mm, pm_queue_push, event);
}

/* As the monitor does it. */
static void hold(pm_mm *mm, uint64_t start)
{
    push_by(mm, pm_queue_hold,
            (struct pm_event){.start = start, .end = start + PAGE, .type = PM_UNMAP, .guarantee = PM_AFTER});
}

static uint64_t push(pm_mm *mm, uint64_t start, uint64_t end)
{
    return push_event(mm,
                      (struct pm_event){.start = start, .end = end, .type = PM_UNMAP, .guarantee = PM_AFTER});
}

/* A CPU fault on page i of device memory. */
static uint64_t push_fault(pm_mm *mm, uint64_t i)
{
    return push_event(mm, (struct pm_event){.start = i * PAGE,
                                            .end = (i + 1) * PAGE,
                                            .type = PM_MIGRATE,
                                            .guarantee = PM_BEFORE,
                                            .flags = PM_EV_FAULT});
}

static bool undelivered(pm_mm *mm, uint64_t seq)
{
    bool ret;

    pm_lock(mm);
    ret = pm_seq_undelivered(mm, seq);
    pm_unlock(mm);
    return ret;
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

static void faults_on_neighbours_are_one_event(void)
{
    pm_mm *mm = open_small_queue();
    struct pm_event event;
    uint64_t first = push_fault(mm, 8), middle, last;

    push_fault(mm, 9);
    middle = push_fault(mm, 7);
    for (uint64_t i = 10; i < 10 + 2 * LENGTH; i++)
        last = push_fault(mm, i);
    CHECK(undelivered(mm, first) && undelivered(mm, middle) && undelivered(mm, last));
    CHECK(!undelivered(mm, first - 2) && !undelivered(mm, last + 2));
    NEED_EQ(pm_event_wait(mm, 0, &event), 0);
    CHECK_EQ(event.start, 7 * PAGE);
    CHECK_EQ(event.end, (10 + 2 * LENGTH) * PAGE);
    CHECK_EQ(event.first_seq, first);
    CHECK_EQ(event.seq, last);
    CHECK(undelivered(mm, middle));
    /* What is being told does not grow. */
    push_fault(mm, 6);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK(!undelivered(mm, middle));
    NEED_EQ(pm_event_wait(mm, 0, &event), 0);
    CHECK_EQ(event.start, 6 * PAGE);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(sync_all(mm, 0), 0);
    close_mm(mm);
}

static void only_neighbours_in_place_and_time(void)
{
    pm_mm *mm = open_small_queue();
    struct pm_inv inv = {0};
    struct pm_event event;
    uint64_t seqs[4];

    seqs[0] = push_fault(mm, 1);
    seqs[1] = push_fault(mm, 3);
    /* An operation of the API, which its own thread tells. */
    pm_lock(mm);
    pm_inv_open(mm, &inv, 4 * PAGE, 5 * PAGE - 1, PM_MIGRATE, PM_BEFORE);
    pm_inv_close(mm, &inv);
    pm_unlock(mm);
    seqs[2] = push_fault(mm, 4);
    seqs[3] = push(mm, 5 * PAGE, 6 * PAGE);
    for (int i = 0; i < 4; i++) {
        NEED_EQ(pm_event_wait(mm, 0, &event), 0);
        CHECK_EQ(event.seq, seqs[i]);
        CHECK_EQ(event.first_seq, seqs[i]);
        CHECK_EQ(pm_event_done(mm), 0);
    }
    close_mm(mm);
}

/* The first is told at once, the next with what follows it, anything else and a sync at once. */
static void faults_let_the_dispatcher_rest(void)
{
    pm_mm *mm = open_small_queue();
    struct call syncer = {.fn = call_sync, .arg = {mm}};
    struct pm_event event;
    uint64_t taken;

    push_fault(mm, 1);
    NEED_EQ(pm_event_wait(mm, SECOND, &event), 0);
    taken = mm->fault_event_ns;
    CHECK_EQ(pm_event_done(mm), 0);
    push_fault(mm, 2);
    NEED_EQ(pm_event_wait(mm, SECOND, &event), 0);
    CHECK(mm->fault_event_ns - taken >= 4 * MILLISECOND);
    CHECK_EQ(pm_event_done(mm), 0);
    /* As if that one had come an hour from now: nothing ends the rest but what is checked here. */
    pm_lock(mm);
    mm->fault_event_ns += 3600 * SECOND;
    pm_unlock(mm);
    push_fault(mm, 3);
    push(mm, 9 * PAGE, 10 * PAGE);
    for (int i = 0; i < 2; i++) {
        NEED_EQ(pm_event_wait(mm, UINT64_MAX, &event), 0);
        CHECK_EQ(pm_event_done(mm), 0);
        pm_lock(mm);
        mm->fault_event_ns = pm_now_ns() + 3600 * SECOND;
        pm_unlock(mm);
    }
    push_fault(mm, 4);
    call_start(&syncer);
    NEED_EQ(pm_event_wait(mm, UINT64_MAX, &event), 0);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(call_join(&syncer), 0);
    close_mm(mm);
}

static int take(pm_mm *mm)
{
    struct pm_event event;
    int ret = pm_event_wait(mm, UINT64_MAX, &event);

    return ret ? ret : pm_event_done(mm);
}

static void call_take(struct call *call)
{
    call->ret = take(call->arg[0]);
}

/* As if the last time limit were an hour off. */
static void put_off(pm_mm *mm)
{
    pm_lock(mm);
    mm->held_ns += 3600 * SECOND;
    pm_unlock(mm);
}

static void what_is_held_waits_to_be_told(void)
{
    pm_mm *mm = open_small_queue();
    struct call taker = {.fn = call_take, .arg = {mm}}, syncer = {.fn = call_sync, .arg = {mm}};
    struct pm_event event;

    hold(mm, PAGE);
    put_off(mm);
    hold(mm, 3 * PAGE);
    CHECK_EQ(mm->ready, 0);
    call_start(&taker);
    pm_lock(mm);
    CHECK_EQ(mm->queue_count, 2);
    pm_queue_tell(mm);
    pm_unlock(mm);
    CHECK_EQ(call_join(&taker), 0);
    /* Told of already, and nothing that comes later puts it off. */
    hold(mm, 5 * PAGE);
    put_off(mm);
    NEED_EQ(pm_event_wait(mm, UINT64_MAX, &event), 0);
    CHECK_EQ(event.start, 3 * PAGE);
    CHECK_EQ(pm_event_done(mm), 0);
    /* Who waits for the queue has it told. */
    call_start(&syncer);
    NEED_EQ(pm_event_wait(mm, UINT64_MAX, &event), 0);
    CHECK_EQ(event.start, 5 * PAGE);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(call_join(&syncer), 0);
    /* So does another event that is not held, and a queue that fills. */
    hold(mm, 7 * PAGE);
    put_off(mm);
    push(mm, PAGE, 2 * PAGE);
    CHECK_EQ(mm->ready, 2);
    CHECK_EQ(take(mm), 0);
    CHECK_EQ(take(mm), 0);
    for (uint64_t i = 0; i <= LENGTH / 2; i++)
        hold(mm, (2 * i + 1) * PAGE);
    CHECK_EQ(mm->ready, 0);
    CHECK_EQ(take(mm), 0);
    /* Told of by its own time limit, if nobody tells. */
    pm_lock(mm);
    mm->held_ns = pm_now_ns();
    pm_unlock(mm);
    CHECK_EQ(take(mm), 0);
    CHECK(pm_now_ns() >= mm->held_ns + PM_HELD_MAX_NS);
    close_mm(mm);
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
        TEST(faults_on_neighbours_are_one_event),
        TEST(only_neighbours_in_place_and_time),
        TEST(faults_let_the_dispatcher_rest),
        TEST(what_is_held_waits_to_be_told),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
