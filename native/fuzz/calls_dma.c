/* SPDX-License-Identifier: MIT */
/* calls_dma.c - domains, mappings, accesses by DMA address, IOVAs, spans. */
#include <string.h>

#include "world.h"

void call_dma(void)
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

void call_dma_access(void)
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

void call_iovas(void)
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

void call_spans(void)
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
