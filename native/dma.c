/* SPDX-License-Identifier: MIT */
/*
 * dma.c - the DMA engine: a device reads and writes by DMA address, through what is mapped there.
 *
 * An access goes mapping by mapping. Mirrored pages are reached as access.c does it, by process address and
 * under the eyes of invalidations; the driver's own memory by a plain copy, which an unmapping waits for.
 */
#include <errno.h>

#include "access.h"
#include "domain.h"
#include "inline.h"

enum { PIECE_BYTES = 1 << 20 };

/* A part of one mapping. */
struct piece {
    struct pm_dmap *dmap;
    uint64_t at;  /* bytes from its first page */
    uint64_t len; /* bytes */
    char *buf;
    bool write;
};

static uint64_t dmap_entry(const struct pm_access_span *span, uint64_t addr)
{
    const struct pm_dmap *dmap = span->from;

    return dmap->entry[(addr - dmap->start) >> PM_PAGE_SHIFT];
}

static void fault(struct pm_dma_access *access, uint32_t why)
{
    access->fault = why;
}

static int64_t access_mirror(const struct piece *piece, struct pm_dma_access *access)
{
    struct pm_dmap *dmap = piece->dmap;
    struct pm_access_span span = {
        .mm = dmap->mm, .from = dmap, .entry_at = dmap_entry, .write = piece->write};
    struct pm_access_why why = {0};
    int64_t n;

    span.addr = dmap->start + piece->at;
    span.len = pm_access_span_len(span.addr, piece->len);
    /* A closed mm has fenced all that it had: the entries say the rest. */
    n = pm_mm_enter(dmap->mm);
    if (n) {
        n = pm_access_span_look(&span, &why) ? -EFAULT : -ESRCH;
    } else {
        n = pm_have(dmap->mm, PM_FEAT_PROCESS_VM) ? pm_access_span_do(&span, &why, piece->buf) : -EOPNOTSUPP;
        pm_mm_exit(dmap->mm);
    }
    access->redone += why.redone;
    access->fault = why.fault;
    access->fault_start = why.start;
    access->fault_end = why.end;
    access->fence_seq = why.fence_seq;
    return n;
}

static int64_t copy_kernel(const struct piece *piece)
{
    uint64_t addr = piece->dmap->start + piece->at, buf = (uintptr_t)piece->buf;
    unsigned tries = 0, tries_buf = 0;
    ssize_t n;

    do
        n = piece->write ? pm_sys_vm_writev(piece->buf, addr, piece->len)
                         : pm_sys_vm_readv(piece->buf, addr, piece->len);
    while (pm_inline_again(n, addr, addr + piece->len, &tries) ||
           pm_inline_again(n, buf, buf + piece->len, &tries_buf));
    return n == -EINTR ? 0 : n;
}

/* A pin that its mm's close gave back leads nowhere. */
static int64_t copy_pin(const struct piece *piece, struct pm_dma_access *access)
{
    uint64_t done = 0;
    int err = pm_pin_access(piece->dmap->pin, piece->at, piece->buf, piece->len, piece->write, &done);

    if (err != -ESRCH || done)
        return done ? (int64_t)done : err;
    fault(access, PM_FAULT_MISSING);
    return -EFAULT;
}

/* What no invalidation fences: the driver's own memory, and pinned pages. */
static int64_t access_held(const struct piece *piece, struct pm_dma_access *access)
{
    uint32_t why;
    int64_t n;

    why = pm_dmap_use(piece->dmap, piece->at >> PM_PAGE_SHIFT, piece->write);
    if (why) {
        fault(access, why);
        return -EFAULT;
    }
    n = piece->dmap->source == PM_DMA_PIN ? copy_pin(piece, access) : copy_kernel(piece);
    pm_dmap_unuse(piece->dmap);
    return n;
}

static int64_t access_dmap(struct piece *piece, struct pm_dma_access *access)
{
    struct pm_dmap *dmap = piece->dmap;

    access->cookie = dmap->cookie;
    access->fault_start = pm_page_down(dmap->start + piece->at);
    access->fault_end = access->fault_start + PM_PAGE_SIZE;
    if (!pm_dmap_holds(dmap, piece->at)) {
        fault(access, PM_FAULT_MISSING);
        return -EFAULT;
    }
    if (!pm_dmap_permits(dmap, piece->write)) {
        fault(access, PM_FAULT_DIRECTION);
        return -EFAULT;
    }
    piece->len = pm_min(piece->len, dmap->offset + dmap->size - piece->at);
    return dmap->source == PM_DMA_MIRROR ? access_mirror(piece, access) : access_held(piece, access);
}

static int64_t access_next(struct pm_domain *domain, struct pm_dma_access *access)
{
    uint64_t addr = access->addr + access->done, page, run_bytes;
    struct piece piece = {
        .len = pm_min(access->len - access->done, PIECE_BYTES),
        .buf = (char *)access->buf + access->done,
        .write = access->write != 0,
    };
    int64_t n;

    access->cookie = 0;
    piece.dmap = pm_domain_lookup(domain, addr, piece.write, &page, &run_bytes);
    if (!piece.dmap) {
        fault(access, PM_FAULT_MISSING);
        return -EFAULT;
    }
    piece.at = (page << PM_PAGE_SHIFT) + addr % PM_PAGE_SIZE;
    piece.len = pm_min(piece.len, run_bytes);
    n = access_dmap(&piece, access);
    pm_dmap_drop(piece.dmap);
    return n;
}

int pm_dma_access(pm_domain *domain, struct pm_dma_access *access)
{
    int64_t n = 0;

    access->fault = PM_FAULT_NONE;
    access->done = access->cookie = access->fault_start = access->fault_end = 0;
    access->fence_seq = access->redone = 0;
    if (!pm_domain_owned(domain))
        return -ESRCH;
    if (access->len == 0 || access->len - 1 > UINT64_MAX - access->addr)
        return -EINVAL;
    if (access->addr > access->mask || access->len - 1 > access->mask - access->addr) {
        fault(access, PM_FAULT_MASK);
        return -EFAULT;
    }
    while (access->done < access->len && n >= 0) {
        n = access_next(domain, access);
        access->done += n > 0 ? (uint64_t)n : 0;
    }
    return n < 0 ? (int)n : 0;
}
