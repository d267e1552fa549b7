/* SPDX-License-Identifier: MIT */
/* The end of pins: whatever ends, fails or forks, nothing is left pinned. */
#include <sys/syscall.h>
#include <sys/wait.h>

#include "pinned.h"

static void released_once(void)
{
    pm_pin *pin = new_pin(mem, 2);
    char byte;

    CHECK_EQ(pm_pin_hold(pin), 0);
    CHECK_EQ(pm_pin_release(pin), -EBUSY);
    CHECK_EQ(read_pin(pin, 0, &byte, 1), 1);
    pm_pin_unhold(pin);
    CHECK_EQ(pm_pin_release(pin), 0);
    CHECK_EQ(pm_pin_release(pin), -EALREADY);
    CHECK_EQ(pm_pin_hold(pin), -EALREADY);
    CHECK_EQ(read_pin(pin, 0, &byte, 1), -EALREADY);
    pm_pin_put(pin);
    pin = new_pin(mem, 1);
    pm_pin_get(pin);
    pm_pin_put(pin);
    CHECK_EQ(read_pin(pin, 0, &byte, 1), 1);
    pm_pin_put(pin); /* the last reference releases what nobody did */
    CHECK_EQ(still_pinned_kib(), 0);
}

static void close_gives_all_back(void)
{
    pm_mm *other = open_mm();
    struct pm_pinning request = {.start = addr_of(mem), .npages = 4};
    pm_pin *pin = NULL, *second = NULL;
    uint64_t done;
    char byte;

    NEED_EQ(pm_pin_create(other, &request, &pin), 0);
    NEED_EQ(pm_pin_create(other, &request, &second), 0);
    CHECK_EQ(pm_mm_close(other), 0);
    CHECK_EQ(still_pinned_kib(), 0);
    CHECK_EQ(pm_pin_access(pin, 0, &byte, 1, 0, &done), -ESRCH);
    CHECK_EQ(pm_pin_release(pin), -ESRCH);
    CHECK_EQ(pm_pin_hold(pin), -ESRCH);
    CHECK_EQ(pm_pin_create(other, &request, &second), -ESRCH);
    pm_pin_put(pin);
    pm_pin_put(second);
    pm_mm_put(other);
}

static void the_callers_buffer_is_not_there(void)
{
    char *other = new_pages(2);
    pm_pin *pin = new_pin(mem, PAGES);
    uint64_t done;

    munmap(other + PAGE, PAGE);
    CHECK_EQ(pm_pin_access(pin, 0, other, 2 * PAGE, 0, &done), -EFAULT);
    CHECK_EQ(done, PAGE);
    CHECK(memcmp(other, mem, PAGE) == 0);
    CHECK_EQ(pm_pin_access(pin, 0, other, 2 * PAGE, 1, &done), -EFAULT);
    CHECK_EQ(done, PAGE);
    drop_pin(pin);
    munmap(other, PAGE);
}

static void release_amid_an_access(struct call *call)
{
    uint64_t done;

    call->ret = pm_pin_access(call->arg[0], 0, call->arg[1], call->num[0], 0, &done);
    call->num[1] = done;
}

static void released_between_two_pieces(void)
{
    char *big = new_pages(BIG / PAGE), *seen = malloc(BIG);
    struct call call = {.fn = release_amid_an_access, .num = {BIG}};
    pm_pin *pin;

    memset(big, 5, BIG);
    pin = new_pin(big, BIG / PAGE);
    call.arg[0] = pin;
    call.arg[1] = seen;
    CHECK_EQ(pm_point_arm(PM_POINT_PIN_PIECE), 0);
    call_start(&call);
    CHECK_EQ(pm_point_wait(PM_POINT_PIN_PIECE, 10 * SECOND), 0);
    CHECK_EQ(pm_pin_release(pin), 0);
    CHECK_EQ(still_pinned_kib(), 0);
    pm_point_release(PM_POINT_PIN_PIECE);
    CHECK_EQ(call_join(&call), -EALREADY);
    CHECK_EQ(call.num[1], 0);
    pm_pin_put(pin);
    free(seen);
    free_pages(big, BIG / PAGE);
}

static void close_waits_for_an_access(struct call *call)
{
    call->ret = pm_mm_close(call->arg[0]);
}

static void closed_amid_an_access(void)
{
    char seen[PAGE];
    struct call access = {.fn = release_amid_an_access, .num = {PAGE}, .arg = {NULL, seen}};
    struct call closing = {.fn = close_waits_for_an_access, .arg = {mm}};
    pm_pin *pin = new_pin(mem, 1);

    access.arg[0] = pin;
    CHECK_EQ(pm_point_arm(PM_POINT_PIN_PIECE), 0);
    call_start(&access);
    CHECK_EQ(pm_point_wait(PM_POINT_PIN_PIECE, 10 * SECOND), 0);
    call_start(&closing);
    while (pm_mm_alive(mm) == 1)
        usleep(100);
    pm_point_release(PM_POINT_PIN_PIECE);
    CHECK_EQ(call_join(&closing), 0);
    call_join(&access);
    CHECK(access.ret == 0 || access.ret == -ESRCH);
    CHECK_EQ(still_pinned_kib(), 0);
    pm_pin_put(pin);
}

/* Threads that pin, read, write and unpin their own pages of one mm. */
static void work(struct call *call)
{
    char *own = call->arg[0], seen[PAGE];

    for (int i = 0; i < 200; i++) {
        struct pm_pinning request = {.start = addr_of(own), .npages = 1};
        pm_pin *pin = NULL;

        if (pm_pin_create(mm, &request, &pin))
            break;
        memset(seen, i, sizeof(seen));
        if (write_pin(pin, 0, seen, PAGE) != PAGE || own[i] != (char)i)
            call->ret++;
        if (read_pin(pin, 100, seen, 50) != 50 || seen[7] != (char)i)
            call->ret++;
        if (pm_pin_release(pin))
            call->ret++;
        pm_pin_put(pin);
        call->num[0]++;
    }
}

static void threads_of_one_mm(void)
{
    struct call call[4] = {0};

    for (int i = 0; i < 4; i++) {
        call[i].fn = work;
        call[i].arg[0] = mem + i * PAGE;
        call_start(&call[i]);
    }
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(call_join(&call[i]), 0);
        CHECK_EQ(call[i].num[0], 200);
    }
}

/* What fails at the nth system call, for each n: it is refused and leaves nothing, or it is done. */
static bool attempt(int kind, uint64_t nth, int err, uint64_t times)
{
    struct pm_pinning request;
    uint64_t pfns[PAGES], done = 0;
    char seen[PAGE], given[PAGE];
    pm_pin *pin = NULL;
    pm_mm *fresh = mm;
    struct pm_pin_stats stats;
    int ret, released;

    memset(given, (int)nth, sizeof(given));
    pm_inject(kind, nth, times, err, (int)syscall(SYS_gettid));
    ret = pin_at(mem, PAGES, pfns, PM_PIN_REPLACE, &request, &pin);
    if (!ret && pm_pin_access(pin, PAGE, given, PAGE, 1, &done) == 0)
        CHECK(memcmp(mem + PAGE, given, PAGE) == 0);
    if (!ret && pm_pin_access(pin, 0, seen, PAGE, 0, &done) == 0)
        CHECK(memcmp(mem, seen, PAGE) == 0);
    released = ret ? 0 : pm_pin_release(pin);
    if (!ret)
        pm_pin_put(pin);
    if (pm_inject_clear() == 0)
        return false;
    CHECK(ret <= 0);
    CHECK(released == 0 || released == -err);
    CHECK_EQ(pm_pin_stats(fresh, &stats), 0);
    CHECK_EQ(stats.pins, 0);
    CHECK_EQ(stats.slots, stats.slots_stuck);
    if (!released)
        CHECK_EQ(still_pinned_kib(), 0);
    pin = NULL;
    CHECK_EQ(pin_at(mem, PAGES, NULL, 0, &request, &pin), 0);
    if (pin) {
        CHECK_EQ(write_pin(pin, 0, "still", 5), 5);
        CHECK(memcmp(mem, "still", 5) == 0);
        drop_pin(pin);
    }
    CHECK_EQ(still_pinned_kib(), 0);
    return true;
}

static void errors_at_each_call(void)
{
    static const int errors[] = {ENOMEM, EINTR, EAGAIN};

    for (int kind = PM_SYS_ANY + 1; kind < PM_SYS_COUNT && !check_failures; kind++) {
        for (size_t e = 0; e < COUNT_OF(errors); e++) {
            for (uint64_t nth = 1; attempt(kind, nth, errors[e], 1) && !check_failures; nth++)
                continue;
        }
    }
    for (uint64_t nth = 1; nth < 4; nth++)
        attempt(PM_SYS_URING_REGISTER, nth, EINVAL, 1000);
}

/* As above, of a ring that is made. */
static void errors_while_the_ring_is_made(void)
{
    for (int kind = PM_SYS_ANY + 1; kind < PM_SYS_COUNT && !check_failures; kind++) {
        for (uint64_t nth = 1; !check_failures; nth++) {
            bool struck;

            pm_mm_close(mm);
            pm_mm_put(mm);
            mm = open_mm();
            struck = attempt(kind, nth, EMFILE, 1);
            if (!struck)
                break;
        }
    }
}

static int child_has_no_pin(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        char path[300], target[64] = "";

        snprintf(path, sizeof(path), "/proc/self/fd/%s", entry->d_name);
        if (readlink(path, target, sizeof(target) - 1) > 0 &&
            (strstr(target, "io_uring") || strstr(target, "pymirror-stage")))
            n++;
    }
    if (dir)
        closedir(dir);
    return n;
}

static void forked_child(void)
{
    pm_pin *pin = new_pin(mem, 2);
    int status = -1, pid;
    char seen[5];

    memcpy(mem, "first", 5);
    pid = fork();
    if (pid == 0) {
        uint64_t done;

        if (memcmp(mem, "first", 5) != 0)
            _exit(101);
        if (pm_pin_access(pin, 0, seen, 5, 0, &done) != -ESRCH || pm_pin_release(pin) != -ESRCH)
            _exit(102);
        pm_pin_put(pin);
        memcpy(mem, "child", 5);
        _exit(child_has_no_pin());
    }
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    memcpy(mem, "again", 5);
    CHECK_EQ(read_pin(pin, 0, seen, 5), 5);
    CHECK(memcmp(seen, "again", 5) == 0);
    drop_pin(pin);
}

static const struct test tests[] = {
    TEST(released_once),
    TEST(close_gives_all_back),
    TEST(the_callers_buffer_is_not_there),
    TEST(released_between_two_pieces),
    TEST(closed_amid_an_access),
    TEST(threads_of_one_mm),
    TEST(errors_at_each_call),
    TEST(errors_while_the_ring_is_made),
    TEST(forked_child),
};

int main(int argc, char **argv)
{
    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
