/* SPDX-License-Identifier: MIT */
/*
 * monitor_read.c - the monitor reads the watch descriptor, also where the table of descriptors is full.
 */
#include <errno.h>

#include "monitor.h"

static bool no_room(ssize_t n)
{
    return n == -EMFILE || n == -ENFILE;
}

/* The limit may be lowered below the number of every descriptor there is. */
static ssize_t read_above_limit(struct pm_mm *mm, struct uffd_msg *msgs)
{
    struct rlimit old, more;
    ssize_t n;

    if (pm_sys_nofile(NULL, &old))
        return -EMFILE;
    more = old;
    more.rlim_cur = old.rlim_cur < old.rlim_max ? old.rlim_max : old.rlim_max + PM_MESSAGES;
    more.rlim_max = pm_max(more.rlim_cur, more.rlim_max);
    if (pm_sys_nofile(&more, NULL))
        return -EMFILE;
    n = pm_sys_read(mm->uffd, msgs, PM_MESSAGES * sizeof(*msgs));
    pm_sys_nofile(&old, NULL);
    return n;
}

/*
 * Reading a fork message makes a descriptor; with the table of descriptors full that fails, and the forking
 * thread would hang. The spare one makes room, at once, before another thread takes the place.
 */
ssize_t pm_monitor_read(struct pm_mm *mm, struct uffd_msg *msgs)
{
    ssize_t n = pm_sys_read(mm->uffd, msgs, PM_MESSAGES * sizeof(*msgs));

    if (no_room(n) && mm->spare_fd >= 0) {
        pm_sys_close(mm->spare_fd);
        mm->spare_fd = -1;
        n = pm_sys_read(mm->uffd, msgs, PM_MESSAGES * sizeof(*msgs));
    }
    return no_room(n) ? read_above_limit(mm, msgs) : n;
}
