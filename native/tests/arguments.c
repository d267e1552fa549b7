/* SPDX-License-Identifier: MIT */
/*
 * No length, address or number that the Python side might get wrong is taken for true: each entry of
 * pymirror.h refuses what is beyond its bounds before it touches an array. Arrays here are as long as the
 * right arguments say, so that a sanitizer sees a touch beyond.
 */
#include "check.h"
#include "pymirror.h"
#include "util.h"

enum { PAGES = 4, DEVICE_PAGES = 512 };

#define USER_END (1ULL << 47)
#define TOP (UINT64_MAX - PAGE + 1)
/* So many pages, or array elements, are no bytes at all in 64 bits. */
#define WRAPS (1ULL << 52)
#define WRAPS_WORDS (1ULL << 61)

static pm_mm *mm, *other;
static char *mem;
static pm_sub *sub, *others;
static uint64_t words[PAGES];
static uint8_t bytes[PAGES];

static void before(void)
{
    mm = open_mm();
    other = open_mm();
    mem = new_pages(PAGES);
    memset(mem, 1, PAGES * PAGE);
    sub = new_sub(mm, mem, PAGES);
    others = new_sub(other, mem, PAGES);
}

static void after(void)
{
    drop_sub(sub);
    drop_sub(others);
    close_mm(mm);
    close_mm(other);
    free_pages(mem, PAGES);
}

struct interval {
    uint64_t start, end;
};

enum { WRONG = 8 };

/* None is one of whole pages of user memory. */
static struct interval wrong(unsigned i)
{
    uint64_t at = addr_of(mem);
    const struct interval all[WRONG] = {
        {at + 1, at + PAGE},         {at, at + PAGE + 1}, {at, at},  {at + PAGE, at},
        {USER_END, USER_END + PAGE}, {at, TOP},           {TOP, at}, {at, UINT64_MAX},
    };

    return all[i];
}

/* Numbers of pages that are not there, or whose bytes are none. */
static const uint64_t too_many[] = {USER_END / PAGE, USER_END / PAGE + 1, WRAPS,     WRAPS + 1,
                                    WRAPS_WORDS,     WRAPS_WORDS + 1,     UINT64_MAX};

static void walks(void)
{
    struct pm_walk walk;

    for (unsigned i = 0; i < WRONG; i++) {
        walk = (struct pm_walk){.start = wrong(i).start, .end = wrong(i).end, .pfns = words};
        CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
        CHECK_EQ(pm_walk_inout(mm, &walk), -EINVAL);
    }
    walk = (struct pm_walk){.start = addr_of(mem), .end = addr_of(mem) + PAGES * PAGE};
    CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
    CHECK_EQ(pm_walk_inout(mm, &walk), -EINVAL);
    walk.pfns = words;
    walk.flags = 16;
    CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
    walk.flags = 0;
    walk.sub = others;
    CHECK_EQ(pm_walk(mm, &walk), -EINVAL);
    walk.sub = sub;
    walk.seq = pm_sub_seq(sub);
    CHECK_EQ(pm_walk(mm, &walk), 0);
}

static void pagemap(void)
{
    CHECK_EQ(pm_pagemap_read(mm, addr_of(mem) + 1, 1, words), -EINVAL);
    CHECK_EQ(pm_pagemap_read(mm, addr_of(mem), WRAPS, words), -EINVAL);
    CHECK_EQ(pm_pagemap_read(mm, addr_of(mem), WRAPS_WORDS + 1, words), -EINVAL);
    CHECK_EQ(pm_pagemap_read(mm, TOP, 2, words), -EINVAL);
}

static void watching(void)
{
    /* Notifiers are of 64 bits. */
    for (unsigned i = 0; i < 4; i++) {
        CHECK_EQ(pm_watch(mm, wrong(i).start, wrong(i).end, 0), -EINVAL);
        CHECK_EQ(pm_unwatch(mm, wrong(i).start, wrong(i).end), -EINVAL);
    }
    CHECK_EQ(pm_watch(mm, addr_of(mem), addr_of(mem) + PAGE, 4), -EINVAL);
}

static void notifiers(void)
{
    uint64_t seq;
    pm_inv *inv;
    pm_sub *made;

    CHECK_EQ(pm_sub_insert(mm, 2, 1, 1, 1, &made), -EINVAL);
    CHECK_EQ(pm_sub_insert(mm, 1, 2, 1, 0, &made), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, PAGE, 1, PM_CLEAR, PM_BEFORE, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, 0, PAGE, PM_EXCLUSIVE + 1, PM_BEFORE, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, 0, PAGE, -1, PM_BEFORE, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, 0, PAGE, PM_CLEAR, PM_DETECTED + 1, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_invalidate_start(mm, 0, PAGE, PM_CLEAR, -1, &inv, &seq), -EINVAL);
    CHECK_EQ(pm_event_done(mm), -EINVAL);
    words[1] = 0;
    CHECK_EQ(pm_overlapping(mm, 0, 0, ~0U, words, 0), 1);
    CHECK_EQ(words[1], 0);
}

static void page_tables(void)
{
    pm_table *table = new_table();
    uint64_t seq = pm_sub_seq(sub), at = addr_of(mem), changed[2];

    for (unsigned i = 0; i < COUNT_OF(too_many); i++) {
        CHECK_EQ(pm_table_map(table, sub, seq, at, too_many[i], words), -EINVAL);
        if (too_many[i] > USER_END / PAGE)
            CHECK_EQ(pm_table_read(table, at, too_many[i], words), -EINVAL);
    }
    CHECK_EQ(pm_table_map(table, sub, seq, at, PAGES + 1, words), -EINVAL);
    CHECK_EQ(pm_table_map(table, sub, seq, at - PAGE, 1, words), -EINVAL);
    CHECK_EQ(pm_table_map(table, sub, seq, at + 1, 1, words), -EINVAL);
    CHECK_EQ(pm_table_map(table, sub, seq, at, 0, words), -EINVAL);
    CHECK_EQ(pm_table_read(table, at + 1, 1, words), -EINVAL);
    /* Nothing is in the table yet that could be looked at. */
    words[0] = 1ULL << 63;
    CHECK_EQ(pm_table_map(table, sub, seq, at, 1, words), 0);
    for (unsigned i = 0; i < WRONG; i++) {
        if (wrong(i).start != wrong(i).end)
            CHECK_EQ(pm_table_verify(table, wrong(i).start, wrong(i).end, changed, changed + 1), -EINVAL);
    }
    CHECK_EQ(pm_table_map(table, others, pm_sub_seq(others), at, 1, words), -EXDEV);
    pm_table_put(table);
}

static void accesses(void)
{
    pm_table *table = new_table();
    char buf[8];
    struct pm_access access = {.addr = addr_of(mem), .len = UINT64_MAX, .buf = buf};
    struct pm_atomic atomic = {.addr = addr_of(mem), .size = 3};

    CHECK_EQ(pm_access(table, &access), -EINVAL);
    access.len = 0;
    CHECK_EQ(pm_access(table, &access), -EINVAL);
    access = (struct pm_access){.addr = USER_END, .len = 8, .buf = buf};
    CHECK_EQ(pm_access(table, &access), -EINVAL);
    access = (struct pm_access){.addr = USER_END - 4, .len = 8, .buf = buf};
    CHECK_EQ(pm_access(table, &access), -EINVAL);
    CHECK_EQ(pm_access_atomic(table, &atomic), -EINVAL);
    atomic = (struct pm_atomic){.addr = addr_of(mem) + 4, .size = 8};
    CHECK_EQ(pm_access_atomic(table, &atomic), -EINVAL);
    atomic = (struct pm_atomic){.addr = USER_END, .size = 8};
    CHECK_EQ(pm_access_atomic(table, &atomic), -EINVAL);
    atomic = (struct pm_atomic){.addr = addr_of(mem), .size = 8, .op = PM_ATOMIC_CAS + 1};
    CHECK_EQ(pm_access_atomic(table, &atomic), -EINVAL);
    pm_table_put(table);
}

/* The caller's buffer is reached by the kernel, which looks before it copies. */
static void buffers_that_are_not_there(void)
{
    pm_table *table = new_table();
    struct pm_access access = {.addr = addr_of(mem), .len = PAGE, .buf = (void *)(uintptr_t)8};

    NEED_EQ(mirror_pages(mm, table, sub, mem, PAGES, WANT_WRITE), 0);
    for (access.write = 0; access.write < 2; access.write++) {
        CHECK_EQ(pm_access(table, &access), -EFAULT);
        CHECK_EQ(access.fault, PM_FAULT_NONE);
    }
    pm_table_put(table);
}

static void pins(void)
{
    struct pm_pinning pinning;
    uint64_t done;
    pm_pin *pin = NULL;

    for (unsigned i = 0; i < COUNT_OF(too_many); i++) {
        pinning = (struct pm_pinning){.start = addr_of(mem), .npages = too_many[i], .pfns = words};
        CHECK_EQ(pm_pin_create(mm, &pinning, &pin), -EINVAL);
    }
    pinning = (struct pm_pinning){.start = addr_of(mem) + 1, .npages = 1};
    CHECK_EQ(pm_pin_create(mm, &pinning, &pin), -EINVAL);
    pinning = (struct pm_pinning){.start = USER_END, .npages = 1};
    CHECK_EQ(pm_pin_create(mm, &pinning, &pin), -EINVAL);
    pinning = (struct pm_pinning){.start = addr_of(mem), .npages = 1, .flags = 2};
    CHECK_EQ(pm_pin_create(mm, &pinning, &pin), -EINVAL);
    pinning.flags = 0;
    if (!mm_has(mm, PM_FEAT_IO_URING))
        LEAVE_OUT("no io_uring");
    NEED_EQ(pm_pin_create(mm, &pinning, &pin), 0);
    CHECK_EQ(pm_pin_access(pin, PAGE - 1, words, 2, 0, &done), -EINVAL);
    CHECK_EQ(pm_pin_access(pin, PAGE + 1, words, 0, 0, &done), -EINVAL);
    CHECK_EQ(pm_pin_access(pin, 8, words, UINT64_MAX - 4, 0, &done), -EINVAL);
    CHECK_EQ(pm_pin_release(pin), 0);
    CHECK_EQ(pm_pin_access(pin, 0, words, 8, 0, &done), -EALREADY);
    CHECK_EQ(pm_pin_release(pin), -EALREADY);
    CHECK_EQ(pm_pin_hold(pin), -EALREADY);
    pm_pin_put(pin);
}

/* Of a device's pages only the ends of arrays are of interest here. */
static void device_pages(pm_devmem *vram)
{
    uint64_t at = addr_of(mem), pfn, n;

    for (unsigned i = 0; i < COUNT_OF(too_many); i++) {
        CHECK_EQ(pm_devmem_holds(vram, at, too_many[i], bytes), -EINVAL);
        CHECK_EQ(pm_coherent_pages(mm, vram, at, too_many[i], bytes), -EINVAL);
        CHECK_EQ(pm_devmem_alloc(vram, at, too_many[i], bytes, words), -EINVAL);
        CHECK_EQ(pm_migrate_pages(vram, at, too_many[i], words, bytes), -EINVAL);
        if (too_many[i] > USER_END / PAGE)
            CHECK_EQ(pm_devmem_free(vram, too_many[i], words), -EINVAL);
    }
    NEED_EQ(pm_devmem_range(vram, &pfn, &n), 0);
    CHECK_EQ(pm_devmem_addrs(vram, pfn, n + 1, words), -EINVAL);
    CHECK_EQ(pm_devmem_addrs(vram, pfn + n - 1, 2, words), -EINVAL);
    CHECK_EQ(pm_devmem_addrs(vram, pfn + n, 1, words), -EINVAL);
    CHECK_EQ(pm_devmem_addrs(vram, pfn - 1, 1, words), -EINVAL);
    CHECK_EQ(pm_devmem_addrs(vram, pfn + 1, UINT64_MAX, words), -EINVAL);
    CHECK_EQ(pm_devmem_addrs(vram, 0, 1, words), -EINVAL);
}

/* Slots that were never set aside are nobody's: nothing moves to them, nothing is given back. */
static void slots_of_others(pm_devmem *vram)
{
    uint64_t pfn, n, pfns[] = {0, 1, 0, 0};

    NEED_EQ(pm_devmem_range(vram, &pfn, &n), 0);
    pfns[2] = pfn;
    pfns[3] = pfn + n;
    CHECK_EQ(pm_devmem_free(vram, COUNT_OF(pfns), pfns), 0);
    CHECK_EQ(pm_migrate_pages(vram, addr_of(mem), PAGES, pfns, bytes), 0);
    CHECK_EQ(bytes[0] + bytes[1] + bytes[2] + bytes[3], 0);
    CHECK_EQ(pm_devmem_used(vram), 0);
    CHECK_EQ(mem[0] + mem[3 * PAGE], 2);
}

static void device_memory(void)
{
    pm_devmem *vram = NULL;
    uint64_t moved;

    CHECK_EQ(pm_devmem_create(mm, 0, 1, &vram), -EINVAL);
    CHECK_EQ(pm_devmem_create(mm, PAGE + 1, 1, &vram), -EINVAL);
    CHECK_EQ(pm_devmem_create(mm, USER_END, 1, &vram), -EINVAL);
    CHECK_EQ(pm_devmem_create(mm, TOP, 1, &vram), -EINVAL);
    if (!can_migrate(mm, 0))
        LEAVE_OUT("no device memory");
    NEED_EQ(pm_devmem_create(mm, DEVICE_PAGES * PAGE, 1, &vram), 0);
    for (unsigned i = 0; i < WRONG; i++) {
        struct interval one = wrong(i);

        CHECK_EQ(pm_devmem_populate(vram, one.start, one.end), -EINVAL);
        CHECK_EQ(pm_migrate_to_device(vram, one.start, one.end, &moved), -EINVAL);
        CHECK_EQ(pm_migrate_to_system(mm, one.start, one.end, NULL, &moved), -EINVAL);
        CHECK_EQ(pm_migrate_level(mm, one.start, one.end), -EINVAL);
    }
    CHECK_EQ(pm_devmem_fault_around(vram, 8192), -EINVAL);
    CHECK_EQ(pm_devmem_timeslice(vram, SECOND + 1), -EINVAL);
    device_pages(vram);
    slots_of_others(vram);
    if (mm_has(mm, PM_FEAT_PFN)) {
        CHECK_EQ(pm_devmem_coherent(vram), 0);
        CHECK_EQ(pm_devmem_coherent(vram), -EBUSY);
    }
    CHECK_EQ(pm_devmem_destroy(vram), 0);
}

static void exclusive_access(void)
{
    pm_devmem *arena = NULL;

    if (!can_migrate(mm, 0))
        LEAVE_OUT("no device memory");
    NEED_EQ(pm_exclusive_create(mm, DEVICE_PAGES * PAGE, &arena), 0);
    for (unsigned i = 0; i < WRONG; i++) {
        struct interval one = wrong(i);

        CHECK_EQ(pm_exclusive_fault(arena, one.start, &one.end), -EINVAL);
        CHECK_EQ(pm_exclusive(arena, one.start, wrong(i).end, words), -EINVAL);
        CHECK_EQ(pm_exclusive_pfns(arena, one.start, wrong(i).end, words), -EINVAL);
    }
    CHECK_EQ(pm_devmem_destroy(arena), 0);
}

static void iovas(void)
{
    pm_iova_space *space = NULL;
    uint64_t iova;

    CHECK_EQ(pm_iova_create(1, PAGE * 8 - 1, &space), -EINVAL);
    CHECK_EQ(pm_iova_create(0, PAGE * 8, &space), -EINVAL);
    CHECK_EQ(pm_iova_create(PAGE * 8, PAGE * 4 - 1, &space), -EINVAL);
    CHECK_EQ(pm_iova_create(0, PAGE - 1, &space), -EINVAL);
    NEED_EQ(pm_iova_create(0, UINT64_MAX, &space), 0);
    CHECK_EQ(pm_iova_alloc(space, 0, UINT64_MAX, &iova), -EINVAL);
    CHECK_EQ(pm_iova_alloc(space, UINT64_MAX, UINT64_MAX, &iova), -ENOSPC);
    CHECK_EQ(pm_iova_alloc(space, PAGE, PAGE - 2, &iova), -ENOSPC);
    CHECK_EQ(pm_iova_free(space, PAGE, PAGE), -ENOENT);
    CHECK_EQ(pm_iova_free(space, PAGE + 1, PAGE), -EINVAL);
    NEED_EQ(pm_iova_alloc(space, PAGE, UINT64_MAX, &iova), 0);
    CHECK_EQ(pm_iova_free(space, iova, 2 * PAGE), -EINVAL);
    CHECK_EQ(pm_iova_free(space, iova, UINT64_MAX), -EINVAL);
    CHECK_EQ(pm_iova_free(space, iova, PAGE), 0);
    CHECK_EQ(pm_iova_free(space, iova, PAGE), -ENOENT);
    CHECK_EQ(pm_iova_size(space, iova), -ENOENT);
    CHECK_EQ(pm_iova_reserve(space, 2, 1), -EINVAL);
    pm_iova_destroy(space);
}

static int create(const struct pm_dmap_options *opt)
{
    pm_dmap *dmap = NULL;
    int err = pm_dmap_create(opt, &dmap);

    if (!err)
        pm_dmap_put(dmap);
    return err;
}

static void dma_mappings(void)
{
    struct pm_domain_options aperture = {.first = PAGE, .last = (1ULL << 48) - 1, .flags = 4};
    struct pm_dmap_options right, opt;
    pm_domain *domain = NULL;
    pm_dmap *dmap;

    CHECK_EQ(pm_domain_create(&aperture, &domain), -EINVAL);
    aperture.flags = 0;
    NEED_EQ(pm_domain_create(&aperture, &domain), 0);
    right = (struct pm_dmap_options){.domain = domain,
                                     .sub = sub,
                                     .seq = pm_sub_seq(sub),
                                     .start = addr_of(mem),
                                     .n = PAGES,
                                     .pfns = words,
                                     .mask = UINT64_MAX};
    CHECK_EQ(create(&right), 0);
    for (unsigned i = 0; i < COUNT_OF(too_many); i++) {
        opt = right;
        opt.n = too_many[i];
        CHECK_EQ(create(&opt), -EINVAL);
    }
#define REFUSED(change)                                                                                      \
    do {                                                                                                     \
        opt = right;                                                                                         \
        change;                                                                                              \
        CHECK_EQ(create(&opt), -EINVAL);                                                                     \
    } while (0)
    REFUSED(opt.n = 0);
    REFUSED(opt.n = PAGES + 1); /* beyond the notifier */
    REFUSED(opt.start -= PAGE);
    REFUSED(opt.start += 1);
    REFUSED(opt.start = USER_END);
    REFUSED(opt.sub = NULL);
    REFUSED(opt.pfns = NULL);
    REFUSED(opt.direction = PM_DMA_NONE);
    REFUSED(opt.source = PM_DMA_KERNEL + 1);
    REFUSED(opt.source = PM_DMA_PIN);
    REFUSED((opt.source = PM_DMA_KERNEL, opt.size = 0));
    REFUSED((opt.source = PM_DMA_KERNEL, opt.size = PAGES * PAGE + 1));
    REFUSED(opt.flags = 4);
    REFUSED((opt.flags = PM_DMAP_AT, opt.iova = 0));
    REFUSED((opt.flags = PM_DMAP_AT, opt.iova = 1));
    REFUSED((opt.flags = PM_DMAP_AT, opt.iova = TOP));
#undef REFUSED
    opt = right;
    opt.flags = PM_DMAP_EMPTY;
    NEED_EQ(pm_dmap_create(&opt, &dmap), 0);
    CHECK_EQ(pm_dmap_link(dmap, sub, opt.seq, 0, PAGES + 1, words), -EINVAL);
    CHECK_EQ(pm_dmap_link(dmap, sub, opt.seq, PAGES + 1, 0, words), -EINVAL);
    CHECK_EQ(pm_dmap_link(dmap, sub, opt.seq, 1, UINT64_MAX, words), -EINVAL);
    CHECK_EQ(pm_dmap_link(dmap, others, opt.seq, 0, 1, words), -EINVAL);
    CHECK_EQ(pm_dmap_unlink(dmap, 0, 0, NULL), -EINVAL);
    CHECK_EQ(pm_dmap_unlink(dmap, 1, PAGES, NULL), -EINVAL);
    CHECK_EQ(pm_dmap_unlink(dmap, 1, UINT64_MAX, NULL), -EINVAL);
    CHECK_EQ(pm_dmap_read(dmap, 1, PAGES, words), -EINVAL);
    CHECK_EQ(pm_dmap_read(dmap, 1, UINT64_MAX, words), -EINVAL);
    CHECK_EQ(pm_dmap_unmap(dmap, NULL), 0);
    pm_dmap_put(dmap);
    pm_domain_put(domain);
}

static void dma_accesses(void)
{
    const struct pm_domain_options aperture = {.first = PAGE, .last = (1ULL << 48) - 1};
    struct pm_dma_access access = {.addr = PAGE, .buf = words, .mask = UINT64_MAX};
    pm_domain *domain = NULL;

    NEED_EQ(pm_domain_create(&aperture, &domain), 0);
    CHECK_EQ(pm_dma_access(domain, &access), -EINVAL);
    access.len = UINT64_MAX;
    CHECK_EQ(pm_dma_access(domain, &access), -EINVAL);
    access.len = 8;
    access.addr = UINT64_MAX - 3;
    CHECK_EQ(pm_dma_access(domain, &access), -EINVAL);
    access.addr = PAGE;
    access.mask = PAGE + 6;
    CHECK_EQ(pm_dma_access(domain, &access), -EFAULT);
    CHECK_EQ(access.fault, PM_FAULT_MASK);
    pm_domain_put(domain);
}

static void the_rest(void)
{
    const struct pm_mm_options flags = {.flags = 2}, queue = {.queue_length = (1U << 20) + 1};
    struct pm_status_wait waits[PM_STATUS_WAITS + 1] = {0};
    pm_span *span;
    pm_spans *spans = NULL;
    uint64_t found;
    pm_mm *made = NULL;

    CHECK_EQ(pm_mm_create(&flags, &made), -EINVAL);
    CHECK_EQ(pm_mm_create(&queue, &made), -EINVAL);
    CHECK_EQ(pm_status_waits(mm, waits, PM_STATUS_WAITS + 1), -EINVAL);
    CHECK_EQ(pm_status_waits(mm, waits, UINT32_MAX), -EINVAL);
    CHECK_EQ(pm_memory_area(addr_of(mem), 0), -EINVAL);
    CHECK_EQ(pm_memory_area(addr_of(mem), UINT64_MAX), -EINVAL);
    NEED_EQ(pm_spans_create(&spans), 0);
    CHECK_EQ(pm_spans_add(spans, 2, 1, 1, &span, &found), -EINVAL);
    CHECK_EQ(pm_spans_add(spans, 1, 2, 0, &span, &found), -EINVAL);
    CHECK_EQ(pm_spans_find(spans, 2, 1, &found), -EINVAL);
    pm_spans_destroy(spans);
    CHECK_EQ(pm_inject(PM_SYS_COUNT, 1, 1, EIO, 0), -EINVAL);
    CHECK_EQ(pm_inject(-1, 1, 1, EIO, 0), -EINVAL);
    CHECK_EQ(pm_inject(PM_SYS_ANY, 0, 1, EIO, 0), -EINVAL);
    CHECK_EQ(pm_inject(PM_SYS_ANY, 1, 1, 0, 0), -EINVAL);
    CHECK_EQ(pm_sys_calls(PM_SYS_COUNT), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_COUNT), -EINVAL);
    CHECK_EQ(pm_point_arm(-1), -EINVAL);
    CHECK_EQ(pm_point_wait(PM_POINT_COUNT, 0), -EINVAL);
    CHECK_EQ(pm_point_release(PM_POINT_COUNT), -EINVAL);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(walks),
        TEST(pagemap),
        TEST(watching),
        TEST(notifiers),
        TEST(page_tables),
        TEST(accesses),
        TEST(buffers_that_are_not_there),
        TEST(pins),
        TEST(device_memory),
        TEST(exclusive_access),
        TEST(iovas),
        TEST(dma_mappings),
        TEST(dma_accesses),
        TEST(the_rest),
    };

    return run_tests_with(before, after, tests, COUNT_OF(tests), argc, argv);
}
