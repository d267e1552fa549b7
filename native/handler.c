/* SPDX-License-Identifier: MIT */
/*
 * handler.c - the handlers of SIGBUS and SIGSEGV, and those that were there before.
 *
 * They run with every signal blocked, so that no other handler meets them half-way, or leaves them by a jump.
 * They touch no mirrored memory themselves, hence no SA_NODEFER. They run on the stack of the code that
 * touched: an alternate stack is somebody else's, of the size that their handler needs. What is not ours goes
 * to the earlier handler, with the mask that this one asked for, but for the signal: it may touch mirrored
 * memory.
 *
 * A handler that somebody installs over ours gets our faults, and can do nothing about them. Those we have
 * served come to ours only through it, at its mercy: so pages do not leave for a device while it is there.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "inline.h"

struct earlier {
    struct sigaction act;
    atomic_bool spent; /* SA_RESETHAND: it has been called */
};

/* Replaced, never changed: a handler may be reading it. By place_of(). */
static _Atomic(struct earlier *) earlier[2];

static int place_of(int sig)
{
    return sig == SIGSEGV;
}

static bool is_default(const struct sigaction *act)
{
    return !(act->sa_flags & SA_SIGINFO) && act->sa_handler == SIG_DFL;
}

static bool is_ignored(const struct sigaction *act)
{
    return !(act->sa_flags & SA_SIGINFO) && act->sa_handler == SIG_IGN;
}

/* Back at the touch, the kernel does what it does without a handler; what was sent is sent again. */
static void take_default(int sig, const siginfo_t *info)
{
    struct sigaction act = {.sa_handler = SIG_DFL};

    pm_sys_sigaction(sig, &act, NULL);
    if (info->si_code <= 0)
        raise(sig);
}

static void call_earlier(const struct sigaction *act, int sig, siginfo_t *info, ucontext_t *context)
{
    sigset_t mask, interrupted;

    /* The kernel's set is shorter than libc's. */
    sigemptyset(&interrupted);
    memcpy(&interrupted, &context->uc_sigmask, _NSIG / 8);
    sigorset(&mask, &interrupted, &act->sa_mask);
    sigdelset(&mask, sig);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    if (act->sa_flags & SA_SIGINFO)
        act->sa_sigaction(sig, info, context);
    else
        act->sa_handler(sig);
}

static void pass_on(int sig, siginfo_t *info, ucontext_t *context)
{
    struct earlier *to = atomic_load(&earlier[place_of(sig)]);
    bool sent = info->si_code <= 0, reset = to && (to->act.sa_flags & (int)SA_RESETHAND);

    if (to && sent && is_ignored(&to->act))
        return;
    /* The kernel does not ignore a fault, whatever was asked of it. */
    if (!to || is_default(&to->act) || is_ignored(&to->act) || (reset && atomic_exchange(&to->spent, true)))
        take_default(sig, info);
    else
        call_earlier(&to->act, sig, info, context);
}

/* A hole of what is watched; a guard, or a page while its guard is set or taken away. */
static bool may_be_ours(int sig, int code)
{
    return sig == SIGBUS ? code == BUS_ADRERR : code == SEGV_MAPERR || code == SEGV_ACCERR;
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
    int saved = errno;
    bool ours = may_be_ours(sig, info->si_code) && pm_inline_touch(sig, (uintptr_t)info->si_addr);

    errno = saved;
    if (!ours)
        pass_on(sig, info, context);
}

static bool is_ours(const struct sigaction *act)
{
    return (act->sa_flags & SA_SIGINFO) && act->sa_sigaction == on_fault;
}

static bool is_known(int sig, const struct sigaction *act)
{
    const struct earlier *known = atomic_load(&earlier[place_of(sig)]);

    return known && known->act.sa_handler == act->sa_handler;
}

uint64_t pm_handler_over(int sig)
{
    struct sigaction now;

    if (sig != SIGBUS && sig != SIGSEGV)
        return 0;
    if (!atomic_load(&earlier[place_of(sig)]) || pm_sys_sigaction(sig, NULL, &now) || is_ours(&now))
        return 0;
    return is_default(&now) || is_ignored(&now) || is_known(sig, &now) ? 0 : (uintptr_t)now.sa_sigaction;
}

static int install(int sig, const struct sigaction *before)
{
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct earlier *to = pm_sys_calloc(1, sizeof(*to)), *old;
    int err;

    if (!to)
        return -ENOMEM;
    to->act = *before;
    old = atomic_exchange(&earlier[place_of(sig)], to);
    sigfillset(&ours.sa_mask);
    err = pm_sys_sigaction(sig, &ours, NULL);
    if (err) {
        atomic_store(&earlier[place_of(sig)], old);
        free(to);
    }
    return err;
}

/* With the registry lock held. */
int pm_handler_install(int sig)
{
    struct sigaction now;
    int err = pm_sys_sigaction(sig, NULL, &now);

    if (err || is_ours(&now))
        return err;
    return pm_handler_over(sig) ? -EBUSY : install(sig, &now);
}
