/* SPDX-License-Identifier: MIT */
/* DMA mappings: what a device reaches through them, what fences and unmapping do, and what is left. */
#include "util.h"

enum { PAGES = 600, HUGE_BYTES = 2 << 20 };

static pm_mm *mm;
static pm_sub *sub;
static pm_domain *domain;
static char *mem;
static uint64_t pfns[PAGES], daddrs[PAGES];

static pm_domain *new_domain(uint32_t flags)
{
    const struct pm_domain_options opt = {.first = PAGE, .last = (1ULL << 48) - 1, .flags = flags};
    pm_domain *made = NULL;

    CHECK_EQ(pm_domain_create(&opt, &made), 0);
    return made;
}

static void set_up(void)
{
    mm = open_mm();
    mem = new_pages(PAGES);
    sub = new_sub(mm, mem, PAGES);
    domain = new_domain(0);
}

static struct pm_domain_stats stats(void)
{
    struct pm_domain_stats found;

    CHECK_EQ(pm_domain_stats(domain, &found), 0);
    return found;
}

static uint64_t iovas_live(void)
{
    struct pm_iova_stats found;

    CHECK_EQ(pm_iova_stats(pm_domain_iovas(domain), &found), 0);
    return found.live;
}

static void tear_down(void)
{
    pm_points_reset();
    CHECK_EQ(stats().mappings, 0);
    CHECK_EQ(stats().mapped_pages, 0);
    if (pm_domain_iovas(domain)) {
        pm_domain_flush(domain);
        CHECK_EQ(iovas_live(), 0);
    }
    pm_domain_put(domain);
    drop_sub(sub);
    close_mm(mm);
    free_pages(mem, PAGES);
}

static uint64_t fault(uint64_t want)
{
    struct pm_walk walk = {
        .start = addr_of(mem),
        .end = addr_of(mem) + PAGES * PAGE,
        .pfns = pfns,
        .default_flags = want,
        .flags = PM_WALK_FAULT,
        .sub = sub,
    };

    CHECK_EQ(pm_sub_read_begin(sub, SECOND, &walk.seq), 0);
    CHECK_EQ(pm_walk(mm, &walk), 0);
    return walk.seq;
}

static struct pm_dmap_options mirror(uint64_t seq)
{
    return (struct pm_dmap_options){
        .domain = domain,
        .sub = sub,
        .seq = seq,
        .start = addr_of(mem),
        .n = PAGES,
        .pfns = pfns,
        .daddrs = daddrs,
        .mask = UINT64_MAX,
        .cookie = 7,
        .source = PM_DMA_MIRROR,
    };
}

static pm_dmap *map(uint64_t want)
{
    struct pm_dmap_options opt = mirror(fault(want));
    pm_dmap *made = NULL;

    CHECK_EQ(pm_dmap_create(&opt, &made), 0);
    return made;
}

static int dma(uint64_t addr, void *buf, uint64_t len, int write, struct pm_dma_access *ret)
{
    struct pm_dma_access access = {
        .addr = addr, .len = len, .buf = buf, .mask = UINT64_MAX, .write = (uint32_t)write};
    int err = pm_dma_access(domain, &access);

    if (ret)
        *ret = access;
    return err;
}

static void unmap(pm_dmap *dmap, int64_t pages)
{
    CHECK_EQ(pm_dmap_unmap(dmap, NULL), pages);
    CHECK_EQ(pm_dmap_unmap(dmap, NULL), 0);
    pm_dmap_put(dmap);
}

static void invalidate(uint64_t page, uint64_t n, bool delivered)
{
    uint64_t start = addr_of(mem) + page * PAGE, seq;
    pm_inv *inv;

    NEED_EQ(pm_invalidate_start(mm, start, start + n * PAGE, PM_CLEAR, PM_BEFORE, &inv, &seq), 0);
    if (delivered)
        CHECK_EQ(pm_invalidate_delivered(inv), 0);
    CHECK_EQ(pm_invalidate_end(inv), 0);
}

static void reads_and_writes_through_it(void)
{
    static char buf[PAGES * PAGE];
    pm_dmap *dmap = map(WANT_WRITE);

    for (size_t i = 0; i < sizeof(buf); i++)
        mem[i] = (char)(i * 7 + i / PAGE);
    CHECK_EQ(dma(daddrs[0], buf, sizeof(buf), 0, NULL), 0);
    CHECK(memcmp(buf, mem, sizeof(buf)) == 0);
    CHECK_EQ(dma(daddrs[5] + 4090, (char[]){"twelve bytes"}, 12, 1, NULL), 0);
    CHECK(memcmp(mem + 5 * PAGE + 4090, "twelve bytes", 12) == 0);
    CHECK_EQ(stats().mapped_pages, PAGES);
    unmap(dmap, PAGES);
}

static void what_is_not_there_has_no_address(void)
{
    pm_dmap *dmap;

    mem[PAGE] = 1;
    dmap = map(0);
    CHECK_EQ(daddrs[0], 0);
    CHECK(daddrs[1] != 0);
    unmap(dmap, 1);
}

static void refuses_what_is_not_mapped(void)
{
    struct pm_dma_access access;
    char c;
    pm_dmap *dmap = map(WANT_READ);

    CHECK_EQ(dma(daddrs[0] - PAGE, &c, 1, 0, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
    CHECK_EQ(dma(daddrs[3], &c, 1, 1, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_READONLY);
    CHECK_EQ(access.cookie, 7);
    CHECK_EQ(access.fault_start, addr_of(mem) + 3 * PAGE);
    unmap(dmap, PAGES);
    CHECK_EQ(dma(daddrs[0], &c, 1, 0, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
}

static void an_invalidation_fences_it(void)
{
    struct pm_dma_access access;
    char c;
    pm_dmap *dmap = map(WANT_WRITE);

    invalidate(2, 3, true);
    CHECK_EQ(stats().fenced, 3);
    for (int page = 1; page < 6; page++) {
        int fenced = page >= 2 && page < 5;

        CHECK_EQ(dma(daddrs[page], &c, 1, 0, &access), fenced ? -EFAULT : 0);
        CHECK_EQ(access.fault, fenced ? PM_FAULT_STALE : PM_FAULT_NONE);
    }
    CHECK_EQ(pm_dmap_unlink(dmap, 2, 2, NULL), 2);
    CHECK_EQ(dma(daddrs[2], &c, 1, 0, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
    unmap(dmap, PAGES - 2);
}

static void a_refused_invalidation_leaves_nothing_fenced(void)
{
    struct pm_dma_access access;
    char c;
    pm_dmap *dmap = map(WANT_WRITE);

    invalidate(0, PAGES, false);
    CHECK_EQ(dma(daddrs[0], &c, 1, 0, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
    CHECK_EQ(stats().mapped_pages, 0);
    unmap(dmap, 0);
}

static void a_sequence_that_moved_maps_nothing(void)
{
    struct pm_dmap_options opt = mirror(fault(WANT_READ));
    pm_dmap *dmap = NULL;

    invalidate(PAGES - 1, 1, true);
    CHECK_EQ(pm_dmap_create(&opt, &dmap), -EBUSY);
    CHECK(dmap == NULL);
    CHECK_EQ(iovas_live(), 0);
}

static void no_iovas_below_the_mask(void)
{
    struct pm_dmap_options opt = mirror(fault(WANT_READ));
    pm_dmap *dmap = NULL;

    opt.mask = 0xffff;
    CHECK_EQ(pm_dmap_create(&opt, &dmap), -ENOSPC);
    CHECK_EQ(iovas_live(), 0);
}

static void lazily_unmapped_addresses_are_refused_and_not_given_out_again(void)
{
    struct pm_dma_access access;
    uint64_t first;
    char c;
    pm_dmap *dmap;

    pm_domain_put(domain);
    domain = new_domain(PM_DOMAIN_LAZY);
    dmap = map(WANT_READ);
    first = daddrs[0];
    CHECK_EQ(dma(first, &c, 1, 0, NULL), 0);
    unmap(dmap, PAGES);
    CHECK_EQ(stats().lazy_pending, 1);
    CHECK_EQ(dma(first, &c, 1, 0, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
    CHECK_EQ(stats().iotlb_stale, 1);
    dmap = map(WANT_READ);
    CHECK(daddrs[0] != first);
    unmap(dmap, PAGES);
    CHECK_EQ(pm_domain_flush(domain), 2);
    CHECK_EQ(stats().lazy_pending, 0);
}

static void many_are_mapped_and_unmapped_lazily(void)
{
    pm_domain_put(domain);
    domain = new_domain(PM_DOMAIN_LAZY);
    for (int i = 0; i < 600; i++)
        unmap(map(0), 0);
    CHECK_EQ(stats().lazy_pending, 600 % 256);
    CHECK_EQ(stats().iotlb_flushes, 600 / 256);
}

static void driver_memory_is_reached_byte_by_byte(void)
{
    struct pm_dmap_options opt = {.domain = domain,
                                  .start = addr_of(mem) + 100,
                                  .n = 2,
                                  .size = PAGE + 50,
                                  .mask = UINT64_MAX,
                                  .source = PM_DMA_KERNEL,
                                  .direction = PM_DMA_TO_DEVICE};
    struct pm_dma_access access;
    struct pm_dmap_info info;
    char buf[PAGE + 50];
    pm_dmap *dmap;

    memset(mem, 'k', 2 * PAGE);
    NEED_EQ(pm_dmap_create(&opt, &dmap), 0);
    NEED_EQ(pm_dmap_info(dmap, &info), 0);
    CHECK_EQ(info.iova % PAGE, 100);
    CHECK_EQ(info.size, PAGE + 50);
    CHECK_EQ(dma(info.iova, buf, sizeof(buf), 0, NULL), 0);
    CHECK(memcmp(buf, mem + 100, sizeof(buf)) == 0);
    CHECK_EQ(dma(info.iova - 1, buf, 1, 0, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MISSING);
    CHECK_EQ(dma(info.iova + 1, buf, sizeof(buf), 0, &access), -EFAULT);
    CHECK_EQ(access.done, sizeof(buf) - 1);
    CHECK_EQ(dma(info.iova, buf, 1, 1, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_DIRECTION);
    unmap(dmap, 2);
}

static void pages_are_linked_one_by_one(void)
{
    uint64_t seq = fault(WANT_WRITE);
    struct pm_dmap_options opt = mirror(seq);
    struct pm_dmap_info info;
    char c;
    pm_dmap *dmap;

    opt.flags = PM_DMAP_EMPTY;
    NEED_EQ(pm_dmap_create(&opt, &dmap), 0);
    NEED_EQ(pm_dmap_info(dmap, &info), 0);
    mem[9 * PAGE] = 'x';
    CHECK_EQ(dma(info.iova + 9 * PAGE, &c, 1, 0, NULL), -EFAULT);
    CHECK_EQ(pm_dmap_link(dmap, sub, seq, 9, 1, pfns + 9), 0);
    CHECK_EQ(pm_dmap_link(dmap, sub, seq, 8, 2, pfns + 8), -EEXIST);
    CHECK_EQ(dma(info.iova + 9 * PAGE, &c, 1, 0, NULL), 0);
    CHECK_EQ(c, 'x');
    invalidate(9, 1, true);
    CHECK_EQ(pm_dmap_link(dmap, sub, seq, 10, 1, pfns + 10), -EBUSY);
    unmap(dmap, 1);
}

static void without_an_iommu_the_address_is_the_pages_own(void)
{
    struct pm_dmap_options opt;
    pm_dmap *first, *second;
    char c;

    if (!mm_has(mm, PM_FEAT_PFN))
        LEAVE_OUT("PFNs are not to be seen");
    pm_domain_put(domain);
    domain = new_domain(PM_DOMAIN_DIRECT);
    first = map(WANT_WRITE);
    for (int i = 0; i < PAGES; i++)
        CHECK_EQ(daddrs[i], (pfns[i] & ((1ULL << 52) - 1)) * PAGE);
    opt = mirror(fault(WANT_WRITE));
    NEED_EQ(pm_dmap_create(&opt, &second), 0);
    mem[77 * PAGE + 3] = 'd';
    CHECK_EQ(dma(daddrs[77] + 3, &c, 1, 0, NULL), 0);
    CHECK_EQ(c, 'd');
    unmap(first, PAGES);
    CHECK_EQ(dma(daddrs[77] + 3, &c, 1, 0, NULL), 0);
    unmap(second, PAGES);
    CHECK_EQ(dma(daddrs[77] + 3, &c, 1, 0, NULL), -EFAULT);
    opt = mirror(fault(WANT_WRITE));
    opt.mask = 0xfff;
    CHECK_EQ(pm_dmap_create(&opt, &second), -EFAULT);
}

static void a_closed_mm_is_fenced(void)
{
    struct pm_dma_access access;
    char c;
    pm_dmap *dmap = map(WANT_READ);

    CHECK_EQ(pm_mm_close(mm), 0);
    CHECK_EQ(dma(daddrs[0], &c, 1, 0, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_STALE);
    unmap(dmap, PAGES);
    drop_sub(sub);
    pm_mm_put(mm);
    mm = open_mm();
    sub = new_sub(mm, mem, PAGES);
}

static void no_memory_leaves_nothing(void)
{
    uint64_t seq = fault(WANT_READ), nth = 0;
    int err = -ENOMEM;

    while (err && nth < 10) {
        struct pm_dmap_options opt = mirror(seq);
        pm_dmap *dmap = NULL;

        CHECK_EQ(pm_inject(PM_SYS_MALLOC, ++nth, 1, ENOMEM, 0), 0);
        err = pm_dmap_create(&opt, &dmap);
        pm_inject_clear();
        if (err) {
            CHECK_EQ(err, -ENOMEM);
            CHECK_EQ(stats().mappings, 0);
            CHECK_EQ(iovas_live(), 0);
        } else {
            unmap(dmap, PAGES);
        }
    }
    CHECK_EQ(err, 0);
}

struct reader {
    atomic_bool stop;
    atomic_uint_least64_t reads;
    uint64_t refused;
};

static void *keep_reading(void *arg)
{
    struct reader *reader = arg;
    char buf[3 * PAGE];

    while (!atomic_load(&reader->stop)) {
        if (dma(((1ULL << 48) - HUGE_BYTES), buf, sizeof(buf), (int)(reader->reads & 1), NULL))
            reader->refused++;
        reader->reads++;
    }
    return NULL;
}

static pm_dmap *created;

static void *create_main(void *arg)
{
    CHECK_EQ(pm_dmap_create(arg, &created), 0);
    return NULL;
}

static void threads_read_while_it_is_mapped_and_unmapped(void)
{
    struct reader reader = {0};
    pthread_t thread;

    CHECK_EQ(pthread_create(&thread, NULL, keep_reading, &reader), 0);
    while (atomic_load(&reader.reads) == 0)
        usleep(100);
    for (int i = 0; i < 300; i++) {
        pm_dmap *dmap = map(WANT_WRITE);

        if (i % 3 == 0)
            invalidate((uint64_t)i % PAGES, 1, true);
        unmap(dmap, PAGES);
    }
    atomic_store(&reader.stop, true);
    pthread_join(thread, NULL);
}

static void *map_and_unmap(void *arg)
{
    struct pm_dmap_options opt = {.domain = domain,
                                  .start = addr_of(mem),
                                  .n = 1,
                                  .size = PAGE,
                                  .mask = UINT64_MAX,
                                  .source = PM_DMA_KERNEL};

    for (int i = 0; i < *(int *)arg; i++) {
        pm_dmap *dmap;

        if (!CHECK_EQ(pm_dmap_create(&opt, &dmap), 0))
            break;
        unmap(dmap, 1);
    }
    return NULL;
}

static void threads_unmap_lazily(void)
{
    enum { THREADS = 4 };
    int times = 5000;
    pthread_t thread[THREADS];

    pm_domain_put(domain);
    domain = new_domain(PM_DOMAIN_LAZY);
    for (int i = 0; i < THREADS; i++)
        CHECK_EQ(pthread_create(&thread[i], NULL, map_and_unmap, &times), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(thread[i], NULL);
    CHECK_EQ(stats().lazy_pending, THREADS * (uint64_t)times % 256);
}

static void what_is_put_while_it_is_mapped_waits_for_the_flush(void)
{
    struct pm_dma_access access;
    char c;

    pm_domain_put(domain);
    domain = new_domain(PM_DOMAIN_LAZY);
    pm_dmap_put(map(WANT_READ));
    CHECK_EQ(stats().mappings, 0);
    CHECK_EQ(stats().lazy_pending, 1);
    CHECK_EQ(dma(daddrs[0], &c, 1, 0, &access), -EFAULT);
    CHECK_EQ(pm_domain_flush(domain), 1);
}

/* LeakSanitizer tells: the domain and the last mapping would keep each other. */
static void a_lazy_domain_goes_with_its_last_mapping(void)
{
    pm_domain *lazy = new_domain(PM_DOMAIN_LAZY), *kept = domain;
    pm_dmap *dmap;

    domain = lazy;
    dmap = map(WANT_READ);
    pm_domain_put(lazy);
    domain = kept;
    CHECK_EQ(pm_dmap_unmap(dmap, NULL), PAGES);
    CHECK_EQ(pm_domain_flush(lazy), 0);
    pm_dmap_put(dmap);
}

static void iovas_of_the_callers_are_free_at_once(void)
{
    struct pm_dmap_options opt = {.domain = domain,
                                  .start = addr_of(mem),
                                  .n = 1,
                                  .size = PAGE,
                                  .mask = UINT64_MAX,
                                  .source = PM_DMA_KERNEL,
                                  .flags = PM_DMAP_AT};
    pm_dmap *dmap;
    char c;

    pm_domain_put(domain);
    opt.domain = domain = new_domain(PM_DOMAIN_LAZY);
    NEED_EQ(pm_iova_alloc(pm_domain_iovas(domain), PAGE, UINT64_MAX, &opt.iova), 0);
    for (int i = 0; i < 2; i++) {
        NEED_EQ(pm_dmap_create(&opt, &dmap), 0);
        CHECK_EQ(dma(opt.iova, &c, 1, 0, NULL), 0);
        unmap(dmap, 1);
    }
    CHECK_EQ(stats().iotlb_stale, 0);
    CHECK_EQ(pm_iova_free(pm_domain_iovas(domain), opt.iova, PAGE), 0);
}

static void one_unmapping_is_one_flush(void)
{
    unmap(map(WANT_READ), PAGES);
    CHECK_EQ(stats().iotlb_flushes, 1);
}

static void what_is_refused_gives_no_addresses(void)
{
    struct pm_dmap_options opt = mirror(fault(WANT_READ));
    pm_dmap *dmap = NULL;

    invalidate(0, 1, true);
    CHECK_EQ(pm_dmap_create(&opt, &dmap), -EBUSY);
    for (int i = 0; i < PAGES; i++)
        CHECK_EQ(daddrs[i], 0);
}

static void extents_beyond_64_bits_are_refused(void)
{
    struct pm_dmap_options opt = {.domain = domain,
                                  .start = addr_of(mem) + 100,
                                  .n = 1,
                                  .size = UINT64_MAX - 50,
                                  .mask = UINT64_MAX,
                                  .source = PM_DMA_KERNEL};
    pm_dmap *dmap = NULL;

    CHECK_EQ(pm_dmap_create(&opt, &dmap), -EINVAL);
    opt.n = 2;
    opt.size = PAGE;
    opt.flags = PM_DMAP_AT;
    opt.iova = -(uint64_t)PAGE;
    CHECK_EQ(pm_dmap_create(&opt, &dmap), -EINVAL);
}

/* What a refused invalidation drops is not counted twice, if it comes before the call that maps is over. */
static void pages_are_counted_from_the_commit_on(void)
{
    struct pm_dmap_options opt = mirror(fault(WANT_READ));
    pthread_t thread;

    NEED_EQ(pm_point_arm(PM_POINT_DMA_MAP_AFTER_COMMIT), 0);
    NEED_EQ(pthread_create(&thread, NULL, create_main, &opt), 0);
    NEED_EQ(pm_point_wait(PM_POINT_DMA_MAP_AFTER_COMMIT, SECOND), 0);
    invalidate(0, 10, false);
    CHECK_EQ(stats().mapped_pages, PAGES - 10);
    pm_point_release(PM_POINT_DMA_MAP_AFTER_COMMIT);
    pthread_join(thread, NULL);
    CHECK_EQ(stats().mapped_pages, PAGES - 10);
    unmap(created, PAGES - 10);
}

/* The first PFN that a walk finds changed, behind the back of every notifier. */
static void a_walk_finds_a_page_that_was_exchanged(void)
{
    struct pm_walk again = {
        .start = addr_of(mem),
        .end = addr_of(mem) + PAGES * PAGE,
        .pfns = pfns,
        .flags = PM_WALK_VERIFY,
        .sub = sub,
    };
    pm_dmap *dmap;

    if (!mm_has(mm, PM_FEAT_PFN))
        LEAVE_OUT("PFNs are not to be seen");
    dmap = map(WANT_READ);
    NEED_EQ(pm_sub_read_begin(sub, SECOND, &again.seq), 0);
    CHECK_EQ(pm_walk(mm, &again), 0);
    /* Copies take the place of the zero page. */
    mem[530 * PAGE] = mem[531 * PAGE] = 1;
    CHECK_EQ(pm_walk(mm, &again), -ESTALE);
    CHECK_EQ(again.fail_start, addr_of(mem) + 530 * PAGE);
    CHECK_EQ(again.fail_end, addr_of(mem) + 532 * PAGE);
    CHECK_EQ(pm_dmap_unlink(dmap, 530, 2, NULL), 2);
    CHECK_EQ(pm_walk(mm, &again), 0);
    unmap(dmap, PAGES - 2);
}

static const struct test tests[] = {
    TEST(reads_and_writes_through_it),
    TEST(what_is_not_there_has_no_address),
    TEST(refuses_what_is_not_mapped),
    TEST(an_invalidation_fences_it),
    TEST(a_refused_invalidation_leaves_nothing_fenced),
    TEST(a_sequence_that_moved_maps_nothing),
    TEST(no_iovas_below_the_mask),
    TEST(lazily_unmapped_addresses_are_refused_and_not_given_out_again),
    TEST(many_are_mapped_and_unmapped_lazily),
    TEST(driver_memory_is_reached_byte_by_byte),
    TEST(pages_are_linked_one_by_one),
    TEST(without_an_iommu_the_address_is_the_pages_own),
    TEST(a_closed_mm_is_fenced),
    TEST(no_memory_leaves_nothing),
    TEST(threads_unmap_lazily),
    TEST(what_is_put_while_it_is_mapped_waits_for_the_flush),
    TEST(a_lazy_domain_goes_with_its_last_mapping),
    TEST(iovas_of_the_callers_are_free_at_once),
    TEST(one_unmapping_is_one_flush),
    TEST(what_is_refused_gives_no_addresses),
    TEST(extents_beyond_64_bits_are_refused),
    TEST(pages_are_counted_from_the_commit_on),
    TEST(a_walk_finds_a_page_that_was_exchanged),
    TEST(threads_read_while_it_is_mapped_and_unmapped),
};

int main(int argc, char **argv)
{
    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
