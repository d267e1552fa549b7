/* SPDX-License-Identifier: MIT */
/*
 * watch.h - what watch.c, watch_list.c and watch_fork.c tell each other; internal.h has what others use.
 */
#ifndef PM_WATCH_H
#define PM_WATCH_H

#include "internal.h"

/* UFFDIO_REGISTER of [start, end): 0 or a negative errno. */
int pm_watch_register(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t mode);
/* UFFDIO_WRITEPROTECT of [start, end), again while an event is unread. */
int pm_watch_protect_run(struct pm_mm *mm, uint64_t start, uint64_t end);

/* Room in the list for what one registration and the monitor add: 0 or -ENOMEM. With watch_lock held. */
int pm_watch_reserve(struct pm_mm *mm);
void pm_watch_remember(struct pm_mm *mm, uint64_t start, uint64_t end); /* device lock held */
/* The first range of the list that ends beyond addr. */
bool pm_watch_next(struct pm_mm *mm, uint64_t addr, struct pm_watch_range *ret);

#endif
