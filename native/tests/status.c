/* SPDX-License-Identifier: MIT */
/* The status page, read as another process would read it: who holds, runs and waits for what. */
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#include "internal.h"
#include "util.h"

static struct pm_status look(pm_mm *mm)
{
    struct pm_status status = {0};

    CHECK_EQ(pread(pm_mm_status_fd(mm), &status, sizeof(status), 0), sizeof(status));
    return status;
}

static void a_new_page_says_what_it_is(void)
{
    pm_mm *mm = open_mm();
    struct pm_status status = look(mm);

    CHECK_EQ(status.magic, PM_STATUS_MAGIC);
    CHECK_EQ(status.layout, PM_STATUS_LAYOUT);
    CHECK_EQ(status.pid, getpid());
    CHECK_EQ(status.state, 1);
    CHECK_EQ(status.lock_addr, (uintptr_t)&mm->lock);
    CHECK_EQ(status.lock_tid, 0);
    CHECK_EQ(status.dispatch_state, PM_DISPATCH_NONE);
    CHECK(strcmp(status.version, pm_version()) == 0);
    close_mm(mm);
}

/* Of what a process may reach through /proc/PID/fd. */
static void nobody_else_can_write_to_it(void)
{
    pm_mm *mm = open_mm();
    int fd = pm_mm_status_fd(mm);
    struct stat about;
    char path[32];
    int again;

    CHECK_EQ(fstat(fd, &about), 0);
    CHECK_EQ(about.st_mode & 07777, 0600);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    again = open(path, O_RDWR | O_CLOEXEC);
    CHECK(again >= 0);
    CHECK_EQ(write(again, "x", 1), -1);
    CHECK_EQ(ftruncate(again, 0), -1);
    CHECK_EQ(ftruncate(again, 2 * PAGE), -1);
    CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, again, 0) == MAP_FAILED);
    CHECK_EQ(fcntl(again, F_ADD_SEALS, 0), -1);
    close(again);
    close_mm(mm);
}

static void an_invalidation_shows_its_thread_and_its_callbacks(void)
{
    pm_mm *mm = open_mm();
    struct pm_status status;
    pm_inv *inv;
    uint64_t seq;

    NEED_EQ(pm_invalidate_start(mm, PAGE, 3 * PAGE, PM_CLEAR, PM_BEFORE, &inv, &seq), 0);
    status = look(mm);
    CHECK_EQ(status.active, 1);
    CHECK_EQ(status.inv[0].start, PAGE);
    CHECK_EQ(status.inv[0].end, 3 * PAGE);
    CHECK_EQ(status.inv[0].tid, pm_gettid());
    CHECK_EQ(status.inv[0].undelivered, 1);
    CHECK_EQ(pm_invalidate_delivered(inv), 0);
    CHECK_EQ(look(mm).inv[0].undelivered, 0);
    CHECK_EQ(pm_invalidate_end(inv), 0);
    CHECK_EQ(look(mm).inv[0].since_ns, 0);
    close_mm(mm);
}

static void read_through(struct call *call)
{
    char buf[1];
    int err;

    call->num[0] = (uint64_t)pm_gettid();
    device_read(call->arg[0], call->arg[1], buf, sizeof(buf), &err);
    call->ret = err;
}

static void an_access_in_flight_shows_its_thread(void)
{
    pm_mm *mm = open_mm();
    char *mem = new_pages(1);
    pm_sub *sub = new_sub(mm, mem, 1);
    pm_table *table = new_table();
    struct call reader = {.fn = read_through, .arg = {table, mem}};
    struct pm_status status;

    if (!mm_has(mm, PM_FEAT_PAGEMAP))
        LEAVE_OUT("no pagemap");
    NEED_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_start(&reader);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_LOOKED_UP, 10 * SECOND), 0);
    status = look(mm);
    CHECK_EQ(status.inflight, 1);
    CHECK_EQ(status.inflight_tid, reader.num[0]);
    CHECK(status.inflight_since_ns != 0 && status.inflight_since_ns <= now_ns());
    CHECK_EQ(pm_point_release(PM_POINT_ACCESS_LOOKED_UP), 0);
    CHECK_EQ(call_join(&reader), 0);
    status = look(mm);
    CHECK_EQ(status.inflight, 0);
    CHECK_EQ(status.inflight_since_ns, 0);
    CHECK_EQ(status.inflight_tid, 0);
    pm_table_put(table);
    drop_sub(sub);
    close_mm(mm);
    free_pages(mem, 1);
}

static void whoever_takes_events_is_named(void)
{
    pm_mm *mm = open_mm();
    struct pm_inv inv = {0};
    struct pm_event event = {.start = PAGE, .end = 2 * PAGE, .type = PM_UNMAP, .guarantee = PM_AFTER};
    struct pm_status status;

    event.when_ns = pm_now_ns();
    CHECK_EQ(pm_event_wait(mm, 0, &event), -ETIMEDOUT);
    status = look(mm);
    CHECK_EQ(status.dispatch_tid, pm_gettid());
    CHECK_EQ(status.dispatch_state, PM_DISPATCH_AWAY);
    pm_lock(mm);
    event.seq = pm_inv_open(mm, &inv, PAGE, 2 * PAGE - 1, PM_UNMAP, PM_AFTER);
    pm_inv_close(mm, &inv);
    pm_queue_push(mm, &event);
    pm_unlock(mm);
    CHECK_EQ(look(mm).queue_depth, 1);
    CHECK_EQ(look(mm).callback_since_ns, 0);
    CHECK_EQ(pm_event_wait(mm, 0, &event), 0);
    status = look(mm);
    CHECK_EQ(status.queue_depth, 0);
    CHECK(status.callback_since_ns >= event.when_ns);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(look(mm).callback_since_ns, 0);
    close_mm(mm);
}

static void watched_ranges_are_listed(void)
{
    enum { RANGES = PM_STATUS_WATCHED + 3 };
    pm_mm *mm = open_mm();
    char *mem = new_pages(2 * RANGES);
    struct pm_status status;

    if (!mm_has(mm, PM_FEAT_UFFD_WP_ASYNC))
        LEAVE_OUT("memory is not watched without wp_async");
    /* Every other page: a mapping of its own each. */
    for (uint64_t i = 0; i < RANGES; i++)
        CHECK_EQ(munmap(mem + (2 * i + 1) * PAGE, PAGE), 0);
    for (uint64_t i = 0; i < RANGES; i++)
        CHECK_EQ(pm_watch(mm, addr_of(mem) + 2 * i * PAGE, addr_of(mem) + (2 * i + 1) * PAGE, 0), PAGE);
    status = look(mm);
    CHECK_EQ(status.watched_ranges, RANGES);
    CHECK_EQ(status.watched_bytes, RANGES * PAGE);
    for (uint64_t i = 0; i < PM_STATUS_WATCHED; i++) {
        CHECK_EQ(status.watched[i].start, addr_of(mem) + 2 * i * PAGE);
        CHECK_EQ(status.watched[i].end, addr_of(mem) + (2 * i + 1) * PAGE);
    }
    CHECK(status.monitor_tid != 0);
    CHECK_EQ(pm_unwatch(mm, addr_of(mem), addr_of(mem) + PAGE), 0);
    status = look(mm);
    CHECK_EQ(status.watched_ranges, RANGES - 1);
    CHECK_EQ(status.watched[0].start, addr_of(mem) + 2 * PAGE);
    close_mm(mm);
    for (uint64_t i = 0; i < RANGES; i++)
        free_pages(mem + 2 * i * PAGE, 1);
}

static void waits_of_the_program_are_shown(void)
{
    struct pm_status_wait waits[PM_STATUS_WAITS + 1] = {
        {.since_ns = 1, .tid = 2, .holder_tid = 3, .lock = "one"}, {.since_ns = 4, .tid = 5}};
    pm_mm *mm = open_mm();

    CHECK_EQ(pm_status_waits(mm, waits, PM_STATUS_WAITS + 1), -EINVAL);
    CHECK_EQ(pm_status_waits(mm, waits, 2), 0);
    CHECK(memcmp(look(mm).wait, waits, sizeof(waits[0]) * PM_STATUS_WAITS) == 0);
    CHECK_EQ(pm_status_waits(mm, waits, 1), 0);
    CHECK_EQ(look(mm).wait[0].holder_tid, 3);
    CHECK_EQ(look(mm).wait[1].since_ns, 0);
    CHECK_EQ(pm_mm_close(mm), 0);
    CHECK_EQ(pm_status_waits(mm, waits, 1), -ESRCH);
    pm_mm_put(mm);
}

static void a_thread_shows_its_name(void)
{
    char before[16] = "", name[16] = "";

    prctl(PR_GET_NAME, before);
    pm_thread_name("a-name-that-is-too-long");
    prctl(PR_GET_NAME, name);
    CHECK(strcmp(name, "a-name-that-is-") == 0);
    pm_thread_name(before);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(a_new_page_says_what_it_is),
        TEST(nobody_else_can_write_to_it),
        TEST(an_invalidation_shows_its_thread_and_its_callbacks),
        TEST(an_access_in_flight_shows_its_thread),
        TEST(whoever_takes_events_is_named),
        TEST(watched_ranges_are_listed),
        TEST(waits_of_the_program_are_shown),
        TEST(a_thread_shows_its_name),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
