/* SPDX-License-Identifier: MIT */
/*
 * maps.h - vmas from the text of /proc/self/maps, where there is no PROCMAP_QUERY.
 */
#ifndef PM_MAPS_H
#define PM_MAPS_H

#include "internal.h"

/* The vma that holds addr or the next above it, without the flags that pm_vma_query() infers; -ENOENT. */
int pm_maps_find(uint64_t addr, struct pm_vma *ret);
/* Parse one line; false if it is not the first line of a vma. */
bool pm_maps_parse(const char *line, struct pm_vma *ret);

#endif
