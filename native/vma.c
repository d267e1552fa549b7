/* SPDX-License-Identifier: MIT */
/*
 * vma.c - which vma holds an address. One PROCMAP_QUERY ioctl; without it, maps.c reads the text of
 * /proc/self/maps.
 */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "maps.h"

static int query(struct pm_mm *mm, uint64_t addr, struct pm_abi_procmap_query *query, char *name,
                 uint32_t size)
{
    memset(query, 0, sizeof(*query));
    query->size = sizeof(*query);
    query->query_flags = PM_ABI_PROCMAP_COVERING_OR_NEXT_VMA;
    query->query_addr = addr;
    query->vma_name_addr = (uintptr_t)name;
    query->vma_name_size = size;
    name[0] = 0;
    return pm_sys_ioctl(mm->maps_fd, PM_ABI_PROCMAP_QUERY, query);
}

/* The kernel gives a name whole or not at all. */
static __attribute__((noinline)) int query_long_name(struct pm_mm *mm, uint64_t addr,
                                                     struct pm_abi_procmap_query *q, char *name, size_t size)
{
    char whole[PATH_MAX];
    int err = query(mm, addr, q, whole, sizeof(whole));

    if (!err)
        snprintf(name, size, "%s", whole);
    return err;
}

static int query_kernel(struct pm_mm *mm, uint64_t addr, struct pm_vma *ret)
{
    struct pm_abi_procmap_query q;
    int err = query(mm, addr, &q, ret->name, sizeof(ret->name));

    if (err == -ENAMETOOLONG)
        err = query_long_name(mm, addr, &q, ret->name, sizeof(ret->name));
    if (err)
        return err;
    _Static_assert(
        PM_VMA_READ == PM_ABI_PROCMAP_VMA_READABLE && PM_VMA_WRITE == PM_ABI_PROCMAP_VMA_WRITABLE &&
            PM_VMA_EXEC == PM_ABI_PROCMAP_VMA_EXECUTABLE && PM_VMA_SHARED == PM_ABI_PROCMAP_VMA_SHARED,
        "the flags are the kernel's");
    ret->start = q.vma_start;
    ret->end = q.vma_end;
    ret->flags = q.vma_flags & (PM_VMA_READ | PM_VMA_WRITE | PM_VMA_EXEC | PM_VMA_SHARED);
    ret->page_size = q.vma_page_size;
    ret->offset = q.vma_offset;
    ret->inode = q.inode;
    ret->dev_major = q.dev_major;
    ret->dev_minor = q.dev_minor;
    return 0;
}

static bool begins(const char *name, const char *prefix)
{
    return strncmp(name, prefix, strlen(prefix)) == 0;
}

/* Names under which memory that is not page cache may be mapped. */
static bool may_be_special(const struct pm_vma *vma)
{
    const char *name = vma->name;

    if (name[0] == '[')
        return begins(name, "[vvar");
    if (begins(name, "/dev/"))
        return !begins(name, "/dev/shm/") && !begins(name, "/dev/zero");
    return begins(name, "/sys/") || begins(name, "/proc/") || begins(name, "anon_inode:");
}

/*
 * VM_PFNMAP shows in smaps only, which is read at the cost of walking every page table. MADV_COLD refuses
 * such a vma (and mlocked ones), and is but a hint where it does not; it came with kernel 5.4, before that
 * the name decides.
 */
static bool is_special(const struct pm_vma *vma)
{
    if (!may_be_special(vma))
        return false;
    return pm_sys_madvise(vma->start, PM_PAGE_SIZE, PM_ABI_MADV_COLD) == -EINVAL;
}

int pm_vma_prot(const struct pm_vma *vma)
{
    return (vma->flags & PM_VMA_READ ? PROT_READ : 0) | (vma->flags & PM_VMA_WRITE ? PROT_WRITE : 0) |
           (vma->flags & PM_VMA_EXEC ? PROT_EXEC : 0);
}

int pm_vma_query(struct pm_mm *mm, uint64_t addr, struct pm_vma *ret)
{
    int err = pm_have(mm, PM_FEAT_PROCMAP_QUERY) ? query_kernel(mm, addr, ret) : pm_maps_find(addr, ret);

    if (err)
        return err;
    if (ret->inode)
        ret->flags |= PM_VMA_FILE;
    if (ret->page_size > PM_PAGE_SIZE)
        ret->flags |= PM_VMA_HUGETLB;
    else if (is_special(ret))
        ret->flags |= PM_VMA_SPECIAL;
    return 0;
}

int pm_vma_find(pm_mm *mm, uint64_t addr, struct pm_vma *ret)
{
    int err = pm_mm_enter(mm);

    if (err)
        return err;
    err = pm_vma_query(mm, addr, ret);
    pm_mm_exit(mm);
    return err;
}
