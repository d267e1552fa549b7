/* SPDX-License-Identifier: MIT */
/* calls_mm.c - the address space: notifiers, walks, the page table and the device behind it, operations,
 * events. */
#include <errno.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/mman.h>

#include "fuzz.h"
#include "world.h"

void call_subs(void)
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

void call_invalidation(void)
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

void call_walk(void)
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

void call_table(void)
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
void call_access(void)
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

void call_atomic(void)
{
    struct pm_atomic atomic = {.addr = addr() + next() % 16, .size = next() % 10, .op = next() % 3};

    pm_access_atomic(w.table, &atomic); /* adds 0, or puts 0 where 0 is */
}

void call_memory(void)
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

void call_watching(void)
{
    uint64_t start = addr(), end = until(start);

    if (next() % 4)
        pm_watch(w.mm, own_addr(), end, next() % 4);
    else
        pm_unwatch(w.mm, start, end);
}

void call_message(void)
{
    static const unsigned events[] = {UFFD_EVENT_FORK, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
                                      99};
    unsigned event = events[next() % 5];

    w.lies = true;
    fuzz_message(w.mm, event, addr(), addr(), next() % 4 ? few() * PAGE : wide());
}

void call_looks(void)
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
void call_failure(void)
{
    static const int errors[] = {EINTR, ENOMEM, EAGAIN};
    int sys = 1 + next() % (PM_SYS_COUNT - 1);

    if (sys != PM_SYS_MUNMAP)
        pm_inject(sys, 1 + next() % 8, 1 + next() % 3, errors[next() % 3], 0);
}
