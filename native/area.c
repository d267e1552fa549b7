/* SPDX-License-Identifier: MIT */
/*
 * area.c - memory of this process that is not for DMA: stacks, code and constants of programs, what is not
 * there.
 *
 * Needs no context. /proc/self/maps is opened for each question, so nothing stays open.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "maps.h"

/* An ELF file is mapped in a handful of pieces, one behind the other. */
enum { PIECES = 6 };

static int query(int fd, uint64_t addr, char *name, uint32_t size, struct pm_abi_procmap_query *ret)
{
    *ret = (struct pm_abi_procmap_query){
        .size = sizeof(*ret),
        .query_flags = PM_ABI_PROCMAP_COVERING_OR_NEXT_VMA,
        .query_addr = addr,
        .vma_name_addr = size ? (uintptr_t)name : 0,
        .vma_name_size = size,
    };
    name[0] = 0;
    return pm_sys_ioctl(fd, PM_ABI_PROCMAP_QUERY, ret);
}

/* Of the names only [stack] matters; the kernel refuses the whole call when one does not fit. */
static int find_vma(int fd, uint64_t addr, struct pm_vma *ret)
{
    struct pm_abi_procmap_query q;
    char name[sizeof("[stack]") + 1];
    int err = query(fd, addr, name, sizeof(name), &q);

    if (err == -ENAMETOOLONG)
        err = query(fd, addr, name, 0, &q);
    if (err == -ENOTTY || err == -EINVAL)
        return pm_maps_find(addr, ret);
    if (err)
        return err;
    *ret = (struct pm_vma){.start = q.vma_start, .end = q.vma_end, .flags = q.vma_flags, .inode = q.inode};
    ret->dev_major = q.dev_major;
    ret->dev_minor = q.dev_minor;
    memcpy(ret->name, name, sizeof(name));
    return 0;
}

static bool same_file(const struct pm_vma *a, const struct pm_vma *b)
{
    return a->inode == b->inode && a->dev_major == b->dev_major && a->dev_minor == b->dev_minor;
}

/* Is a piece of the same file, next to this one without a gap, code? */
static bool beside_code(int fd, const struct pm_vma *vma)
{
    struct pm_vma near = *vma;

    for (int i = 0; i < PIECES; i++) {
        uint64_t end = near.end;

        if (find_vma(fd, end, &near) || near.start != end || !same_file(&near, vma))
            break;
        if (near.flags & PM_VMA_EXEC)
            return true;
    }
    near = *vma;
    for (int i = 0; i < PIECES && near.start >= PM_PAGE_SIZE; i++) {
        uint64_t start = near.start;

        if (find_vma(fd, start - PM_PAGE_SIZE, &near) || near.end != start || !same_file(&near, vma))
            return false;
        if (near.flags & PM_VMA_EXEC)
            return true;
    }
    return false;
}

static uint32_t area_of(int fd, const struct pm_vma *vma)
{
    uint32_t area = vma->flags & PM_VMA_WRITE ? 0 : PM_AREA_READONLY;

    if (strcmp(vma->name, "[stack]") == 0)
        area |= PM_AREA_STACK;
    if (vma->flags & PM_VMA_EXEC)
        area |= PM_AREA_TEXT;
    else if (area & PM_AREA_READONLY && vma->inode && beside_code(fd, vma))
        area |= PM_AREA_RODATA;
    return area;
}

/* Of the main thread glibc would read it from /proc/self/maps, where it has its name anyway. */
static bool on_thread_stack(uint64_t addr, uint64_t last)
{
    static _Thread_local bool known;
    static _Thread_local uint64_t low, high;
    pthread_attr_t attr;
    void *base;
    size_t size;

    if (!known && pm_gettid() != getpid() && pthread_getattr_np(pthread_self(), &attr) == 0) {
        if (pthread_attr_getstack(&attr, &base, &size) == 0) {
            low = (uintptr_t)base;
            high = low + size;
        }
        pthread_attr_destroy(&attr);
    }
    known = true;
    return high && pm_overlap(addr, last, low, high - 1);
}

int pm_memory_area(uint64_t addr, uint64_t len)
{
    uint64_t last = addr + len - 1;
    uint32_t area = 0;
    struct pm_vma vma;
    int fd, err;

    if (!len || last < addr)
        return -EINVAL;
    fd = pm_sys_open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return fd;
    if (on_thread_stack(addr, last))
        area |= PM_AREA_STACK;
    while (addr <= last) {
        err = find_vma(fd, addr, &vma);
        if (err && err != -ENOENT)
            break;
        if (err || vma.start > addr) {
            area |= PM_AREA_HOLE;
            err = 0;
            break;
        }
        area |= area_of(fd, &vma);
        addr = vma.end;
    }
    pm_sys_close(fd);
    return err ? err : (int)area;
}
