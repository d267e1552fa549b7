/* SPDX-License-Identifier: MIT */
/*
 * dmap.c - the life of a DMA mapping: pages of a process or of the driver, mapped for a device.
 *
 * A mapping of a range is made in one step: IOVAs and entries first, with no lock held, then the commit under
 * the device lock, if the sequence still stands. Entries are those of the device page table, and are fenced
 * with them.
 */
#include "domain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "access.h"
#include "entries.h"

static const uint64_t copy_wait_ns = 1000ULL * 1000 * 1000;

void pm_dmap_get(struct pm_dmap *dmap)
{
    atomic_fetch_add(&dmap->refs, 1);
}

bool pm_dmap_permits(const struct pm_dmap *dmap, bool write)
{
    return dmap->direction == PM_DMA_BIDIRECTIONAL ||
           dmap->direction == (write ? PM_DMA_FROM_DEVICE : PM_DMA_TO_DEVICE);
}

bool pm_dmap_holds(const struct pm_dmap *dmap, uint64_t at)
{
    return at >= dmap->offset && at < dmap->offset + dmap->size;
}

static void lock_entries(struct pm_dmap *dmap)
{
    if (pm_dmap_fences(dmap))
        pm_lock(dmap->mm);
    else
        pthread_mutex_lock(&dmap->domain->lock);
}

static void unlock_entries(struct pm_dmap *dmap)
{
    if (pm_dmap_fences(dmap))
        pm_unlock(dmap->mm);
    else
        pthread_mutex_unlock(&dmap->domain->lock);
}

static void free_dmap(struct pm_dmap *dmap)
{
    if (dmap->runs != &dmap->one)
        free(dmap->runs);
    if (dmap->mm)
        pm_mm_put(dmap->mm);
    if (dmap->pin)
        pm_pin_put(dmap->pin);
    pm_domain_drop(dmap->domain);
    free(dmap);
}

void pm_dmap_drop(struct pm_dmap *dmap)
{
    if (pm_domain_owned(dmap->domain) && atomic_fetch_sub(&dmap->refs, 1) == 1)
        free_dmap(dmap);
}

/* Out of the tree first: a look-up must not find what has no reference, nor a lazy domain keep it. */
void pm_dmap_put(pm_dmap *dmap)
{
    pm_dmap_unmap(dmap, NULL);
    pm_dmap_drop(dmap);
}

/* With the device lock held. */
static int commit(struct pm_dmap *dmap, const struct pm_dmap_options *opt)
{
    if (pm_mm_check(dmap->mm))
        return -ESRCH;
    if (!(opt->flags & PM_DMAP_EMPTY) && pm_sub_stale(opt->sub, opt->seq))
        return -EBUSY;
    dmap->by_addr.start = dmap->start;
    dmap->by_addr.last = dmap->start + (dmap->n << PM_PAGE_SHIFT) - 1;
    pm_itree_insert(&dmap->mm->dmaps, &dmap->by_addr);
    dmap->fenceable = true;
    atomic_fetch_add(&dmap->mm->ndmaps, 1);
    pm_domain_insert(dmap->domain, dmap);
    return 0;
}

int pm_dmap_create(const struct pm_dmap_options *opt, pm_dmap **ret)
{
    struct pm_dmap *dmap;
    int err = pm_dmap_make(opt, &dmap);

    if (err)
        return err;
    if (opt->daddrs)
        pm_dmap_give_addresses(dmap, opt->daddrs);
    /* Before the commit: from then on an invalidation may drop some of them again. */
    atomic_fetch_add(&dmap->domain->pages, dmap->linked);
    pm_point(PM_POINT_DMA_MAP_BEFORE_COMMIT);
    if (pm_dmap_fences(dmap)) {
        pm_lock(dmap->mm);
        err = commit(dmap, opt);
        pm_unlock(dmap->mm);
    } else {
        err = dmap->pin ? pm_pin_hold(dmap->pin) : 0;
        if (!err)
            pm_domain_insert(dmap->domain, dmap);
    }
    pm_point(PM_POINT_DMA_MAP_AFTER_COMMIT);
    if (err) {
        if (opt->daddrs)
            memset(opt->daddrs, 0, opt->n * sizeof(*opt->daddrs));
        atomic_fetch_sub(&dmap->domain->pages, dmap->linked);
        pm_dmap_discard(dmap);
        return err;
    }
    *ret = dmap;
    return 0;
}

int pm_dmap_link(pm_dmap *dmap, pm_sub *sub, uint64_t seq, uint64_t first, uint64_t n, const uint64_t *pfns)
{
    uint64_t linked = 0, runs;
    int err = 0;

    if (!pm_domain_owned(dmap->domain))
        return -ESRCH;
    if (!pm_dmap_fences(dmap) || pm_domain_direct(dmap->domain) || first > dmap->n || n > dmap->n - first ||
        sub->mm != dmap->mm || !pm_sub_covers(sub, dmap->start + (first << PM_PAGE_SHIFT), n))
        return -EINVAL;
    pm_point(PM_POINT_DMA_MAP_BEFORE_COMMIT);
    pm_lock(dmap->mm);
    if (!dmap->fenceable || pm_mm_check(dmap->mm))
        err = -ESRCH;
    else if (pm_sub_stale(sub, seq))
        err = -EBUSY;
    for (uint64_t i = 0; !err && i < n; i++)
        err = dmap->entry[first + i] ? -EEXIST : 0;
    if (!err)
        linked = pm_entries_fill(dmap->entry + first, pfns, n, PM_DMAP_KEPT, &runs);
    dmap->linked += linked;
    pm_unlock(dmap->mm);
    atomic_fetch_add(&dmap->domain->pages, linked);
    pm_point(PM_POINT_DMA_MAP_AFTER_COMMIT);
    return err;
}

uint32_t pm_dmap_use(struct pm_dmap *dmap, uint64_t page, bool write)
{
    uint32_t why = PM_FAULT_NONE;

    pthread_mutex_lock(&dmap->domain->lock);
    if (dmap->entry[page] == 0)
        why = PM_FAULT_MISSING;
    else if (write && !(dmap->entry[page] & PM_ENTRY_WRITE))
        why = PM_FAULT_READONLY;
    else
        dmap->users++;
    pthread_mutex_unlock(&dmap->domain->lock);
    return why;
}

void pm_dmap_unuse(struct pm_dmap *dmap)
{
    pthread_mutex_lock(&dmap->domain->lock);
    if (--dmap->users == 0)
        pthread_cond_broadcast(&dmap->domain->unused);
    pthread_mutex_unlock(&dmap->domain->lock);
}

/* With the domain's lock held: the memory may be freed once it is unmapped, so copies end first. */
static void wait_for_copies(struct pm_dmap *dmap)
{
    uint64_t until_ns = pm_now_ns() + copy_wait_ns;
    struct timespec until = {(time_t)(until_ns / 1000000000), (long)(until_ns % 1000000000)};

    while (dmap->users && pthread_cond_timedwait(&dmap->domain->unused, &dmap->domain->lock, &until) == 0)
        continue;
}

/* With the entries locked. */
static uint64_t take_out(struct pm_dmap *dmap, uint64_t first, uint64_t n, uint64_t *writable)
{
    uint64_t writes, taken = pm_entries_clear(dmap->entry + first, n, &writes);

    dmap->linked -= taken;
    if (writable)
        *writable = writes;
    return taken;
}

/* With the entries locked: no access of these pages is under way any more, also if another call took them. */
static void settle(struct pm_dmap *dmap, uint64_t first, uint64_t n)
{
    uint64_t start = dmap->start + (first << PM_PAGE_SHIFT);

    if (pm_dmap_fences(dmap))
        pm_access_expel(dmap->mm, start, start + (n << PM_PAGE_SHIFT) - 1);
    else
        wait_for_copies(dmap);
}

int64_t pm_dmap_unlink(pm_dmap *dmap, uint64_t first, uint64_t n, uint64_t *writable)
{
    uint64_t taken;

    if (writable)
        *writable = 0;
    if (!pm_domain_owned(dmap->domain))
        return -ESRCH;
    if (n == 0 || first >= dmap->n || n > dmap->n - first)
        return -EINVAL;
    pm_point(PM_POINT_DMA_UNMAP);
    lock_entries(dmap);
    taken = take_out(dmap, first, n, writable);
    settle(dmap, first, n);
    unlock_entries(dmap);
    if (taken)
        atomic_fetch_add(&dmap->domain->flushes, !pm_domain_direct(dmap->domain));
    atomic_fetch_sub(&dmap->domain->pages, taken);
    return (int64_t)taken;
}

/* With the entries locked, in one step with the last of them: nothing is linked that no fence would find. */
static void leave_mm(struct pm_dmap *dmap)
{
    if (!dmap->fenceable)
        return;
    pm_itree_remove(&dmap->mm->dmaps, &dmap->by_addr);
    dmap->fenceable = false;
    atomic_fetch_sub(&dmap->mm->ndmaps, 1);
}

int64_t pm_dmap_unmap(pm_dmap *dmap, uint64_t *writable)
{
    uint64_t taken;

    if (writable)
        *writable = 0;
    if (!pm_domain_owned(dmap->domain))
        return -ESRCH;
    if (!pm_domain_remove(dmap->domain, dmap))
        return 0;
    pm_point(PM_POINT_DMA_UNMAP);
    lock_entries(dmap);
    taken = take_out(dmap, 0, dmap->n, writable);
    leave_mm(dmap);
    settle(dmap, 0, dmap->n);
    unlock_entries(dmap);
    atomic_fetch_sub(&dmap->domain->pages, taken);
    if (dmap->pin)
        pm_pin_unhold(dmap->pin);
    pm_domain_give_back(dmap->domain, dmap);
    return (int64_t)taken;
}

void pm_dmap_dirtied(pm_dmap *dmap, uint64_t pages)
{
    atomic_fetch_add(&dmap->domain->dirtied, pages);
}

int pm_dmap_read(pm_dmap *dmap, uint64_t first, uint64_t n, uint64_t *ret)
{
    if (!pm_domain_owned(dmap->domain))
        return -ESRCH;
    if (first > dmap->n || n > dmap->n - first)
        return -EINVAL;
    lock_entries(dmap);
    memcpy(ret, dmap->entry + first, n * sizeof(*ret));
    unlock_entries(dmap);
    return 0;
}

int pm_dmap_info(pm_dmap *dmap, struct pm_dmap_info *ret)
{
    if (!pm_domain_owned(dmap->domain))
        return -ESRCH;
    lock_entries(dmap);
    *ret = (struct pm_dmap_info){
        .iova = dmap->nruns ? dmap->runs[0].node.start + dmap->offset : 0,
        .size = dmap->size,
        .linked = dmap->linked,
        .bytes = dmap->bytes,
        .segments = dmap->segments,
        .entries = dmap->entries,
    };
    unlock_entries(dmap);
    return 0;
}
