/* SPDX-License-Identifier: MIT */
/* pinned.h - what the test programs of pins share: an mm, some pages, and how much is pinned of them. */
#ifndef PINNED_H
#define PINNED_H

#include "util.h"

enum { PAGES = 8, BIG = 1 << 20 };

static pm_mm *mm;
static char *mem;
static long long pinned_before;

/* Of this process, by the kernel's account; KiB. */
static inline long long vm_pin(void)
{
    char line[256];
    long long kib = -1;
    FILE *status = fopen("/proc/self/status", "r");

    while (status && fgets(line, sizeof(line), status)) {
        if (sscanf(line, "VmPin: %lld", &kib) == 1)
            break;
    }
    if (status)
        fclose(status);
    return kib;
}

static inline long long pinned_kib(void)
{
    return vm_pin() - pinned_before;
}

/* The kernel may let go of a buffer a little after the call that dropped it: what it still holds after a
 * while. */
static inline long long still_pinned_kib(void)
{
    for (int i = 0; pinned_kib() && i < 1000; i++)
        usleep(1000);
    return pinned_kib();
}

static inline void set_up(void)
{
    struct pm_mm_options opt = {0};

#ifdef __SANITIZE_THREAD__
    opt.disable = 1ULL << PM_FEAT_UFFD_EVENT_FORK; /* see fork.c */
#endif
    pinned_before = vm_pin();
    mm = open_mm_with(&opt);
    mem = new_pages(PAGES);
    for (int i = 0; i < PAGES * PAGE; i++)
        mem[i] = (char)(i % 251);
}

static inline void tear_down(void)
{
    pm_points_reset();
    pm_inject_clear();
    close_mm(mm);
    CHECK_EQ(still_pinned_kib(), 0);
    free_pages(mem, PAGES);
}

static inline int pin_at(const void *at, uint64_t npages, uint64_t *pfns, uint32_t flags,
                         struct pm_pinning *ret, pm_pin **pin)
{
    *ret = (struct pm_pinning){.start = addr_of(at), .npages = npages, .pfns = pfns, .flags = flags};
    return pm_pin_create(mm, ret, pin);
}

static inline pm_pin *new_pin(const void *at, uint64_t npages)
{
    struct pm_pinning request;
    pm_pin *pin = NULL;

    CHECK_EQ(pin_at(at, npages, NULL, 0, &request, &pin), 0);
    return pin;
}

static inline void drop_pin(pm_pin *pin)
{
    CHECK_EQ(pm_pin_release(pin), 0);
    pm_pin_put(pin);
}

static inline int64_t read_pin(pm_pin *pin, uint64_t offset, void *buf, uint64_t len)
{
    uint64_t done;
    int err = pm_pin_access(pin, offset, buf, len, 0, &done);

    return err ? err : (int64_t)done;
}

static inline int64_t write_pin(pm_pin *pin, uint64_t offset, const void *buf, uint64_t len)
{
    uint64_t done;
    int err = pm_pin_access(pin, offset, (void *)(uintptr_t)buf, len, 1, &done);

    return err ? err : (int64_t)done;
}

#endif
