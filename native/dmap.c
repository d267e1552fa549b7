/* SPDX-License-Identifier: MIT */
/*
 * dmap.c - DMA mappings: pages of a process or of the driver, mapped for a device.
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

static const uint64_t user_end = 1ULL << 47;
static const uint64_t copy_wait_ns = 1000ULL * 1000 * 1000;
static const uint64_t kept_bits = ~(PM_PFN_ERROR | PM_PFN_STICKY);

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

static bool fences(const struct pm_dmap *dmap)
{
    return dmap->source == PM_DMA_MIRROR;
}

static void lock_entries(struct pm_dmap *dmap)
{
    if (fences(dmap))
        pm_lock(dmap->mm);
    else
        pthread_mutex_lock(&dmap->domain->lock);
}

static void unlock_entries(struct pm_dmap *dmap)
{
    if (fences(dmap))
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

/* Pages that whole huge entries stand for, beyond the one entry of each. */
static uint64_t count_saved(const uint64_t *entry, uint64_t n, uint64_t iova)
{
    uint64_t first = (PM_HUGE_PAGES - (iova >> PM_PAGE_SHIFT) % PM_HUGE_PAGES) % PM_HUGE_PAGES, saved = 0;

    for (uint64_t i = first; i + PM_HUGE_PAGES <= n; i += PM_HUGE_PAGES) {
        uint64_t head = entry[i], tail = entry[i + PM_HUGE_PAGES - 1];
        uint64_t order = (head >> PM_PFN_ORDER_SHIFT) & PM_PFN_ORDER_MASK;

        if (order >= PM_HUGE_ORDER && (head & PM_PFN_MASK) % PM_HUGE_PAGES == 0 &&
            tail == head + PM_HUGE_PAGES - 1)
            saved += PM_HUGE_PAGES - 1;
    }
    return saved;
}

static void give_own_addresses(const struct pm_dmap *dmap, uint64_t *daddrs)
{
    for (uint64_t i = 0; i < dmap->n; i++)
        daddrs[i] = dmap->entry[i] & PM_ENTRY_VALID ? (dmap->entry[i] & PM_PFN_MASK) << PM_PAGE_SHIFT : 0;
}

static void give_addresses(const struct pm_dmap *dmap, uint64_t *daddrs)
{
    if (pm_domain_direct(dmap->domain))
        give_own_addresses(dmap, daddrs);
    else
        pm_entries_place(dmap->entry, dmap->n, (struct pm_run){dmap->iova, PM_PAGE_SIZE}, daddrs);
    if (dmap->n)
        daddrs[0] += daddrs[0] ? dmap->offset : 0;
}

static struct pm_dmap_run run_of(struct pm_dmap *dmap, uint64_t first, uint64_t n, uint64_t addr)
{
    return (struct pm_dmap_run){
        .node = {.start = addr, .last = addr + (n << PM_PAGE_SHIFT) - 1},
        .dmap = dmap,
        .first = first,
    };
}

/* Without an IOMMU: a run for each stretch of pages next to each other. */
static int make_direct_runs(struct pm_dmap *dmap)
{
    uint64_t i = 0, end;

    if (dmap->segments > 1) {
        dmap->runs = pm_sys_calloc(dmap->segments, sizeof(*dmap->runs));
        if (!dmap->runs)
            return -ENOMEM;
    }
    for (; i < dmap->n; i = end) {
        uint64_t addr = (dmap->entry[i] & PM_PFN_MASK) << PM_PAGE_SHIFT;

        end = i + 1;
        if (!(dmap->entry[i] & PM_ENTRY_VALID))
            continue;
        if (!addr)
            return -EOPNOTSUPP;
        while (end < dmap->n && pm_pfn_continues(dmap->entry[end], dmap->entry[end - 1]))
            end++;
        if (addr + ((end - i) << PM_PAGE_SHIFT) - 1 > dmap->mask)
            return -EFAULT;
        /* Another thread changed the pfns between the two looks at them. */
        if (dmap->nruns == pm_max(dmap->segments, 1))
            return -EBUSY;
        dmap->runs[dmap->nruns++] = run_of(dmap, i, end - i, addr);
    }
    return 0;
}

/* Huge pages are mapped whole where the IOVA has the place in 2 MiB that the address has. */
static uint64_t lead_of(const struct pm_dmap *dmap)
{
    uint64_t lead = dmap->start & (PM_HUGE_SIZE - 1);

    return dmap->n >= PM_HUGE_PAGES && fences(dmap) ? lead : 0;
}

static int place(struct pm_dmap *dmap, const struct pm_dmap_options *opt)
{
    uint64_t lead = lead_of(dmap), size = (dmap->n << PM_PAGE_SHIFT) + lead;
    int err;

    if (pm_domain_direct(dmap->domain))
        return make_direct_runs(dmap);
    if (opt->flags & PM_DMAP_AT) {
        dmap->iova = opt->iova;
    } else {
        err = pm_domain_alloc(dmap->domain, size, dmap->mask, &dmap->iova);
        if (err)
            return err;
        dmap->iova_size = size;
        dmap->iova += lead;
    }
    dmap->runs[dmap->nruns++] = run_of(dmap, 0, dmap->n, dmap->iova);
    return 0;
}

/* From where the extent was given out, which may be before the first page. */
void pm_dmap_free_iovas(struct pm_dmap *dmap)
{
    if (!dmap->iova_size)
        return;
    pm_iova_free(dmap->domain->iovas, dmap->iova - (dmap->iova_size - (dmap->n << PM_PAGE_SHIFT)),
                 dmap->iova_size);
    dmap->iova_size = 0;
}

static void unplace(struct pm_dmap *dmap)
{
    pm_dmap_free_iovas(dmap);
    free_dmap(dmap);
}

static int check_options(const struct pm_dmap_options *opt)
{
    const uint32_t flags = PM_DMAP_EMPTY | PM_DMAP_AT;
    bool direct = pm_domain_direct(opt->domain);

    if (!pm_domain_owned(opt->domain))
        return -ESRCH;
    if (opt->n == 0 || opt->n > user_end >> PM_PAGE_SHIFT || opt->direction >= PM_DMA_NONE ||
        (opt->flags & ~flags) || ((opt->flags & flags) && direct) || opt->start >= user_end)
        return -EINVAL;
    if ((opt->flags & PM_DMAP_AT) &&
        (opt->iova % PM_PAGE_SIZE || opt->iova == 0 || -opt->iova < opt->n << PM_PAGE_SHIFT))
        return -EINVAL;
    if (opt->source == PM_DMA_KERNEL)
        return opt->size && opt->size <= (opt->n << PM_PAGE_SHIFT) - opt->start % PM_PAGE_SIZE ? 0 : -EINVAL;
    if (opt->start % PM_PAGE_SIZE || user_end - opt->start < opt->n << PM_PAGE_SHIFT)
        return -EINVAL;
    if (opt->source == PM_DMA_PIN)
        return opt->pin && opt->pfns && !opt->flags ? 0 : -EINVAL;
    if (opt->source != PM_DMA_MIRROR || !opt->sub)
        return -EINVAL;
    return opt->pfns || (opt->flags & PM_DMAP_EMPTY) ? 0 : -EINVAL;
}

/* Driver memory whose PFNs do not matter: every page is there. */
static void fill_kernel(struct pm_dmap *dmap)
{
    for (uint64_t i = 0; i < dmap->n; i++)
        dmap->entry[i] = PM_ENTRY_VALID | PM_ENTRY_WRITE;
    dmap->linked = dmap->segments = dmap->n;
}

static int make(const struct pm_dmap_options *opt, struct pm_dmap **ret)
{
    uint64_t bytes = sizeof(struct pm_dmap) + opt->n * sizeof(uint64_t);
    struct pm_dmap *dmap = pm_sys_malloc(bytes);
    int err;

    if (!dmap)
        return -ENOMEM;
    memset(dmap, 0, sizeof(*dmap));
    atomic_init(&dmap->refs, 1);
    dmap->domain = opt->domain;
    pm_domain_get(opt->domain);
    if (opt->source == PM_DMA_MIRROR) {
        dmap->mm = opt->sub->mm;
        pm_mm_get(dmap->mm);
    }
    if (opt->source == PM_DMA_PIN) {
        dmap->pin = opt->pin;
        pm_pin_get(dmap->pin);
    }
    dmap->source = opt->source;
    dmap->direction = opt->direction;
    dmap->cookie = opt->cookie;
    dmap->mask = opt->mask;
    dmap->n = opt->n;
    dmap->start = pm_page_down(opt->start);
    dmap->offset = opt->start % PM_PAGE_SIZE;
    dmap->size = opt->source == PM_DMA_KERNEL ? opt->size : opt->n << PM_PAGE_SHIFT;
    dmap->runs = &dmap->one;
    if (opt->flags & PM_DMAP_EMPTY)
        memset(dmap->entry, 0, opt->n * sizeof(uint64_t));
    else if (opt->pfns)
        dmap->linked = pm_entries_fill(dmap->entry, opt->pfns, opt->n, kept_bits, &dmap->segments);
    else
        fill_kernel(dmap);
    err = place(dmap, opt);
    dmap->entries = dmap->linked - count_saved(dmap->entry, dmap->n, dmap->iova);
    dmap->bytes = bytes + (dmap->runs == &dmap->one ? 0 : dmap->nruns * sizeof(*dmap->runs));
    if (err) {
        unplace(dmap);
        return err;
    }
    *ret = dmap;
    return 0;
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
    int err = check_options(opt);

    if (!err && opt->source == PM_DMA_MIRROR)
        err = pm_mm_check(opt->sub->mm);
    if (!err)
        err = make(opt, &dmap);
    if (err)
        return err;
    if (opt->daddrs)
        give_addresses(dmap, opt->daddrs);
    /* Before the commit: from then on an invalidation may drop some of them again. */
    atomic_fetch_add(&dmap->domain->pages, dmap->linked);
    pm_point(PM_POINT_DMA_MAP_BEFORE_COMMIT);
    if (fences(dmap)) {
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
        unplace(dmap);
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
    if (!fences(dmap) || pm_domain_direct(dmap->domain) || first > dmap->n || n > dmap->n - first ||
        sub->mm != dmap->mm)
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
        linked = pm_entries_fill(dmap->entry + first, pfns, n, kept_bits, &runs);
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

    if (fences(dmap))
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

/* The pages of a mapping that lie in [start, last]. */
struct interval {
    uint64_t start, last, seq;
};

static void pages_in(const struct pm_dmap *dmap, const struct interval *at, uint64_t *first, uint64_t *end)
{
    uint64_t start = pm_max(at->start, dmap->by_addr.start), last = pm_min(at->last, dmap->by_addr.last);

    *first = (start - dmap->start) >> PM_PAGE_SHIFT;
    *end = ((last - dmap->start) >> PM_PAGE_SHIFT) + 1;
}

static bool fence_dmap(struct pm_inode *node, void *arg)
{
    struct pm_dmap *dmap = (struct pm_dmap *)node;
    const struct interval *at = arg;
    uint64_t i, end, fenced = 0;

    for (pages_in(dmap, at, &i, &end); i < end; i++) {
        if (!(dmap->entry[i] & PM_ENTRY_VALID))
            continue;
        dmap->entry[i] = PM_ENTRY_FENCED | (dmap->entry[i] & PM_ENTRY_WRITE) | (at->seq & PM_ENTRY_SEQ_MASK);
        fenced++;
    }
    if (fenced) {
        atomic_fetch_add(&dmap->domain->fenced, fenced);
        atomic_fetch_add(&dmap->domain->flushes, !pm_domain_direct(dmap->domain));
    }
    return true;
}

void pm_dmaps_fence(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq)
{
    struct interval at = {start, last, seq};

    pm_itree_visit(mm->dmaps, start, last, fence_dmap, &at);
}

static bool drop_dmap(struct pm_inode *node, void *arg)
{
    struct pm_dmap *dmap = (struct pm_dmap *)node;
    const struct interval *at = arg;
    uint64_t fenced = PM_ENTRY_FENCED | (at->seq & PM_ENTRY_SEQ_MASK), i, end;

    for (pages_in(dmap, at, &i, &end); i < end; i++) {
        if ((dmap->entry[i] & ~PM_ENTRY_WRITE) != fenced)
            continue;
        dmap->entry[i] = 0;
        dmap->linked--;
        atomic_fetch_sub(&dmap->domain->pages, 1);
    }
    return true;
}

void pm_dmaps_drop(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq)
{
    struct interval at = {start, last, seq};

    pm_itree_visit(mm->dmaps, start, last, drop_dmap, &at);
}
