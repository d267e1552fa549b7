/* SPDX-License-Identifier: MIT */
/*
 * feature.h - what the files about features share.
 */
#ifndef PM_FEATURE_H
#define PM_FEATURE_H

#include "internal.h"

#define PM_BIT(feature) (1ULL << (feature))

/* Features that mean nothing without PM_FEAT_UFFD, and without PM_FEAT_PAGEMAP. */
#define PM_NEEDS_UFFD                                                                                        \
    (PM_BIT(PM_FEAT_UFFD_KERNEL) | PM_BIT(PM_FEAT_UFFD_WP_ASYNC) | PM_BIT(PM_FEAT_UFFD_WP_UNPOPULATED) |     \
     PM_BIT(PM_FEAT_UFFD_EVENTS) | PM_BIT(PM_FEAT_UFFD_EVENT_FORK) | PM_BIT(PM_FEAT_UFFD_MOVE) |             \
     PM_BIT(PM_FEAT_UFFD_SIGBUS))
#define PM_NEEDS_PAGEMAP (PM_BIT(PM_FEAT_PFN) | PM_BIT(PM_FEAT_PAGEMAP_SCAN))

/* probe.c: try everything; an error only if nothing could be tried. */
int pm_probe_kernel(struct pm_features *ret);

#endif
