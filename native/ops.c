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

/*
 * The part of [*addr, end) that is in one vma; of a hole the kernel says what is wrong. As in the kernel,
 * pages in device memory are read-only once the protection of their vma has changed. In one hold of the lock,
 * since guarded pages that come home give their vma back the protection that they have found (guard.c).
 */
static int protect_next(struct pm_mm *mm, uint64_t *addr, uint64_t end, int prot)
{
    bool differs = true;
    uint64_t next = end;
    struct pm_vma vma;
    int err;

    pm_lock(mm);
    if (pm_vma_query(mm, *addr, &vma) == 0 && vma.start <= *addr) {
        next = pm_min(end, vma.end);
        differs = pm_vma_prot(&vma) != (prot & (PROT_READ | PROT_WRITE | PROT_EXEC));
    }
    err = pm_sys_mprotect(*addr, next - *addr, prot);
    if (!err && differs)
        pm_resident_protect(mm, *addr, next);
    pm_unlock(mm);
    *addr = next;
    return err;
}

/* Where the kernel refuses, what comes before has changed, and the rest has not. */
int pm_mprotect(pm_mm *mm, uint64_t addr, uint64_t len, int prot)
{
    uint64_t end = addr + len;
    int err = pm_mm_check(mm);

    if (err)
        return err;
    if (!mm->devices || end < addr)
        return pm_sys_mprotect(addr, len, prot);
    do
        err = protect_next(mm, &addr, end, prot);
    while (!err && addr < end);
    return err;
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
