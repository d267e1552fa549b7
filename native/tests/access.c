/* SPDX-License-Identifier: MIT */
/* The device reads and writes through its table: what it is served, what it is refused, and races with
 * invalidation. */
#include "util.h"

enum { PAGES = 600 };

static pm_mm *mm;
static pm_sub *sub;
static pm_table *table;
static char *mem;

static void set_up(void)
{
    mm = open_mm();
    mem = new_pages(PAGES);
    sub = new_sub(mm, mem, PAGES);
    table = new_table();
}

static void tear_down(void)
{
    pm_points_reset();
    drop_sub(sub);
    pm_table_put(table);
    close_mm(mm);
    free_pages(mem, PAGES);
}

static pm_inv *begin(char *at, uint64_t n, uint64_t *seq)
{
    pm_inv *inv = NULL;

    CHECK_EQ(pm_invalidate_start(mm, addr_of(at), addr_of(at) + n * PAGE, PM_CLEAR, PM_BEFORE, &inv, seq), 0);
    return inv;
}

static void end(pm_inv *inv)
{
    CHECK_EQ(pm_invalidate_delivered(inv), 0);
    CHECK_EQ(pm_invalidate_end(inv), 0);
}

static void fill(char *buf, size_t len, unsigned seed)
{
    for (size_t i = 0; i < len; i++)
        buf[i] = (char)(seed + i * 7 + i / PAGE);
}

static void reads_what_the_cpu_wrote(void)
{
    static char buf[PAGES * PAGE];
    struct pm_access access;
    int err;

    fill(mem, sizeof(buf), 1);
    NEED_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_READ), 0);
    access = device_read(table, mem + 100, buf, sizeof(buf) - 200, &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(access.done, sizeof(buf) - 200);
    CHECK(memcmp(buf, mem + 100, sizeof(buf) - 200) == 0);
}

static void the_cpu_reads_what_it_wrote(void)
{
    static char buf[PAGES * PAGE];
    struct pm_access access;
    int err;

    NEED_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
    fill(buf, sizeof(buf), 9);
    access = device_write(table, mem + 1, buf, sizeof(buf) - 2, &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(access.done, sizeof(buf) - 2);
    CHECK(memcmp(buf, mem + 1, sizeof(buf) - 2) == 0);
    CHECK_EQ(mem[0], 0);
    CHECK_EQ(mem[sizeof(buf) - 1], 0);
}

static void missing_entries_fault(void)
{
    char buf[3 * PAGE];
    struct pm_access access;
    int err;

    access = device_read(table, mem, buf, 1, &err);
    CHECK_EQ(err, -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
    NEED_EQ(mirror_pages(mm, table, sub, mem, 2, WANT_WRITE), 0);
    access = device_read(table, mem, buf, sizeof(buf), &err);
    CHECK_EQ(err, -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
    CHECK_EQ(access.done, 2 * PAGE);
    CHECK_EQ(access.fault_start, addr_of(mem) + 2 * PAGE);
    CHECK_EQ(access.fault_end, addr_of(mem) + 3 * PAGE);
}

static void read_only_entries_refuse_writes(void)
{
    char buf[2 * PAGE] = "x";
    struct pm_access access;
    int err;

    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    NEED_EQ(mprotect(mem + PAGE, PAGE, PROT_READ), 0);
    NEED_EQ(mirror_pages(mm, table, sub, mem + PAGE, 1, WANT_READ), 0);
    access = device_write(table, mem, buf, sizeof(buf), &err);
    CHECK_EQ(err, -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_READONLY);
    CHECK_EQ(access.done, PAGE);
    CHECK_EQ(access.fault_start, addr_of(mem) + PAGE);
    CHECK_EQ(mem[0], 'x');
}

static void bad_arguments(void)
{
    struct pm_access access = {.addr = 0, .len = 0};
    char byte;

    CHECK_EQ(pm_access(table, &access), -EINVAL);
    access = (struct pm_access){.addr = UINT64_MAX - 1, .len = 4, .buf = &byte};
    CHECK_EQ(pm_access(table, &access), -EINVAL);
}

/* Fenced is the device's ordinary fault while callbacks run; stale is a driver that did not clear. */
static void fenced_then_stale(void)
{
    struct pm_access access;
    char byte;
    uint64_t seq;
    pm_inv *inv;
    int err;

    NEED_EQ(mirror_pages(mm, table, sub, mem, 2, WANT_WRITE), 0);
    inv = begin(mem, 1, &seq);
    access = device_read(table, mem, &byte, 1, &err);
    CHECK_EQ(err, -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_FENCED);
    CHECK_EQ(access.fence_seq, seq);
    CHECK_EQ(pm_invalidate_delivered(inv), 0);
    access = device_read(table, mem, &byte, 1, &err);
    CHECK_EQ(access.fault, PM_FAULT_STALE);
    CHECK_EQ(access.fence_seq, seq);
    CHECK_EQ(pm_invalidate_end(inv), 0);
    access = device_read(table, mem, &byte, 1, &err);
    CHECK_EQ(access.fault, PM_FAULT_STALE);
    access = device_read(table, mem + PAGE, &byte, 1, &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(pm_table_clear(table, addr_of(mem), addr_of(mem) + PAGE), 1);
    access = device_read(table, mem, &byte, 1, &err);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
}

static void a_change_nobody_told_of(void)
{
    struct pm_access access;
    char buf[4 * PAGE];
    int err;

    memset(mem, 1, sizeof(buf));
    NEED_EQ(mirror_pages(mm, table, sub, mem, 4, WANT_WRITE), 0);
    CHECK_EQ(madvise(mem + PAGE, 2 * PAGE, MADV_DONTNEED), 0);
    access = device_read(table, mem, buf, sizeof(buf), &err);
    CHECK_EQ(err, -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_CHANGED);
    CHECK_EQ(access.done, PAGE);
    CHECK_EQ(access.fault_start, addr_of(mem) + PAGE);
    CHECK_EQ(access.fault_end, addr_of(mem) + 3 * PAGE);
}

static void call_access(struct call *call)
{
    struct pm_access *access = call->arg[0];

    call->ret = pm_access(table, access);
}

/* Invalidate, replace the contents, program anew, all while a reader stands between its copy and its check.
 */
static void a_read_that_raced_is_done_again(void)
{
    char buf[PAGE];
    struct pm_access access = {.addr = addr_of(mem), .len = sizeof(buf), .buf = buf};
    struct call reader = {.fn = call_access, .arg = {&access}};
    struct pm_mm_stats stats;
    uint64_t seq;

    memset(mem, 'a', PAGE);
    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_COPIED), 0);
    call_start(&reader);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_COPIED, 10 * SECOND), 0);
    pm_inv *inv = begin(mem, 1, &seq);
    CHECK_EQ(pm_table_clear(table, addr_of(mem), addr_of(mem) + PAGE), 1);
    memset(mem, 'b', PAGE);
    end(inv);
    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_point_release(PM_POINT_ACCESS_COPIED), 0);
    CHECK_EQ(call_join(&reader), 0);
    CHECK_EQ(access.redone, 1);
    CHECK_EQ(buf[0], 'b');
    CHECK_EQ(buf[PAGE - 1], 'b');
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.access_redone, 1);
    CHECK_EQ(stats.inflight, 0);
}

static void an_invalidated_read_gives_nothing(void)
{
    char buf[PAGE];
    struct pm_access access = {.addr = addr_of(mem), .len = sizeof(buf), .buf = buf};
    struct call reader = {.fn = call_access, .arg = {&access}};
    uint64_t seq;
    pm_inv *inv;

    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_start(&reader);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_LOOKED_UP, 10 * SECOND), 0);
    inv = begin(mem, 1, &seq);
    CHECK_EQ(pm_point_release(PM_POINT_ACCESS_LOOKED_UP), 0);
    CHECK_EQ(call_join(&reader), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_FENCED);
    CHECK_EQ(access.done, 0);
    end(inv);
}

static void call_invalidate(struct call *call)
{
    uint64_t seq;
    pm_inv *inv = begin(call->arg[0], 1, &seq);

    call->num[0] = (uint64_t)((char *)call->arg[0])[0];
    end(inv);
}

/* A write cannot be taken back: the invalidation waits, so that the change comes after the write. */
static void an_invalidation_waits_for_a_write(void)
{
    char byte = 'w';
    struct pm_access access = {.addr = addr_of(mem), .len = 1, .buf = &byte, .write = 1};
    struct call writer = {.fn = call_access, .arg = {&access}};
    struct call changer = {.fn = call_invalidate, .arg = {mem}};
    struct pm_mm_stats stats;

    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_start(&writer);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_LOOKED_UP, 10 * SECOND), 0);
    call_start(&changer);
    usleep(50000);
    CHECK(!atomic_load(&changer.done));
    CHECK_EQ(pm_point_release(PM_POINT_ACCESS_LOOKED_UP), 0);
    CHECK_EQ(call_join(&writer), 0);
    call_join(&changer);
    CHECK_EQ(changer.num[0], 'w');
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.drain_timeouts, 0);
}

/* Nothing waits for ever, not even for a writer that is stuck. */
static void a_stuck_write_is_passed_by(void)
{
    char byte = 'w';
    struct pm_access access = {.addr = addr_of(mem), .len = 1, .buf = &byte, .write = 1};
    struct call writer = {.fn = call_access, .arg = {&access}};
    struct pm_mm_stats stats;
    uint64_t seq, began;

    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_start(&writer);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_LOOKED_UP, 10 * SECOND), 0);
    began = now_ns();
    end(begin(mem, 1, &seq));
    CHECK(now_ns() - began < 20 * SECOND);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.drain_timeouts, 1);
    CHECK_EQ(stats.inflight, 1);
    CHECK_EQ(pm_point_release(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_join(&writer);
}

static void elsewhere_is_not_disturbed(void)
{
    char buf[PAGE];
    struct pm_access access = {.addr = addr_of(mem), .len = sizeof(buf), .buf = buf};
    struct call reader = {.fn = call_access, .arg = {&access}};
    uint64_t seq;

    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_COPIED), 0);
    call_start(&reader);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_COPIED, 10 * SECOND), 0);
    end(begin(mem + PAGE, 1, &seq));
    CHECK_EQ(pm_point_release(PM_POINT_ACCESS_COPIED), 0);
    CHECK_EQ(call_join(&reader), 0);
    CHECK_EQ(access.redone, 0);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(reads_what_the_cpu_wrote),
        TEST(the_cpu_reads_what_it_wrote),
        TEST(missing_entries_fault),
        TEST(read_only_entries_refuse_writes),
        TEST(bad_arguments),
        TEST(fenced_then_stale),
        TEST(a_change_nobody_told_of),
        TEST(a_read_that_raced_is_done_again),
        TEST(an_invalidated_read_gives_nothing),
        TEST(an_invalidation_waits_for_a_write),
        TEST(a_stuck_write_is_passed_by),
        TEST(elsewhere_is_not_disturbed),
    };

    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
