/* SPDX-License-Identifier: MIT */
/* The device page table: programming under a sequence, fencing, clearing, comparing with the CPU's. */
#include "util.h"

enum { PAGES = 1200 };

static pm_mm *mm;
static char *mem;
static pm_sub *sub;

#define VALID (1ULL << PM_ENTRY_VALID_BIT)
#define WRITE (1ULL << PM_ENTRY_WRITE_BIT)
#define FENCED (1ULL << PM_ENTRY_FENCED_BIT)

static uint64_t at(uint64_t page)
{
    return addr_of(mem) + page * PAGE;
}

static uint64_t entry_of(pm_table *table, uint64_t page)
{
    uint64_t entry = 0;

    CHECK_EQ(pm_table_read(table, at(page), 1, &entry), 0);
    return entry;
}

static struct pm_table_stats stats_of(pm_table *table)
{
    struct pm_table_stats stats;

    CHECK_EQ(pm_table_stats(table, &stats), 0);
    return stats;
}

static void invalidate(uint64_t first, uint64_t n, uint64_t *seq)
{
    pm_inv *inv = NULL;

    CHECK_EQ(pm_invalidate_start(mm, at(first), at(first + n), PM_CLEAR, PM_BEFORE, &inv, seq), 0);
    CHECK_EQ(pm_invalidate_delivered(inv), 0);
    CHECK_EQ(pm_invalidate_end(inv), 0);
}

/* Numbers of the test's own: what stands behind an entry does not matter to the table. */
static int map_numbers(pm_table *table, uint64_t seq, uint64_t first, uint64_t n, uint64_t flags)
{
    uint64_t *pfns = calloc(n, sizeof(*pfns));
    int err;

    for (uint64_t i = 0; i < n; i++)
        pfns[i] = flags | (first + i + 1);
    err = pm_table_map(table, sub, seq, at(first), n, pfns);
    free(pfns);
    return err;
}

static void map_and_read_back(void)
{
    pm_table *table = new_table();
    uint64_t seq, next = 0;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(map_numbers(table, seq, 0, PAGES, VALID | WRITE), 0);
    for (uint64_t i = 0; i < PAGES; i++)
        NEED_EQ(entry_of(table, i), VALID | WRITE | (i + 1));
    CHECK_EQ(stats_of(table).entries, PAGES);
    CHECK_EQ(stats_of(table).fenced, 0);
    CHECK(stats_of(table).bytes >= PAGES * 8);
    CHECK_EQ(pm_table_next(table, at(5), at(PAGES), &next), 0);
    CHECK_EQ(next, at(5));
    CHECK_EQ(pm_table_clear(table, at(3), at(PAGES - 3)), PAGES - 6);
    CHECK_EQ(pm_table_next(table, at(3), at(PAGES), &next), 0);
    CHECK_EQ(next, at(PAGES - 3));
    CHECK_EQ(pm_table_next(table, at(3), at(PAGES - 3), &next), -ENOENT);
    CHECK_EQ(entry_of(table, 3), 0);
    CHECK_EQ(pm_table_clear(table, 0, 0), 6);
    CHECK_EQ(stats_of(table).entries, 0);
    pm_table_put(table);
}

static void invalid_pfns_are_left_out(void)
{
    pm_table *table = new_table();
    uint64_t pfns[4] = {VALID | 5, 0, 6, VALID | WRITE | 7};
    uint64_t seq;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(pm_table_map(table, sub, seq, at(0), 4, pfns), 0);
    CHECK_EQ(entry_of(table, 0), VALID | 5);
    CHECK_EQ(entry_of(table, 1), 0);
    CHECK_EQ(entry_of(table, 2), 0);
    CHECK_EQ(entry_of(table, 3), VALID | WRITE | 7);
    CHECK_EQ(stats_of(table).entries, 2);
    pm_table_put(table);
}

static void old_sequence_is_refused(void)
{
    pm_table *table = new_table();
    uint64_t seq, inv_seq;

    CHECK_EQ(read_begin(sub, &seq), 0);
    invalidate(0, 1, &inv_seq);
    CHECK_EQ(map_numbers(table, seq, 4, 4, VALID), -EBUSY);
    CHECK_EQ(stats_of(table).entries, 0);
    pm_table_put(table);
}

static void nothing_is_mapped_while_invalidating(void)
{
    pm_table *table = new_table();
    pm_inv *inv = NULL;
    uint64_t seq;

    CHECK_EQ(pm_invalidate_start(mm, at(0), at(1), PM_CLEAR, PM_BEFORE, &inv, &seq), 0);
    CHECK_EQ(map_numbers(table, pm_sub_seq(sub), 0, 1, VALID), -EBUSY);
    CHECK_EQ(pm_invalidate_end(inv), 0);
    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(map_numbers(table, seq, 0, 1, VALID), 0);
    pm_table_put(table);
}

static void fence_keeps_who_did_it(void)
{
    pm_table *table = new_table();
    uint64_t seq, first_seq, second_seq;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(map_numbers(table, seq, 0, PAGES, VALID | WRITE), 0);
    invalidate(10, 600, &first_seq);
    invalidate(600, 20, &second_seq);
    CHECK_EQ(entry_of(table, 9), VALID | WRITE | 10);
    CHECK_EQ(entry_of(table, 10) & ~WRITE, FENCED | first_seq);
    CHECK_EQ(entry_of(table, 609) & ~WRITE, FENCED | first_seq);
    CHECK_EQ(entry_of(table, 610) & ~WRITE, FENCED | second_seq);
    CHECK_EQ(entry_of(table, 620), VALID | WRITE | 621);
    CHECK_EQ(stats_of(table).entries, PAGES);
    CHECK_EQ(stats_of(table).fenced, 610);
    CHECK_EQ(pm_table_clear(table, at(0), at(100)), 100);
    CHECK_EQ(stats_of(table).fenced, 520);
    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(map_numbers(table, seq, 100, 520, VALID), 0);
    CHECK_EQ(stats_of(table).fenced, 0);
    CHECK_EQ(entry_of(table, 610), VALID | 611);
    pm_table_put(table);
}

static void every_table_is_fenced(void)
{
    pm_table *tables[3];
    uint64_t seq, inv_seq;

    CHECK_EQ(read_begin(sub, &seq), 0);
    for (size_t i = 0; i < COUNT_OF(tables); i++) {
        tables[i] = new_table();
        CHECK_EQ(map_numbers(tables[i], seq, 0, 8, VALID), 0);
    }
    invalidate(0, 8, &inv_seq);
    for (size_t i = 0; i < COUNT_OF(tables); i++) {
        CHECK_EQ(stats_of(tables[i]).fenced, 8);
        pm_table_put(tables[i]);
    }
}

static void edges_of_the_address_space(void)
{
    uint64_t last_page = (1ULL << 47) - PAGE;
    pm_table *table = new_table();
    pm_sub *whole = NULL;
    uint64_t seq, entry = 0, next = 0, pfn = VALID | 1;

    CHECK_EQ(pm_sub_insert(mm, 0, UINT64_MAX, 1, 1, &whole), 0);
    CHECK_EQ(read_begin(whole, &seq), 0);
    CHECK_EQ(pm_table_map(table, whole, seq, 0, 1, &pfn), 0);
    CHECK_EQ(pm_table_map(table, whole, seq, last_page, 1, &pfn), 0);
    CHECK_EQ(pm_table_map(table, whole, seq, last_page + PAGE, 1, &pfn), -EINVAL);
    CHECK_EQ(pm_table_map(table, whole, seq, last_page, 2, &pfn), -EINVAL);
    CHECK_EQ(pm_table_map(table, whole, seq, UINT64_MAX - PAGE + 1, 1, &pfn), -EINVAL);
    CHECK_EQ(pm_table_next(table, PAGE, 0, &next), 0);
    CHECK_EQ(next, last_page);
    CHECK_EQ(pm_table_read(table, last_page, 1, &entry), 0);
    CHECK_EQ(entry, pfn);
    CHECK_EQ(pm_table_clear(table, PAGE, 0), 1);
    CHECK_EQ(pm_table_clear(table, 0, 0), 1);
    drop_sub(whole);
    pm_table_put(table);
}

static void bad_arguments(void)
{
    pm_table *table = new_table();
    uint64_t seq, pfn = VALID | 1, entry;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(pm_table_map(table, sub, seq, at(0) + 1, 1, &pfn), -EINVAL);
    CHECK_EQ(pm_table_map(table, sub, seq, at(0), 0, &pfn), -EINVAL);
    CHECK_EQ(pm_table_map(table, sub, seq, at(0) - PAGE, 1, &pfn), -EINVAL);
    CHECK_EQ(pm_table_map(table, sub, seq, at(PAGES), 1, &pfn), -EINVAL);
    CHECK_EQ(pm_table_read(table, at(0) + 8, 1, &entry), -EINVAL);
    CHECK_EQ(stats_of(table).entries, 0);
    pm_table_put(table);
}

static void one_mm_at_a_time(void)
{
    pm_table *table = new_table();
    pm_mm *other = open_mm();
    pm_sub *foreign = new_sub(other, mem, 4);
    uint64_t seq, pfn = VALID | 1;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(map_numbers(table, seq, 0, 1, VALID), 0);
    CHECK_EQ(read_begin(foreign, &seq), 0);
    CHECK_EQ(pm_table_map(table, foreign, seq, at(0), 1, &pfn), -EXDEV);
    CHECK_EQ(pm_table_clear(table, 0, 0), 1);
    CHECK_EQ(pm_table_map(table, foreign, seq, at(0), 1, &pfn), 0);
    CHECK_EQ(entry_of(table, 0), pfn);
    drop_sub(foreign);
    close_mm(other);
    pm_table_put(table);
}

/* The tree gives its memory back, or a long-lived device would grow with every address it ever saw. */
static void leaves_are_freed(void)
{
    pm_table *table = new_table();
    uint64_t empty = stats_of(table).bytes, after_one, seq;

    CHECK_EQ(read_begin(sub, &seq), 0);
    CHECK_EQ(map_numbers(table, seq, 0, PAGES, VALID), 0);
    CHECK(stats_of(table).bytes > empty);
    CHECK_EQ(pm_table_clear(table, 0, 0), PAGES);
    after_one = stats_of(table).bytes;
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(map_numbers(table, seq, 0, PAGES, VALID), 0);
        CHECK_EQ(pm_table_clear(table, 0, 0), PAGES);
    }
    CHECK_EQ(stats_of(table).bytes, after_one);
    pm_table_put(table);
}

static void verify_finds_what_changed(void)
{
    pm_table *table = new_table();
    uint64_t from = 0, to = 0;
    /* Two pages of one leaf, wherever the memory is: a run that is found ends with its leaf. */
    uint64_t gone = at(4) % (2 << 20) ? 3 : 4;

    memset(mem, 1, 8 * PAGE);
    CHECK_EQ(mirror_pages(mm, table, sub, mem, 8, WANT_WRITE), 0);
    CHECK_EQ(pm_table_verify(table, at(0), at(8), &from, &to), 0);
    /* Through the raw call: no invalidation tells of it. */
    CHECK_EQ(madvise(mem + gone * PAGE, 2 * PAGE, MADV_DONTNEED), 0);
    CHECK_EQ(pm_table_verify(table, at(0), at(8), &from, &to), -ESTALE);
    CHECK_EQ(from, at(gone));
    CHECK_EQ(to, at(gone + 2));
    CHECK_EQ(pm_table_verify(table, at(gone + 2), at(8), &from, &to), 0);
    CHECK_EQ(pm_table_clear(table, at(gone), at(gone + 2)), 2);
    CHECK_EQ(pm_table_verify(table, at(0), at(8), &from, &to), 0);
    pm_table_put(table);
}

/* A page replaced by another shows only where PFNs can be seen. */
static void verify_sees_another_page(void)
{
    pm_table *table = new_table();
    uint64_t from = 0, to = 0;

    if (!mm_has(mm, PM_FEAT_PFN)) {
        pm_table_put(table);
        LEAVE_OUT("the pagemap shows no PFNs (CAP_SYS_ADMIN)");
    }
    memset(mem, 1, 4 * PAGE);
    CHECK_EQ(mirror_pages(mm, table, sub, mem, 4, WANT_WRITE), 0);
    char *other = new_pages(1);
    memset(other, 2, PAGE);
    CHECK(mremap(other, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, mem + 2 * PAGE) == mem + 2 * PAGE);
    CHECK_EQ(pm_table_verify(table, at(0), at(4), &from, &to), -ESTALE);
    CHECK_EQ(from, at(2));
    CHECK_EQ(to, at(3));
    pm_table_put(table);
}

static void call_map(struct call *call)
{
    call->ret = map_numbers(call->arg[0], call->num[0], 0, 4, VALID);
}

/* Between the walk and the commit: what a driver in C must check under its own lock. */
static void invalidation_before_the_commit(void)
{
    pm_table *table = new_table();
    struct call mapper = {.fn = call_map, .arg = {table}};
    uint64_t inv_seq;

    CHECK_EQ(read_begin(sub, &mapper.num[0]), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_MAP_BEFORE_COMMIT), 0);
    call_start(&mapper);
    CHECK_EQ(pm_point_wait(PM_POINT_MAP_BEFORE_COMMIT, 10 * SECOND), 0);
    invalidate(3, 1, &inv_seq);
    CHECK_EQ(pm_point_release(PM_POINT_MAP_BEFORE_COMMIT), 0);
    CHECK_EQ(call_join(&mapper), -EBUSY);
    CHECK_EQ(stats_of(table).entries, 0);
    pm_table_put(table);
}

static void a_table_outlives_its_mm(void)
{
    pm_table *table = new_table();
    pm_mm *own = open_mm();
    pm_sub *own_sub = new_sub(own, mem, 4);
    uint64_t seq, pfn = VALID | 1;
    struct pm_table_stats stats;
    char byte;
    int err;

    CHECK_EQ(read_begin(own_sub, &seq), 0);
    CHECK_EQ(pm_table_map(table, own_sub, seq, at(0), 1, &pfn), 0);
    close_mm(own);
    CHECK_EQ(pm_table_map(table, own_sub, seq, at(0), 1, &pfn), -ESRCH);
    device_read(table, mem, &byte, 1, &err);
    CHECK(err < 0);
    CHECK(pm_table_clear(table, 0, 0) >= 0);
    CHECK_EQ(pm_table_stats(table, &stats), 0);
    CHECK_EQ(stats.entries, 0);
    pm_sub_put(own_sub);
    pm_table_put(table);
}

static atomic_bool keep_looking;

static void call_look_on(struct call *call)
{
    struct pm_table_stats stats;

    while (atomic_load(&keep_looking)) {
        pm_table_clear(call->arg[0], 0, 0);
        pm_table_stats(call->arg[0], &stats);
    }
}

/* A callback of the one mm may still be at work when the table goes to the other. */
static void changing_mms_among_readers(void)
{
    pm_table *table = new_table();
    pm_mm *mms[2] = {mm, open_mm()};
    pm_sub *subs[2] = {sub, new_sub(mms[1], mem, PAGES)};
    struct call lookers[2] = {{.fn = call_look_on, .arg = {table}}, {.fn = call_look_on, .arg = {table}}};
    uint64_t seq, pfn = VALID | 1, until = now_ns() + SECOND;

    atomic_store(&keep_looking, true);
    for (size_t i = 0; i < COUNT_OF(lookers); i++)
        call_start(&lookers[i]);
    for (int i = 0; now_ns() < until; i++) {
        CHECK_EQ(read_begin(subs[i % 2], &seq), 0);
        int err = pm_table_map(table, subs[i % 2], seq, at(0), 1, &pfn);
        CHECK(err == 0 || err == -EXDEV);
    }
    atomic_store(&keep_looking, false);
    for (size_t i = 0; i < COUNT_OF(lookers); i++)
        call_join(&lookers[i]);
    pm_table_clear(table, 0, 0);
    CHECK_EQ(stats_of(table).entries, 0);
    pm_table_put(table);
    drop_sub(subs[1]);
    close_mm(mms[1]);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(map_and_read_back),
        TEST(invalid_pfns_are_left_out),
        TEST(old_sequence_is_refused),
        TEST(nothing_is_mapped_while_invalidating),
        TEST(fence_keeps_who_did_it),
        TEST(every_table_is_fenced),
        TEST(edges_of_the_address_space),
        TEST(bad_arguments),
        TEST(one_mm_at_a_time),
        TEST(leaves_are_freed),
        TEST(verify_finds_what_changed),
        TEST(verify_sees_another_page),
        TEST(invalidation_before_the_commit),
        TEST(a_table_outlives_its_mm),
        TEST(changing_mms_among_readers),
    };
    int failed;

    mm = open_mm();
    mem = new_pages(PAGES);
    sub = new_sub(mm, mem, PAGES);
    failed = run_tests(tests, COUNT_OF(tests), argc, argv);
    drop_sub(sub);
    close_mm(mm);
    free_pages(mem, PAGES);
    return failed;
}
