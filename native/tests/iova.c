/* SPDX-License-Identifier: MIT */
/* The IOVA allocator against a model of one byte a page. */
#include "internal.h"
#include "util.h"

enum { PAGES = 2048, FIRST = 7, LAST = FIRST + PAGES - 1, HELD = 700, ROUNDS = 60000 };

static uint64_t random_state = 0x9e3779b97f4a7c15ULL;

static uint64_t random_u64(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static uint64_t rounded(uint64_t pages)
{
    uint64_t power = 1;

    while (power < pages)
        power *= 2;
    return pages <= 32 ? power : pages;
}

static uint64_t alignment(uint64_t pages)
{
    uint64_t power = 1;

    while (power < pages)
        power *= 2;
    return power;
}

struct model {
    bool taken[LAST + 1];
    struct {
        uint64_t iova, pages;
    } held[HELD];
    size_t n;
    uint64_t reserved, live;
};

static void model_take(struct model *model, uint64_t first, uint64_t pages, bool taken)
{
    for (uint64_t page = first; page < first + pages; page++) {
        CHECK(model->taken[page] == !taken);
        model->taken[page] = taken;
    }
}

/* The first page of the highest place, 0 without one. */
static uint64_t model_find(const struct model *model, uint64_t pages, uint64_t last)
{
    uint64_t align = alignment(pages);

    for (uint64_t first = LAST + 1; first-- > FIRST;) {
        uint64_t page = first;

        if (first % align || first + pages - 1 > last)
            continue;
        while (page < first + pages && !model->taken[page])
            page++;
        if (page == first + pages)
            return first;
    }
    return 0;
}

static void adds_up(pm_iova_space *space, const struct model *model)
{
    struct pm_iova_stats stats;

    NEED_EQ(pm_iova_stats(space, &stats), 0);
    CHECK_EQ(stats.live, model->n);
    CHECK_EQ(stats.live_bytes, model->live * PAGE);
    CHECK_EQ(stats.reserved_bytes, model->reserved * PAGE);
    CHECK_EQ(stats.live_bytes + stats.cached_bytes + stats.reserved_bytes + stats.unused_bytes,
             (uint64_t)PAGES * PAGE);
}

static void random_alloc(pm_iova_space *space, struct model *model)
{
    uint64_t pages = random_u64() % 8 ? 1 + random_u64() % 40 : 1 + random_u64() % 300;
    uint64_t limit = random_u64() % 4 ? UINT64_MAX : (random_u64() % (PAGES * (uint64_t)PAGE)) | 0xfff;
    uint64_t last = pm_min(limit / PAGE, LAST), iova = 0;
    uint64_t want = model_find(model, rounded(pages), last);
    int err = pm_iova_alloc(space, pages * PAGE - random_u64() % PAGE, limit, &iova);

    if (!want) {
        CHECK_EQ(err, -ENOSPC);
        return;
    }
    NEED_EQ(err, 0);
    CHECK_EQ(iova % (alignment(pages) * PAGE), 0);
    CHECK(iova / PAGE >= FIRST && iova / PAGE + rounded(pages) - 1 <= last);
    CHECK_EQ(pm_iova_size(space, iova), pages * PAGE);
    model_take(model, iova / PAGE, rounded(pages), true);
    model->held[model->n].iova = iova;
    model->held[model->n++].pages = pages;
    model->live += rounded(pages);
}

static void random_free(pm_iova_space *space, struct model *model)
{
    size_t i = random_u64() % model->n;
    uint64_t iova = model->held[i].iova, pages = model->held[i].pages;

    CHECK_EQ(pm_iova_free(space, iova, (pages + 1) * PAGE), -EINVAL);
    CHECK_EQ(pm_iova_free(space, iova + 1, pages * PAGE), -EINVAL);
    CHECK_EQ(pm_iova_free(space, iova, pages * PAGE), 0);
    CHECK_EQ(pm_iova_free(space, iova, pages * PAGE), -ENOENT);
    CHECK_EQ(pm_iova_size(space, iova), -ENOENT);
    model_take(model, iova / PAGE, rounded(pages), false);
    model->held[i] = model->held[--model->n];
    model->live -= rounded(pages);
}

static void random_reserve(pm_iova_space *space, struct model *model)
{
    uint64_t first = FIRST + random_u64() % PAGES, last = pm_min(first + random_u64() % 4, LAST);
    bool busy = false;

    for (uint64_t page = first; page <= last; page++)
        busy |= model->taken[page];
    if (busy) {
        CHECK_EQ(pm_iova_reserve(space, first * PAGE, last * PAGE + PAGE - 1), -EBUSY);
        return;
    }
    CHECK_EQ(pm_iova_reserve(space, first * PAGE, last * PAGE + PAGE - 1), 0);
    CHECK_EQ(pm_iova_reserve(space, first * PAGE, last * PAGE), 0);
    model_take(model, first, last - first + 1, true);
    model->reserved += last - first + 1;
}

static void random_operations(void)
{
    static struct model model;
    pm_iova_space *space;

    NEED_EQ(pm_iova_create(FIRST * PAGE, (LAST + 1) * PAGE - 1, &space), 0);
    for (int round = 0; round < ROUNDS && !check_failures; round++) {
        bool filling = round / 2000 % 2 == 0;

        if (round % 4000 == 3999)
            random_reserve(space, &model);
        else if (model.n < HELD && (!model.n || random_u64() % 3 < (filling ? 2 : 1)))
            random_alloc(space, &model);
        else
            random_free(space, &model);
        adds_up(space, &model);
    }
    while (model.n && !check_failures)
        random_free(space, &model);
    adds_up(space, &model);
    pm_iova_destroy(space);
}

static void all_of_it_comes_back(void)
{
    enum { MANY = 512 };
    uint64_t iova[MANY], all;
    pm_iova_space *space;
    struct pm_iova_stats stats;

    NEED_EQ(pm_iova_create(4 * PAGE, (uint64_t)(MANY + 1) * 4 * PAGE - 1, &space), 0);
    for (size_t i = 0; i < MANY; i++)
        NEED_EQ(pm_iova_alloc(space, 3 * PAGE, UINT64_MAX, &iova[i]), 0);
    for (size_t i = 0; i < MANY; i++)
        CHECK_EQ(pm_iova_free(space, iova[i * 7 % MANY], 3 * PAGE), 0);
    CHECK_EQ(pm_iova_alloc(space, (uint64_t)MANY * 2 * PAGE, UINT64_MAX, &all), 0);
    CHECK_EQ(pm_iova_free(space, all, (uint64_t)MANY * 2 * PAGE), 0);
    CHECK_EQ(pm_iova_stats(space, &stats), 0);
    CHECK_EQ(stats.unused_bytes + stats.cached_bytes, (uint64_t)MANY * 4 * PAGE);
    CHECK_EQ(stats.unused_runs, 1);
    pm_iova_destroy(space);
}

/* From the limit downwards, each the highest that is left. */
static void top_down_and_aligned(void)
{
    pm_iova_space *space;
    uint64_t iova;

    NEED_EQ(pm_iova_create(0, UINT64_MAX, &space), 0);
    NEED_EQ(pm_iova_alloc(space, PAGE, UINT32_MAX, &iova), 0);
    CHECK_EQ(iova, 0xfffff000);
    NEED_EQ(pm_iova_alloc(space, 2 << 20, UINT32_MAX, &iova), 0);
    CHECK_EQ(iova, 0xffc00000);
    NEED_EQ(pm_iova_alloc(space, 1, UINT32_MAX, &iova), 0);
    CHECK_EQ(iova, 0xffffe000);
    NEED_EQ(pm_iova_alloc(space, PAGE, UINT64_MAX, &iova), 0);
    CHECK_EQ(iova, UINT64_MAX - PAGE + 1);
    NEED_EQ(pm_iova_alloc(space, 1ULL << 40, (1ULL << 48) - 1, &iova), 0);
    CHECK_EQ(iova, (1ULL << 48) - (1ULL << 40));
    CHECK_EQ(iova % (1ULL << 30), 0);
    pm_iova_destroy(space);
}

static void page_zero_is_never_given(void)
{
    pm_iova_space *space;
    uint64_t iova;

    NEED_EQ(pm_iova_create(0, 2 * PAGE - 1, &space), 0);
    CHECK_EQ(pm_iova_alloc(space, PAGE, UINT64_MAX, &iova), 0);
    CHECK_EQ(iova, PAGE);
    CHECK_EQ(pm_iova_alloc(space, PAGE, UINT64_MAX, &iova), -ENOSPC);
    CHECK_EQ(pm_iova_free(space, 0, PAGE), -ENOENT);
    pm_iova_destroy(space);
}

static void windows_are_left_out(void)
{
    pm_iova_space *space;
    uint64_t iova;

    NEED_EQ(pm_iova_create(PAGE, UINT32_MAX, &space), 0);
    NEED_EQ(pm_iova_reserve(space, 0xfee00000, 0xfeefffff), 0);
    for (int i = 0; i < 64; i++) {
        NEED_EQ(pm_iova_alloc(space, 1 << 20, UINT32_MAX, &iova), 0);
        CHECK(iova != 0xfee00000);
    }
    CHECK_EQ(pm_iova_reserve(space, iova, iova), -EBUSY);
    CHECK_EQ(pm_iova_free(space, 0xfee00000, 1 << 20), -ENOENT);
    pm_iova_destroy(space);
}

static void nonsense_is_refused(void)
{
    pm_iova_space *space;
    uint64_t iova;

    CHECK_EQ(pm_iova_create(0, PAGE - 1, &space), -EINVAL);
    CHECK_EQ(pm_iova_create(PAGE, 0, &space), -EINVAL);
    CHECK_EQ(pm_iova_create(1, PAGE * 4 - 1, &space), -EINVAL);
    CHECK_EQ(pm_iova_create(PAGE, PAGE * 4, &space), -EINVAL);
    NEED_EQ(pm_iova_create(PAGE, PAGE * 64 - 1, &space), 0);
    CHECK_EQ(pm_iova_alloc(space, 0, UINT64_MAX, &iova), -EINVAL);
    CHECK_EQ(pm_iova_alloc(space, UINT64_MAX, UINT64_MAX, &iova), -ENOSPC);
    CHECK_EQ(pm_iova_alloc(space, PAGE, 100, &iova), -ENOSPC);
    CHECK_EQ(pm_iova_free(space, PAGE, 0), -EINVAL);
    CHECK_EQ(pm_iova_reserve(space, PAGE * 2, PAGE), -EINVAL);
    CHECK_EQ(pm_iova_reserve(space, PAGE * 64, PAGE * 65), 0);
    pm_iova_destroy(space);
}

static void out_of_memory_changes_nothing(void)
{
    static uint64_t iova[1024];
    struct pm_iova_stats before, after;
    pm_iova_space *space;
    size_t n = 0;

    for (int nth = 1; nth <= 2; nth++) {
        CHECK_EQ(pm_inject(PM_SYS_MALLOC, nth, 1, ENOMEM, 0), 0);
        CHECK_EQ(pm_iova_create(PAGE, UINT32_MAX, &space), -ENOMEM);
    }
    pm_inject_clear();
    NEED_EQ(pm_iova_create(PAGE, UINT32_MAX, &space), 0);
    while (n < COUNT_OF(iova)) {
        CHECK_EQ(pm_iova_stats(space, &before), 0);
        CHECK_EQ(pm_inject(PM_SYS_MALLOC, 1, 1, ENOMEM, 0), 0);
        if (pm_iova_alloc(space, PAGE, UINT64_MAX, &iova[n]) == 0) {
            n++;
            continue;
        }
        pm_inject_clear();
        CHECK_EQ(pm_iova_stats(space, &after), 0);
        CHECK_EQ(after.live, before.live);
        CHECK_EQ(after.unused_bytes, before.unused_bytes);
        NEED_EQ(pm_iova_alloc(space, PAGE, UINT64_MAX, &iova[n]), 0);
        n++;
    }
    CHECK_EQ(pm_inject(PM_SYS_MALLOC, 1, 1000, ENOMEM, 0), 0);
    while (n > 0)
        CHECK_EQ(pm_iova_free(space, iova[--n], PAGE), 0);
    CHECK_EQ(pm_inject_clear(), 0);
    pm_iova_destroy(space);
}

enum { THREADS = 4, EACH = 4000 };

struct worker {
    pthread_t thread;
    pm_iova_space *space;
    atomic_uchar *owners;
    uint64_t seed;
    bool ok;
};

/* No page is given to two, and none is freed that another has. */
static void own(struct worker *worker, uint64_t iova, uint64_t pages, bool take)
{
    for (uint64_t page = iova / PAGE; page < iova / PAGE + pages; page++) {
        worker->ok &= take ? atomic_fetch_add(&worker->owners[page], 1) == 0
                           : atomic_fetch_sub(&worker->owners[page], 1) == 1;
    }
}

static void *work(void *arg)
{
    struct worker *worker = arg;
    uint64_t iova[16] = {0}, x = worker->seed;

    for (int i = 0; i < EACH; i++) {
        uint64_t slot = (x = x * 6364136223846793005ULL + 1442695040888963407ULL) >> 60;
        uint64_t pages = 1 + slot % 3;

        if (iova[slot]) {
            own(worker, iova[slot], pages, false);
            worker->ok &= pm_iova_free(worker->space, iova[slot], pages * PAGE) == 0;
            iova[slot] = 0;
        } else if (pm_iova_alloc(worker->space, pages * PAGE, UINT64_MAX, &iova[slot]) == 0) {
            own(worker, iova[slot], pages, true);
        }
    }
    for (uint64_t slot = 0; slot < COUNT_OF(iova); slot++) {
        if (!iova[slot])
            continue;
        own(worker, iova[slot], 1 + slot % 3, false);
        worker->ok &= pm_iova_free(worker->space, iova[slot], (1 + slot % 3) * PAGE) == 0;
    }
    return NULL;
}

static void threads_share_a_space(void)
{
    static atomic_uchar owners[256];
    struct worker workers[THREADS];
    struct pm_iova_stats stats;
    pm_iova_space *space;

    NEED_EQ(pm_iova_create(PAGE, COUNT_OF(owners) * PAGE - 1, &space), 0);
    for (uint64_t i = 0; i < THREADS; i++) {
        workers[i] = (struct worker){.space = space, .owners = owners, .seed = i * 77 + 1, .ok = true};
        NEED_EQ(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
    }
    for (size_t i = 0; i < THREADS; i++) {
        pthread_join(workers[i].thread, NULL);
        CHECK(workers[i].ok);
    }
    CHECK_EQ(pm_iova_stats(space, &stats), 0);
    CHECK_EQ(stats.live, 0);
    CHECK_EQ(stats.unused_bytes + stats.cached_bytes, (COUNT_OF(owners) - 1) * PAGE);
    pm_iova_destroy(space);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(random_operations),
        TEST(all_of_it_comes_back),
        TEST(top_down_and_aligned),
        TEST(page_zero_is_never_given),
        TEST(windows_are_left_out),
        TEST(nonsense_is_refused),
        TEST(out_of_memory_changes_nothing),
        TEST(threads_share_a_space),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
