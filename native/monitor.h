/* SPDX-License-Identifier: MIT */
/*
 * monitor.h - what the files of the monitor thread share.
 */
#ifndef PM_MONITOR_H
#define PM_MONITOR_H

#include "internal.h"

enum { PM_MESSAGES = 32 };

/* As many messages as there are and have room: bytes, or an errno. With the device lock held. */
ssize_t pm_monitor_read(struct pm_mm *mm, struct uffd_msg *msgs);

#endif
