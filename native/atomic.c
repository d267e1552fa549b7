/* SPDX-License-Identifier: MIT */
/*
 * atomic.c - atomics of a device, on memory that only the device reaches at that moment.
 *
 * The word is in an arena of this process, so the CPU's own instruction does it. It is announced as a write:
 * what brings the page home waits for it.
 */
#include <errno.h>

#include "access.h"
#include "devmem.h"
#include "table.h"

static uint64_t add(uint64_t at, uint32_t size, uint64_t operand)
{
    if (size == 4)
        return __atomic_fetch_add((uint32_t *)(uintptr_t)at, (uint32_t)operand, __ATOMIC_SEQ_CST);
    return __atomic_fetch_add((uint64_t *)(uintptr_t)at, operand, __ATOMIC_SEQ_CST);
}

static uint64_t compare_and_swap(uint64_t at, uint32_t size, uint64_t expected, uint64_t operand)
{
    uint32_t narrow = (uint32_t)expected;

    if (size == 4) {
        __atomic_compare_exchange_n((uint32_t *)(uintptr_t)at, &narrow, (uint32_t)operand, false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        return narrow;
    }
    __atomic_compare_exchange_n((uint64_t *)(uintptr_t)at, &expected, operand, false, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
    return expected;
}

static int do_atomic(struct pm_access_span *span, void *arg)
{
    struct pm_atomic *atomic = arg;

    atomic->old = atomic->op == PM_ATOMIC_ADD
                      ? add(span->at, atomic->size, atomic->operand)
                      : compare_and_swap(span->at, atomic->size, atomic->expected, atomic->operand);
    return 0;
}

static int atomic_access(struct pm_table *table, struct pm_mm *mm, struct pm_atomic *atomic)
{
    struct pm_access_span span = {
        .mm = mm,
        .from = table,
        .entry_at = pm_table_entry,
        .addr = atomic->addr,
        .len = atomic->size,
        .write = true,
    };
    struct pm_access_why fault = {0};
    int err = pm_access_span_with(&span, &fault, do_atomic, atomic);

    atomic->fault = fault.fault;
    atomic->fault_start = fault.start;
    atomic->fence_seq = fault.fence_seq;
    return err;
}

int pm_access_atomic(pm_table *table, struct pm_atomic *atomic)
{
    struct pm_mm *mm;
    int err;

    if ((atomic->size != 4 && atomic->size != 8) || atomic->addr % atomic->size ||
        atomic->addr >= PM_USER_END || atomic->op > PM_ATOMIC_CAS)
        return -EINVAL;
    if (pm_table_inherited(table))
        return -ESRCH;
    atomic->fault = PM_FAULT_MISSING;
    atomic->fault_start = pm_page_down(atomic->addr);
    atomic->fence_seq = 0;
    mm = pm_table_mm(table);
    if (!mm)
        return -EFAULT;
    err = pm_mm_enter(mm);
    if (!err) {
        err = atomic_access(table, mm, atomic);
        pm_mm_exit(mm);
    }
    pm_mm_put(mm);
    return err;
}
