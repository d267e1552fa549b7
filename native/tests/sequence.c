/* SPDX-License-Identifier: MIT */
/* Sequence numbers: what read_begin waits for, what read_retry tells, and whom an invalidation concerns. */
#include "util.h"

static pm_mm *mm;
static char *mem;

static pm_inv *begin(uint64_t first, uint64_t n, uint64_t *seq)
{
    uint64_t start = addr_of(mem) + first * PAGE;
    pm_inv *inv = NULL;

    CHECK_EQ(pm_invalidate_start(mm, start, start + n * PAGE, PM_CLEAR, PM_BEFORE, &inv, seq), 0);
    return inv;
}

static void end(pm_inv *inv)
{
    CHECK_EQ(pm_invalidate_delivered(inv), 0);
    CHECK_EQ(pm_invalidate_end(inv), 0);
}

static void idle_sub_holds(void)
{
    pm_sub *sub = new_sub(mm, mem, 4);
    uint64_t seq = 0;

    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
    CHECK(seq & 1);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 0);
    CHECK_EQ(pm_sub_seq(sub), seq);
    drop_sub(sub);
}

static void overlap_moves_the_sequence(void)
{
    pm_sub *sub = new_sub(mm, mem, 4);
    uint64_t seq, inv_seq, after;
    pm_inv *inv;

    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
    inv = begin(3, 2, &inv_seq);
    CHECK(inv_seq & 1);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 1);
    CHECK_EQ(pm_sub_seq(sub), inv_seq);
    end(inv);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 1);
    CHECK_EQ(pm_sub_read_begin(sub, 0, &after), 0);
    CHECK(after != seq);
    CHECK_EQ(pm_sub_read_retry(sub, after), 0);
    drop_sub(sub);
}

static void neighbours_are_left_alone(void)
{
    pm_sub *low = new_sub(mm, mem, 4), *high = new_sub(mm, mem + 6 * PAGE, 4);
    uint64_t low_seq, high_seq, ignored;
    pm_inv *inv;

    CHECK_EQ(pm_sub_read_begin(low, 0, &low_seq), 0);
    CHECK_EQ(pm_sub_read_begin(high, 0, &high_seq), 0);
    inv = begin(4, 2, &ignored);
    CHECK_EQ(pm_sub_read_retry(low, low_seq), 0);
    CHECK_EQ(pm_sub_read_retry(high, high_seq), 0);
    CHECK_EQ(pm_sub_read_begin(low, 0, &low_seq), 0);
    end(inv);
    CHECK_EQ(pm_sub_read_retry(low, low_seq), 0);
    CHECK_EQ(pm_sub_read_retry(high, high_seq), 0);
    drop_sub(low);
    drop_sub(high);
}

static void the_whole_mm_concerns_everyone(void)
{
    pm_sub *sub = new_sub(mm, mem, 1), *whole = NULL;
    uint64_t seq, whole_seq, ignored;
    pm_inv *inv = NULL;

    CHECK_EQ(pm_sub_insert(mm, 0, UINT64_MAX, 7, 1, &whole), 0);
    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
    CHECK_EQ(pm_sub_read_begin(whole, 0, &whole_seq), 0);
    CHECK_EQ(pm_invalidate_start(mm, 0, 0, PM_RELEASE, PM_BEFORE, &inv, &ignored), 0);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 1);
    CHECK_EQ(pm_sub_read_retry(whole, whole_seq), 1);
    end(inv);
    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 0);
    drop_sub(sub);
    drop_sub(whole);
}

static void read_begin_waits_and_times_out(void)
{
    pm_sub *sub = new_sub(mm, mem, 4);
    uint64_t seq, began = now_ns();
    pm_inv *inv = begin(0, 1, &seq);

    CHECK_EQ(pm_sub_read_begin(sub, 5 * MILLISECOND, &seq), -ETIMEDOUT);
    CHECK(now_ns() - began >= 5 * MILLISECOND);
    CHECK_EQ(pm_sub_read_begin(sub, 10 * SECOND, &seq), -EINTR);
    CHECK(now_ns() - began < 5 * SECOND);
    end(inv);
    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
    drop_sub(sub);
}

static void call_read_begin(struct call *call)
{
    call->ret = read_begin(call->arg[0], &call->num[0]);
}

static void end_wakes_the_reader(void)
{
    pm_sub *sub = new_sub(mm, mem, 4);
    struct call reader = {.fn = call_read_begin, .arg = {sub}};
    uint64_t first_seq, second_seq;
    pm_inv *first = begin(0, 2, &first_seq), *second = begin(1, 2, &second_seq);

    CHECK(second_seq > first_seq);
    call_start(&reader);
    end(first);
    usleep(20000);
    CHECK(!atomic_load(&reader.done));
    end(second);
    CHECK_EQ(call_join(&reader), 0);
    CHECK_EQ(pm_sub_read_retry(sub, reader.num[0]), 0);
    drop_sub(sub);
}

static void call_read_begin_once(struct call *call)
{
    call->ret = pm_sub_read_begin(call->arg[0], 10 * SECOND, &call->num[0]);
}

/* Woken, not found out at the end of a slice of waiting, which would be -EINTR. */
static void the_reader_does_not_wait_longer(void)
{
    pm_sub *sub = new_sub(mm, mem, 4);
    bool woken = false;

    for (int i = 0; i < 20 && !woken; i++) {
        struct call reader = {.fn = call_read_begin_once, .arg = {sub}};
        uint64_t seq;
        pm_inv *inv = begin(0, 1, &seq);

        call_start(&reader);
        usleep(5000);
        end(inv);
        woken = call_join(&reader) == 0;
    }
    CHECK(woken);
    drop_sub(sub);
}

/* Nested in time: the sequence stays odd until the last one ends, and each has a number of its own. */
static void overlapping_in_time(void)
{
    pm_sub *sub = new_sub(mm, mem, 1);
    struct pm_mm_stats stats;
    uint64_t first_seq, second_seq, seq;
    pm_inv *first = begin(0, 1, &first_seq), *second = begin(4, 1, &second_seq);

    CHECK_EQ(second_seq, first_seq + 2);
    end(first);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK(stats.invalidate_seq & 1);
    CHECK_EQ(stats.active, 1);
    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
    end(second);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK(!(stats.invalidate_seq & 1));
    CHECK_EQ(stats.active, 0);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 0);
    drop_sub(sub);
}

/* A sub made while an invalidation runs over its interval must not hand out a sequence before that ends. */
static void insert_during_an_invalidation(void)
{
    uint64_t seq;
    pm_inv *inv = begin(0, 4, &seq);
    pm_sub *sub = new_sub(mm, mem, 4);

    CHECK_EQ(pm_sub_read_begin(sub, MILLISECOND, &seq), -ETIMEDOUT);
    end(inv);
    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
    inv = begin(2, 1, &seq);
    end(inv);
    CHECK_EQ(pm_sub_read_retry(sub, pm_sub_seq(sub)), 0);
    drop_sub(sub);
}

static void no_sequence_comes_twice(void)
{
    pm_sub *sub = new_sub(mm, mem, 4);
    uint64_t last = 0, seq, ignored;

    for (int i = 0; i < 1000; i++) {
        end(begin(i % 4, 1, &ignored));
        CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), 0);
        NEED(seq > last);
        last = seq;
    }
    drop_sub(sub);
}

static void remove_wakes_and_refuses(void)
{
    pm_sub *sub = new_sub(mm, mem, 4);
    struct call reader = {.fn = call_read_begin, .arg = {sub}};
    uint64_t seq;
    pm_inv *inv = begin(0, 1, &seq);

    call_start(&reader);
    CHECK_EQ(pm_sub_remove(sub), 0);
    CHECK_EQ(call_join(&reader), -ESRCH);
    CHECK_EQ(pm_sub_remove(sub), 0);
    CHECK_EQ(pm_sub_read_retry(sub, pm_sub_seq(sub)), 1);
    end(inv);
    CHECK_EQ(pm_sub_read_begin(sub, 0, &seq), -ESRCH);
    pm_sub_put(sub);
}

static void overlapping_names_the_subs(void)
{
    uint64_t at = addr_of(mem), cookies[4] = {0};
    pm_sub *sub[3] = {0};

    CHECK_EQ(pm_sub_insert(mm, at, at + PAGE - 1, 10, 1, &sub[0]), 0);
    CHECK_EQ(pm_sub_insert(mm, at + 2 * PAGE, at + 3 * PAGE - 1, 20, 1, &sub[1]), 0);
    CHECK_EQ(pm_sub_insert(mm, at, at + 4 * PAGE - 1, 30, 2, &sub[2]), 0);
    CHECK_EQ(pm_overlapping(mm, at, at + 4 * PAGE, 1, cookies, 4), 2);
    CHECK_EQ(cookies[0], 10);
    CHECK_EQ(cookies[1], 20);
    CHECK_EQ(pm_overlapping(mm, at + PAGE, at + 2 * PAGE, 3, cookies, 4), 1);
    CHECK_EQ(cookies[0], 30);
    CHECK_EQ(pm_overlapping(mm, at, 0, 3, cookies, 1), 3);
    CHECK_EQ(pm_overlapping(mm, at, at + 4 * PAGE, 4, cookies, 4), 0);
    for (size_t i = 0; i < COUNT_OF(sub); i++)
        drop_sub(sub[i]);
}

static void bad_arguments(void)
{
    pm_sub *sub = NULL;
    pm_inv *inv = NULL;
    uint64_t seq, at = addr_of(mem);

    CHECK_EQ(pm_sub_insert(mm, at, at - 1, 1, 1, &sub), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, at, at, PM_CLEAR, PM_BEFORE, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, at + PAGE, at, PM_CLEAR, PM_BEFORE, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, at, at + PAGE, PM_EXCLUSIVE + 1, PM_BEFORE, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, at, at + PAGE, PM_CLEAR, PM_DETECTED + 1, &inv, &seq), -EINVAL);
    CHECK(sub == NULL && inv == NULL);
}

static void close_wakes_the_reader(void)
{
    pm_mm *own = open_mm();
    pm_sub *sub = new_sub(own, mem, 4);
    struct call reader = {.fn = call_read_begin, .arg = {sub}};
    uint64_t seq;
    pm_inv *inv = NULL;

    CHECK_EQ(pm_invalidate_start(own, addr_of(mem), addr_of(mem) + PAGE, PM_CLEAR, PM_BEFORE, &inv, &seq), 0);
    call_start(&reader);
    CHECK_EQ(pm_mm_close(own), 0);
    CHECK_EQ(call_join(&reader), -ESRCH);
    CHECK_EQ(pm_sub_read_retry(sub, pm_sub_seq(sub)), 1);
    end(inv);
    pm_sub_put(sub);
    pm_mm_put(own);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(idle_sub_holds),
        TEST(overlap_moves_the_sequence),
        TEST(neighbours_are_left_alone),
        TEST(the_whole_mm_concerns_everyone),
        TEST(read_begin_waits_and_times_out),
        TEST(end_wakes_the_reader),
        TEST(the_reader_does_not_wait_longer),
        TEST(overlapping_in_time),
        TEST(insert_during_an_invalidation),
        TEST(no_sequence_comes_twice),
        TEST(remove_wakes_and_refuses),
        TEST(overlapping_names_the_subs),
        TEST(bad_arguments),
        TEST(close_wakes_the_reader),
    };
    int failed;

    mm = open_mm();
    mem = new_pages(16);
    failed = run_tests(tests, COUNT_OF(tests), argc, argv);
    close_mm(mm);
    free_pages(mem, 16);
    return failed;
}
