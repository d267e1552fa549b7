/* SPDX-License-Identifier: MIT */
/*
 * pin.c - pinned pages: pin_user_pages(FOLL_WRITE | FOLL_LONGTERM), which user space gets as a registered
 * buffer of an io_uring.
 *
 * Buffers are dropped one by one, or all by a call that says so, never by closing the ring: close(2) does it
 * later, and not at all while a forked child has the descriptor.
 */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "inline.h"
#include "ring.h"

enum pm_pin_state { PM_PIN_MADE, PM_PIN_RELEASED, PM_PIN_CLOSED };

struct pm_pin {
    struct pm_pin *next, *prev; /* of the ring's list, while it is made */
    struct pm_mm *mm;
    atomic_int refs;
    uint64_t start, npages;
    enum pm_pin_state state; /* under the ring lock, as is all below */
    uint32_t holds;
    uint32_t nslots;
    uint32_t slot[];
};

static const uint64_t lock_limit_ns = 6000ULL * 1000 * 1000;

static void enlist(struct pm_pin *pin)
{
    struct pm_ring *ring = pin->mm->ring;

    pin->next = ring->pins;
    if (pin->next)
        pin->next->prev = pin;
    ring->pins = pin;
    ring->stats.pins++;
    ring->stats.pages += pin->npages;
    ring->stats.made++;
}

static void delist(struct pm_pin *pin)
{
    struct pm_ring *ring = pin->mm->ring;

    if (pin->prev)
        pin->prev->next = pin->next;
    else
        ring->pins = pin->next;
    if (pin->next)
        pin->next->prev = pin->prev;
    ring->stats.pins--;
    ring->stats.pages -= pin->npages;
    ring->stats.released++;
}

bool pm_pinned(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    const struct pm_pin *pin = mm->ring ? mm->ring->pins : NULL;

    while (pin && !pm_overlap(start, end - 1, pin->start, pin->start + (pin->npages << PM_PAGE_SHIFT) - 1))
        pin = pin->next;
    return pin != NULL;
}

static int drop_slots(struct pm_pin *pin)
{
    int err = 0;

    while (pin->nslots) {
        int failed = pm_ring_drop(pin->mm, pin->slot[--pin->nslots]);

        if (!err)
            err = failed;
    }
    return err;
}

static int register_pages(struct pm_pin *pin)
{
    uint64_t end = pin->start + (pin->npages << PM_PAGE_SHIFT);

    for (uint64_t addr = pin->start; addr < end; addr += PM_ABI_IORING_BUFFER_MAX) {
        uint64_t len = pm_min(PM_ABI_IORING_BUFFER_MAX, end - addr);
        unsigned tries = 0;
        int err;

        do
            err = pm_ring_register(pin->mm, addr, len, &pin->slot[pin->nslots]);
        while (pm_inline_again(err, addr, addr + len, &tries));
        if (err)
            return err;
        pin->nslots++;
    }
    return 0;
}

static int make(struct pm_pin *pin)
{
    int err;

    pthread_mutex_lock(&pin->mm->ring_lock);
    /* A close that could not wait for this call has been here. */
    err = pm_mm_check(pin->mm);
    if (!err)
        err = pm_ring_open(pin->mm);
    if (!err) {
        err = register_pages(pin);
        if (err)
            drop_slots(pin);
        else
            enlist(pin);
    }
    pthread_mutex_unlock(&pin->mm->ring_lock);
    return err;
}

int pm_pin_make(struct pm_mm *mm, uint64_t start, uint64_t npages, pm_pin **ret)
{
    uint64_t bytes = npages << PM_PAGE_SHIFT;
    uint64_t slots = bytes / PM_ABI_IORING_BUFFER_MAX + (bytes % PM_ABI_IORING_BUFFER_MAX != 0);
    struct pm_pin *pin;
    int err;

    if (!pm_have(mm, PM_FEAT_IO_URING))
        return -EOPNOTSUPP;
    if (slots > PM_RING_SLOTS)
        return -ENOSPC;
    pin = pm_sys_calloc(1, sizeof(*pin) + slots * sizeof(pin->slot[0]));
    if (!pin)
        return -ENOMEM;
    pin->mm = mm;
    pin->start = start;
    pin->npages = npages;
    atomic_init(&pin->refs, 1);
    err = make(pin);
    if (err) {
        free(pin);
        return err;
    }
    pm_mm_get(mm);
    *ret = pin;
    return 0;
}

/* With the ring lock held: is there something to work on? */
static int check_made(const struct pm_pin *pin)
{
    if (pin->state == PM_PIN_MADE)
        return 0;
    return pin->state == PM_PIN_RELEASED ? -EALREADY : -ESRCH;
}

int pm_pin_release(pm_pin *pin)
{
    struct pm_mm *mm = pin->mm;
    int err = pm_mm_owned(mm) ? 0 : -ESRCH;

    if (err)
        return err;
    pthread_mutex_lock(&mm->ring_lock);
    err = check_made(pin);
    if (!err && pin->holds)
        err = -EBUSY;
    if (!err) {
        pin->state = PM_PIN_RELEASED;
        delist(pin);
        err = drop_slots(pin);
    }
    pthread_mutex_unlock(&mm->ring_lock);
    return err;
}

void pm_pin_get(pm_pin *pin)
{
    atomic_fetch_add(&pin->refs, 1);
}

void pm_pin_put(pm_pin *pin)
{
    struct pm_mm *mm = pin->mm;

    if (!pm_mm_owned(mm) || atomic_fetch_sub(&pin->refs, 1) != 1)
        return;
    pm_pin_release(pin);
    free(pin);
    pm_mm_put(mm);
}

int pm_pin_hold(pm_pin *pin)
{
    int err = pm_mm_enter(pin->mm);

    if (err)
        return err;
    pthread_mutex_lock(&pin->mm->ring_lock);
    err = check_made(pin);
    if (!err) {
        pin->holds++;
        pm_pin_get(pin);
    }
    pthread_mutex_unlock(&pin->mm->ring_lock);
    pm_mm_exit(pin->mm);
    return err;
}

void pm_pin_unhold(pm_pin *pin)
{
    if (!pm_mm_owned(pin->mm))
        return;
    pthread_mutex_lock(&pin->mm->ring_lock);
    pin->holds--;
    pthread_mutex_unlock(&pin->mm->ring_lock);
    pm_pin_put(pin);
}

/* One piece, which lies in one slot: bytes, or a negative errno. */
static int64_t copy_piece(struct pm_pin *pin, uint64_t offset, void *buf, uint64_t len, bool write)
{
    uint64_t in_slot = PM_ABI_IORING_BUFFER_MAX - offset % PM_ABI_IORING_BUFFER_MAX;
    int64_t n;

    pthread_mutex_lock(&pin->mm->ring_lock);
    n = check_made(pin);
    if (!n) {
        n = pm_ring_copy(pin->mm, pin->slot[offset / PM_ABI_IORING_BUFFER_MAX], pin->start + offset, buf,
                         pm_min(len, in_slot), write);
        if (n > 0)
            *(write ? &pin->mm->ring->stats.write_bytes : &pin->mm->ring->stats.read_bytes) += (uint64_t)n;
    }
    pthread_mutex_unlock(&pin->mm->ring_lock);
    return n;
}

int pm_pin_access(pm_pin *pin, uint64_t offset, void *buf, uint64_t len, int write, uint64_t *done)
{
    uint64_t size = pin->npages << PM_PAGE_SHIFT;
    unsigned tries = 0;
    int64_t n = 0;

    *done = 0;
    if (offset > size || len > size - offset)
        return -EINVAL;
    n = pm_mm_enter(pin->mm);
    if (n)
        return (int)n;
    while (*done < len) {
        pm_point(PM_POINT_PIN_PIECE);
        n = copy_piece(pin, offset + *done, (char *)buf + *done, len - *done, write != 0);
        if (pm_inline_again(n, (uintptr_t)buf + *done, (uintptr_t)buf + len, &tries))
            continue;
        if (n < 0)
            break;
        *done += (uint64_t)n;
    }
    pm_mm_exit(pin->mm);
    return n < 0 ? (int)n : 0;
}

int pm_pin_stats(pm_mm *mm, struct pm_pin_stats *ret)
{
    if (!pm_mm_owned(mm))
        return -ESRCH;
    *ret = (struct pm_pin_stats){.slots_max = PM_RING_SLOTS};
    pthread_mutex_lock(&mm->ring_lock);
    if (mm->ring)
        *ret = mm->ring->stats;
    pthread_mutex_unlock(&mm->ring_lock);
    return 0;
}

/* A call that does not return may have the lock: then the last reference to the mm comes here again. */
static int lock_in_time(struct pm_mm *mm)
{
    uint64_t until = pm_now_ns() + lock_limit_ns;

    while (pthread_mutex_trylock(&mm->ring_lock)) {
        if (pm_now_ns() > until)
            return -ETIMEDOUT;
        nanosleep(&(struct timespec){.tv_nsec = 50 * 1000}, NULL);
    }
    return 0;
}

void pm_pins_close(struct pm_mm *mm)
{
    if (lock_in_time(mm))
        return;
    for (struct pm_pin *pin = mm->ring ? mm->ring->pins : NULL, *next; pin; pin = next) {
        next = pin->next;
        pin->next = pin->prev = NULL;
        pin->state = PM_PIN_CLOSED;
    }
    pm_ring_close(mm);
    pthread_mutex_unlock(&mm->ring_lock);
}
