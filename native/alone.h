/* SPDX-License-Identifier: MIT */
/*
 * alone.h - where every page is known to be mapped by this process alone.
 */
#ifndef PM_ALONE_H
#define PM_ALONE_H

#include "internal.h"

/* Is it known of every page that is in [start, end), but for zero pages? */
bool pm_alone(struct pm_mm *mm, uint64_t start, uint64_t end);
/* May KSM have merged pages of this process? They are small ones. */
bool pm_alone_merged(struct pm_mm *mm);
/* A read that began at `seq` of the mm has shown that every page is there and is mapped here alone. */
void pm_alone_learn(struct pm_mm *mm, uint64_t start, uint64_t end, uint64_t seq);
/* Device lock held. */
void pm_alone_forget(struct pm_mm *mm, uint64_t start, uint64_t last);
void pm_alone_close(struct pm_mm *mm);
/* Bytes of the process that are locked for this. A forked child inherits no lock. */
uint64_t pm_alone_locked(void);
void pm_alone_child(void);

#endif
