/* SPDX-License-Identifier: MIT */
/*
 * populate.h - faulting pages in, which is user space's handle_mm_fault().
 */
#ifndef PM_POPULATE_H
#define PM_POPULATE_H

#include "internal.h"

/*
 * Fault the pages of [start, end) for reading or for writing, without changing a byte. 0; -EFAULT (hole, no
 * access, beyond the end of a file, no huge page left); -ENOMEM; -EHWPOISON; -EINVAL (a vma that cannot be
 * populated); -EAGAIN; -EOPNOTSUPP. On an error some may have been faulted: the page table tells which.
 */
int pm_populate(struct pm_mm *mm, uint64_t start, uint64_t end, bool write);
/*
 * A read of a page of a file maps what else of its aligned 64 KiB is in the page cache, but not in a vma that
 * userfaultfd watches (uffd_disable_fault_around). This does it there, around the pages of [start, end).
 * Returns the pages asked for.
 */
uint64_t pm_populate_around(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end);
/*
 * Would that wait for I/O? 1 and the first such address, and the reading is started; else 0. `pfns` are those
 * of [start, end); pages that are VALID need no I/O.
 */
int pm_would_wait(struct pm_mm *mm, const struct pm_vma *vma, uint64_t start, uint64_t end,
                  const uint64_t *pfns, uint64_t *ret);
/* Shared memory whose pages are writable without a fault once present: no file system wants to hear of the
 * first write. */
bool pm_is_shmem(const struct pm_vma *vma);

#endif
