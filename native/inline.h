/* SPDX-License-Identifier: MIT */
/*
 * inline.h - CPU faults on device-resident pages, served in the thread that takes them.
 */
#ifndef PM_INLINE_H
#define PM_INLINE_H

#include "internal.h"

/* handler.c */
/*
 * Make ours the handler of SIGBUS or SIGSEGV, before whatever is in its place: 0; -EBUSY: a handler was
 * installed over ours, which it may call, so ours cannot call it.
 */
int pm_handler_install(int sig);

/* inline.c */
/* Faults in this mm can be met from here on. 0 without inline delivery; -EBUSY as above; -ENOMEM. */
int pm_inline_join(struct pm_mm *mm);
/* The same for guarded pages (SIGSEGV), with either delivery. */
int pm_inline_join_guards(struct pm_mm *mm);
/* Nothing of this mm faults so any more: its handlers under way are waited for. */
void pm_inline_leave(struct pm_mm *mm);
/* The handler's: may the thread touch addr again? false: the fault is none of ours. */
bool pm_inline_touch(int sig, uint64_t addr);
/*
 * A system call of the shim's, on [start, end), has returned `ret`: true if that was -EFAULT and the call is
 * to be made again, since pages have come home or been filled. *tries starts as 0.
 */
bool pm_inline_again(int64_t ret, uint64_t start, uint64_t end, unsigned *tries);

#endif
