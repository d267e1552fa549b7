/* SPDX-License-Identifier: MIT */
/*
 * target.c - an input is a list of calls: a byte says which, the next ones its arguments.
 *
 * Arguments are what a caller may give, right or wrong: whole pages of some memory, parts of pages, ends of
 * the address space. Only arrays are as long as they must be. The memory has a known byte in each page, and
 * has it still when all is closed, whatever was called, unless a message told of what never happened.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "pymirror.h"

enum { PAGE = 4096, PAGES = 16, ARRAY = 64, SLOTS = 4, CALLS_MAX = 64 };

#define MILLISECOND 1000000ULL

static uint64_t calls;

static struct world {
    const uint8_t *at, *end;
    pm_mm *mm;
    char *room, *mem;    /* what calls reach beyond the memory is nobody's */
    uint8_t byte[PAGES]; /* what is in each page */
    bool gone[PAGES];    /* or nobody knows */
    bool lies;
    pm_sub *sub[SLOTS];
    uint64_t seq[SLOTS];
    pm_inv *inv;
    pm_table *table;
    pm_pin *pin[SLOTS];
    pm_devmem *vram[SLOTS];
    pm_devmem *arena;
    pm_domain *domain;
    pm_dmap *dmap[SLOTS];
    pm_iova_space *iovas;
    pm_spans *spans;
    pm_span *span[SLOTS];
    uint64_t iova[SLOTS], pfns[ARRAY], others[ARRAY], slots[SLOTS][ARRAY];
    uint8_t bytes[ARRAY], buf[4 * PAGE];
} w;

uint64_t fuzz_calls(void)
{
    return calls;
}

static uint8_t next(void)
{
    return w.at < w.end ? *w.at++ : 0;
}

static uint64_t wide(void)
{
    static const uint64_t ends[] = {
        0,          1,         PAGE, UINT64_MAX, UINT64_MAX - PAGE + 1, 1ULL << 47, (1ULL << 47) - PAGE,
        1ULL << 63, 1ULL << 52};
    uint8_t which = next();

    if (which < sizeof(ends) / sizeof(ends[0]))
        return ends[which];
    return (uint64_t)which << (next() % 57);
}

/* An address: of the memory, mostly. */
static uint64_t addr(void)
{
    uint8_t how = next();

    if (how < 240)
        return (uint64_t)(uintptr_t)w.mem + (uint64_t)(how % (PAGES + 1)) * PAGE;
    return how < 248 ? (uint64_t)(uintptr_t)w.mem + how * 97U : wide();
}

/* One of the memory, or one that is nobody's: what would be done to it is done. */
static uint64_t own_addr(void)
{
    uint8_t how = next();
    uint64_t ours = (uint64_t)(uintptr_t)w.mem + (uint64_t)(how % PAGES) * PAGE;

    return how < 245 ? ours : how < 250 ? ours + 8 : 1ULL << 47;
}

/* Pages, so that an array has room for them. */
static uint64_t few(void)
{
    return next() % (PAGES + 2);
}

static uint64_t until(uint64_t start)
{
    uint64_t n = few() * PAGE, last = (uint64_t)(uintptr_t)w.mem + PAGES * PAGE;
    uint8_t how = next();

    if (how > 250)
        return start + n + 1;
    return start < last && start + n > last ? last : start + n;
}

static uint64_t *pfns(void)
{
    for (int i = 0; i < ARRAY; i++)
        w.others[i] = w.pfns[i];
    if (next() % 4 == 0)
        w.others[next() % ARRAY] = wide();
    return w.others;
}

/* Pages of the memory that [start, end) has. */
static void each_page(uint64_t start, uint64_t end, void (*fn)(int page))
{
    for (int i = 0; i < PAGES; i++) {
        uint64_t page = (uint64_t)(uintptr_t)w.mem + (uint64_t)i * PAGE;

        if (page >= start && page < end)
            fn(i);
    }
}

static void now_zero(int page)
{
    w.byte[page] = 0;
}

static void now_gone(int page)
{
    w.gone[page] = true;
}

static void subs(void)
{
    int i = next() % SLOTS;
    uint64_t start = addr(), last = next() < 8 ? UINT64_MAX : until(start) - 1;

    if (!w.sub[i]) {
        pm_sub_insert(w.mm, start, last, next(), next() % 4, &w.sub[i]);
        return;
    }
    switch (next() % 6) {
    case 0:
        pm_sub_remove(w.sub[i]);
        break;
    case 1:
        pm_sub_remove(w.sub[i]);
        pm_sub_put(w.sub[i]);
        w.sub[i] = NULL;
        break;
    case 2:
        pm_sub_read_retry(w.sub[i], w.seq[i]);
        break;
    default:
        pm_sub_read_begin(w.sub[i], MILLISECOND, &w.seq[i]);
    }
}

static void invalidation(void)
{
    uint64_t start = addr(), end = until(start), seq;

    if (!w.inv) {
        pm_invalidate_start(w.mm, start, end, next() % 10 - 1, next() % 4, &w.inv, &seq);
        return;
    }
    if (next() % 2)
        pm_invalidate_delivered(w.inv);
    pm_invalidate_end(w.inv);
    w.inv = NULL;
}

static void walk(void)
{
    int i = next() % SLOTS;
    struct pm_walk walk = {.start = own_addr(), .pfns = w.pfns, .flags = next() % 16, .sub = w.sub[i]};

    walk.end = until(walk.start);
    walk.default_flags = (uint64_t)(next() % 4) << 62;
    walk.pfn_flags_mask = next() % 2 ? 0 : UINT64_MAX;
    walk.owner = next() % 3;
    walk.seq = w.seq[i];
    if (next() % 8)
        pm_walk(w.mm, &walk);
    else
        pm_walk_inout(w.mm, &walk);
}

static void table(void)
{
    int i = next() % SLOTS;
    uint64_t start = addr(), n = few(), end = until(start), out[2];
    struct pm_table_stats stats;

    switch (next() % 6) {
    case 0:
        pm_table_clear(w.table, start, end);
        break;
    case 1:
        pm_table_read(w.table, start, n, w.others);
        break;
    case 2:
        pm_table_next(w.table, start, end, out);
        pm_table_stats(w.table, &stats);
        break;
    case 3:
        pm_table_verify(w.table, start, end, out, out + 1);
        break;
    default:
        if (w.sub[i])
            pm_table_map(w.table, w.sub[i], w.seq[i], start, n, pfns());
    }
}

/* A write is of the byte that is there already, so that none changes. */
static void access(void)
{
    struct pm_access access = {.addr = addr(), .len = few() % 4 * PAGE / (1 + next() % 2), .buf = w.buf};
    uint64_t page = (access.addr - (uint64_t)(uintptr_t)w.mem) / PAGE;

    if (next() % 16 == 0)
        access.buf = (void *)(uintptr_t)8;
    access.write = page < PAGES && next() % 2 && access.len <= PAGE && access.addr % PAGE == 0;
    if (access.write)
        memset(w.buf, w.byte[page], sizeof(w.buf));
    pm_access(w.table, &access);
}

static void atomic(void)
{
    struct pm_atomic atomic = {.addr = addr() + next() % 16, .size = next() % 10, .op = next() % 3};

    pm_access_atomic(w.table, &atomic); /* adds 0, or puts 0 where 0 is */
}

static void pins(void)
{
    int i = next() % SLOTS;
    struct pm_pinning pinning = {.start = own_addr(), .npages = few(), .flags = next() % 3};
    uint64_t done;

    if (!w.pin[i]) {
        pinning.pfns = next() % 2 ? w.pfns : NULL;
        pm_pin_create(w.mm, &pinning, &w.pin[i]);
        return;
    }
    switch (next() % 4) {
    case 0:
        pm_pin_release(w.pin[i]);
        break;
    case 1:
        pm_pin_put(w.pin[i]);
        w.pin[i] = NULL;
        break;
    case 2:
        if (pm_pin_hold(w.pin[i]) == 0)
            pm_pin_unhold(w.pin[i]);
        break;
    default:
        pm_pin_access(w.pin[i], next() < 250 ? few() * 1000 : wide(), w.buf, few() % 4 * PAGE, 0, &done);
    }
}

/* Slots that were set aside, and that no page has come to. */
static void give_back(int i)
{
    pm_devmem_free(w.vram[i], ARRAY, w.slots[i]);
    memset(w.slots[i], 0, sizeof(w.slots[i]));
}

static void memories(void)
{
    int i = next() % SLOTS;
    uint64_t start, end, pfn, n;

    if (!w.vram[i]) {
        if (pm_devmem_create(w.mm, next() < 250 ? few() * PAGE : wide(), 1 + next() % 2, &w.vram[i]) == 0 &&
            next() % 4 == 0)
            pm_devmem_coherent(w.vram[i]);
        return;
    }
    switch (next() % 7) {
    case 0:
        give_back(i);
        if (pm_devmem_destroy(w.vram[i]) == 0)
            w.vram[i] = NULL;
        break;
    case 1:
        start = addr();
        pm_devmem_populate(w.vram[i], start, until(start));
        break;
    case 2:
        pm_devmem_next(w.vram[i], &start, &end);
        pm_devmem_range(w.vram[i], &pfn, &n);
        pm_devmem_addrs(w.vram[i], next() % 2 ? pfn : wide(), few(), w.others);
        break;
    case 3:
        give_back(i);
        pm_devmem_alloc(w.vram[i], own_addr(), few(), w.bytes, w.slots[i]);
        memcpy(w.pfns, w.slots[i], sizeof(w.pfns));
        break;
    case 4:
        pm_devmem_free(w.vram[i], few(), pfns());
        break;
    case 5:
        pm_devmem_fault_around(w.vram[i], (uint64_t)next() << (next() % 20));
        break;
    default:
        pm_devmem_holds(w.vram[i], addr(), few(), w.bytes);
    }
}

static void migration(void)
{
    int i = next() % SLOTS;
    uint64_t start = own_addr(), end = until(start), moved, seq;
    pm_inv *inv;

    if (pm_invalidate_start(w.mm, start, end, PM_MIGRATE, PM_BEFORE, &inv, &seq))
        return;
    pm_invalidate_delivered(inv);
    if (next() % 3 == 0)
        pm_migrate_to_system(w.mm, start, end, next() % 2 ? w.vram[i] : NULL, &moved);
    else if (!w.vram[i])
        pm_migrate_level(w.mm, start, end);
    else if (next() % 4 == 0)
        pm_migrate_pages(w.vram[i], start, few(), pfns(), w.bytes);
    else
        pm_migrate_to_device(w.vram[i], start, end, &moved);
    pm_invalidate_end(inv);
}

static void exclusive(void)
{
    uint64_t start = own_addr(), end = until(start);

    if (!w.arena) {
        pm_exclusive_create(w.mm, (1 + few()) * PAGE, &w.arena);
        return;
    }
    if (next() % 3 == 0)
        pm_exclusive_pfns(w.arena, start, end, w.pfns);
    else if (pm_exclusive_fault(w.arena, start, &end) == 0)
        pm_exclusive(w.arena, start, end, w.pfns);
}

static void memory(void)
{
    static const int advices[] = {MADV_DONTNEED, MADV_WILLNEED, MADV_DONTDUMP, MADV_DODUMP, 23, -1, 1000};
    uint64_t start = own_addr(), end = until(start);
    int advice = advices[next() % 7], page = next() % PAGES, err;

    switch (next() % 6) {
    case 0:
        if (pm_munmap(w.mm, start, end - start) == 0)
            each_page(start, end, now_gone);
        break;
    case 1:
        pm_mprotect(w.mm, start, end - start, next() % 2 ? PROT_READ : PROT_READ | PROT_WRITE);
        break;
    case 2:
    case 3:
        err = pm_madvise(w.mm, start, end - start, advice);
        if (advice == MADV_DONTNEED && (!err || err == -ENOMEM)) /* a hole in it: the rest has gone */
            each_page(start, end, err ? now_gone : now_zero);
        break;
    default: /* the CPU */
        if (!w.gone[page] && !w.lies && *(volatile uint8_t *)(w.mem + page * PAGE) != w.byte[page])
            fuzz_fail("a byte is lost");
    }
}

static void watching(void)
{
    uint64_t start = addr(), end = until(start);

    if (next() % 4)
        pm_watch(w.mm, own_addr(), end, next() % 4);
    else
        pm_unwatch(w.mm, start, end);
}

static void dma(void)
{
    int i = next() % SLOTS;
    uint64_t writable;
    struct pm_domain_options options = {.first = wide(), .last = wide(), .flags = next() % 4};
    struct pm_dmap_options map = {.domain = w.domain, .sub = w.sub[i], .seq = w.seq[i], .cookie = next()};
    struct pm_dmap_info info;

    if (!w.domain) {
        pm_domain_create(&options, &w.domain);
        return;
    }
    if (!w.dmap[i]) {
        map.source = next() % 4;
        map.pin = w.pin[i];
        map.start = map.source == PM_DMA_KERNEL ? (uint64_t)(uintptr_t)w.buf + next() : addr();
        map.n = few() % 3;
        map.size = next() < 250 ? map.n * 1500 : wide();
        map.pfns = map.source == PM_DMA_KERNEL ? NULL : pfns();
        map.mask = next() % 2 ? UINT64_MAX : wide();
        map.iova = wide();
        map.direction = next() % 5;
        map.flags = next() % 5;
        if ((map.source == PM_DMA_MIRROR && !map.sub) || (map.source == PM_DMA_PIN && !map.pin) ||
            map.source > 2)
            return;
        pm_dmap_create(&map, &w.dmap[i]);
        return;
    }
    switch (next() % 5) {
    case 0:
        pm_dmap_unmap(w.dmap[i], &writable);
        pm_dmap_put(w.dmap[i]);
        w.dmap[i] = NULL;
        break;
    case 1:
        pm_dmap_unlink(w.dmap[i], few(), few(), &writable);
        break;
    case 2:
        pm_dmap_read(w.dmap[i], few(), few(), w.others);
        break;
    case 3:
        if (w.sub[i])
            pm_dmap_link(w.dmap[i], w.sub[i], w.seq[i], few(), few(), pfns());
        break;
    default:
        if (pm_dmap_info(w.dmap[i], &info) == 0)
            w.iova[i] = info.iova;
    }
}

static void dma_access(void)
{
    struct pm_dma_access access = {.addr = next() % 4 ? w.iova[next() % SLOTS] + next() : wide(),
                                   .buf = w.buf};
    struct pm_domain_stats stats;

    access.len = next() < 250 ? few() * 512 : wide();
    access.mask = next() % 2 ? UINT64_MAX : wide();
    if (access.len > sizeof(w.buf))
        access.len = sizeof(w.buf);
    if (!w.domain)
        return;
    pm_dma_access(w.domain, &access);
    pm_domain_stats(w.domain, &stats);
    pm_domain_flush(w.domain);
}

static void iovas(void)
{
    int i = next() % SLOTS;
    struct pm_iova_stats stats;
    uint64_t first = wide(), last = wide();

    if (!w.iovas) {
        pm_iova_create(first, last, &w.iovas);
        return;
    }
    switch (next() % 5) {
    case 0:
        pm_iova_free(w.iovas, next() % 8 ? w.iova[i] : first, next() % 2 ? few() * PAGE : last);
        break;
    case 1:
        pm_iova_reserve(w.iovas, first, last);
        break;
    case 2:
        pm_iova_size(w.iovas, w.iova[i]);
        pm_iova_stats(w.iovas, &stats);
        break;
    default:
        pm_iova_alloc(w.iovas, next() % 2 ? few() * PAGE : first, next() % 2 ? UINT64_MAX : last, &w.iova[i]);
    }
}

static void spans(void)
{
    int i = next() % SLOTS;
    uint64_t start = addr(), last = next() % 8 ? until(start) - 1 : wide(), other;

    if (next() % 3 == 0) {
        pm_spans_find(w.spans, start, last, &other);
    } else if (!w.span[i]) {
        pm_spans_add(w.spans, start, last, 1U + next(), &w.span[i], &other);
    } else {
        pm_spans_remove(w.spans, w.span[i]);
        w.span[i] = NULL;
    }
}

static void message(void)
{
    static const unsigned events[] = {UFFD_EVENT_FORK, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
                                      99};
    unsigned event = events[next() % 5];

    w.lies = true;
    fuzz_message(w.mm, event, addr(), addr(), next() % 4 ? few() * PAGE : wide());
}

static void looks(void)
{
    struct pm_event event;
    struct pm_mm_stats stats;
    struct pm_pin_stats pin_stats;
    struct pm_devmem_stats vram_stats;
    struct pm_vma vma;
    struct pm_status_wait waits[PM_STATUS_WAITS] = {{.since_ns = next(), .tid = next()}};
    uint64_t ticket = 0, start = addr(), n = few();

    switch (next() % 8) {
    case 0:
        if (pm_event_wait(w.mm, 0, &event) == 0)
            pm_event_done(w.mm);
        break;
    case 1:
        pm_event_sync(w.mm, MILLISECOND, &ticket);
        break;
    case 2:
        pm_overlapping(w.mm, start, next() % 4 ? until(start) : wide(), next(), w.others, n);
        break;
    case 3:
        pm_vma_find(w.mm, next() % 4 ? start : wide(), &vma);
        break;
    case 4:
        pm_pagemap_read(w.mm, next() % 4 ? start : wide(), n, w.others);
        break;
    case 5:
        pm_status_waits(w.mm, waits, next() % (PM_STATUS_WAITS + 2) % (PM_STATUS_WAITS + 1));
        break;
    case 6:
        pm_memory_area(start, next() % 4 ? n * PAGE : wide());
        pm_coherent_pages(w.mm, NULL, start, n, w.bytes);
        break;
    default:
        pm_mm_stats(w.mm, &stats);
        pm_pin_stats(w.mm, &pin_stats);
        pm_devmem_stats(w.mm, &vram_stats);
    }
}

/* The next call of some kind fails. What munmap refused would stay mapped. */
static void failure(void)
{
    static const int errors[] = {EINTR, ENOMEM, EAGAIN};
    int sys = 1 + next() % (PM_SYS_COUNT - 1);

    if (sys != PM_SYS_MUNMAP)
        pm_inject(sys, 1 + next() % 8, 1 + next() % 3, errors[next() % 3], 0);
}

static void (*const ops[])(void) = {
    subs,     invalidation, walk,       table, access, atomic,  pins,  memories, migration, memory, exclusive,
    watching, dma,          dma_access, iovas, spans,  message, looks, failure,  migration, walk,   subs};

static void open_world(const uint8_t *data, size_t len)
{
    struct pm_mm_options options = {0};

    memset(&w, 0, sizeof(w));
    w.at = data;
    w.end = data + len;
    memset(w.bytes, 1, sizeof(w.bytes));
    options.flags = next() % 2 ? PM_MM_INLINE : 0;
    options.queue_length = next() % 8 ? 0 : 2;
    w.room = mmap(NULL, 3 * PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    w.mem = w.room + PAGES * PAGE;
    if (w.room == MAP_FAILED || mprotect(w.mem, PAGES * PAGE, PROT_READ | PROT_WRITE) ||
        pm_mm_create(&options, &w.mm) || pm_table_create(&w.table) || pm_spans_create(&w.spans))
        fuzz_fail("no world to begin with");
    for (int i = 0; i < PAGES; i++) {
        w.byte[i] = (uint8_t)(i + 1);
        memset(w.mem + i * PAGE, i + 1, PAGE);
    }
    pm_watch(w.mm, (uint64_t)(uintptr_t)w.mem, (uint64_t)(uintptr_t)w.mem + PAGES * PAGE, PM_WATCH_EXACT);
}

static void check_bytes(void)
{
    for (int i = 0; i < PAGES; i++) {
        for (int at = 0; at < PAGE && !w.gone[i] && !w.lies; at++) {
            if ((uint8_t)w.mem[i * PAGE + at] != w.byte[i])
                fuzz_fail("a byte is lost");
        }
    }
}

static void close_world(void)
{
    uint64_t writable;

    pm_inject_clear();
    if (w.inv)
        pm_invalidate_end(w.inv);
    for (int i = 0; i < SLOTS; i++) {
        if (w.dmap[i]) {
            pm_dmap_unmap(w.dmap[i], &writable);
            pm_dmap_put(w.dmap[i]);
        }
        if (w.vram[i])
            give_back(i);
        if (w.span[i])
            pm_spans_remove(w.spans, w.span[i]);
        if (w.pin[i])
            pm_pin_put(w.pin[i]);
        if (w.sub[i]) {
            pm_sub_remove(w.sub[i]);
            pm_sub_put(w.sub[i]);
        }
    }
    pm_mm_close(w.mm);
    for (int i = 0; i < SLOTS; i++) {
        if (w.vram[i] && pm_devmem_destroy(w.vram[i]) && !w.lies)
            fuzz_fail("device memory is in use after close");
    }
    if (w.arena && pm_devmem_destroy(w.arena) && !w.lies)
        fuzz_fail("exclusive memory is in use after close");
    if (w.domain)
        pm_domain_put(w.domain);
    if (w.iovas)
        pm_iova_destroy(w.iovas);
    pm_spans_destroy(w.spans);
    pm_table_put(w.table);
    pm_mm_put(w.mm);
    check_bytes();
    munmap(w.room, 3 * PAGES * PAGE);
}

void fuzz_one(const uint8_t *data, size_t len)
{
    open_world(data, len);
    for (int i = 0; i < CALLS_MAX && w.at < w.end; i++) {
        unsigned op = next() % (sizeof(ops) / sizeof(ops[0]));

        if (getenv("FUZZ_TRACE"))
            fprintf(stderr, "fuzz: op %u at byte %td\n", op, w.at - data);
        ops[op]();
        calls++;
    }
    close_world();
}
