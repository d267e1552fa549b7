/* SPDX-License-Identifier: MIT */
/* The seams for tests themselves: named points and injected errors. */
#include <sys/syscall.h>

#include "internal.h"
#include "util.h"

static pm_mm *mm;
static char *mem;

static void set_up(void)
{
    mm = open_mm();
    mem = new_pages(4);
}

static void tear_down(void)
{
    pm_points_reset();
    pm_inject_clear();
    close_mm(mm);
    free_pages(mem, 4);
}

static void call_invalidate(struct call *call)
{
    pm_inv *inv = NULL;
    uint64_t seq;

    call->ret = pm_invalidate_start(mm, 0, 0, PM_CLEAR, PM_BEFORE, &inv, &seq);
    if (!call->ret) {
        pm_invalidate_delivered(inv);
        call->ret = pm_invalidate_end(inv);
    }
}

static void a_point_holds_a_thread(void)
{
    struct call call = {.fn = call_invalidate};

    CHECK_EQ(pm_point_wait(PM_POINT_INVALIDATE_END, 0), -ETIMEDOUT);
    CHECK_EQ(pm_point_arm(PM_POINT_INVALIDATE_END), 0);
    CHECK_EQ(pm_point_wait(PM_POINT_INVALIDATE_END, MILLISECOND), -ETIMEDOUT);
    call_start(&call);
    CHECK_EQ(pm_point_wait(PM_POINT_INVALIDATE_END, 10 * SECOND), 0);
    CHECK(!atomic_load(&call.done));
    CHECK_EQ(pm_point_release(PM_POINT_INVALIDATE_END), 0);
    CHECK_EQ(call_join(&call), 0);
    call_invalidate(&call);
    CHECK_EQ(call.ret, 0);
}

static void an_order_of_points(void)
{
    struct call call = {.fn = call_invalidate};
    static const int order[] = {PM_POINT_INVALIDATE_START, PM_POINT_INVALIDATE_FENCED,
                                PM_POINT_INVALIDATE_END};

    for (size_t i = 0; i < COUNT_OF(order); i++)
        CHECK_EQ(pm_point_arm(order[i]), 0);
    call_start(&call);
    for (size_t i = 0; i < COUNT_OF(order); i++) {
        CHECK_EQ(pm_point_wait(order[i], 10 * SECOND), 0);
        CHECK_EQ(pm_point_release(order[i]), 0);
    }
    CHECK_EQ(call_join(&call), 0);
}

static void reset_lets_everyone_go(void)
{
    struct call call = {.fn = call_invalidate};

    CHECK_EQ(pm_point_arm(PM_POINT_INVALIDATE_START), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_INVALIDATE_END), 0);
    call_start(&call);
    CHECK_EQ(pm_point_wait(PM_POINT_INVALIDATE_START, 10 * SECOND), 0);
    pm_points_reset();
    CHECK_EQ(call_join(&call), 0);
    CHECK_EQ(atomic_load(&pm_points_armed), 0);
}

static void points_that_do_not_exist(void)
{
    CHECK_EQ(pm_point_arm(-1), -EINVAL);
    CHECK_EQ(pm_point_arm(PM_POINT_COUNT), -EINVAL);
    CHECK_EQ(pm_point_wait(PM_POINT_COUNT, 0), -EINVAL);
    CHECK_EQ(pm_point_release(PM_POINT_COUNT), -EINVAL);
    CHECK_EQ(pm_point_release(PM_POINT_MAP_BEFORE_COMMIT), 0);
}

static int map_one(void)
{
    uint64_t at = 0;
    int err = pm_mmap(mm, 0, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &at);

    if (!err)
        CHECK_EQ(pm_munmap(mm, at, PAGE), 0);
    return err;
}

static void the_nth_call_fails(void)
{
    uint64_t before = pm_sys_calls(PM_SYS_MMAP);

    CHECK_EQ(pm_inject(PM_SYS_MMAP, 3, 2, ENOMEM, 0), 0);
    CHECK_EQ(map_one(), 0);
    CHECK_EQ(map_one(), 0);
    CHECK_EQ(map_one(), -ENOMEM);
    CHECK_EQ(map_one(), -ENOMEM);
    CHECK_EQ(map_one(), 0);
    CHECK_EQ(pm_inject_clear(), 2);
    CHECK_EQ(pm_inject_clear(), 0);
    CHECK_EQ(map_one(), 0);
    CHECK_EQ(pm_sys_calls(PM_SYS_MMAP) - before, 6);
    CHECK(pm_sys_calls(PM_SYS_ANY) >= 6);
}

static void call_map_one(struct call *call)
{
    call->ret = map_one();
}

static void one_thread_only(void)
{
    struct call call = {.fn = call_map_one};

    CHECK_EQ(pm_inject(PM_SYS_MMAP, 1, 1, EAGAIN, (int)syscall(SYS_gettid)), 0);
    call_start(&call);
    CHECK_EQ(call_join(&call), 0);
    CHECK_EQ(map_one(), -EAGAIN);
    CHECK_EQ(pm_inject_clear(), 1);
}

static void other_kinds_are_not_hit(void)
{
    CHECK_EQ(pm_inject(PM_SYS_MUNMAP, 1, 1, EINVAL, 0), 0);
    CHECK_EQ(pm_madvise(mm, addr_of(mem), PAGE, MADV_DONTNEED), 0);
    CHECK_EQ(pm_munmap(mm, addr_of(mem), PAGE), -EINVAL);
    CHECK_EQ(pm_inject_clear(), 1);
    mem[0] = 1;
}

static void bad_injections(void)
{
    CHECK_EQ(pm_inject(PM_SYS_COUNT, 1, 1, ENOMEM, 0), -EINVAL);
    CHECK_EQ(pm_inject(-1, 1, 1, ENOMEM, 0), -EINVAL);
    CHECK_EQ(pm_inject(PM_SYS_MMAP, 0, 1, ENOMEM, 0), -EINVAL);
    CHECK_EQ(pm_inject(PM_SYS_MMAP, 1, 1, 0, 0), -EINVAL);
    CHECK_EQ(pm_inject_clear(), 0);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(a_point_holds_a_thread),   TEST(an_order_of_points), TEST(reset_lets_everyone_go),
        TEST(points_that_do_not_exist), TEST(the_nth_call_fails), TEST(one_thread_only),
        TEST(other_kinds_are_not_hit),  TEST(bad_injections),
    };

    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
