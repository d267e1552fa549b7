/* SPDX-License-Identifier: MIT */
/*
 * maps.c - vmas from the text of /proc/self/maps: the way of kernels before 6.11. A look-up reads the file
 * from its beginning, through a descriptor of its own (readers of one descriptor would disturb each other),
 * in constant memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "maps.h"

struct lines {
    int fd;
    size_t pos, len;
    char buf[4096];
};

static int refill(struct lines *in)
{
    int interrupted = 0;
    ssize_t n;

    do
        n = pm_sys_read(in->fd, in->buf, sizeof(in->buf));
    while (n == -EINTR && interrupted++ < PM_EINTR_LIMIT);
    if (n <= 0)
        return n ? (int)n : -ENOENT;
    in->pos = 0;
    in->len = (size_t)n;
    return 0;
}

/* The next line, cut to fit; -ENOENT at the end of the file. */
static int next_line(struct lines *in, char *line, size_t size)
{
    size_t n = 0;

    for (;;) {
        if (in->pos == in->len) {
            int err = refill(in);

            if (err)
                return err;
        }
        const char *from = in->buf + in->pos, *end = memchr(from, '\n', in->len - in->pos);
        size_t got = end ? (size_t)(end - from) : in->len - in->pos;
        size_t fits = got < size - 1 - n ? got : size - 1 - n;

        memcpy(line + n, from, fits);
        n += fits;
        in->pos += got + (end != NULL);
        if (end)
            break;
    }
    line[n] = 0;
    return 0;
}

static uint64_t flag(const char *perms, int i, char set, uint64_t value)
{
    return perms[i] == set ? value : 0;
}

bool pm_maps_parse(const char *line, struct pm_vma *ret)
{
    char perms[5];
    int name = 0;

    if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %" SCNx32 ":%" SCNx32 " %" SCNu64 " %n",
               &ret->start, &ret->end, perms, &ret->offset, &ret->dev_major, &ret->dev_minor, &ret->inode,
               &name) != 7)
        return false;
    ret->flags = flag(perms, 0, 'r', PM_VMA_READ) | flag(perms, 1, 'w', PM_VMA_WRITE) |
                 flag(perms, 2, 'x', PM_VMA_EXEC) | flag(perms, 3, 's', PM_VMA_SHARED);
    ret->page_size = PM_PAGE_SIZE;
    snprintf(ret->name, sizeof(ret->name), "%s", line + name);
    return true;
}

/* A line of a vma that ends beyond addr. All those before it are read too, and this is less than a parse. */
static bool ends_beyond(const char *line, uint64_t addr)
{
    char *at;

    strtoull(line, &at, 16);
    return at > line && *at == '-' && strtoull(at + 1, NULL, 16) > addr;
}

static int find_header(struct lines *in, uint64_t addr, struct pm_vma *ret)
{
    char line[sizeof(ret->name) + 128];
    int err;

    do
        err = next_line(in, line, sizeof(line));
    while (!err && (!ends_beyond(line, addr) || !pm_maps_parse(line, ret)));
    /* The gate page is listed, but is in no mm. */
    if (!err && strcmp(ret->name, "[vsyscall]") == 0)
        return -ENOENT;
    return err;
}

static int open_lines(struct lines *in, const char *path)
{
    in->pos = in->len = 0;
    in->fd = pm_sys_open(path, O_RDONLY);
    return in->fd < 0 ? in->fd : 0;
}

/* Only smaps tells the page size. It walks page tables, so it is read for what may be hugetlb only. */
static int find_page_size(struct pm_vma *vma)
{
    struct pm_vma at;
    struct lines in;
    char line[128];
    uint64_t kib;
    int err = open_lines(&in, "/proc/self/smaps");

    if (err)
        return err;
    err = find_header(&in, vma->start, &at);
    while (!err) {
        err = next_line(&in, line, sizeof(line));
        if (err || pm_maps_parse(line, &at))
            break;
        if (sscanf(line, "KernelPageSize: %" SCNu64, &kib) == 1) {
            vma->page_size = kib << 10;
            break;
        }
    }
    pm_sys_close(in.fd);
    return err == -ENOENT ? 0 : err;
}

/* MADV_COLD refuses hugetlb memory, is but a hint elsewhere, and costs less than smaps. Kernels before 5.4
 * refuse it for all. */
static bool may_be_hugetlb(const struct pm_vma *vma)
{
    return vma->inode && vma->dev_major == 0 && (vma->start | vma->end) % PM_HUGE_SIZE == 0 &&
           pm_sys_madvise(vma->start, PM_PAGE_SIZE, PM_ABI_MADV_COLD) == -EINVAL;
}

int pm_maps_find(uint64_t addr, struct pm_vma *ret)
{
    struct lines in;
    int err = open_lines(&in, "/proc/self/maps");

    if (err)
        return err;
    err = find_header(&in, addr, ret);
    pm_sys_close(in.fd);
    if (!err && may_be_hugetlb(ret))
        err = find_page_size(ret);
    return err;
}
