/* SPDX-License-Identifier: MIT */
/*
 * walk_fault.c - the part of the range walk that populates what was asked for and is not there.
 */
#include "walk.h"

#include <string.h>

#include "populate.h"

enum {
    ROUND_LIMIT = 8, /* populate and read again, before -EBUSY */
    GAP_LIMIT = 8, /* pages that need nothing (33 ns each) inside a run: cheaper than a call more (170 ns) */
};

/* From the first page at or after i that lacks something: the run to populate in one call, [*first, end). */
static uint64_t next_run(const struct pm_part *b, uint64_t i, uint64_t end, uint64_t *first)
{
    uint64_t kind, last;

    while (i < end && !pm_part_lack(b, i))
        i++;
    *first = i;
    if (i == end)
        return end;
    /* Populating for writing brings in what has to be read too. */
    kind = pm_part_wanted(b, i);
    for (last = i++; i < end && i - last <= GAP_LIMIT && pm_part_wanted(b, i) == kind && !pm_part_own(b, i);
         i++) {
        if (pm_part_lack(b, i))
            last = i;
    }
    return last + 1;
}

/* What an error of populate means; the vma may have changed since it was looked up. */
static int explain(struct pm_part *b, uint64_t addr, bool write, int err)
{
    struct pm_vma vma;

    if (err != -EINVAL && err != -ENOMEM)
        return err;
    if (pm_vma_query(b->mm, addr, &vma) || vma.start > addr || !(vma.flags & PM_VMA_READ))
        return -EFAULT;
    if (write && !(vma.flags & PM_VMA_WRITE))
        return -EPERM;
    return err == -ENOMEM ? -ENOMEM : -EFAULT;
}

static bool loses_fault_around(const struct pm_part *b, uint64_t start, uint64_t end)
{
    return (b->vma->flags & PM_VMA_FILE) && !(b->vma->flags & PM_VMA_HUGETLB) &&
           pm_watched(b->mm, start, end);
}

static bool refused(const struct pm_part *b, uint64_t i)
{
    return pm_populate(b->mm, pm_part_addr(b, i), pm_part_addr(b, i + 1),
                       pm_part_wanted(b, i) & PM_PFN_WRITE) != 0;
}

static int populate_run(struct pm_part *b, uint64_t i, uint64_t end)
{
    bool write = pm_part_wanted(b, i) & PM_PFN_WRITE;
    uint64_t start = pm_part_addr(b, i), waits, lacking;
    int err = pm_walk_check(b->walk, start);

    if (err)
        return err;
    if ((b->walk->flags & PM_WALK_NOBLOCK) &&
        pm_would_wait(b->mm, b->vma, start, pm_part_addr(b, end), b->pfns + i, &waits))
        return pm_walk_fail(b->walk, waits, -EAGAIN);
    pm_point(PM_POINT_WALK_BEFORE_POPULATE);
    pm_home_touch(b->mm, start, pm_part_addr(b, end));
    err = pm_populate(b->mm, start, pm_part_addr(b, end), write);
    pm_point(PM_POINT_WALK_AFTER_POPULATE);
    b->walk->populated += end - i;
    if (!err && !write && loses_fault_around(b, start, pm_part_addr(b, end)))
        b->walk->populated += pm_populate_around(b->mm, b->vma, start, pm_part_addr(b, end));
    if (!err)
        return 0;
    if (pm_part_read(b, i, end, &lacking))
        return pm_walk_fail(b->walk, start, err);
    while (i < end && !pm_part_lack(b, i) && !(b->announcing && refused(b, i)))
        i++;
    if (i == end)
        return 0;
    return pm_walk_fail(b->walk, pm_part_addr(b, i),
                        err == -EAGAIN ? -EBUSY : explain(b, pm_part_addr(b, i), write, err));
}

/* What was populated before the failure is to show too. */
static int read_before_failure(struct pm_part *b, uint64_t first, int err)
{
    uint64_t failed = (b->walk->fail_start - b->start) >> PM_PAGE_SHIFT, lacking;
    int again = first < failed ? pm_part_read(b, first, failed, &lacking) : 0;

    return again ? again : err;
}

/* Populate the runs of [i, end) that pm_part_lack something; *first and *last: what has to be read again. */
static int populate_runs(struct pm_part *b, uint64_t i, uint64_t end, uint64_t *first, uint64_t *last)
{
    uint64_t run, stop;
    int err;

    *first = *last = end;
    for (stop = next_run(b, i, end, &run); run < end; stop = next_run(b, stop, end, &run)) {
        err = populate_run(b, run, stop);
        if (err)
            return read_before_failure(b, *first, err);
        *first = pm_min(*first, run);
        *last = stop;
    }
    return 0;
}

static int fault_pages(struct pm_part *b, uint64_t end)
{
    uint64_t first = 0, last = end, lacking;
    int err;

    for (int round = 0; round < ROUND_LIMIT; round++) {
        err = populate_runs(b, first, last, &first, &last);
        if (!err)
            err = pm_walk_check(b->walk, pm_part_addr(b, first));
        if (!err && first < last)
            err = pm_part_read(b, first, last, &lacking);
        if (err || first == last || !lacking)
            return err;
    }
    return pm_walk_fail(b->walk, pm_part_addr(b, first), -EBUSY);
}

/* Pages before the first one that must not be written are faulted still, as the kernel does. */
int pm_part_fault(struct pm_part *b)
{
    uint64_t end = b->n;
    int err;

    if (!b->rules.writable) {
        for (end = 0; end < b->n && !(pm_part_lack(b, end) & PM_PFN_WRITE);)
            end++;
    }
    err = fault_pages(b, end);
    if (!err && end < b->n)
        err = pm_walk_fail(b->walk, pm_part_addr(b, end), -EPERM);
    return err;
}

/*
 * A shared page of a file on disk is mapped read-only until its file system has heard of the write, and the
 * pagemap does not show that: it is populated for writing whenever that is asked for.
 */
bool pm_part_must_announce(const struct pm_part *b)
{
    const uint64_t kinds = PM_VMA_SHARED | PM_VMA_FILE | PM_VMA_WRITE;
    uint64_t asked = b->all;

    if ((b->vma->flags & (kinds | PM_VMA_HUGETLB)) != kinds || pm_is_shmem(b->vma))
        return false;
    for (uint64_t i = 0; b->each && i < b->n; i++)
        asked |= b->each[i];
    return asked & PM_PFN_WRITE;
}

int pm_part_announce(struct pm_part *b)
{
    uint64_t first, last;
    int err;

    memset(b->pfns, 0, b->n * sizeof(*b->pfns));
    b->announcing = true;
    err = populate_runs(b, 0, b->n, &first, &last);
    b->announcing = false;
    return err;
}
