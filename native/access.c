/* SPDX-License-Identifier: MIT */
/*
 * access.c - a device reads and writes process memory by address.
 *
 * A read is optimistic: it is announced, copies with no lock held, and is discarded and done again if an
 * invalidation passed meanwhile. A write cannot be taken back: it is announced, and an invalidation waits for
 * it.
 */
#include <errno.h>

#include "access.h"
#include "devmem.h"
#include "inline.h"
#include "pagemap.h"
#include "table.h"

static const uint64_t writer_wait_ns = 1000ULL * 1000 * 1000;

static void fault_at(struct pm_access_why *fault, uint64_t page, uint64_t end, uint32_t why)
{
    fault->fault = why;
    fault->start = page;
    fault->end = end;
}

static uint32_t fault_of(const struct pm_mm *mm, uint64_t entry, bool write)
{
    if (entry & PM_ENTRY_VALID)
        return write && !(entry & PM_ENTRY_WRITE) ? PM_FAULT_READONLY : PM_FAULT_NONE;
    if (!(entry & PM_ENTRY_FENCED))
        return PM_FAULT_MISSING;
    return pm_seq_undelivered(mm, entry & PM_ENTRY_SEQ_MASK) ? PM_FAULT_FENCED : PM_FAULT_STALE;
}

/* Where the page of a usable entry is in this process. */
static uint64_t place_of(uint64_t entry, uint64_t page)
{
    return entry & PM_PFN_DEVICE ? pm_pfn_slot(entry) : page;
}

/*
 * With the device lock held: how much of the span is served, in one piece; the fault when that is nothing.
 */
static void look_up(struct pm_access_span *span, struct pm_access_why *fault)
{
    uint64_t page = pm_page_down(span->addr), end = span->addr + span->len;

    for (unsigned i = 0; page < end; i++, page += PM_PAGE_SIZE) {
        uint32_t why;

        span->entry[i] = span->entry_at(span, page);
        why = fault_of(span->mm, span->entry[i], span->write);
        if (why == PM_FAULT_NONE && i == 0)
            span->at = place_of(span->entry[0], page) + span->addr % PM_PAGE_SIZE;
        if (why == PM_FAULT_NONE && place_of(span->entry[i], page) == page - span->addr + span->at)
            continue;
        if (i == 0) {
            fault_at(fault, page, page + PM_PAGE_SIZE, why);
            fault->fence_seq = span->entry[0] & PM_ENTRY_FENCED ? span->entry[0] & PM_ENTRY_SEQ_MASK : 0;
            span->len = 0;
        } else {
            span->len = page - span->addr;
        }
        return;
    }
}

static void announce(struct pm_access_span *span)
{
    struct pm_mm *mm = span->mm;

    span->flight = (struct pm_inflight){
        .next = mm->inflight,
        .start = span->addr,
        .last = span->addr + span->len - 1,
        .since_ns = pm_now_ns(),
        .tid = pm_status_tid(mm),
        .write = span->write,
    };
    mm->inflight = &span->flight;
    mm->stats.inflight++;
    pm_status_inflight(mm);
}

static void withdraw(struct pm_access_span *span)
{
    struct pm_inflight **link = &span->mm->inflight;

    while (*link != &span->flight)
        link = &(*link)->next;
    *link = span->flight.next;
    span->mm->stats.inflight--;
    pm_status_inflight(span->mm);
    if (span->write)
        pthread_cond_broadcast(&span->mm->drained);
}

/* Narrow the span to the pages whose PFNs are those programmed: the first other one is a change nobody told
 * of. */
static int check_system_pages(struct pm_access_span *span, struct pm_access_why *fault)
{
    uint64_t seen[PM_ACCESS_PAGES];
    uint64_t first = pm_page_down(span->addr);
    uint64_t n = (pm_page_up(span->addr + span->len) - first) >> PM_PAGE_SHIFT;
    uint64_t i = 0, page;
    int err;

    if (!pm_have(span->mm, PM_FEAT_PAGEMAP))
        return 0;
    err = pm_pagemap_read(span->mm, first, n, seen);
    if (err)
        return err;
    while (i < n && !pm_entry_changed(span->entry[i], seen[i]))
        i++;
    if (i == n)
        return 0;
    page = first + (i << PM_PAGE_SHIFT);
    if (i > 0) {
        span->len = page - span->addr;
        return 0;
    }
    while (i < n && pm_entry_changed(span->entry[i], seen[i]))
        i++;
    fault_at(fault, page, first + (i << PM_PAGE_SHIFT), PM_FAULT_CHANGED);
    span->len = 0;
    return -EFAULT;
}

/* Pages do not change unseen in device memory. */
static int check_pages(struct pm_access_span *span, struct pm_access_why *fault)
{
    uint64_t slot = pm_page_down(span->at), len = pm_page_up(span->at + span->len) - slot;

    if (span->at == span->addr)
        return check_system_pages(span, fault);
    if (pm_pagemap_there(span->mm, slot, len) < len) {
        pm_lock(span->mm);
        pm_devmem_fill(span->mm, span->addr, span->at, span->len);
        pm_unlock(span->mm);
    }
    return 0;
}

/* The kernel does not say which side of a copy it was. */
static bool buffer_gone(const struct pm_access_span *span, const char *buf)
{
    uint64_t addr = (uintptr_t)buf, need = span->write ? PM_VMA_READ : PM_VMA_WRITE;
    struct pm_vma vma;

    return pm_vma_query(span->mm, addr, &vma) || vma.start > addr || !(vma.flags & need);
}

/* Bytes copied, or -EFAULT with the fault set, or another errno. */
static int64_t copy(struct pm_access_span *span, struct pm_access_why *fault, char *buf)
{
    uint64_t addr = (uintptr_t)buf;
    unsigned tries = 0;
    ssize_t n;

    do
        n = span->write ? pm_sys_vm_writev(buf, span->at, span->len)
                        : pm_sys_vm_readv(buf, span->at, span->len);
    while (pm_inline_again(n, addr, addr + span->len, &tries));
    if (n == -EINTR)
        return 0;
    if (n != -EFAULT || buffer_gone(span, buf))
        return n;
    fault_at(fault, pm_page_down(span->addr), pm_page_down(span->addr) + PM_PAGE_SIZE, PM_FAULT_CHANGED);
    return -EFAULT;
}

/* A stream of writes must not keep an invalidation waiting; nor may one that is stuck keep a writer for ever.
 */
static void let_drains_by(struct pm_mm *mm)
{
    uint64_t until = pm_now_ns() + writer_wait_ns;

    while (mm->draining && pm_wait(mm, &mm->idle, until) != -ETIMEDOUT)
        continue;
}

/*
 * While this thread writes no handler of a signal runs in it. What that touched on a device would wait for
 * the monitor, which waits for the write; or, inline, come home without waiting for it, and it would be lost.
 */
static void unlock_announced(struct pm_access_span *span)
{
    span->masked = span->len && span->write;
    if (span->masked)
        pm_unlock_masked(span->mm, &span->mask);
    else
        pm_unlock(span->mm);
}

static void unlock_withdrawn(struct pm_access_span *span)
{
    pm_unlock(span->mm);
    if (span->masked)
        pthread_sigmask(SIG_SETMASK, &span->mask, NULL);
}

/*
 * What a write is from may be on a device itself, or a hole that the monitor fills: it is made to come before
 * the write is announced, since the monitor waits for those that are.
 */
static void touch_source(struct pm_mm *mm, uint64_t start, uint64_t len)
{
    uint64_t seen[PM_ACCESS_PAGES + 1], first = pm_page_down(start);
    uint64_t n = (pm_page_up(start + len) - first) >> PM_PAGE_SHIFT;
    char byte;

    if (!mm->devices || mm->inline_faults || pm_pagemap_read(mm, first, n, seen))
        return;
    for (uint64_t i = 0; i < n; i++) {
        if (!pm_is_there(seen[i]))
            pm_sys_vm_readv(&byte, first + (i << PM_PAGE_SHIFT), 1);
    }
}

int64_t pm_access_span_do(struct pm_access_span *span, struct pm_access_why *fault, char *buf)
{
    struct pm_mm *mm = span->mm;
    bool voided;
    int64_t n;

    if (span->write)
        touch_source(mm, (uintptr_t)buf, span->len);
    pm_lock(mm);
    if (span->write)
        let_drains_by(mm);
    look_up(span, fault);
    if (span->len)
        announce(span);
    unlock_announced(span);
    if (!span->len)
        return -EFAULT;
    pm_point(PM_POINT_ACCESS_LOOKED_UP);
    n = check_pages(span, fault);
    if (!n)
        n = copy(span, fault, buf);
    pm_point(PM_POINT_ACCESS_COPIED);
    pm_lock(mm);
    voided = span->flight.voided;
    withdraw(span);
    if (voided && !span->write)
        mm->stats.access_redone++;
    unlock_withdrawn(span);
    if (!voided || span->write)
        return n;
    fault->fault = PM_FAULT_NONE;
    fault->redone++;
    return 0;
}

int pm_access_span_with(struct pm_access_span *span, struct pm_access_why *fault,
                        int (*work)(struct pm_access_span *span, void *arg), void *arg)
{
    struct pm_mm *mm = span->mm;
    int err;

    pm_lock(mm);
    let_drains_by(mm);
    look_up(span, fault);
    if (span->len && span->at == span->addr) {
        fault_at(fault, pm_page_down(span->addr), pm_page_down(span->addr) + PM_PAGE_SIZE, PM_FAULT_ATOMIC);
        span->len = 0;
    }
    if (span->len)
        announce(span);
    unlock_announced(span);
    if (!span->len)
        return -EFAULT;
    pm_point(PM_POINT_ACCESS_LOOKED_UP);
    pm_lock(mm);
    /* Who waited for this may have lost patience, and the page have gone home. */
    if (pm_devmem_is_at(mm->devices, pm_page_down(span->addr), pm_page_down(span->at))) {
        pm_devmem_fill(mm, span->addr, span->at, span->len);
        err = work(span, arg);
    } else {
        fault_at(fault, pm_page_down(span->addr), pm_page_down(span->addr) + PM_PAGE_SIZE, PM_FAULT_MISSING);
        err = -EFAULT;
    }
    withdraw(span);
    unlock_withdrawn(span);
    return err;
}

int pm_access_span_look(struct pm_access_span *span, struct pm_access_why *fault)
{
    pm_lock(span->mm);
    look_up(span, fault);
    pm_unlock(span->mm);
    return span->len ? 0 : -EFAULT;
}

void pm_access_expel(struct pm_mm *mm, uint64_t start, uint64_t last)
{
    for (struct pm_inflight *access = mm->inflight; access; access = access->next) {
        if (pm_overlap(start, last, access->start, access->last))
            access->voided = true;
    }
    pm_drain_writes(mm, start, last, pm_now_ns() + writer_wait_ns);
}

uint64_t pm_access_span_len(uint64_t addr, uint64_t len)
{
    return pm_min(len, PM_ACCESS_PAGES * PM_PAGE_SIZE - addr % PM_PAGE_SIZE);
}

uint64_t pm_table_entry(const struct pm_access_span *span, uint64_t addr)
{
    struct pm_table *table = span->from;
    struct pm_leaf *leaf = pm_table_of(table, span->mm) ? pm_table_leaf(table, addr) : NULL;
    uint64_t entry = leaf ? leaf->entry[pm_leaf_slot(addr)] : 0;

    pm_tlb_use(&table->tlb, addr, entry);
    return entry;
}

static void tell(struct pm_access *access, const struct pm_access_why *fault)
{
    access->fault = fault->fault;
    access->fault_start = fault->start;
    access->fault_end = fault->end;
    access->fence_seq = fault->fence_seq;
    access->redone = fault->redone;
}

static int access_all(struct pm_table *table, struct pm_mm *mm, struct pm_access *access)
{
    struct pm_access_span span = {
        .mm = mm, .from = table, .entry_at = pm_table_entry, .write = access->write != 0};
    struct pm_access_why fault = {0};
    int64_t n = 0;

    while (access->done < access->len && n >= 0) {
        n = pm_mm_check(mm);
        if (n)
            break;
        span.addr = access->addr + access->done;
        span.len = pm_access_span_len(span.addr, access->len - access->done);
        n = pm_access_span_do(&span, &fault, (char *)access->buf + access->done);
        access->done += n > 0 ? (uint64_t)n : 0;
    }
    tell(access, &fault);
    return n < 0 ? (int)n : 0;
}

int pm_access(pm_table *table, struct pm_access *access)
{
    uint64_t page = pm_page_down(access->addr);
    struct pm_mm *mm;
    int err;

    access->done = 0;
    tell(access, &(struct pm_access_why){0});
    if (access->len == 0 || access->addr >= PM_USER_END || access->len > PM_USER_END - access->addr)
        return -EINVAL;
    if (pm_table_inherited(table))
        return -ESRCH;
    mm = pm_table_mm(table);
    if (!mm) {
        tell(access,
             &(struct pm_access_why){.fault = PM_FAULT_MISSING, .start = page, .end = page + PM_PAGE_SIZE});
        return -EFAULT;
    }
    err = pm_mm_enter(mm);
    if (!err) {
        err = pm_have(mm, PM_FEAT_PROCESS_VM) ? access_all(table, mm, access) : -EOPNOTSUPP;
        pm_mm_exit(mm);
    }
    pm_mm_put(mm);
    return err;
}
