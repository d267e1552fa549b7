/* SPDX-License-Identifier: MIT */
/*
 * dmap_make.c - a new DMA mapping: its entries, and the DMA addresses that they get. Nothing sees it yet.
 */
#include "domain.h"

#include <errno.h>
#include <string.h>

#include "entries.h"

static const uint64_t user_end = 1ULL << 47;

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

void pm_dmap_give_addresses(const struct pm_dmap *dmap, uint64_t *daddrs)
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

    return dmap->n >= PM_HUGE_PAGES && pm_dmap_fences(dmap) ? lead : 0;
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

void pm_dmap_discard(struct pm_dmap *dmap)
{
    pm_dmap_free_iovas(dmap);
    pm_dmap_drop(dmap);
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
    if (opt->source != PM_DMA_MIRROR || !opt->sub || !(opt->pfns || (opt->flags & PM_DMAP_EMPTY)))
        return -EINVAL;
    if (!pm_sub_covers(opt->sub, opt->start, opt->n))
        return -EINVAL;
    return pm_mm_check(opt->sub->mm);
}

/* Driver memory whose PFNs do not matter: every page is there. */
static void fill_kernel(struct pm_dmap *dmap)
{
    for (uint64_t i = 0; i < dmap->n; i++)
        dmap->entry[i] = PM_ENTRY_VALID | PM_ENTRY_WRITE;
    dmap->linked = dmap->segments = dmap->n;
}

int pm_dmap_make(const struct pm_dmap_options *opt, struct pm_dmap **ret)
{
    uint64_t bytes = sizeof(struct pm_dmap) + opt->n * sizeof(uint64_t);
    struct pm_dmap *dmap;
    int err = check_options(opt);

    if (err)
        return err;
    dmap = pm_sys_malloc(bytes);
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
        dmap->linked = pm_entries_fill(dmap->entry, opt->pfns, opt->n, PM_DMAP_KEPT, &dmap->segments);
    else
        fill_kernel(dmap);
    err = place(dmap, opt);
    dmap->entries = dmap->linked - count_saved(dmap->entry, dmap->n, dmap->iova);
    dmap->bytes = bytes + (dmap->runs == &dmap->one ? 0 : dmap->nruns * sizeof(*dmap->runs));
    if (err) {
        pm_dmap_discard(dmap);
        return err;
    }
    *ret = dmap;
    return 0;
}
