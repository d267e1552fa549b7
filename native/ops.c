/* SPDX-License-Identifier: MIT */
/*
 * ops.c - system calls on memory, for the operations of the API.
 */
#include <sys/mman.h>

#include "devmem.h"
#include "inline.h"

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

/* As in the kernel, pages in device memory are read-only once the protection of their vma has changed. */
static void protect_resident(struct pm_mm *mm, uint64_t start, uint64_t end, uint32_t prot)
{
    const uint32_t bits = PM_VMA_READ | PM_VMA_WRITE | PM_VMA_EXEC;
    struct pm_vma vma;

    while (start < end && pm_vma_query(mm, start, &vma) == 0 && vma.start < end) {
        if ((vma.flags & bits) != prot) {
            pm_lock(mm);
            pm_resident_protect(mm, start, pm_min(end, vma.end));
            pm_unlock(mm);
        }
        start = vma.end;
    }
}

static uint32_t vma_flags(int prot)
{
    return (prot & PROT_READ ? PM_VMA_READ : 0) | (prot & PROT_WRITE ? PM_VMA_WRITE : 0) |
           (prot & PROT_EXEC ? PM_VMA_EXEC : 0);
}

int pm_mprotect(pm_mm *mm, uint64_t addr, uint64_t len, int prot)
{
    int err = pm_mm_check(mm);

    if (!err && mm->devices)
        protect_resident(mm, addr, addr + len, vma_flags(prot));
    return err ? err : pm_sys_mprotect(addr, len, prot);
}

int pm_madvise(pm_mm *mm, uint64_t addr, uint64_t len, int advice)
{
    int err = pm_mm_check(mm);
    unsigned tries = 0;

    if (err)
        return err;
    do
        err = pm_sys_madvise(addr, len, advice);
    while (pm_inline_again(err, addr, addr + len, &tries)); /* MADV_POPULATE_* */
    return err;
}

int pm_mremap(pm_mm *mm, uint64_t addr, uint64_t old_len, uint64_t new_len, int flags, uint64_t new_addr,
              uint64_t *ret)
{
    int err = pm_mm_check(mm);

    return err ? err : pm_sys_mremap(addr, old_len, new_len, flags, new_addr, ret);
}
