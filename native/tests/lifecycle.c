/* SPDX-License-Identifier: MIT */
/* Open and close: nothing is left behind, closing wakes everyone, and each refused system call is survived.
 */
#include <dirent.h>

#include "util.h"

enum { PAGES = 8 };

struct left {
    int fds, threads, vmas;
};

static int count_vmas(void)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512];
    int n = 0;

    if (!maps)
        return -1;
    while (fgets(line, sizeof(line), maps)) {
        if (strstr(line, "pymirror"))
            n++;
    }
    fclose(maps);
    return n;
}

static struct left count_left(void)
{
    return (struct left){
        .fds = count_dir("/proc/self/fd"),
        .threads = count_dir("/proc/self/task"),
        .vmas = count_vmas(),
    };
}

static void check_left(const struct left *before)
{
    struct left after = count_left();

    /* A joined thread leaves /proc a moment later. */
    for (int i = 0; i < 100 && after.threads != before->threads; i++) {
        usleep(1000);
        after = count_left();
    }
    CHECK_EQ(after.fds, before->fds);
    CHECK_EQ(after.threads, before->threads);
    CHECK_EQ(after.vmas, before->vmas);
}

/* Everything that the library does in a life, with the errors it gives on the way. */
static int live(char *mem)
{
    const struct pm_mm_options opt = {0};
    struct pm_mm_stats stats;
    pm_table *table = NULL;
    pm_sub *sub = NULL;
    pm_inv *inv = NULL;
    pm_mm *mm = NULL;
    uint64_t seq, start = addr_of(mem);
    int64_t watched = 0;
    char byte = 1;
    int err;

    err = pm_mm_create(&opt, &mm);
    if (err)
        return err;
    err = pm_table_create(&table);
    if (!err) {
        watched = pm_watch(mm, start, start + PAGES * PAGE, 0);
        err = watched < 0 ? (int)watched : 0;
    }
    if (!err)
        err = pm_sub_insert(mm, start, start + PAGES * PAGE - 1, 1, 1, &sub);
    if (!err)
        err = mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE);
    if (!err)
        device_write(table, mem, &byte, 1, &err);
    if (!err)
        device_read(table, mem, &byte, 1, &err);
    if (!err)
        err = pm_invalidate_start(mm, start, start + PAGE, PM_CLEAR, PM_BEFORE, &inv, &seq);
    if (!err) {
        err = pm_madvise(mm, start, PAGE, MADV_DONTNEED);
        CHECK_EQ(pm_invalidate_delivered(inv), 0);
        CHECK_EQ(pm_invalidate_end(inv), 0);
    }
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.inflight, 0);
    if (sub) {
        CHECK_EQ(pm_sub_remove(sub), 0);
        pm_sub_put(sub);
    }
    if (table)
        pm_table_put(table);
    CHECK_EQ(pm_mm_close(mm), 0);
    pm_mm_put(mm);
    return err;
}

static void nothing_is_left(void)
{
    char *mem = new_pages(PAGES);
    struct left before;

    CHECK_EQ(live(mem), 0);
    before = count_left();
    for (int i = 0; i < 50; i++)
        NEED_EQ(live(mem), 0);
    check_left(&before);
    free_pages(mem, PAGES);
}

static void close_is_idempotent(void)
{
    struct left before = count_left();
    pm_mm *mm = open_mm();
    struct pm_mm_stats stats;
    struct pm_vma vma;

    CHECK_EQ(pm_mm_alive(mm), 1);
    CHECK(pm_mm_status_fd(mm) >= 0);
    CHECK_EQ(pm_mm_close(mm), 0);
    CHECK_EQ(pm_mm_alive(mm), 0);
    CHECK_EQ(pm_mm_close(mm), 0);
    CHECK_EQ(pm_vma_find(mm, 0, &vma), -ESRCH);
    CHECK_EQ(pm_mm_status_fd(mm), -ENOENT);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    check_left(&before);
    pm_mm_put(mm);
}

static void put_alone_closes(void)
{
    struct left before = count_left();
    pm_mm *mm = open_mm();
    char *mem = new_pages(1);

    pm_watch(mm, addr_of(mem), addr_of(mem) + PAGE, 0);
    pm_mm_put(mm);
    check_left(&before);
    free_pages(mem, 1);
}

static void many_at_once(void)
{
    struct left before = count_left();
    pm_mm *mms[16];
    char *mem = new_pages(16);

    for (size_t i = 0; i < COUNT_OF(mms); i++) {
        mms[i] = open_mm();
        CHECK(pm_watch(mms[i], addr_of(mem) + i * PAGE, addr_of(mem) + (i + 1) * PAGE, 0) >= 0);
    }
    for (size_t i = 0; i < COUNT_OF(mms); i++)
        close_mm(mms[i]);
    check_left(&before);
    free_pages(mem, 16);
}

static void call_close(struct call *call)
{
    call->ret = pm_mm_close(call->arg[0]);
}

static void closes_at_once(void)
{
    for (int i = 0; i < 20; i++) {
        pm_mm *mm = open_mm();
        struct call closers[4];

        for (size_t j = 0; j < COUNT_OF(closers); j++) {
            closers[j] = (struct call){.fn = call_close, .arg = {mm}};
            call_start(&closers[j]);
        }
        for (size_t j = 0; j < COUNT_OF(closers); j++)
            CHECK_EQ(call_join(&closers[j]), 0);
        CHECK_EQ(pm_mm_alive(mm), 0);
        pm_mm_put(mm);
    }
}

static void bad_options(void)
{
    struct pm_mm_options opt = {.flags = 2};
    pm_mm *mm = NULL;

    CHECK_EQ(pm_mm_create(&opt, &mm), -EINVAL);
    opt = (struct pm_mm_options){.queue_length = UINT32_MAX};
    CHECK_EQ(pm_mm_create(&opt, &mm), -EINVAL);
    CHECK(mm == NULL);
}

/* What a refused close or unmap leaves behind is not the library's doing. */
static bool gives_back(int sys)
{
    return sys == PM_SYS_CLOSE || sys == PM_SYS_MUNMAP;
}

/* How often calls of this kind were made, each of them refused once. */
static uint64_t refuse_kind(char *mem, int sys, int err, uint64_t *refused)
{
    struct left before = count_left();
    uint64_t nth = 0, struck;

    do {
        int ret;

        CHECK_EQ(pm_inject(sys, ++nth, 1, err, 0), 0);
        ret = live(mem);
        struck = pm_inject_clear();
        CHECK(struck <= 1);
        CHECK(ret <= 0);
        *refused += ret != 0;
        if (!gives_back(sys))
            check_left(&before);
        if (check_failures) {
            fprintf(stderr, "call %" PRIu64 " of kind %d fails with %s, the life with %d\n", nth, sys,
                    strerror(err), ret);
            break;
        }
    } while (struck && nth < 1000);
    return nth - 1;
}

/* Each system call of a life in its turn is refused: an error or a life without it, but nothing left behind.
 */
static void refuse_each(int err)
{
    char *mem = new_pages(PAGES);
    uint64_t calls = 0, refused = 0;

    memset(mem, 1, PAGES * PAGE);
    live(mem);
    for (int sys = PM_SYS_ANY + 1; sys < PM_SYS_COUNT && !check_failures; sys++)
        calls += refuse_kind(mem, sys, err, &refused);
    CHECK(calls > 20);
    CHECK(refused > 0);
    CHECK_EQ(live(mem), 0);
    free_pages(mem, PAGES);
}

static void every_call_may_lack_memory(void)
{
    refuse_each(ENOMEM);
}

static void every_call_may_be_forbidden(void)
{
    refuse_each(EPERM);
}

static void every_call_may_be_interrupted(void)
{
    refuse_each(EINTR);
}

static void every_call_may_meet_the_fd_limit(void)
{
    refuse_each(EMFILE);
}

static void without_each_feature(void)
{
    char *mem = new_pages(PAGES);
    struct left before = count_left();

    for (int i = 0; i < PM_FEAT_COUNT; i++) {
        const struct pm_mm_options opt = {.disable = 1ULL << i};
        struct pm_features features;
        pm_mm *mm = open_mm_with(&opt);
        pm_sub *sub = new_sub(mm, mem, PAGES);
        pm_table *table = new_table();
        int err;

        CHECK_EQ(pm_mm_features(mm, &features), 0);
        CHECK_EQ((features.have >> i) & 1, 0);
        CHECK(features.why[i] > 0);
        CHECK(pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, 0) >= 0);
        err = mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE);
        if (!CHECK(err == 0 || err == -ENOSYS || err == -EOPNOTSUPP || err == -EPERM))
            fprintf(stderr, "without feature %d: %s\n", i, strerror(-err));
        drop_sub(sub);
        pm_table_put(table);
        close_mm(mm);
        check_left(&before);
    }
    free_pages(mem, PAGES);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(nothing_is_left),
        TEST(close_is_idempotent),
        TEST(put_alone_closes),
        TEST(many_at_once),
        TEST(closes_at_once),
        TEST(bad_options),
        TEST(every_call_may_lack_memory),
        TEST(every_call_may_be_forbidden),
        TEST(every_call_may_be_interrupted),
        TEST(every_call_may_meet_the_fd_limit),
        TEST(without_each_feature),
    };
    pm_mm *first = open_mm();

    /* What the library makes once a process is no leak of a test. */
    close_mm(first);
    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
