/* SPDX-License-Identifier: MIT */
/* What the process does to its memory behind pymirror's back, and what the monitor makes of it. */
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "util.h"

enum { PAGES = 16 };

/* The monitor passes by a device write that is under way for longer than 100 ms. */
#define WAITED_FOR_NS (80 * MILLISECOND)

static pm_mm *mm;
static pm_sub *sub;
static pm_table *table;
static char *mem;

static void set_up(void)
{
    mm = open_mm();
    mem = new_pages(PAGES);
    memset(mem, 1, PAGES * PAGE);
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

#define NEED_EVENTS()                                                                                        \
    do {                                                                                                     \
        if (!mm_has(mm, PM_FEAT_UFFD_EVENTS))                                                                \
            LEAVE_OUT("no userfaultfd events for this user");                                                \
        NEED_EQ(pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0), PAGES * PAGE);                   \
        NEED_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);                                    \
    } while (0)

static struct pm_event next_event(void)
{
    struct pm_event event = {0};

    CHECK_EQ(pm_event_wait(mm, 10 * SECOND, &event), 0);
    return event;
}

static uint32_t fault_at(const char *at)
{
    char byte;
    int err;

    return device_read(table, at, &byte, 1, &err).fault;
}

static void watching_is_counted(void)
{
    struct pm_mm_stats stats;
    uint64_t start = addr_of(mem);

    NEED_EVENTS();
    CHECK_EQ(pm_watch(mm, start, start + PAGES * PAGE, 0), PAGES * PAGE);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.monitor_running, 1);
    CHECK(stats.watched_bytes >= PAGES * PAGE);
    CHECK_EQ(pm_unwatch(mm, start, start + PAGES * PAGE), 0);
    CHECK_EQ(pm_unwatch(mm, start, start + PAGES * PAGE), 0);
    CHECK_EQ(pm_watch(mm, start + 1, start + PAGE, 0), -EINVAL);
    CHECK_EQ(pm_watch(mm, start, start, 0), -EINVAL);
}

/* Fenced when munmap returns to its caller, whether or not anybody has taken the event from the queue. */
static void foreign_munmap(void)
{
    struct pm_event event;
    uint64_t seq;

    NEED_EVENTS();
    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(munmap(mem + 4 * PAGE, 3 * PAGE), 0);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 1);
    CHECK_EQ(fault_at(mem + 4 * PAGE), PM_FAULT_FENCED);
    CHECK_EQ(fault_at(mem + 6 * PAGE), PM_FAULT_FENCED);
    CHECK_EQ(fault_at(mem + 3 * PAGE), PM_FAULT_NONE);
    CHECK_EQ(fault_at(mem + 7 * PAGE), PM_FAULT_NONE);
    event = next_event();
    CHECK_EQ(event.type, PM_UNMAP);
    CHECK_EQ(event.guarantee, PM_AFTER);
    CHECK_EQ(event.start, addr_of(mem) + 4 * PAGE);
    CHECK_EQ(event.end, addr_of(mem) + 7 * PAGE);
    CHECK_EQ(event.seq, pm_sub_seq(sub));
    CHECK_EQ(fault_at(mem + 4 * PAGE), PM_FAULT_FENCED);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(fault_at(mem + 4 * PAGE), PM_FAULT_STALE);
}

static void foreign_dontneed(void)
{
    struct pm_event event;
    uint64_t seq;
    char byte = 9;
    int err;

    NEED_EVENTS();
    CHECK_EQ(madvise(mem + PAGE, 2 * PAGE, MADV_DONTNEED), 0);
    CHECK_EQ(fault_at(mem + PAGE), PM_FAULT_FENCED);
    event = next_event();
    CHECK_EQ(event.type, PM_CLEAR);
    CHECK_EQ(event.guarantee, PM_BEFORE);
    CHECK_EQ(event.start, addr_of(mem) + PAGE);
    CHECK_EQ(event.end, addr_of(mem) + 3 * PAGE);
    CHECK_EQ(pm_table_clear(table, event.start, event.end), 2);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
    device_read(table, mem + PAGE, &byte, 1, &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(byte, 0);
}

static void call_dontneed(struct call *call)
{
    uint64_t began = now_ns();

    call->ret = madvise(call->arg[0], PAGE, MADV_DONTNEED);
    call->num[0] = now_ns() - began;
}

/* The message of a REMOVE comes before the pages go: until they have gone nothing may be programmed there. */
static void a_remove_lingers(void)
{
    struct call zapper = {.fn = call_dontneed, .arg = {mem}};
    struct pm_mm_stats stats;
    uint64_t seq;

    NEED_EVENTS();
    CHECK_EQ(pm_point_arm(PM_POINT_REMOVE_LINGER), 0);
    call_start(&zapper);
    CHECK_EQ(call_join(&zapper), 0);
    CHECK_EQ(pm_point_wait(PM_POINT_REMOVE_LINGER, 10 * SECOND), 0);
    CHECK_EQ(pm_sub_read_begin(sub, MILLISECOND, &seq), -ETIMEDOUT);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.active, 1);
    CHECK_EQ(pm_point_release(PM_POINT_REMOVE_LINGER), 0);
    CHECK_EQ(read_begin(sub, &seq), 0);
}

/*
 * A driver that races with the zap must never end up with an entry for a page that is gone; unless the
 * zapping thread got no processor for longer than an interval stays invalidating, 10 ms.
 */
static void nothing_stale_is_programmed_during_a_zap(void)
{
    uint64_t from, to;
    int err;

    NEED_EVENTS();
    for (int i = 0; i < 200; i++) {
        struct call zapper = {.fn = call_dontneed, .arg = {mem + (i % PAGES) * PAGE}};

        call_start(&zapper);
        NEED_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
        call_join(&zapper);
        err = pm_table_verify(table, addr_of(mem), addr_of(mem) + PAGES * PAGE, &from, &to);
        CHECK(err == 0 || (err == -ESTALE && zapper.num[0] > 10 * MILLISECOND));
    }
}

static void foreign_mremap(void)
{
    char *place = new_pages(4);
    struct pm_event event;

    NEED_EVENTS();
    CHECK(mremap(mem, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
    CHECK_EQ(fault_at(mem), PM_FAULT_FENCED);
    event = next_event();
    if (event.start == addr_of(place)) {
        /* It lay beside mem in one vma and was watched with it: what was there before is unmapped first. */
        CHECK_EQ(pm_event_done(mm), 0);
        event = next_event();
    }
    CHECK_EQ(event.type, PM_UNMAP);
    CHECK(event.flags & PM_EV_REMAP);
    CHECK_EQ(event.start, addr_of(mem));
    CHECK_EQ(event.end, addr_of(mem) + 4 * PAGE);
    CHECK_EQ(event.new_start, addr_of(place));
    CHECK_EQ(pm_event_done(mm), 0);
    /* The new place is watched as the old one was. */
    while (pm_event_wait(mm, 0, &event) == 0)
        CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(munmap(place, 4 * PAGE), 0);
    event = next_event();
    CHECK_EQ(event.type, PM_UNMAP);
    CHECK_EQ(event.start, addr_of(place));
    CHECK_EQ(pm_event_done(mm), 0);
}

/* MAP_FIXED over watched memory is an unmap to whoever watches. */
static void foreign_map_fixed(void)
{
    struct pm_event event;
    char *over;

    NEED_EVENTS();
    over = mmap(mem + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(over == mem + 2 * PAGE);
    CHECK_EQ(fault_at(over), PM_FAULT_FENCED);
    event = next_event();
    CHECK_EQ(event.type, PM_UNMAP);
    CHECK_EQ(event.start, addr_of(over));
    CHECK_EQ(event.end, addr_of(over) + PAGE);
    CHECK_EQ(pm_event_done(mm), 0);
}

/* A change that the API makes itself is not told twice. */
static void own_changes_are_swallowed(void)
{
    struct pm_mm_stats stats;
    struct pm_event event;
    pm_inv *inv = NULL;
    uint64_t seq, start = addr_of(mem);

    NEED_EVENTS();
    CHECK_EQ(pm_invalidate_start(mm, start, start + 4 * PAGE, PM_CLEAR, PM_BEFORE, &inv, &seq), 0);
    CHECK_EQ(pm_table_clear(table, start, start + 4 * PAGE), 4);
    CHECK_EQ(pm_invalidate_delivered(inv), 0);
    CHECK_EQ(pm_madvise(mm, start, 4 * PAGE, MADV_DONTNEED), 0);
    CHECK_EQ(pm_invalidate_end(inv), 0);
    CHECK_EQ(pm_event_wait(mm, 20 * MILLISECOND, &event), -ETIMEDOUT);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK(stats.swallowed >= 1);
}

/* A device write that is under way when a zap is told must be in the page before it goes, not in the next
 * one. */
static void call_write(struct call *call)
{
    char byte = 'w';
    int err;

    device_write(table, call->arg[0], &byte, 1, &err);
    call->ret = err;
}

/* One round of it: how long the write was under way once the zap had begun. */
static uint64_t zap_during_a_write(void)
{
    struct call writer = {.fn = call_write, .arg = {mem}}, zapper = {.fn = call_dontneed, .arg = {mem}};
    uint64_t began, took;

    CHECK_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_start(&writer);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_LOOKED_UP, 10 * SECOND), 0);
    began = now_ns();
    call_start(&zapper);
    usleep(20000);
    CHECK(!atomic_load(&zapper.done));
    CHECK_EQ(pm_point_release(PM_POINT_ACCESS_LOOKED_UP), 0);
    CHECK_EQ(call_join(&writer), 0);
    took = now_ns() - began;
    CHECK_EQ(call_join(&zapper), 0);
    return took;
}

static void a_zap_waits_for_a_device_write(void)
{
    struct pm_mm_stats stats;
    uint64_t took = WAITED_FOR_NS, before = 0;

    NEED_EVENTS();
    /* Again if this thread got no processor for as long as the monitor waits. */
    for (int i = 0; i < 20 && took >= WAITED_FOR_NS; i++) {
        CHECK_EQ(pm_mm_stats(mm, &stats), 0);
        before = stats.drain_timeouts;
        took = zap_during_a_write();
    }
    NEED(took < WAITED_FOR_NS);
    CHECK_EQ(mem[0], 0);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.drain_timeouts, before);
}

static atomic_bool keep_writing;

static void call_write_on(struct call *call)
{
    static char buf[PAGES / 2 * PAGE];
    int err = 0;

    while (atomic_load(&keep_writing) && !err)
        device_write(table, call->arg[0], buf, sizeof(buf), &err);
    call->ret = err;
}

/* Writers that follow each other without a gap must not keep an event waiting. */
static void busy_writers_do_not_delay_events(void)
{
    char *other = new_pages(1);
    struct call writers[3];
    struct pm_mm_stats stats;
    uint64_t began;

    NEED_EVENTS();
    NEED_EQ(pm_watch(mm, addr_of(other), addr_of(other) + PAGE, 0), PAGE);
    atomic_store(&keep_writing, true);
    for (size_t i = 0; i < COUNT_OF(writers); i++) {
        writers[i] = (struct call){.fn = call_write_on, .arg = {mem}};
        call_start(&writers[i]);
    }
    began = now_ns();
    for (int i = 0; i < 50; i++)
        CHECK_EQ(madvise(other, PAGE, MADV_DONTNEED), 0);
    CHECK(now_ns() - began < 5 * SECOND);
    atomic_store(&keep_writing, false);
    for (size_t i = 0; i < COUNT_OF(writers); i++)
        CHECK_EQ(call_join(&writers[i]), 0);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    /* Each of the 50 would time out; a few may where a writer gets no processor for 100 ms. */
    CHECK(stats.drain_timeouts < 5);
    free_pages(other, 1);
}

static int fork_raw(void)
{
    return (int)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
}

/* A fork that libc knows nothing of, seen by the kernel's event only. */
static void foreign_fork(void)
{
    struct pm_event event;
    int status = 0, pid;

    if (!mm_has(mm, PM_FEAT_UFFD_EVENT_FORK))
        LEAVE_OUT("no userfaultfd fork event for this user (CAP_SYS_PTRACE)");
    NEED_EVENTS();
    pid = fork_raw();
    if (pid == 0)
        syscall(SYS_exit, 0);
    NEED(pid > 0);
    CHECK_EQ(fault_at(mem), PM_FAULT_FENCED);
    event = next_event();
    CHECK_EQ(event.type, PM_PROTECTION_PAGE);
    CHECK_EQ(event.guarantee, PM_AFTER);
    CHECK_EQ(event.start, 0);
    CHECK_EQ(event.end, 0);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
}

/* The monitor has polled and waits for the lock: an event that comes from outside is fenced before its caller
 * goes on. */
static void no_access_between_read_and_fence(void)
{
    struct call zapper = {.fn = call_dontneed, .arg = {mem}};
    struct call writer;
    char byte = 9;
    struct pm_access access = {.addr = addr_of(mem), .len = 1, .buf = &byte};

    NEED_EVENTS();
    CHECK_EQ(pm_point_arm(PM_POINT_MONITOR_AFTER_READ), 0);
    call_start(&zapper);
    CHECK_EQ(pm_point_wait(PM_POINT_MONITOR_AFTER_READ, 10 * SECOND), 0);
    writer = (struct call){.fn = call_write, .arg = {mem}};
    call_start(&writer);
    usleep(20000);
    CHECK(!atomic_load(&writer.done));
    CHECK_EQ(pm_point_release(PM_POINT_MONITOR_AFTER_READ), 0);
    CHECK_EQ(call_join(&writer), -EFAULT);
    CHECK_EQ(call_join(&zapper), 0);
    CHECK_EQ(pm_access(table, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_FENCED);
}

/* Closing must not leave a system call waiting for an event that nobody reads. */
static void call_churn(struct call *call)
{
    while (atomic_load(&keep_writing)) {
        char *page = call->arg[0];

        madvise(page, PAGE, MADV_DONTNEED);
        page[0] = 1;
    }
}

static void close_while_events_come(void)
{
    for (int i = 0; i < 20; i++) {
        pm_mm *own = open_mm();
        struct call churner = {.fn = call_churn, .arg = {mem}};

        if (!mm_has(own, PM_FEAT_UFFD_EVENTS)) {
            close_mm(own);
            LEAVE_OUT("no userfaultfd events for this user");
        }
        CHECK_EQ(pm_watch(own, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0), PAGES * PAGE);
        atomic_store(&keep_writing, true);
        call_start(&churner);
        usleep(1000);
        close_mm(own);
        atomic_store(&keep_writing, false);
        call_join(&churner);
    }
}

static void a_second_mm_cannot_watch_the_same(void)
{
    pm_mm *other = open_mm();

    if (!mm_has(mm, PM_FEAT_UFFD_EVENTS)) {
        close_mm(other);
        LEAVE_OUT("no userfaultfd events for this user");
    }
    CHECK_EQ(pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0), PAGES * PAGE);
    CHECK_EQ(pm_watch(other, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0), 0);
    close_mm(other);
}

/* More at once than there are slots to linger in: what is fenced with the last of them is told of too. */
static void what_many_removes_fence_is_told(void)
{
    enum { MANY = 200, GAP = 180 };
    char *many = new_pages(MANY);
    pm_sub *over = new_sub(mm, many, MANY);
    struct pm_event event;

    memset(many, 1, MANY * PAGE);
    if (!mm_has(mm, PM_FEAT_UFFD_EVENTS)) {
        drop_sub(over);
        free_pages(many, MANY);
        LEAVE_OUT("no userfaultfd events for this user");
    }
    CHECK_EQ(pm_watch(mm, addr_of(many), addr_of(many) + MANY * PAGE, 0), MANY * PAGE);
    CHECK_EQ(mirror_pages(mm, table, over, many, MANY, WANT_WRITE), 0);
    for (int i = 0; i < 90; i++) {
        char *page = many + (i < 89 ? 2 * i : MANY - 1) * PAGE;

        CHECK_EQ(madvise(page, PAGE, MADV_DONTNEED), 0);
        *page = 1; /* so that it lingers its full time */
    }
    while (pm_event_wait(mm, 20 * MILLISECOND, &event) == 0) {
        pm_table_clear(table, event.start, event.end);
        CHECK_EQ(pm_event_done(mm), 0);
    }
    for (int i = 0; i < MANY; i++)
        CHECK(fault_at(many + i * PAGE) != PM_FAULT_STALE);
    CHECK_EQ(fault_at(many), PM_FAULT_MISSING);
    CHECK_EQ(fault_at(many + (MANY - 1) * PAGE), PM_FAULT_MISSING);
    drop_sub(over);
    free_pages(many, MANY);
}

static void call_munmap(struct call *call)
{
    call->ret = munmap(mem, PAGES * PAGE);
}

/* The list of what is watched has the old mapping still. */
static void new_memory_where_an_unmap_is_unread(void)
{
    const uint64_t size = PAGES * PAGE;
    struct call unmapper = {.fn = call_munmap};
    struct pm_event event;

    NEED_EVENTS();
    CHECK_EQ(pm_point_arm(PM_POINT_MONITOR_POLLED), 0);
    call_start(&unmapper);
    CHECK_EQ(pm_point_wait(PM_POINT_MONITOR_POLLED, 10 * SECOND), 0);
    CHECK(mmap(mem, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
          mem);
    CHECK_EQ(pm_watch(mm, addr_of(mem), addr_of(mem) + size, PM_WATCH_EXACT), size);
    CHECK_EQ(pm_point_release(PM_POINT_MONITOR_POLLED), 0);
    CHECK_EQ(call_join(&unmapper), 0);
    event = next_event();
    CHECK_EQ(event.type, PM_UNMAP);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(munmap(mem, size), 0);
    event = next_event();
    CHECK_EQ(event.type, PM_UNMAP);
    CHECK_EQ(event.start, addr_of(mem));
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK(mmap(mem, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
          mem);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(watching_is_counted),
        TEST(foreign_munmap),
        TEST(foreign_dontneed),
        TEST(a_remove_lingers),
        TEST(nothing_stale_is_programmed_during_a_zap),
        TEST(foreign_mremap),
        TEST(foreign_map_fixed),
        TEST(own_changes_are_swallowed),
        TEST(a_zap_waits_for_a_device_write),
        TEST(busy_writers_do_not_delay_events),
        TEST(foreign_fork),
        TEST(no_access_between_read_and_fence),
        TEST(close_while_events_come),
        TEST(a_second_mm_cannot_watch_the_same),
        TEST(what_many_removes_fence_is_told),
        TEST(new_memory_where_an_unmap_is_unread),
    };

    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
