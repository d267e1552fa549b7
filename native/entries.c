/* SPDX-License-Identifier: MIT */
/*
 * entries.c - loops over arrays of page-table entries.
 *
 * They are to cost little beside the pread that fills the array (2.5 to 6 ns an entry), so they work on
 * vectors of four whatever the optimiser would make of them. The compiler breaks these down for a processor
 * without AVX2. What is left over at the end of an array goes through the same code in a padded vector.
 */
#include <string.h>

#include "entries.h"

typedef uint64_t vec __attribute__((vector_size(32), aligned(8), may_alias));
typedef int64_t svec __attribute__((vector_size(32), aligned(8), may_alias));

enum { LANES = sizeof(vec) / sizeof(uint64_t) };

#define INLINE static inline __attribute__((always_inline))
#define ALL(x) ((vec){x, x, x, x})
/* All ones in the lanes whose bit 63 is set: VALID in a pfn, present in an entry. */
#define TOP_BIT(v) ((vec)((svec)(v) < (svec){0}))

INLINE uint64_t and_lanes(const vec *v)
{
    return (*v)[0] & (*v)[1] & (*v)[2] & (*v)[3];
}

INLINE uint64_t or_lanes(const vec *v)
{
    return (*v)[0] | (*v)[1] | (*v)[2] | (*v)[3];
}

/* How many lanes are all ones, after that was summed up. */
INLINE uint64_t count_lanes(const vec *v)
{
    return 0 - ((*v)[0] + (*v)[1] + (*v)[2] + (*v)[3]);
}

struct masks {
    vec keep, order, shared, write, zero;
};

INLINE void convert_vec(vec *at, const struct masks *m)
{
    vec e = *at, mapping = e & m->keep;
    /* Bits 56 (mapped here alone), 57 (uffd-wp) and 61 (file) moved to where WRITE is. */
    vec write = (e << 6) & ~((e << 5) | (e << 1));

    write = (write | m->shared) & m->write & (vec)(mapping != m->zero);
    *at = TOP_BIT(e) & (mapping | write | m->order);
}

INLINE uint64_t convert(uint64_t *p, uint64_t n, const struct pm_conversion *c)
{
    /* Copied, as for all that the compiler knows the entries may overlap *c. */
    const struct masks m = {ALL(c->keep), ALL(c->order), ALL(c->shared), ALL(c->write), ALL(c->zero)};
    vec common = ALL(UINT64_MAX), rest = {0};
    uint64_t i = 0, ret;

    for (; i + LANES <= n; i += LANES) {
        convert_vec((vec *)(p + i), &m);
        common &= *(vec *)(p + i);
    }
    ret = and_lanes(&common);
    if (i == n)
        return ret;
    memcpy(&rest, p + i, (n - i) * sizeof(*p));
    convert_vec(&rest, &m);
    memcpy(p + i, &rest, (n - i) * sizeof(*p));
    for (; i < n; i++)
        ret &= p[i];
    return ret;
}

INLINE bool replace(uint64_t *p, uint64_t n, struct pm_run old, struct pm_run new, uint64_t loose,
                    uint64_t *ret)
{
    const vec lanes = {0, 1, 2, 3};
    vec want = ALL(old.first) + lanes * ALL(old.step), next = ALL(new.first) + lanes * ALL(new.step);
    vec wrong = {0}, common = ALL(loose);
    uint64_t i = 0, off;

    for (; i + LANES <= n; i += LANES) {
        vec e = *(vec *)(p + i);

        *(vec *)(p + i) = next;
        wrong |= e ^ want;
        common &= e;
        want += ALL(LANES * old.step);
        next += ALL(LANES * new.step);
    }
    off = or_lanes(&wrong);
    *ret = and_lanes(&common);
    for (; i < n; i++) {
        off |= p[i] ^ (old.first + i * old.step);
        *ret &= p[i];
        p[i] = new.first + i * new.step;
    }
    return (off & ~loose) == 0;
}

INLINE void set(uint64_t *p, uint64_t n, struct pm_run run)
{
    const vec lanes = {0, 1, 2, 3};
    vec next = ALL(run.first) + lanes * ALL(run.step);
    uint64_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        *(vec *)(p + i) = next;
        next += ALL(LANES * run.step);
    }
    for (; i < n; i++)
        p[i] = run.first + i * run.step;
}

INLINE void hide(uint64_t *p, uint64_t n)
{
    uint64_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        vec e = *(vec *)(p + i);

        *(vec *)(p + i) = e & ~(TOP_BIT(e) & ALL(PM_ABI_PAGEMAP_PFN_MASK));
    }
    for (; i < n; i++) {
        if (p[i] & PM_ABI_PAGEMAP_PRESENT)
            p[i] &= ~PM_ABI_PAGEMAP_PFN_MASK;
    }
}

INLINE uint64_t request(uint64_t pfn, uint64_t mask, uint64_t flags)
{
    uint64_t asked = (pfn & mask) | flags;

    return asked & PM_PFN_VALID ? asked & (PM_PFN_VALID | PM_PFN_WRITE) : 0;
}

/* Only the bits that count are compared, and none where the flags ask for all: pages that differ there may
 * want the same still. */
INLINE bool same_requests(const uint64_t *p, uint64_t n, uint64_t mask, uint64_t flags, uint64_t *ret)
{
    uint64_t bits = mask & ~flags & (PM_PFN_VALID | PM_PFN_WRITE), off, i = 0;
    vec differ = {0};

    *ret = request(p[0], mask, flags);
    if (!bits)
        return true;
    for (; i + LANES <= n; i += LANES)
        differ |= *(const vec *)(p + i) ^ ALL(p[0]);
    off = or_lanes(&differ);
    for (; i < n; i++)
        off |= p[i] ^ p[0];
    return (off & bits) == 0;
}

INLINE void requests(const uint64_t *p, uint64_t n, uint64_t mask, uint64_t flags, uint64_t *ret)
{
    uint64_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        vec asked = (*(const vec *)(p + i) & ALL(mask)) | ALL(flags);

        *(vec *)(ret + i) = TOP_BIT(asked) & asked & ALL(PM_PFN_VALID | PM_PFN_WRITE);
    }
    for (; i < n; i++)
        ret[i] = request(p[i], mask, flags);
}

INLINE uint64_t lacking(const uint64_t *p, const uint64_t *wanted, uint64_t n)
{
    vec lack = {0};
    uint64_t i = 0, ret;

    for (; i + LANES <= n; i += LANES)
        lack |= *(const vec *)(wanted + i) & ~*(const vec *)(p + i);
    ret = or_lanes(&lack);
    for (; i < n; i++)
        ret |= wanted[i] & ~p[i];
    return ret;
}

INLINE uint64_t valid(uint64_t pfn, uint64_t keep)
{
    return pfn & PM_PFN_VALID ? pfn & keep : 0;
}

INLINE uint64_t fill(uint64_t *entries, const uint64_t *pfns, uint64_t n, uint64_t keep, uint64_t *runs)
{
    vec there = {0}, continued = {0};
    uint64_t i = 1, filled, joined;

    *runs = 0;
    if (!n)
        return 0;
    entries[0] = valid(pfns[0], keep);
    for (; i + LANES <= n; i += LANES) {
        vec pfn = *(const vec *)(pfns + i), before = *(const vec *)(pfns + i - 1), here = TOP_BIT(pfn);

        *(vec *)(entries + i) = pfn & ALL(keep) & here;
        there += here;
        continued +=
            here & TOP_BIT(before) & (vec)((pfn & ALL(PM_PFN_MASK)) == (before & ALL(PM_PFN_MASK)) + ALL(1));
    }
    filled = (pfns[0] >> 63) + count_lanes(&there);
    joined = count_lanes(&continued);
    for (; i < n; i++) {
        entries[i] = valid(pfns[i], keep);
        filled += pfns[i] >> 63;
        joined += pm_pfn_continues(pfns[i], pfns[i - 1]);
    }
    *runs = filled - joined;
    return filled;
}

INLINE void place(const uint64_t *entries, uint64_t n, struct pm_run at, uint64_t *ret)
{
    const vec lanes = {0, 1, 2, 3};
    vec next = ALL(at.first) + lanes * ALL(at.step);
    uint64_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        *(vec *)(ret + i) = next & TOP_BIT(*(const vec *)(entries + i));
        next += ALL(LANES * at.step);
    }
    for (; i < n; i++)
        ret[i] = entries[i] & PM_ENTRY_VALID ? at.first + i * at.step : 0;
}

INLINE uint64_t clear(uint64_t *entries, uint64_t n, uint64_t *writable)
{
    vec there = {0}, writes = {0};
    uint64_t i = 0, cleared;

    for (; i + LANES <= n; i += LANES) {
        vec *at = (vec *)(entries + i), entry = *at;

        there += (vec)(entry != (vec){0});
        writes += (vec)((entry & ALL(PM_ENTRY_WRITE)) != (vec){0});
        *at = (vec){0};
    }
    cleared = count_lanes(&there);
    *writable = count_lanes(&writes);
    for (; i < n; i++) {
        cleared += entries[i] != 0;
        *writable += (entries[i] & PM_ENTRY_WRITE) != 0;
        entries[i] = 0;
    }
    return cleared;
}

/* Every loop twice, for AVX2 and for any processor, under one name. */
#if defined(__x86_64__)
#define WIDE static __attribute__((target("avx2"), noinline))
#define EACH(type, name, params, args)                                                                       \
    WIDE type name##_wide params                                                                             \
    {                                                                                                        \
        return name args;                                                                                    \
    }                                                                                                        \
    type pm_entries_##name params                                                                            \
    {                                                                                                        \
        return __builtin_cpu_supports("avx2") ? name##_wide args : name args;                                \
    }
#else
#define EACH(type, name, params, args)                                                                       \
    type pm_entries_##name params                                                                            \
    {                                                                                                        \
        return name args;                                                                                    \
    }
#endif

EACH(uint64_t, convert, (uint64_t *entries, uint64_t n, const struct pm_conversion *conversion),
     (entries, n, conversion))
EACH(bool, replace,
     (uint64_t *entries, uint64_t n, struct pm_run old, struct pm_run new, uint64_t loose, uint64_t *common),
     (entries, n, old, new, loose, common))
EACH(void, set, (uint64_t *entries, uint64_t n, struct pm_run run), (entries, n, run))
EACH(void, hide, (uint64_t *entries, uint64_t n), (entries, n))
EACH(bool, same_requests, (const uint64_t *pfns, uint64_t n, uint64_t mask, uint64_t flags, uint64_t *ret),
     (pfns, n, mask, flags, ret))
EACH(void, requests, (const uint64_t *pfns, uint64_t n, uint64_t mask, uint64_t flags, uint64_t *ret),
     (pfns, n, mask, flags, ret))
EACH(uint64_t, lacking, (const uint64_t *pfns, const uint64_t *wanted, uint64_t n), (pfns, wanted, n))
EACH(uint64_t, fill, (uint64_t *entries, const uint64_t *pfns, uint64_t n, uint64_t keep, uint64_t *runs),
     (entries, pfns, n, keep, runs))
EACH(void, place, (const uint64_t *entries, uint64_t n, struct pm_run at, uint64_t *ret),
     (entries, n, at, ret))
EACH(uint64_t, clear, (uint64_t *entries, uint64_t n, uint64_t *writable), (entries, n, writable))
