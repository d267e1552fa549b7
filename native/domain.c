/* SPDX-License-Identifier: MIT */
/*
 * domain.c - an IOMMU domain: which DMA addresses lead where, and the IOTLB that remembers it.
 *
 * Without an IOMMU (DIRECT) a DMA address is the page's own, so that two mappings may have the same, and
 * there is no IOTLB. What a mapping's entries say is not cached: the IOTLB saves the look-up, and the fence
 * is seen at once.
 */
#include "domain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int pm_domain_create(const struct pm_domain_options *opt, pm_domain **ret)
{
    struct pm_domain *domain;
    int err;

    if (opt->flags & ~(uint32_t)(PM_DOMAIN_DIRECT | PM_DOMAIN_LAZY))
        return -EINVAL;
    domain = pm_sys_calloc(1, sizeof(*domain));
    if (!domain)
        return -ENOMEM;
    err = pm_process_mark(&domain->owner);
    if (!err && !(opt->flags & PM_DOMAIN_DIRECT))
        err = pm_iova_create(opt->first, opt->last, &domain->iovas);
    if (err) {
        free(domain);
        return err;
    }
    atomic_init(&domain->refs, 1);
    domain->flags = opt->flags;
    pthread_mutex_init(&domain->lock, NULL);
    pm_cond_init(&domain->unused);
    *ret = domain;
    return 0;
}

void pm_domain_get(struct pm_domain *domain)
{
    atomic_fetch_add(&domain->refs, 1);
}

/* Mappings hold references, so there are none any more. */
void pm_domain_drop(struct pm_domain *domain)
{
    if (atomic_fetch_sub(&domain->refs, 1) != 1)
        return;
    if (domain->iovas)
        pm_iova_destroy(domain->iovas);
    pthread_cond_destroy(&domain->unused);
    pthread_mutex_destroy(&domain->lock);
    free(domain);
}

pm_iova_space *pm_domain_iovas(pm_domain *domain)
{
    return domain->iovas;
}

static struct pm_iotlb_entry *iotlb_slot(struct pm_domain *domain, uint64_t page)
{
    return &domain->iotlb[page % PM_IOTLB_SIZE];
}

static void iotlb_drop_run(struct pm_domain *domain, const struct pm_dmap_run *run)
{
    uint64_t first = run->node.start >> PM_PAGE_SHIFT, last = run->node.last >> PM_PAGE_SHIFT;

    if (last - first >= PM_IOTLB_SIZE) {
        memset(domain->iotlb, 0, sizeof(domain->iotlb));
        return;
    }
    for (uint64_t page = first; page <= last; page++) {
        struct pm_iotlb_entry *slot = iotlb_slot(domain, page);

        if (slot->run == run)
            memset(slot, 0, sizeof(*slot));
    }
}

static void iotlb_drop(struct pm_domain *domain, const struct pm_dmap *dmap)
{
    if (pm_domain_direct(domain))
        return;
    for (uint64_t i = 0; i < dmap->nruns; i++)
        iotlb_drop_run(domain, &dmap->runs[i]);
    atomic_fetch_add(&domain->flushes, 1);
}

void pm_domain_insert(struct pm_domain *domain, struct pm_dmap *dmap)
{
    pthread_mutex_lock(&domain->lock);
    for (uint64_t i = 0; i < dmap->nruns; i++)
        pm_itree_insert(&domain->runs, &dmap->runs[i].node);
    dmap->mapped = true;
    domain->mappings++;
    domain->segments += dmap->segments;
    domain->entries += dmap->entries;
    domain->bytes += dmap->bytes;
    pthread_mutex_unlock(&domain->lock);
}

/* Of a batch: the IOTLB is empty by now. */
static void free_batch(struct pm_dmap **batch, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        pm_dmap_free_iovas(batch[i]);
        pm_dmap_drop(batch[i]);
    }
}

static uint32_t take_batch(struct pm_domain *domain, struct pm_dmap **batch)
{
    uint32_t n = domain->nlazy;

    if (!n)
        return 0;
    memcpy(batch, domain->lazy, n * sizeof(*batch));
    memset(domain->iotlb, 0, sizeof(domain->iotlb));
    domain->nlazy = 0;
    atomic_fetch_add(&domain->flushes, 1);
    return n;
}

int64_t pm_domain_flush(pm_domain *domain)
{
    struct pm_dmap *batch[PM_LAZY_MAX];
    uint32_t n;

    if (!pm_domain_owned(domain))
        return -ESRCH;
    pthread_mutex_lock(&domain->lock);
    n = take_batch(domain, batch);
    pthread_mutex_unlock(&domain->lock);
    free_batch(batch, n);
    return n;
}

/* Those that wait for a flush hold references too. */
void pm_domain_put(pm_domain *domain)
{
    if (!pm_domain_owned(domain))
        return;
    pthread_mutex_lock(&domain->lock);
    domain->abandoned = true;
    pthread_mutex_unlock(&domain->lock);
    pm_domain_flush(domain);
    pm_domain_drop(domain);
}

/* IOVAs that the caller gives out again are not kept back. */
static bool is_lazy(const struct pm_domain *domain, const struct pm_dmap *dmap)
{
    return (domain->flags & PM_DOMAIN_LAZY) && dmap->iova_size;
}

/* False if it was not there any more: another thread has taken it out. Its IOVAs are not free yet. */
bool pm_domain_remove(struct pm_domain *domain, struct pm_dmap *dmap)
{
    bool there;

    pthread_mutex_lock(&domain->lock);
    there = dmap->mapped;
    if (there) {
        dmap->mapped = false;
        for (uint64_t i = 0; i < dmap->nruns; i++)
            pm_itree_remove(&domain->runs, &dmap->runs[i].node);
        domain->mappings--;
        domain->segments -= dmap->segments;
        domain->entries -= dmap->entries;
        domain->bytes -= dmap->bytes;
        if (!is_lazy(domain, dmap))
            iotlb_drop(domain, dmap);
    }
    pthread_mutex_unlock(&domain->lock);
    return there;
}

void pm_domain_give_back(struct pm_domain *domain, struct pm_dmap *dmap)
{
    struct pm_dmap *batch[PM_LAZY_MAX];
    uint32_t n = 0;

    if (!is_lazy(domain, dmap)) {
        pm_dmap_free_iovas(dmap);
        return;
    }
    pthread_mutex_lock(&domain->lock);
    pm_dmap_get(dmap);
    domain->lazy[domain->nlazy++] = dmap;
    if (domain->nlazy == PM_LAZY_MAX || domain->abandoned)
        n = take_batch(domain, batch);
    pthread_mutex_unlock(&domain->lock);
    free_batch(batch, n);
}

int pm_domain_alloc(struct pm_domain *domain, uint64_t size, uint64_t limit, uint64_t *ret)
{
    int err = pm_iova_alloc(domain->iovas, size, limit, ret);

    if (err == -ENOSPC && pm_domain_flush(domain) > 0)
        err = pm_iova_alloc(domain->iovas, size, limit, ret);
    return err;
}

struct find {
    struct pm_dmap_run *run;
    uint64_t addr;
    bool write, holds;
};

/* The first, but without an IOMMU one that has the byte, and rather one that serves: mappings share pages. */
static bool take_best(struct pm_inode *node, void *arg)
{
    struct pm_dmap_run *run = (struct pm_dmap_run *)node;
    struct find *find = arg;
    bool holds = pm_dmap_holds(run->dmap, (run->first << PM_PAGE_SHIFT) + (find->addr - node->start));
    bool serves = holds && pm_dmap_permits(run->dmap, find->write);

    if (!find->run || (holds && !find->holds) || serves) {
        find->run = run;
        find->holds = holds;
    }
    return pm_domain_direct(run->dmap->domain) && !serves;
}

/* With the domain's lock held. */
static struct pm_dmap_run *run_at(struct pm_domain *domain, uint64_t addr, bool write)
{
    struct pm_iotlb_entry *slot = iotlb_slot(domain, addr >> PM_PAGE_SHIFT);
    struct find find = {.addr = addr, .write = write};

    if (!pm_domain_direct(domain) && slot->page == (addr >> PM_PAGE_SHIFT) + 1) {
        domain->hits++;
        return slot->run;
    }
    domain->misses++;
    pm_itree_visit(domain->runs, addr, addr, take_best, &find);
    if (find.run && !pm_domain_direct(domain))
        *slot = (struct pm_iotlb_entry){(addr >> PM_PAGE_SHIFT) + 1, find.run};
    return find.run;
}

struct pm_dmap *pm_domain_lookup(struct pm_domain *domain, uint64_t addr, bool write, uint64_t *page,
                                 uint64_t *bytes)
{
    struct pm_dmap *dmap = NULL;
    struct pm_dmap_run *run;

    pthread_mutex_lock(&domain->lock);
    run = run_at(domain, addr, write);
    if (run && !run->dmap->mapped) {
        domain->stale++;
    } else if (run) {
        dmap = run->dmap;
        pm_dmap_get(dmap);
        *page = run->first + ((addr - run->node.start) >> PM_PAGE_SHIFT);
        *bytes = run->node.last - addr + 1;
    }
    pthread_mutex_unlock(&domain->lock);
    return dmap;
}

int pm_domain_stats(pm_domain *domain, struct pm_domain_stats *ret)
{
    if (!pm_domain_owned(domain))
        return -ESRCH;
    pthread_mutex_lock(&domain->lock);
    *ret = (struct pm_domain_stats){
        .mappings = domain->mappings,
        .mapped_pages = atomic_load(&domain->pages),
        .entries = domain->entries,
        .segments = domain->segments,
        .iotlb_hits = domain->hits,
        .iotlb_misses = domain->misses,
        .iotlb_flushes = atomic_load(&domain->flushes),
        .iotlb_stale = domain->stale,
        .lazy_pending = domain->nlazy,
        .fenced = atomic_load(&domain->fenced),
        .dirtied = atomic_load(&domain->dirtied),
        .bytes = domain->bytes,
    };
    pthread_mutex_unlock(&domain->lock);
    return 0;
}
