/* SPDX-License-Identifier: MIT */
/* The walk: what a snapshot shows, what a fault makes present, which errors it gives and where. */
#include <sys/mman.h>

#include "util.h"

enum { PAGES = 32 };

#define VALID (1ULL << 63)
#define WRITE (1ULL << 62)
#define ERROR (1ULL << 61)

static pm_mm *mm;
static pm_sub *sub;
static char *mem;
static uint64_t pfns[PAGES];

static void set_up(void)
{
    mm = open_mm();
    mem = new_pages(PAGES);
    sub = new_sub(mm, mem, PAGES);
    memset(pfns, 0, sizeof(pfns));
}

static void tear_down(void)
{
    pm_points_reset();
    drop_sub(sub);
    close_mm(mm);
    free_pages(mem, PAGES);
}

static struct pm_walk walk_of(uint64_t first, uint64_t n, uint32_t flags)
{
    return (struct pm_walk){
        .start = addr_of(mem) + first * PAGE,
        .end = addr_of(mem) + (first + n) * PAGE,
        .pfns = pfns,
        .flags = flags,
    };
}

static int snapshot(uint32_t flags)
{
    struct pm_walk walk = walk_of(0, PAGES, flags);

    return pm_walk(mm, &walk);
}

static uint64_t flags_of(uint64_t page)
{
    return pfns[page] & (VALID | WRITE | ERROR);
}

static void a_snapshot_only_looks(void)
{
    memset(mem + PAGE, 1, PAGE);
    CHECK_EQ(snapshot(0), 0);
    CHECK_EQ(pfns[0], 0);
    CHECK_EQ(flags_of(1), VALID | WRITE);
    CHECK_EQ(snapshot(0), 0);
    CHECK_EQ(pfns[0], 0);
}

static void a_fault_makes_present(void)
{
    struct pm_walk walk = walk_of(0, PAGES, PM_WALK_FAULT);

    walk.default_flags = VALID | WRITE;
    CHECK_EQ(pm_walk(mm, &walk), 0);
    CHECK_EQ(walk.populated, PAGES);
    for (uint64_t i = 0; i < PAGES; i++)
        CHECK_EQ(flags_of(i), VALID | WRITE);
    walk.populated = 0;
    CHECK_EQ(pm_walk(mm, &walk), 0);
    CHECK_EQ(walk.populated, 0);
}

/* The zero page: present, readable, and no write bit until it is asked for. */
static void a_read_fault_gives_no_write(void)
{
    struct pm_walk walk = walk_of(0, 4, PM_WALK_FAULT);

    walk.default_flags = VALID;
    CHECK_EQ(pm_walk(mm, &walk), 0);
    CHECK_EQ(flags_of(0), VALID);
    walk.default_flags = VALID | WRITE;
    CHECK_EQ(pm_walk(mm, &walk), 0);
    CHECK_EQ(flags_of(0), VALID | WRITE);
}

static void each_page_may_ask_for_itself(void)
{
    struct pm_walk walk = walk_of(0, PAGES, PM_WALK_FAULT);

    walk.pfn_flags_mask = UINT64_MAX;
    pfns[3] = VALID;
    pfns[7] = VALID | WRITE;
    CHECK_EQ(pm_walk(mm, &walk), 0);
    for (uint64_t i = 0; i < PAGES; i++)
        CHECK_EQ(flags_of(i), i == 7 ? VALID | WRITE : i == 3 ? VALID : 0);
}

static void holes_and_protections(void)
{
    struct pm_walk walk;

    memset(mem, 1, PAGES * PAGE);
    CHECK_EQ(mprotect(mem + 4 * PAGE, PAGE, PROT_NONE), 0);
    CHECK_EQ(mprotect(mem + 5 * PAGE, PAGE, PROT_READ), 0);
    CHECK_EQ(munmap(mem + 6 * PAGE, PAGE), 0);
    CHECK_EQ(snapshot(0), 0);
    CHECK_EQ(flags_of(3), VALID | WRITE);
    CHECK_EQ(flags_of(4), ERROR);
    CHECK_EQ(flags_of(5), VALID);
    CHECK_EQ(flags_of(6), ERROR);
    CHECK_EQ(flags_of(7), VALID | WRITE);

    walk = walk_of(0, PAGES, PM_WALK_FAULT);
    walk.default_flags = VALID;
    CHECK_EQ(pm_walk(mm, &walk), -EFAULT);
    CHECK_EQ(walk.fail_start, addr_of(mem) + 4 * PAGE);
    CHECK_EQ(pfns[4], 0);
    CHECK_EQ(pfns[PAGES - 1], 0);
    walk = walk_of(5, 1, PM_WALK_FAULT);
    walk.default_flags = VALID | WRITE;
    CHECK_EQ(pm_walk(mm, &walk), -EPERM);
    walk = walk_of(6, 1, PM_WALK_FAULT);
    walk.default_flags = VALID;
    CHECK_EQ(pm_walk(mm, &walk), -EFAULT);
    walk = walk_of(6, 1, PM_WALK_STRICT);
    CHECK_EQ(pm_walk(mm, &walk), -EFAULT);
    walk = walk_of(4, 1, PM_WALK_STRICT);
    CHECK_EQ(pm_walk(mm, &walk), -EPERM);
}

static void bad_arguments(void)
{
    struct pm_walk walk = walk_of(0, 1, 0);

    walk.start++;
    CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
    walk = walk_of(0, 0, 0);
    CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
    walk = walk_of(1, 1, 0);
    walk.end = walk.start - PAGE;
    CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
    walk = walk_of(0, 1, 0);
    walk.start = UINT64_MAX - PAGE + 1;
    walk.end = 0;
    CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
}

static void call_walk(struct call *call)
{
    struct pm_walk walk = walk_of(0, PAGES, PM_WALK_FAULT);

    walk.default_flags = VALID | WRITE;
    walk.sub = sub;
    walk.seq = call->num[0];
    call->ret = pm_walk(mm, &walk);
}

static void invalidation_at(int point)
{
    struct call walker = {.fn = call_walk};
    uint64_t seq, start = addr_of(mem);
    pm_inv *inv = NULL;

    CHECK_EQ(pm_madvise(mm, start, PAGES * PAGE, MADV_DONTNEED), 0);
    CHECK_EQ(read_begin(sub, &walker.num[0]), 0);
    CHECK_EQ(pm_point_arm(point), 0);
    call_start(&walker);
    CHECK_EQ(pm_point_wait(point, 10 * SECOND), 0);
    CHECK_EQ(pm_invalidate_start(mm, start, start + PAGE, PM_CLEAR, PM_BEFORE, &inv, &seq), 0);
    CHECK_EQ(pm_invalidate_delivered(inv), 0);
    CHECK_EQ(pm_invalidate_end(inv), 0);
    CHECK_EQ(pm_point_release(point), 0);
    CHECK_EQ(call_join(&walker), -EBUSY);
}

static void an_invalidation_ends_the_walk(void)
{
    invalidation_at(PM_POINT_WALK_BEFORE_READ);
    invalidation_at(PM_POINT_WALK_AFTER_READ);
    invalidation_at(PM_POINT_WALK_BEFORE_POPULATE);
    invalidation_at(PM_POINT_WALK_AFTER_POPULATE);
}

static void an_old_sequence_is_refused(void)
{
    struct pm_walk walk = walk_of(0, PAGES, 0);

    CHECK_EQ(read_begin(sub, &walk.seq), 0);
    walk.sub = sub;
    walk.seq += 2;
    CHECK_EQ(pm_walk(mm, &walk), -EBUSY);
}

static void after_close_it_is_gone(void)
{
    pm_mm *own = open_mm();
    struct pm_walk walk = walk_of(0, PAGES, 0);

    CHECK_EQ(pm_mm_close(own), 0);
    CHECK_EQ(pm_walk(own, &walk), -ESRCH);
    pm_mm_put(own);
}

static void huge_pages_have_an_order(void)
{
    enum { HUGE = 512 };
    uint64_t *huge_pfns = calloc(HUGE, sizeof(*huge_pfns));
    char *area = new_pages(2 * HUGE);
    char *huge = area + (-addr_of(area) & (HUGE * PAGE - 1));
    struct pm_walk walk = {.start = addr_of(huge), .end = addr_of(huge) + HUGE * PAGE, .pfns = huge_pfns};

    madvise(huge, HUGE * PAGE, MADV_HUGEPAGE);
    huge[0] = 1;
    CHECK_EQ(pm_walk(mm, &walk), 0);
    if (!mm_has(mm, PM_FEAT_PAGEMAP_SCAN) || !(huge_pfns[1] & VALID)) {
        free(huge_pfns);
        free_pages(area, 2 * HUGE);
        LEAVE_OUT("no transparent huge pages, or no PAGEMAP_SCAN to see them");
    }
    for (int i = 0; i < HUGE; i++)
        CHECK_EQ((huge_pfns[i] >> 53) & 31, 9);
    CHECK_EQ(mprotect(huge + PAGE, PAGE, PROT_READ), 0);
    CHECK_EQ(pm_walk(mm, &walk), 0);
    CHECK_EQ((huge_pfns[0] >> 53) & 31, 0);
    CHECK_EQ((huge_pfns[HUGE - 1] >> 53) & 31, 0);
    free(huge_pfns);
    free_pages(area, 2 * HUGE);
}

static void call_snapshot(struct call *call)
{
    call->ret = snapshot(PM_WALK_VERIFY);
}

/* What another thread faults and programs meanwhile is no change behind the device's back. */
static void pages_that_come_during_a_walk(void)
{
    struct call looker = {.fn = call_snapshot};
    pm_table *table = new_table();

    CHECK_EQ(pm_point_arm(PM_POINT_WALK_AFTER_READ), 0);
    call_start(&looker);
    CHECK_EQ(pm_point_wait(PM_POINT_WALK_AFTER_READ, 10 * SECOND), 0);
    CHECK_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
    CHECK_EQ(pm_point_release(PM_POINT_WALK_AFTER_READ), 0);
    CHECK_EQ(call_join(&looker), 0);
    CHECK_EQ(flags_of(0), 0);
    CHECK_EQ(snapshot(PM_WALK_VERIFY), 0);
    CHECK_EQ(flags_of(0), VALID | WRITE);
    pm_table_put(table);
}

static void verify_sees_what_may_not_be_read(void)
{
    pm_table *table = new_table();

    CHECK_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
    CHECK_EQ(mprotect(mem, PAGE, PROT_NONE), 0);
    CHECK_EQ(snapshot(PM_WALK_VERIFY), -ESTALE);
    CHECK_EQ(mprotect(mem, PAGE, PROT_READ | PROT_WRITE), 0);
    CHECK_EQ(snapshot(PM_WALK_VERIFY), 0);
    madvise(mem, PAGE, MADV_DONTNEED);
    CHECK_EQ(snapshot(PM_WALK_VERIFY), -ESTALE);
    pm_table_put(table);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(a_snapshot_only_looks),         TEST(a_fault_makes_present),
        TEST(a_read_fault_gives_no_write),   TEST(each_page_may_ask_for_itself),
        TEST(holes_and_protections),         TEST(bad_arguments),
        TEST(an_invalidation_ends_the_walk), TEST(an_old_sequence_is_refused),
        TEST(after_close_it_is_gone),        TEST(huge_pages_have_an_order),
        TEST(pages_that_come_during_a_walk), TEST(verify_sees_what_may_not_be_read),
    };

    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
