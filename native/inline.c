/* SPDX-License-Identifier: MIT */
/*
 * inline.c - CPU faults on device-resident pages, served in the thread that takes them.
 *
 * The watch descriptor of an mm with inline delivery has UFFD_FEATURE_SIGBUS: a touch of a hole that faults
 * is a SIGBUS there and then, a system call on one is EFAULT. The handler (handler.c) does what the monitor
 * does for the other mms: the page comes home, or is filled with zeroes, and the thread touches it again.
 * With either delivery it does so for guarded pages (guard.c), a touch of which is SIGSEGV.
 *
 * It takes one lock, the device lock of the mm that watches the address, and that cannot deadlock:
 * - Who holds a device lock touches no mirrored memory, and has all signals blocked: no thread comes here
 * with one, neither by itself nor from the handler of another signal.
 * - Who holds it waits for no thread that touches. The monitor reads without sleeping; who waits for a device
 *   write has let the lock go, and that write, met by a hole, gets EFAULT and ends.
 * - fork() holds the registry lock, and libc those of malloc: neither is taken here. The contexts are in a
 * list of their own, which is read without a lock.
 * - While an event is unread the kernel refuses (EAGAIN), and the list of what is watched may be behind. Then
 *   the lock is let go, and the thread touches again, until the monitor has been there.
 * - Close unregisters first, so no new fault can come, then takes the mm out of the list and waits for who is
 *   in here, with no lock that is taken here.
 * - In a forked child no lock is taken at all: a context that it inherited says only whether the address was
 *   watched, see inherited().
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>

#include "devmem.h"
#include "inline.h"

enum { AGAIN_LIMIT = 64, IDLE_LIMIT = 64 };
static const uint64_t idle_ns = 10ULL * 1000 * 1000;
static const uint64_t quiet_limit_ns = 1000ULL * 1000 * 1000;
static const uint64_t leave_limit_ns = 5000ULL * 1000 * 1000;
static const uint64_t child_limit_ns = 30000ULL * 1000 * 1000;

/* IDLE: of what is watched, and nothing was to be done: another thread may have been faster. */
enum verdict { NOT_OURS, IDLE, SERVED, AGAIN };

/* Made once, used again, never freed. */
struct context {
    struct context *next;
    _Atomic(struct pm_mm *) mm;
    atomic_int users;
    atomic_uint_least64_t child_since; /* a forked child: its first fault in here */
};

static _Atomic(struct context *) contexts;

/* This thread's last fault for which nothing was to be done, and how many there were, one upon the other. */
static _Thread_local struct {
    uint64_t addr, at_ns;
    unsigned times;
} idle __attribute__((tls_model("initial-exec")));

/* The mm of a context, which does not go away before put_mm(). */
static struct pm_mm *get_mm(struct context *context)
{
    struct pm_mm *mm;

    atomic_fetch_add(&context->users, 1);
    mm = atomic_load(&context->mm);
    if (!mm)
        atomic_fetch_sub(&context->users, 1);
    return mm;
}

static void put_mm(struct context *context)
{
    atomic_fetch_sub(&context->users, 1);
}

/* A hole that a read fills with zeroes: private anonymous memory. Of others SIGBUS tells something else. */
static bool fills(struct pm_mm *mm, uint64_t addr, struct pm_vma *vma)
{
    return pm_vma_query(mm, addr, vma) == 0 && vma->start <= addr &&
           !(vma->flags & (PM_VMA_SHARED | PM_VMA_FILE | PM_VMA_HUGETLB | PM_VMA_SPECIAL));
}

static bool resident(struct pm_mm *mm, uint64_t addr)
{
    return mm->devices && pm_resident(mm->devices, addr);
}

/* What a vma has grown by is registered with the rest of it, and listed only once its watching is asked for.
 */
static bool watches(const struct pm_mm *mm, uint64_t addr, const struct pm_vma *vma)
{
    return pm_watch_lists(mm, addr) || pm_watch_lists(mm, vma->start);
}

/* With the device lock held. */
static enum verdict bring_home(struct pm_mm *mm, const struct pm_spot *spot)
{
    int err = pm_home_fault(mm, spot);

    if (!err || err == -EEXIST)
        return SERVED;
    if (resident(mm, spot->addr) || err == -EAGAIN || err == -ENOMEM || err == -EINTR)
        return AGAIN;
    return NOT_OURS;
}

/*
 * While an event is unread what is noted may be out of date, but then the kernel brings nothing home either.
 * So it is asked only where it would not say so, and where it has just said so: drivers are told each time.
 */
static enum verdict serve_locked(struct pm_mm *mm, uint64_t addr)
{
    enum verdict verdict = NOT_OURS;
    struct pm_spot spot;
    struct pm_vma vma;

    if (mm->met_unread && pm_events_unread(mm))
        return AGAIN;
    spot = pm_spot_at(mm->devices, addr);
    if ((spot.word && pm_watch_lists(mm, addr)) || (fills(mm, addr, &vma) && watches(mm, addr, &vma)))
        verdict = bring_home(mm, &spot);
    mm->met_unread = verdict == AGAIN;
    if (verdict == NOT_OURS)
        verdict = pm_events_unread(mm) ? AGAIN : pm_watch_lists(mm, addr) ? IDLE : NOT_OURS;
    return verdict;
}

/* The same for a guarded page. Device writes are waited for without the lock, so it is asked again. */
static enum verdict serve_guard_locked(struct pm_mm *mm, uint64_t addr)
{
    const uint64_t around = addr & ~(PM_HUGE_SIZE - 1);
    enum verdict verdict = pm_watch_lists(mm, addr) ? IDLE : NOT_OURS;
    struct pm_spot spot;

    if (!mm->devices || !pm_guarded(mm->devices, addr))
        return verdict;
    pm_drain_writes(mm, around, around + PM_HUGE_SIZE - 1, pm_now_ns() + quiet_limit_ns);
    spot = pm_spot_at(mm->devices, addr);
    return spot.word & PM_RESIDENT_GUARD ? bring_home(mm, &spot) : IDLE;
}

/* As pm_lock() does, but for signals, which the kernel has blocked for the handler. */
static enum verdict serve(struct pm_mm *mm, int sig, uint64_t addr)
{
    enum verdict verdict;

    pm_point(PM_POINT_INLINE_FAULT);
    pthread_mutex_lock(&mm->lock);
    pm_status_lock(mm, true);
    verdict = sig == SIGSEGV ? serve_guard_locked(mm, addr) : serve_locked(mm, addr);
    pm_status_update(mm);
    pm_status_lock(mm, false);
    pthread_mutex_unlock(&mm->lock);
    return verdict;
}

/*
 * The kernel gives a child the registrations of its parent, until the parent's monitor has closed the child's
 * descriptor, after it has copied into it what was on a device: that is waited for.
 */
static enum verdict inherited(struct context *context, const struct pm_mm *mm, uint64_t addr)
{
    uint64_t now = pm_now_ns(), since = 0;

    if (!pm_watch_lists(mm, addr))
        return NOT_OURS;
    if (atomic_compare_exchange_strong(&context->child_since, &since, now))
        since = now;
    return now - since < child_limit_ns ? AGAIN : NOT_OURS;
}

static enum verdict ask(struct context *context, int sig, uint64_t addr)
{
    struct pm_mm *mm = get_mm(context);
    enum verdict verdict = NOT_OURS;

    if (!mm)
        return NOT_OURS;
    if (pm_mm_owned(mm) && (sig == SIGSEGV || mm->inline_faults))
        verdict = serve(mm, sig, addr);
    else if (!pm_mm_owned(mm) && sig == SIGBUS && mm->inline_faults)
        verdict = inherited(context, mm, addr);
    put_mm(context);
    return verdict;
}

/*
 * The page may have come home, and its mm have gone, since the touch. Of a fault for another reason the same
 * is true again at once, and again.
 */
static bool may_have_changed(uint64_t addr, enum verdict verdict)
{
    uint64_t now = pm_now_ns();

    idle.times = idle.addr == addr && now - idle.at_ns < idle_ns ? idle.times + 1 : 1;
    idle.addr = addr;
    idle.at_ns = now;
    return idle.times < (verdict == IDLE ? IDLE_LIMIT : 2);
}

bool pm_inline_touch(int sig, uint64_t addr)
{
    enum verdict verdict = NOT_OURS;

    addr = pm_page_down(addr);
    for (struct context *context = atomic_load(&contexts); context && verdict != SERVED;
         context = context->next)
        verdict = (enum verdict)pm_max(verdict, ask(context, sig, addr));
    if (verdict == AGAIN)
        pm_doze();
    return verdict > IDLE || may_have_changed(addr, verdict);
}

/* With the device lock held: pages of [start, end), in one 2 MiB range, that were filled with zeroes. */
static int64_t fill_holes(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    const uint64_t there = PM_ABI_PAGEMAP_PRESENT | PM_ABI_PAGEMAP_SWAPPED | PM_ABI_PAGEMAP_GUARD;
    uint64_t seen[PM_HUGE_PAGES], n = (end - start) >> PM_PAGE_SHIFT, last;
    int64_t filled = 0;

    if (pm_pagemap_read(mm, start, n, seen))
        return 0;
    for (uint64_t i = 0; i < n; i = last) {
        struct uffdio_zeropage zero = {0};

        for (last = i; last < n && !(seen[last] & there);)
            last++;
        zero.range = (struct uffdio_range){start + (i << PM_PAGE_SHIFT), (last - i) << PM_PAGE_SHIFT};
        if (last == i)
            last++;
        else if (pm_sys_ioctl(mm->uffd, UFFDIO_ZEROPAGE, &zero) == 0 || zero.zeropage > 0)
            filled += zero.zeropage >> PM_PAGE_SHIFT;
    }
    mm->devices->stats.filled += (uint64_t)filled;
    return filled;
}

/* With the device lock held: [start, end) is in one 2 MiB range. */
static int64_t make_present(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    struct pm_vma vma;
    uint64_t first = start;
    int64_t got = 0;
    bool filled = mm->inline_faults && fills(mm, start, &vma);

    if (!mm->devices || !(filled ? watches(mm, start, &vma) : pm_watch_lists(mm, start)))
        return 0;
    /* Guarded pages, which a device may be writing to; inline, all are waited for as they come home. */
    if (!mm->inline_faults && pm_resident_next(mm->devices, &first, end))
        pm_drain_writes(mm, first, end - 1, pm_now_ns() + quiet_limit_ns);
    if (pm_events_unread(mm))
        return -EAGAIN;
    got = pm_home_told(mm, start, end);
    if (got < 0 || !filled)
        return got;
    return got + fill_holes(mm, start, pm_min(end, vma.end));
}

static int64_t make_present_quiet(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    uint64_t until = pm_now_ns() + quiet_limit_ns;
    int64_t got;

    for (;;) {
        pm_lock(mm);
        got = make_present(mm, start, end);
        pm_status_update(mm);
        pm_unlock(mm);
        if (got != -EAGAIN || pm_now_ns() > until)
            return got > 0 ? got : 0;
        pm_doze();
    }
}

/* In steps that end where a vma may: pages that were brought home or filled. */
static int64_t make_all_present(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    int64_t total = 0;

    while (start < end) {
        struct pm_vma vma;
        uint64_t next;

        if (pm_vma_query(mm, start, &vma) || vma.start >= end)
            break;
        start = pm_max(start, vma.start);
        next = pm_min(pm_min(end, vma.end), (start & ~(PM_HUGE_SIZE - 1)) + PM_HUGE_SIZE);
        total += make_present_quiet(mm, start, next);
        start = next;
    }
    return total;
}

bool pm_inline_again(int64_t ret, uint64_t start, uint64_t end, unsigned *tries)
{
    int64_t total = 0;
    bool any = false;

    if (ret != -EFAULT || *tries == AGAIN_LIMIT || end <= start || end > PM_USER_END)
        return false;
    start = pm_page_down(start);
    end = pm_page_up(end);
    for (struct context *context = atomic_load(&contexts); context; context = context->next) {
        struct pm_mm *mm = get_mm(context);

        if (!mm)
            continue;
        if (pm_mm_owned(mm)) {
            any = true;
            total += make_all_present(mm, start, end);
        }
        put_mm(context);
    }
    /* Another thread may have been faster, once. */
    return any && (++*tries == 1 || total > 0);
}

/* With the registry lock held. */
static int enlist(struct pm_mm *mm)
{
    struct context *context, *free_one = NULL;

    for (context = atomic_load(&contexts); context; context = context->next) {
        struct pm_mm *there = atomic_load(&context->mm);

        if (there == mm)
            return 0;
        if (!there && atomic_load(&context->users) == 0)
            free_one = context;
    }
    if (free_one) {
        atomic_store(&free_one->mm, mm);
        return 0;
    }
    context = pm_sys_calloc(1, sizeof(*context));
    if (!context)
        return -ENOMEM;
    atomic_init(&context->mm, mm);
    context->next = atomic_load(&contexts);
    atomic_store(&contexts, context);
    return 0;
}

static int join(struct pm_mm *mm, int sig)
{
    int err;

    pm_registry_lock();
    err = pm_handler_install(sig);
    if (!err)
        err = enlist(mm);
    pm_registry_unlock();
    return err;
}

int pm_inline_join(struct pm_mm *mm)
{
    return mm->inline_faults ? join(mm, SIGBUS) : 0;
}

int pm_inline_join_guards(struct pm_mm *mm)
{
    return join(mm, SIGSEGV);
}

void pm_inline_leave(struct pm_mm *mm)
{
    struct context *context = atomic_load(&contexts);
    uint64_t until = pm_now_ns() + leave_limit_ns;

    while (context && atomic_load(&context->mm) != mm)
        context = context->next;
    if (!context)
        return;
    atomic_store(&context->mm, NULL);
    while (atomic_load(&context->users) != 0) {
        if (pm_now_ns() > until) {
            /* Somebody is stuck in there: let them have it. */
            pm_mm_get(mm);
            return;
        }
        pm_doze();
    }
}
