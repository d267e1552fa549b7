/* SPDX-License-Identifier: MIT */
/* Pages move to device memory and home: by call, by CPU fault, at forks, and what happens to memory
 * meanwhile.
 */
#include <sys/wait.h>

#include "util.h"

enum { PAGES = 64 };
#define PFN_MASK ((1ULL << 55) - 1)

#define NEED_VRAM()                                                                                          \
    do {                                                                                                     \
        if (!vram)                                                                                           \
            LEAVE_OUT("needs a userfaultfd that serves the faults, with events, and UFFDIO_MOVE");           \
    } while (0)

static uint32_t delivery; /* flags of the mm */
static pm_mm *mm;
static pm_devmem *vram;
static char *mem;

static void set_up(void)
{
    struct pm_mm_options opt = {.flags = delivery};

#ifdef __SANITIZE_THREAD__
    opt.disable = 1ULL << PM_FEAT_UFFD_EVENT_FORK; /* see fork.c */
#endif
    mm = open_mm_with(&opt);
    vram = NULL;
    if (can_migrate(mm, delivery))
        CHECK_EQ(pm_devmem_create(mm, 64 << 20, 7, &vram), 0);
    mem = new_pages(PAGES);
    for (int i = 0; i < PAGES; i++)
        memset(mem + i * PAGE, i + 1, PAGE);
    if (vram)
        CHECK(pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, PM_WATCH_EXACT) > 0);
}

static void tear_down(void)
{
    pm_points_reset();
    pm_mm_close(mm);
    if (vram)
        CHECK_EQ(pm_devmem_destroy(vram), 0);
    pm_mm_put(mm);
    if (mem)
        free_pages(mem, PAGES);
}

static uint64_t out(const void *from, uint64_t n)
{
    uint64_t moved, start = addr_of(from), seq;
    pm_inv *inv;

    CHECK_EQ(pm_invalidate_start(mm, start, start + n * PAGE, PM_MIGRATE, PM_BEFORE, &inv, &seq), 0);
    pm_invalidate_delivered(inv);
    CHECK_EQ(pm_migrate_to_device(vram, start, start + n * PAGE, &moved), 0);
    pm_invalidate_end(inv);
    return moved;
}

static uint64_t home(const void *from, uint64_t n)
{
    uint64_t moved;

    CHECK_EQ(pm_migrate_to_system(mm, addr_of(from), addr_of(from) + n * PAGE, NULL, &moved), 0);
    return moved;
}

static struct pm_devmem_stats stats(void)
{
    struct pm_devmem_stats ret;

    CHECK_EQ(pm_devmem_stats(mm, &ret), 0);
    return ret;
}

static bool present(const void *at)
{
    uint64_t entry = 0;

    CHECK_EQ(pm_pagemap_read(mm, addr_of(at), 1, &entry), 0);
    return entry >> 63;
}

static int wrong_pages(const char *at, int first, int n)
{
    int wrong = 0;

    for (int i = 0; i < n; i++) {
        const char *page = at + i * PAGE;

        if (page[0] != (char)(first + i + 1) || page[PAGE - 1] != (char)(first + i + 1))
            wrong++;
    }
    return wrong;
}

static void out_and_home(void)
{
    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(pm_devmem_used(vram), PAGES);
    CHECK(!present(mem) && !present(mem + (PAGES - 1) * PAGE));
    CHECK_EQ(out(mem, PAGES), 0);
    CHECK_EQ(home(mem, PAGES), PAGES);
    CHECK_EQ(stats().resident, 0);
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
    CHECK_EQ(stats().faults, 0);
    CHECK_EQ(stats().copied, 0);
}

static void a_touch_brings_a_page_home(void)
{
    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(wrong_pages(mem + 3 * PAGE, 3, 1), 0);
    CHECK_EQ(stats().faults, 1);
    CHECK_EQ(stats().resident, PAGES - 1);
    mem[5 * PAGE] = 77;
    CHECK_EQ(mem[5 * PAGE + 1], 6);
    CHECK_EQ(mem[5 * PAGE], 77);
    CHECK_EQ(pm_devmem_fault_around(vram, 16 * PAGE), 0);
    CHECK_EQ(wrong_pages(mem + 40 * PAGE, 40, 1), 0);
    CHECK(stats().resident < PAGES - 2);
    mem[5 * PAGE] = 6;
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
}

static void a_device_is_told_before(void)
{
    pm_sub *sub = new_sub(mm, mem, PAGES);
    pm_table *table = new_table();
    struct pm_event event;
    uint64_t seq;

    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_READ), 0);
    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(wrong_pages(mem + PAGE, 1, 1), 0);
    CHECK_EQ(pm_sub_read_retry(sub, seq), 1);
    while (pm_event_wait(mm, 0, &event) == 0) {
        CHECK_EQ(event.type, PM_MIGRATE);
        CHECK_EQ(event.owner, 7);
        CHECK_EQ(event.guarantee, PM_BEFORE);
        pm_event_done(mm);
    }
    pm_table_clear(table, 0, 0);
    pm_table_put(table);
    drop_sub(sub);
}

static void never_touched_pages_stay_empty(void)
{
    char *fresh = new_pages(PAGES);

    NEED_VRAM();
    CHECK(pm_watch(mm, addr_of(fresh), addr_of(fresh) + PAGES * PAGE, PM_WATCH_EXACT) > 0);
    CHECK_EQ(out(fresh, PAGES), PAGES);
    CHECK_EQ(fresh[7 * PAGE], 0);
    fresh[8 * PAGE] = 1;
    CHECK_EQ(home(fresh, PAGES), PAGES - 2);
    CHECK(!present(fresh + 9 * PAGE));
    CHECK_EQ(fresh[9 * PAGE] + fresh[8 * PAGE], 1);
    free_pages(fresh, PAGES);
}

static void what_became_read_only_is_copied(void)
{
    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(mprotect(mem, PAGES * PAGE, PROT_READ), 0);
    CHECK_EQ(wrong_pages(mem, 0, 2), 0);
    CHECK_EQ(mprotect(mem, PAGES * PAGE, PROT_NONE), 0);
    CHECK_EQ(home(mem, PAGES), PAGES - 2);
    CHECK_EQ(stats().copied, PAGES);
    CHECK_EQ(mprotect(mem, PAGES * PAGE, PROT_READ | PROT_WRITE), 0);
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
}

static void what_is_discarded_is_gone(void)
{
    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(madvise(mem, 4 * PAGE, MADV_DONTNEED), 0);
    CHECK_EQ(mem[0] + mem[3 * PAGE], 0);
    CHECK_EQ(wrong_pages(mem + 4 * PAGE, 4, PAGES - 4), 0);
    CHECK_EQ(stats().dropped, 4);
}

static void what_is_unmapped_is_gone(void)
{
    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(munmap(mem, 8 * PAGE), 0);
    CHECK(mmap(mem, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == mem);
    CHECK_EQ(mem[0] + mem[7 * PAGE], 0);
    CHECK_EQ(wrong_pages(mem + 8 * PAGE, 8, PAGES - 8), 0);
    CHECK_EQ(stats().dropped, 8);
}

static void what_is_moved_goes_with_it(void)
{
    char *to = new_pages(PAGES), *moved;

    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    moved = mremap(mem, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    NEED(moved == to);
    mem = to;
    CHECK_EQ(wrong_pages(mem, 0, PAGES / 2), 0);
    CHECK_EQ(stats().resident, PAGES / 2);
    CHECK_EQ(out(mem, PAGES), PAGES / 2);
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
}

static int child_looks(void)
{
    int wrong = wrong_pages(mem, 0, PAGES);

    memset(mem, 0, PAGES * PAGE);
    return wrong;
}

static void a_child_has_what_was_there(void)
{
    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES / 2), PAGES / 2);
    CHECK_EQ(in_child(child_looks), 0);
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
    CHECK_EQ(stats().child_lost, 0);
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
}

/* Whole, the page stays huge, so its pages stay next to each other: by the number of calls, too. */
static void huge_pages_move_whole(void)
{
    enum { HUGE = 512 };
    char *area = new_pages(2 * HUGE), *huge = (char *)((addr_of(area) + HUGE * PAGE - 1) & -(HUGE * PAGE));
    uint64_t before, at_first, after;

    NEED_VRAM();
    NEED_EQ(madvise(huge, HUGE * PAGE, MADV_HUGEPAGE), 0);
    memset(huge, 5, HUGE * PAGE);
    CHECK(pm_watch(mm, addr_of(huge), addr_of(huge) + HUGE * PAGE, PM_WATCH_EXACT) > 0);
    CHECK_EQ(pm_pagemap_read(mm, addr_of(huge), 1, &at_first), 0);
    before = pm_sys_calls(PM_SYS_IOCTL);
    CHECK_EQ(out(huge, HUGE), HUGE);
    CHECK_EQ(home(huge, HUGE), HUGE);
    CHECK(pm_sys_calls(PM_SYS_IOCTL) - before < 20);
    CHECK_EQ(pm_pagemap_read(mm, addr_of(huge), 1, &after), 0);
    CHECK_EQ(after & PFN_MASK, at_first & PFN_MASK);
    CHECK_EQ(out(huge, HUGE), HUGE);
    CHECK_EQ(huge[100 * PAGE], 5);
    if (mm_has(mm, PM_FEAT_PFN) && at_first % HUGE == 0)
        CHECK_EQ(stats().resident, 0);
    CHECK(huge[0] == 5 && huge[HUGE * PAGE - 1] == 5);
    free_pages(area, 2 * HUGE);
}

/* Huge pages in a row go together, and what is between them, or in their way, as it can. */
static void huge_pages_in_a_row_move(void)
{
    enum { HUGE = 512, N = 40, SIZE = (N + 1) * HUGE };
    char *area = new_pages(SIZE), *row = (char *)((addr_of(area) + HUGE * PAGE - 1) & -(HUGE * PAGE));
    char *gap = row + 7 * HUGE * PAGE, *there = row + 9 * HUGE * PAGE;
    pm_devmem *large = NULL;
    uint64_t moved = 0;

    NEED_VRAM();
    NEED_EQ(madvise(row, N * HUGE * PAGE, MADV_HUGEPAGE), 0);
    for (int i = 0; i < N * HUGE; i++)
        memset(row + i * PAGE, i % 113 + 1, PAGE);
    CHECK_EQ(pm_devmem_create(mm, (N - 2) * HUGE * PAGE, 8, &large), 0);
    CHECK(pm_watch(mm, addr_of(row), addr_of(row) + N * HUGE * PAGE, PM_WATCH_EXACT) > 0);
    madvise(gap + 5 * PAGE, PAGE, MADV_DONTNEED);
    CHECK_EQ(out(there + 100 * PAGE, 3), 3);
    /* Two do not have room; three pages are in the other memory. */
    CHECK_EQ(pm_migrate_to_device(large, addr_of(row), addr_of(row) + N * HUGE * PAGE, &moved), -ENOSPC);
    CHECK(moved > (N - 4) * HUGE && moved <= (N - 2) * HUGE);
    CHECK_EQ(pm_devmem_used(large), moved);
    CHECK_EQ(stats().resident, moved + 3);
    CHECK_EQ(home(row + PAGE, 2 * HUGE), 2 * HUGE);
    CHECK_EQ(stats().resident, moved + 3 - 2 * HUGE);
    home(row, N * HUGE);
    CHECK_EQ(stats().resident, 0);
    for (int i = 0; i < N * HUGE; i++) {
        char want = row + i * PAGE == gap + 5 * PAGE ? 0 : (char)(i % 113 + 1);

        CHECK(row[i * PAGE] == want && row[i * PAGE + PAGE - 1] == want);
    }
    CHECK_EQ(pm_devmem_destroy(large), 0);
    free_pages(area, SIZE);
}

static void closing_brings_all_home(void)
{
    NEED_VRAM();
    CHECK_EQ(out(mem, PAGES), PAGES);
    CHECK_EQ(pm_mm_close(mm), 0);
    CHECK_EQ(pm_devmem_used(vram), 0);
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
}

static void it_ends_where_it_is_full(void)
{
    pm_devmem *small = NULL;
    uint64_t moved, start, end, from = addr_of(mem);

    NEED_VRAM();
    NEED_EQ(pm_devmem_create(mm, 10 * PAGE, 8, &small), 0);
    CHECK_EQ(pm_devmem_next(small, &start, &end), -ENOENT);
    CHECK_EQ(pm_migrate_to_device(small, from, from + PAGES * PAGE, &moved), -ENOSPC);
    CHECK_EQ(moved, 10);
    CHECK_EQ(pm_devmem_next(small, &start, &end), 0);
    CHECK_EQ(start, from);
    CHECK_EQ(pm_devmem_destroy(small), -EBUSY);
    CHECK_EQ(wrong_pages(mem, 0, PAGES), 0);
    CHECK_EQ(pm_devmem_destroy(small), 0);
}

static void other_memory_stays(void)
{
    uint64_t moved, start = addr_of(mem);
    char *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    NEED_VRAM();
    CHECK(pm_watch(mm, addr_of(shared), addr_of(shared) + PAGE, PM_WATCH_FILES) > 0);
    CHECK_EQ(out(shared, 1), 0);
    CHECK_EQ(munmap(mem + 2 * PAGE, PAGE), 0);
    CHECK_EQ(pm_migrate_to_device(vram, start, start + PAGES * PAGE, &moved), -EINVAL);
    CHECK_EQ(moved, 2);
    munmap(shared, PAGE);
}

static atomic_bool keep_going;

static void call_count(struct call *call)
{
    uint64_t *counter = call->arg[0];

    while (atomic_load(&keep_going)) {
        *counter += 1;
        call->num[0]++;
    }
}

/* No increment is lost while the page goes to and fro. */
static void nothing_is_lost_under_writers(void)
{
    struct call writer[2] = {{.fn = call_count, .arg = {mem}}, {.fn = call_count, .arg = {mem + PAGE}}};

    NEED_VRAM();
    memset(mem, 0, 2 * PAGE);
    atomic_store(&keep_going, true);
    for (size_t i = 0; i < COUNT_OF(writer); i++)
        call_start(&writer[i]);
    for (int i = 0; i < 300; i++) {
        out(mem, PAGES);
        if (i % 3 == 0)
            home(mem, PAGES);
        if (i % 50 == 0)
            CHECK_EQ(in_child(child_looks) > 2, 0);
    }
    atomic_store(&keep_going, false);
    for (size_t i = 0; i < COUNT_OF(writer); i++) {
        call_join(&writer[i]);
        CHECK_EQ(*(uint64_t *)writer[i].arg[0], writer[i].num[0]);
    }
    CHECK_EQ(wrong_pages(mem + 2 * PAGE, 2, PAGES - 2), 0);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(out_and_home),
        TEST(a_touch_brings_a_page_home),
        TEST(a_device_is_told_before),
        TEST(never_touched_pages_stay_empty),
        TEST(what_became_read_only_is_copied),
        TEST(what_is_discarded_is_gone),
        TEST(what_is_unmapped_is_gone),
        TEST(what_is_moved_goes_with_it),
        TEST(a_child_has_what_was_there),
        TEST(huge_pages_move_whole),
        TEST(huge_pages_in_a_row_move),
        TEST(closing_brings_all_home),
        TEST(it_ends_where_it_is_full),
        TEST(other_memory_stays),
        TEST(nothing_is_lost_under_writers),
    };

    int failed = run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);

    delivery = PM_MM_INLINE;
    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv) | failed;
}
