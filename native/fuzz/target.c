/* SPDX-License-Identifier: MIT */
/*
 * target.c - an input is a list of calls: a byte says which, the next ones its arguments.
 *
 * Arguments are what a caller may give, right or wrong: whole pages of some memory, parts of pages, ends of
 * the address space. Only arrays are as long as they must be. The memory has a known byte in each page, and
 * has it still when all is closed, whatever was called, unless a message told of what never happened.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "world.h"

static uint64_t calls;

struct world w;

uint64_t fuzz_calls(void)
{
    return calls;
}

uint8_t next(void)
{
    return w.at < w.end ? *w.at++ : 0;
}

uint64_t wide(void)
{
    static const uint64_t ends[] = {
        0,          1,         PAGE, UINT64_MAX, UINT64_MAX - PAGE + 1, 1ULL << 47, (1ULL << 47) - PAGE,
        1ULL << 63, 1ULL << 52};
    uint8_t which = next();

    if (which < sizeof(ends) / sizeof(ends[0]))
        return ends[which];
    return (uint64_t)which << (next() % 57);
}

uint64_t addr(void)
{
    uint8_t how = next();

    if (how < 240)
        return (uint64_t)(uintptr_t)w.mem + (uint64_t)(how % (PAGES + 1)) * PAGE;
    return how < 248 ? (uint64_t)(uintptr_t)w.mem + how * 97U : wide();
}

uint64_t own_addr(void)
{
    uint8_t how = next();
    uint64_t ours = (uint64_t)(uintptr_t)w.mem + (uint64_t)(how % PAGES) * PAGE;

    return how < 245 ? ours : how < 250 ? ours + 8 : 1ULL << 47;
}

uint64_t few(void)
{
    return next() % (PAGES + 2);
}

uint64_t until(uint64_t start)
{
    uint64_t n = few() * PAGE, last = (uint64_t)(uintptr_t)w.mem + PAGES * PAGE;
    uint8_t how = next();

    if (how > 250)
        return start + n + 1;
    return start < last && start + n > last ? last : start + n;
}

uint64_t *pfns(void)
{
    for (int i = 0; i < ARRAY; i++)
        w.others[i] = w.pfns[i];
    if (next() % 4 == 0)
        w.others[next() % ARRAY] = wide();
    return w.others;
}

void each_page(uint64_t start, uint64_t end, void (*fn)(int page))
{
    for (int i = 0; i < PAGES; i++) {
        uint64_t page = (uint64_t)(uintptr_t)w.mem + (uint64_t)i * PAGE;

        if (page >= start && page < end)
            fn(i);
    }
}

void now_zero(int page)
{
    w.byte[page] = 0;
}

void now_gone(int page)
{
    w.gone[page] = true;
}

static void (*const ops[])(void) = {
    call_subs,    call_invalidation, call_walk,      call_table,  call_access,    call_atomic,
    call_pins,    call_memories,     call_migration, call_memory, call_exclusive, call_watching,
    call_dma,     call_dma_access,   call_iovas,     call_spans,  call_message,   call_looks,
    call_failure, call_migration,    call_walk,      call_subs};

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
