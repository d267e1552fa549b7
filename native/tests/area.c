/* SPDX-License-Identifier: MIT */
/* Which memory is not for DMA, and which intervals overlap. */
#include <fcntl.h>
#include <sys/mman.h>

#include "internal.h"
#include "util.h"

static const char constant[PAGE] = "in rodata, a page long at least";

static void *map(int prot)
{
    return mmap(NULL, 3 * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void ordinary_memory_has_no_flags(void)
{
    char *memory = map(PROT_READ | PROT_WRITE);

    CHECK_EQ(pm_memory_area((uintptr_t)memory, 3 * PAGE), 0);
    CHECK_EQ(mprotect(memory + PAGE, PAGE, PROT_READ), 0);
    CHECK_EQ(pm_memory_area((uintptr_t)memory, PAGE), 0);
    CHECK_EQ(pm_memory_area((uintptr_t)memory + 1, PAGE), PM_AREA_READONLY);
    CHECK_EQ(munmap(memory + PAGE, PAGE), 0);
    CHECK_EQ(pm_memory_area((uintptr_t)memory, 3 * PAGE), PM_AREA_HOLE);
    CHECK_EQ(pm_memory_area((uintptr_t)memory, PAGE), 0);
    munmap(memory, 3 * PAGE);
}

/* Not of a local variable: a sanitizer keeps those elsewhere. */
static void *look_at_a_thread_stack(void *arg)
{
    *(int *)arg = pm_memory_area((uintptr_t)__builtin_frame_address(0), 64);
    return NULL;
}

static void stacks(void)
{
    pthread_t thread;
    int area = 0;

    CHECK_EQ(pm_memory_area((uintptr_t)__builtin_frame_address(0), 64), PM_AREA_STACK);
    NEED_EQ(pthread_create(&thread, NULL, look_at_a_thread_stack, &area), 0);
    pthread_join(thread, NULL);
    CHECK_EQ(area, PM_AREA_STACK);
}

static void code_and_constants(void)
{
    int text = pm_memory_area((uintptr_t)code_and_constants, 1);
    int rodata = pm_memory_area((uintptr_t)constant, sizeof(constant));

    CHECK_EQ(text, PM_AREA_TEXT | PM_AREA_READONLY);
    CHECK_EQ(rodata, PM_AREA_RODATA | PM_AREA_READONLY);
}

static void a_file_of_data_is_no_rodata(void)
{
    int fd = open("/proc/self/exe", O_RDONLY);
    void *memory = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0);

    NEED(memory != MAP_FAILED);
    CHECK_EQ(pm_memory_area((uintptr_t)memory, PAGE), PM_AREA_READONLY);
    munmap(memory, PAGE);
    close(fd);
}

static void nor_is_one_with_a_hole_before_the_code(void)
{
    int fd = open("/proc/self/exe", O_RDONLY);
    char *memory = map(PROT_NONE);
    int fixed = MAP_PRIVATE | MAP_FIXED;

    NEED_EQ(munmap(memory, 3 * PAGE), 0);
    NEED(mmap(memory, PAGE, PROT_READ, fixed, fd, 0) == memory);
    NEED(mmap(memory + 2 * PAGE, PAGE, PROT_READ | PROT_EXEC, fixed, fd, 0) == memory + 2 * PAGE);
    CHECK_EQ(pm_memory_area((uintptr_t)memory, PAGE), PM_AREA_READONLY);
    NEED(mmap(memory + PAGE, PAGE, PROT_READ | PROT_EXEC, fixed, fd, 0) == memory + PAGE);
    CHECK_EQ(pm_memory_area((uintptr_t)memory, PAGE), PM_AREA_RODATA | PM_AREA_READONLY);
    munmap(memory, 3 * PAGE);
    close(fd);
}

static void intervals_that_are_none(void)
{
    CHECK_EQ(pm_memory_area(PAGE, 0), -EINVAL);
    CHECK_EQ(pm_memory_area(UINT64_MAX, 2), -EINVAL);
    CHECK_EQ(pm_memory_area(0, 1), PM_AREA_HOLE);
    CHECK_EQ(pm_memory_area(UINT64_MAX - PAGE, 1), PM_AREA_HOLE);
}

static void no_descriptor_no_answer(void)
{
    CHECK_EQ(pm_inject(PM_SYS_OPEN, 1, 1, EMFILE, 0), 0);
    CHECK_EQ(pm_memory_area(PAGE, 1), -EMFILE);
    pm_inject_clear();
}

static void spans_tell_who_overlaps(void)
{
    pm_span *low, *high, *both;
    pm_spans *spans;
    uint64_t other;

    NEED_EQ(pm_spans_create(&spans), 0);
    CHECK_EQ(pm_spans_add(spans, 10, 19, 1, &low, &other), 0);
    CHECK_EQ(other, 0);
    CHECK_EQ(pm_spans_add(spans, 20, 29, 2, &high, &other), 0);
    CHECK_EQ(other, 0);
    CHECK_EQ(pm_spans_remove(spans, low), 0);
    CHECK_EQ(pm_spans_add(spans, 0, 20, 3, &both, &other), 0);
    CHECK_EQ(other, 2);
    CHECK_EQ(pm_spans_find(spans, 29, 29, &other), 0);
    CHECK_EQ(other, 2);
    CHECK_EQ(pm_spans_find(spans, 30, 99, &other), -ENOENT);
    CHECK_EQ(pm_spans_find(spans, 20, 25, &other), 0);
    CHECK_EQ(other, 2);
    CHECK_EQ(pm_spans_add(spans, 5, 6, 0, &low, &other), -EINVAL);
    CHECK_EQ(pm_spans_add(spans, 5, 4, 4, &low, &other), -EINVAL);
    CHECK_EQ(pm_spans_remove(spans, both), 0);
    pm_spans_destroy(spans);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(ordinary_memory_has_no_flags),
        TEST(stacks),
        TEST(code_and_constants),
        TEST(a_file_of_data_is_no_rodata),
        TEST(nor_is_one_with_a_hole_before_the_code),
        TEST(intervals_that_are_none),
        TEST(no_descriptor_no_answer),
        TEST(spans_tell_who_overlaps),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
