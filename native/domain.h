/* SPDX-License-Identifier: MIT */
/*
 * domain.h - IOMMU domains and the mappings in them, for the files that make, fence and use mappings.
 *
 * Lock order: the device lock of an mm, then a domain's lock, then that of its IOVAs. A domain's lock orders
 * the tree of what is mapped where and the IOTLB; the entries of mirrored memory are under the device lock of
 * its mm, so that an invalidation fences them without the domain's lock.
 */
#ifndef PM_DOMAIN_H
#define PM_DOMAIN_H

#include "internal.h"

/* Pages with DMA addresses in a row: all of a mapping behind an IOMMU, else those next to each other. */
struct pm_dmap_run {
    struct pm_inode node; /* first: of the domain's tree, in bytes of DMA addresses */
    struct pm_dmap *dmap;
    uint64_t first; /* page of the mapping */
};

struct pm_dmap {
    struct pm_inode by_addr; /* first: of the mm's tree, in bytes of process addresses */
    struct pm_domain *domain;
    struct pm_mm *mm;   /* MIRROR */
    struct pm_pin *pin; /* PIN */
    uint64_t start;     /* process address of the first page */
    uint64_t n;
    uint64_t offset, size;    /* bytes from the first page on that are mapped */
    uint64_t iova, iova_size; /* the extent of IOVAs that is its own; size 0: none */
    uint64_t mask;
    uint64_t cookie;
    uint32_t source, direction;
    atomic_int refs;
    bool fenceable; /* in the mm's tree; under the device lock */
    bool mapped;    /* in the domain's tree; under the domain's lock */
    unsigned users; /* copies under way that no fence stops; under the domain's lock */
    uint64_t linked;
    uint64_t segments, entries, bytes;
    uint64_t nruns;
    struct pm_dmap_run *runs; /* &one, or allocated */
    struct pm_dmap_run one;
    uint64_t entry[];
};

/* What of a pfn goes into an entry. */
#define PM_DMAP_KEPT (~(PM_PFN_ERROR | PM_PFN_STICKY))

enum { PM_IOTLB_SIZE = 1024, PM_LAZY_MAX = 256 };

struct pm_iotlb_entry {
    uint64_t page; /* of DMA addresses, + 1: 0 is empty */
    struct pm_dmap_run *run;
};

struct pm_domain {
    atomic_int refs;
    uint64_t owner; /* pm_process() */
    uint32_t flags;
    pm_iova_space *iovas; /* NULL: direct */
    pthread_mutex_t lock;
    pthread_cond_t unused; /* a copy has ended */
    struct pm_inode *runs;
    struct pm_iotlb_entry iotlb[PM_IOTLB_SIZE];
    struct pm_dmap *lazy[PM_LAZY_MAX]; /* unmapped; their IOVAs are not free yet */
    uint32_t nlazy;
    bool abandoned; /* by its maker: nobody flushes it any more; under the lock */
    uint64_t mappings, hits, misses, stale, segments, entries, bytes;
    atomic_uint_least64_t flushes, fenced, pages, dirtied;
};

static inline bool pm_domain_owned(const struct pm_domain *domain)
{
    return domain->owner == pm_process();
}

static inline bool pm_domain_direct(const struct pm_domain *domain)
{
    return domain->flags & PM_DOMAIN_DIRECT;
}

/* Do invalidations fence its entries? They are under the device lock of its mm then, else under the domain's.
 */
static inline bool pm_dmap_fences(const struct pm_dmap *dmap)
{
    return dmap->source == PM_DMA_MIRROR;
}

void pm_domain_get(struct pm_domain *domain);
void pm_domain_drop(struct pm_domain *domain);
/* Take a mapping into the domain's tree, and out of it again. */
void pm_domain_insert(struct pm_domain *domain, struct pm_dmap *dmap);
bool pm_domain_remove(struct pm_domain *domain, struct pm_dmap *dmap);
/* Its IOVAs can be given out again: at once, or after the next flush. */
void pm_domain_give_back(struct pm_domain *domain, struct pm_dmap *dmap);
/* The mapping at a DMA address, referenced, with the page of it in *page and the bytes from there to the end
 * of the run in *bytes; NULL: none. */
struct pm_dmap *pm_domain_lookup(struct pm_domain *domain, uint64_t addr, bool write, uint64_t *page,
                                 uint64_t *bytes);
/* An IOVA extent, after a flush where lazily unmapped ones stand in the way. */
int pm_domain_alloc(struct pm_domain *domain, uint64_t size, uint64_t limit, uint64_t *ret);

void pm_dmap_get(struct pm_dmap *dmap);
void pm_dmap_drop(struct pm_dmap *dmap);
/* Is the byte `at` of its pages mapped, and may a device read or write it? Its entries may still say no. */
bool pm_dmap_holds(const struct pm_dmap *dmap, uint64_t at);
bool pm_dmap_permits(const struct pm_dmap *dmap, bool write);
void pm_dmap_free_iovas(struct pm_dmap *dmap);

/* dmap_make.c: a mapping that nothing sees yet, as pm_dmap_create(); and away with it. */
int pm_dmap_make(const struct pm_dmap_options *opt, struct pm_dmap **ret);
void pm_dmap_give_addresses(const struct pm_dmap *dmap, uint64_t *daddrs);
void pm_dmap_discard(struct pm_dmap *dmap);

/* A copy that no fence stops begins: 0, or the fault of that page; and ends. */
uint32_t pm_dmap_use(struct pm_dmap *dmap, uint64_t page, bool write);
void pm_dmap_unuse(struct pm_dmap *dmap);

/* dmap_fence.c, for invalidate.c: with the device lock held; they allocate nothing and take no other lock */
void pm_dmaps_fence(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq);
void pm_dmaps_drop(struct pm_mm *mm, uint64_t start, uint64_t last, uint64_t seq);

#endif
