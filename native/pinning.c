/* SPDX-License-Identifier: MIT */
/*
 * pinning.c - which pages a pin takes. The kernel does not say: the page table is read before and after, and
 * the sequence number of the memory tells whether it was the same all the while.
 */
#include <errno.h>

#include "internal.h"

enum { LOOK_PAGES = 512 };

static const uint32_t pin_kind = 1U << 31; /* no notifier's: nobody calls it back */

static const uint64_t begin_limit_ns = 1000ULL * 1000 * 1000;

/* One look at memory under a sub of its own. */
struct look {
    struct pm_mm *mm;
    struct pm_pinning *pinning;
    pm_sub *sub;
    uint64_t seq;
};

static int read_pages(const struct look *look, uint64_t page, uint64_t n, uint64_t *pfns)
{
    struct pm_walk walk = {
        .start = look->pinning->start + (page << PM_PAGE_SHIFT),
        .end = look->pinning->start + ((page + n) << PM_PAGE_SHIFT),
        .pfns = pfns,
        .sub = look->sub,
        .seq = look->seq,
    };

    return pm_walk(look->mm, &walk);
}

/* Widen [changed_start, changed_end) to take the page in. */
static void changed(struct pm_pinning *pinning, uint64_t page)
{
    uint64_t addr = pinning->start + (page << PM_PAGE_SHIFT);

    if (pinning->changed_start == pinning->changed_end)
        pinning->changed_start = addr;
    pinning->changed_end = addr + PM_PAGE_SIZE;
}

static void find_shared(struct pm_pinning *pinning)
{
    for (uint64_t i = 0; i < pinning->npages; i++) {
        if ((pinning->pfns[i] & (PM_PFN_VALID | PM_PFN_WRITE)) == PM_PFN_VALID)
            changed(pinning, i);
    }
}

/* The pfns as they are now; -EBUSY where a page that is pinned is not mapped any more. */
static int take_over(struct pm_pinning *pinning, uint64_t page, uint64_t n, const uint64_t *now)
{
    for (uint64_t i = 0; i < n; i++) {
        uint64_t before = pinning->pfns[page + i];

        if (!(now[i] & PM_PFN_VALID))
            return -EBUSY;
        if ((before & PM_PFN_VALID) && ((before ^ now[i]) & PM_PFN_MASK))
            changed(pinning, page + i);
        pinning->pfns[page + i] = now[i] | PM_PFN_WRITE;
    }
    return 0;
}

static int look_again(const struct look *look)
{
    struct pm_pinning *pinning = look->pinning;
    uint64_t now[LOOK_PAGES];

    for (uint64_t page = 0; page < pinning->npages; page += LOOK_PAGES) {
        uint64_t n = pm_min(LOOK_PAGES, pinning->npages - page);
        int err = read_pages(look, page, n, now);

        if (!err)
            err = take_over(pinning, page, n, now);
        if (err)
            return err;
    }
    return pm_sub_read_retry(look->sub, look->seq) ? -EBUSY : 0;
}

static int pin_between_looks(struct look *look, pm_pin **ret)
{
    struct pm_pinning *pinning = look->pinning;
    pm_pin *pin;
    int err = pm_sub_read_begin(look->sub, begin_limit_ns, &look->seq);

    if (!err)
        err = read_pages(look, 0, pinning->npages, pinning->pfns);
    if (err)
        return err;
    if (!(pinning->flags & PM_PIN_REPLACE)) {
        find_shared(pinning);
        if (pinning->changed_start != pinning->changed_end)
            return -EAGAIN;
    }
    err = pm_pin_make(look->mm, pinning->start, pinning->npages, &pin);
    if (err)
        return err;
    pm_point(PM_POINT_PIN_PINNED);
    err = look_again(look);
    if (err)
        pm_pin_put(pin);
    else
        *ret = pin;
    return err;
}

static int look_and_pin(struct pm_mm *mm, struct pm_pinning *pinning, pm_pin **ret)
{
    struct look look = {.mm = mm, .pinning = pinning};
    uint64_t last = pinning->start + (pinning->npages << PM_PAGE_SHIFT) - 1;
    int err = pm_sub_insert(mm, pinning->start, last, 0, pin_kind, &look.sub);

    if (err)
        return err;
    err = pin_between_looks(&look, ret);
    pm_sub_remove(look.sub);
    pm_sub_put(look.sub);
    return err;
}

int pm_pin_create(pm_mm *mm, struct pm_pinning *pinning, pm_pin **ret)
{
    uint64_t start = pinning->start, npages = pinning->npages;
    int err;

    pinning->changed_start = pinning->changed_end = 0;
    if (start % PM_PAGE_SIZE || !npages || start >= PM_USER_END ||
        npages > (PM_USER_END - start) >> PM_PAGE_SHIFT || pinning->flags & ~(uint32_t)PM_PIN_REPLACE)
        return -EINVAL;
    err = pm_mm_enter(mm);
    if (err)
        return err;
    err = pinning->pfns ? look_and_pin(mm, pinning, ret) : pm_pin_make(mm, start, npages, ret);
    pm_mm_exit(mm);
    return err;
}
