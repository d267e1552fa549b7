/* SPDX-License-Identifier: MIT */
/* fork through libc: the child's context is dead, the parent's goes on, and entries of before are not used
 * after. */
#include <fcntl.h>
#include <sys/wait.h>

#include "util.h"

enum { PAGES = 8 };

static pm_mm *mm;
static pm_sub *sub;
static pm_table *table;
static char *mem;

/*
 * ThreadSanitizer holds locks of its own across fork(), which waits in the kernel until the monitor has read
 * the event, and the monitor would need these locks: there the fork is known by libc's handlers alone.
 */
static pm_mm *open_to_fork(void)
{
    struct pm_mm_options opt = {0};

#ifdef __SANITIZE_THREAD__
    opt.disable = 1ULL << PM_FEAT_UFFD_EVENT_FORK;
#endif
    return open_mm_with(&opt);
}

static void set_up(void)
{
    mm = open_to_fork();
    mem = new_pages(PAGES);
    memset(mem, 1, PAGES * PAGE);
    sub = new_sub(mm, mem, PAGES);
    table = new_table();
    CHECK_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
}

static void tear_down(void)
{
    pm_points_reset();
    drop_sub(sub);
    pm_table_put(table);
    close_mm(mm);
    free_pages(mem, PAGES);
}

static int child_finds_it_dead(void)
{
    struct pm_access access = {.addr = addr_of(mem), .len = 1};
    struct pm_mm_stats stats;
    struct pm_event event;
    struct pm_vma vma;
    pm_inv *inv = NULL;
    pm_sub *other = NULL;
    uint64_t seq, ticket = 0;
    char byte;

    access.buf = &byte;
    if (pm_mm_alive(mm) != -1)
        return 1;
    if (pm_sub_insert(mm, 0, 1, 1, 1, &other) != -ESRCH)
        return 2;
    if (pm_sub_read_begin(sub, 0, &seq) != -ESRCH)
        return 3;
    if (pm_invalidate_start(mm, 0, 0, PM_CLEAR, PM_BEFORE, &inv, &seq) != -ESRCH)
        return 4;
    if (pm_event_wait(mm, 0, &event) != -ESRCH)
        return 5;
    if (pm_access(table, &access) != -ESRCH)
        return 6;
    if (mirror_pages(mm, table, sub, mem, 1, WANT_WRITE) != -ESRCH)
        return 7;
    if (pm_watch(mm, addr_of(mem), addr_of(mem) + PAGE, 0) >= 0)
        return 8;
    if (pm_mm_close(mm) != -ESRCH && pm_mm_close(mm) != 0)
        return 9;
    if (pm_event_sync(mm, 0, &ticket) != -ESRCH)
        return 10;
    if (pm_vma_find(mm, addr_of(mem), &vma) != -ESRCH)
        return 11;
    if (pm_sub_read_retry(sub, pm_sub_seq(sub)) != 1)
        return 12;
    if (pm_mm_stats(mm, &stats) != -ESRCH)
        return 13;
    pm_sub_put(sub);
    pm_table_put(table);
    pm_mm_put(mm);
    return 0;
}

static void the_child_finds_it_dead(void)
{
    CHECK_EQ(in_child(child_finds_it_dead), 0);
    CHECK_EQ(pm_mm_alive(mm), 1);
}

static int child_makes_its_own(void)
{
    char byte = 0;
    int err;

    set_up();
    device_read(table, mem, &byte, 1, &err);
    if (err || byte != 1)
        return 1;
    tear_down();
    return check_failures ? 2 : 0;
}

static void the_child_makes_its_own(void)
{
    CHECK_EQ(in_child(child_makes_its_own), 0);
}

static int parents_fds;

static int child_counts_fds(void)
{
    int n = 0;

    for (int fd = 0; fd < 256; fd++) {
        char path[64], name[128];
        ssize_t len;

        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        len = readlink(path, name, sizeof(name) - 1);
        if (len <= 0)
            continue;
        name[len] = 0;
        if (strstr(name, "userfaultfd") || strstr(name, "pymirror-status") || strstr(name, "pagemap"))
            n++;
    }
    return n;
}

/* A descriptor that the child keeps would keep the parent's registrations alive. */
static void the_child_keeps_no_descriptor(void)
{
    pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0);
    parents_fds = child_counts_fds();
    CHECK(parents_fds > 0);
    CHECK_EQ(in_child(child_counts_fds), 0);
    CHECK_EQ(child_counts_fds(), parents_fds);
}

static int child_does_nothing(void)
{
    return 0;
}

static void entries_of_before_are_fenced(void)
{
    struct pm_event event;
    struct pm_access access;
    uint64_t seq;
    char byte;
    int err;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(in_child(child_does_nothing), 0);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 1);
    access = device_read(table, mem, &byte, 1, &err);
    CHECK_EQ(access.fault, PM_FAULT_FENCED);
    NEED_EQ(pm_event_wait(mm, SECOND, &event), 0);
    CHECK_EQ(event.type, PM_PROTECTION_PAGE);
    CHECK_EQ(event.guarantee, PM_BEFORE);
    CHECK_EQ(event.start, 0);
    CHECK_EQ(event.end, 0);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK(pm_table_clear(table, 0, 0) == PAGES);
    CHECK_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
}

/* One fork, one event, though the kernel's own message of it comes too. */
static void a_watched_fork_is_told_once(void)
{
    struct pm_event event;

    pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0);
    CHECK_EQ(in_child(child_does_nothing), 0);
    NEED_EQ(pm_event_wait(mm, SECOND, &event), 0);
    CHECK_EQ(pm_event_done(mm), 0);
    CHECK_EQ(pm_event_wait(mm, 20 * MILLISECOND, &event), -ETIMEDOUT);
}

static int pipe_fds[2];

static int child_reads_after_the_parents_device_wrote(void)
{
    char go;

    if (read(pipe_fds[0], &go, 1) != 1)
        return 1;
    return mem[0] == 1 ? 0 : 2;
}

/* The device writes the parent's memory; the child has its own. */
static void the_child_does_not_see_the_device(void)
{
    char byte = 7;
    int err, status = -1, pid;

    NEED_EQ(pipe(pipe_fds), 0);
    pid = fork();
    if (pid == 0)
        _exit(child_reads_after_the_parents_device_wrote());
    CHECK_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
    device_write(table, mem, &byte, 1, &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(mem[0], 7);
    CHECK_EQ(write(pipe_fds[1], "g", 1), 1);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
}

static void call_fork(struct call *call)
{
    call->ret = in_child(child_does_nothing);
}

/* Between prepare and parent the whole mm is invalidating. */
static void nothing_is_programmed_during_a_fork(void)
{
    struct call forker = {.fn = call_fork};
    uint64_t seq;

    CHECK_EQ(pm_point_arm(PM_POINT_FORK_PREPARE), 0);
    call_start(&forker);
    CHECK_EQ(pm_point_wait(PM_POINT_FORK_PREPARE, 10 * SECOND), 0);
    CHECK_EQ(pm_sub_read_begin(sub, MILLISECOND, &seq), -ETIMEDOUT);
    CHECK_EQ(pm_point_arm(PM_POINT_FORK_PARENT), 0);
    CHECK_EQ(pm_point_release(PM_POINT_FORK_PREPARE), 0);
    CHECK_EQ(pm_point_wait(PM_POINT_FORK_PARENT, 10 * SECOND), 0);
    CHECK_EQ(pm_sub_read_begin(sub, MILLISECOND, &seq), -ETIMEDOUT);
    CHECK_EQ(pm_point_release(PM_POINT_FORK_PARENT), 0);
    CHECK_EQ(call_join(&forker), 0);
    CHECK_EQ(read_begin(sub, &seq), 0);
}

static atomic_bool keep_going;

static void call_invalidate_on(struct call *call)
{
    uint64_t seq, from = addr_of(mem);
    pm_inv *inv = NULL;

    while (atomic_load(&keep_going) && !call->ret) {
        call->ret = pm_invalidate_start(mm, from, from + PAGE, PM_CLEAR, PM_BEFORE, &inv, &seq);
        if (!call->ret) {
            pm_invalidate_delivered(inv);
            call->ret = pm_invalidate_end(inv);
        }
    }
}

static void call_open_close(struct call *call)
{
    while (atomic_load(&keep_going)) {
        pm_mm *own = open_to_fork();

        pm_watch(own, addr_of(call->arg[0]), addr_of(call->arg[0]) + PAGE, 0);
        close_mm(own);
    }
}

static void forks_among_threads(void)
{
    struct call busy[2] = {{.fn = call_invalidate_on}, {.fn = call_open_close, .arg = {new_pages(1)}}};
    struct pm_event event;

    atomic_store(&keep_going, true);
    for (size_t i = 0; i < COUNT_OF(busy); i++)
        call_start(&busy[i]);
    for (int i = 0; i < 30; i++) {
        CHECK_EQ(in_child(child_does_nothing), 0);
        while (pm_event_wait(mm, 0, &event) == 0)
            pm_event_done(mm);
    }
    atomic_store(&keep_going, false);
    for (size_t i = 0; i < COUNT_OF(busy); i++)
        CHECK_EQ(call_join(&busy[i]), 0);
    free_pages(busy[1].arg[0], 1);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(the_child_finds_it_dead),
        TEST(the_child_makes_its_own),
        TEST(the_child_keeps_no_descriptor),
        TEST(entries_of_before_are_fenced),
        TEST(a_watched_fork_is_told_once),
        TEST(the_child_does_not_see_the_device),
        TEST(nothing_is_programmed_during_a_fork),
        TEST(forks_among_threads),
    };

    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
