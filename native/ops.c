/* SPDX-License-Identifier: MIT */
/*
 * ops.c - system calls on memory, for the operations of the API.
 */
#include "internal.h"

int pm_mmap(pm_mm *mm, uint64_t addr, uint64_t len, int prot, int flags, int fd, uint64_t offset,
            uint64_t *ret)
{
    int err = pm_mm_check(mm);

    return err ? err : pm_sys_mmap(addr, len, prot, flags, fd, offset, ret);
}

/* Of a closed mm too: memory outlives its mirror. */
int pm_munmap(pm_mm *mm, uint64_t addr, uint64_t len)
{
    (void)mm;
    return pm_sys_munmap(addr, len);
}

int pm_mprotect(pm_mm *mm, uint64_t addr, uint64_t len, int prot)
{
    int err = pm_mm_check(mm);

    return err ? err : pm_sys_mprotect(addr, len, prot);
}

int pm_madvise(pm_mm *mm, uint64_t addr, uint64_t len, int advice)
{
    int err = pm_mm_check(mm);

    return err ? err : pm_sys_madvise(addr, len, advice);
}

int pm_mremap(pm_mm *mm, uint64_t addr, uint64_t old_len, uint64_t new_len, int flags, uint64_t new_addr,
              uint64_t *ret)
{
    int err = pm_mm_check(mm);

    return err ? err : pm_sys_mremap(addr, old_len, new_len, flags, new_addr, ret);
}
