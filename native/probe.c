/* SPDX-License-Identifier: MIT */
/*
 * probe.c - what this kernel lets this process do. Every feature is tried, never inferred from a version:
 * privileges, sysctls and seccomp filters decide as much as the kernel does. A probe leaves no descriptor and
 * no mapping behind.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "feature.h"

enum { SCRATCH_PAGES = 4 };

struct probe {
    struct pm_features *ret;
    uint64_t scratch; /* SCRATCH_PAGES private anonymous pages; the probes fill and empty them */
    int pagemap_fd, maps_fd;
};

static const uint64_t event_bits =
    PM_ABI_UFFD_FEATURE_EVENT_REMOVE | PM_ABI_UFFD_FEATURE_EVENT_UNMAP | PM_ABI_UFFD_FEATURE_EVENT_REMAP;

/* A userfaultfd with these features, or a negative errno. */
static int uffd_with(uint64_t features)
{
    uint32_t source;
    int fd = pm_uffd_open(0, &source);
    int err;

    if (fd < 0)
        return fd;
    err = pm_uffd_api(fd, features);
    if (!err)
        return fd;
    pm_sys_close(fd);
    return err;
}

static int try_uffd_features(uint64_t features)
{
    int fd = uffd_with(features);

    if (fd < 0)
        return fd;
    pm_sys_close(fd);
    return 0;
}

static int try_uffd(struct probe *probe)
{
    struct uffdio_api api = {.api = UFFD_API};
    int fd = pm_uffd_open(0, &probe->ret->uffd_source);
    int err;

    if (fd < 0)
        return fd;
    err = pm_sys_ioctl(fd, UFFDIO_API, &api);
    if (!err)
        probe->ret->uffd_features = api.features;
    pm_sys_close(fd);
    return err;
}

/* EPERM also where only the user-mode kind can be had. */
static int try_uffd_kernel(struct probe *probe)
{
    return probe->ret->uffd_source == 1 || probe->ret->uffd_source == 2 ? 0 : -EPERM;
}

static void fill(uint64_t page)
{
    *(volatile char *)(uintptr_t)page = 1;
}

static int empty(struct probe *probe)
{
    return pm_sys_madvise(probe->scratch, SCRATCH_PAGES * PM_PAGE_SIZE, MADV_DONTNEED);
}

static int registered(uint64_t features, uint64_t page, uint64_t mode)
{
    struct uffdio_register reg = {.range = {page, PM_PAGE_SIZE}, .mode = mode};
    int fd = uffd_with(features);
    int err;

    if (fd < 0)
        return fd;
    err = pm_sys_ioctl(fd, UFFDIO_REGISTER, &reg);
    if (!err)
        return fd;
    pm_sys_close(fd);
    return err;
}

static void unregister(int fd, uint64_t page)
{
    struct uffdio_range range = {page, PM_PAGE_SIZE};

    pm_sys_ioctl(fd, UFFDIO_UNREGISTER, &range);
    pm_sys_close(fd);
}

static int try_wp_async(struct probe *probe)
{
    struct uffdio_writeprotect wp = {.range = {probe->scratch, PM_PAGE_SIZE},
                                     .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    uint64_t entry = PM_ABI_PAGEMAP_UFFD_WP;
    int fd, err;

    fill(probe->scratch);
    fd = registered(PM_ABI_UFFD_FEATURE_WP_ASYNC, probe->scratch, UFFDIO_REGISTER_MODE_WP);
    if (fd < 0)
        return fd;
    err = pm_sys_ioctl(fd, UFFDIO_WRITEPROTECT, &wp);
    if (!err && probe->pagemap_fd >= 0)
        pm_sys_pread(probe->pagemap_fd, &entry, sizeof(entry), probe->scratch / PM_PAGE_SIZE * sizeof(entry));
    unregister(fd, probe->scratch);
    if (!err && !(entry & PM_ABI_PAGEMAP_UFFD_WP))
        err = -EOPNOTSUPP;
    return err;
}

static int try_wp_unpopulated(struct probe *probe)
{
    (void)probe;
    return try_uffd_features(PM_ABI_UFFD_FEATURE_WP_UNPOPULATED);
}

static int try_uffd_events(struct probe *probe)
{
    (void)probe;
    return try_uffd_features(event_bits);
}

static int try_uffd_event_fork(struct probe *probe)
{
    (void)probe;
    return try_uffd_features(PM_ABI_UFFD_FEATURE_EVENT_FORK);
}

static int try_uffd_sigbus(struct probe *probe)
{
    (void)probe;
    return try_uffd_features(PM_ABI_UFFD_FEATURE_SIGBUS);
}

static int try_uffd_move(struct probe *probe)
{
    struct pm_abi_uffdio_move move = {
        .dst = probe->scratch,
        .src = probe->scratch + PM_PAGE_SIZE,
        .len = PM_PAGE_SIZE,
    };
    int fd, err = empty(probe);

    if (err)
        return err;
    fill(move.src);
    fd = registered(0, move.dst, UFFDIO_REGISTER_MODE_MISSING);
    if (fd < 0)
        return fd;
    err = pm_sys_ioctl(fd, PM_ABI_UFFDIO_MOVE, &move);
    unregister(fd, move.dst);
    return err;
}

static int entry_of(struct probe *probe, uint64_t page, uint64_t *ret)
{
    ssize_t n;

    if (probe->pagemap_fd < 0)
        return probe->pagemap_fd;
    n = pm_sys_pread(probe->pagemap_fd, ret, sizeof(*ret), page / PM_PAGE_SIZE * sizeof(*ret));
    if (n < 0)
        return (int)n;
    return n == sizeof(*ret) ? 0 : -EIO;
}

static int try_pagemap(struct probe *probe)
{
    uint64_t entry;
    int err;

    fill(probe->scratch);
    err = entry_of(probe, probe->scratch, &entry);
    if (err)
        return err;
    return entry & PM_ABI_PAGEMAP_PRESENT ? 0 : -EOPNOTSUPP;
}

/* Pages that were only read are the zero page: two of them have the same PFN. */
static uint64_t find_zero_pfn(struct probe *probe)
{
    uint64_t entry[2];

    if (empty(probe))
        return 0;
    for (unsigned i = 0; i < 2; i++) {
        uint64_t page = probe->scratch + i * PM_PAGE_SIZE;

        (void)*(volatile char *)(uintptr_t)page;
        if (entry_of(probe, page, &entry[i]) || !(entry[i] & PM_ABI_PAGEMAP_PRESENT))
            return 0;
    }
    if (entry[0] != entry[1])
        return 0;
    return entry[0] & PM_ABI_PAGEMAP_PFN_MASK;
}

static int try_pfn(struct probe *probe)
{
    uint64_t entry;
    int err;

    fill(probe->scratch);
    err = entry_of(probe, probe->scratch, &entry);
    if (err)
        return err;
    if (!(entry & PM_ABI_PAGEMAP_PFN_MASK))
        return -EPERM;
    probe->ret->zero_pfn = find_zero_pfn(probe);
    return 0;
}

static int try_pagemap_scan(struct probe *probe)
{
    struct pm_abi_page_region region;
    struct pm_abi_scan_arg scan = {
        .size = sizeof(scan),
        .start = probe->scratch,
        .end = probe->scratch + PM_PAGE_SIZE,
        .vec = (uintptr_t)&region,
        .vec_len = 1,
        .category_mask = PM_ABI_PAGE_IS_PRESENT,
        .return_mask = PM_ABI_PAGE_IS_PRESENT,
    };
    int n;

    fill(probe->scratch);
    n = pm_sys_ioctl(probe->pagemap_fd, PM_ABI_PAGEMAP_SCAN, &scan);
    if (n < 0)
        return n;
    return n == 1 && region.start == probe->scratch ? 0 : -EOPNOTSUPP;
}

static int try_procmap_query(struct probe *probe)
{
    struct pm_abi_procmap_query query = {.size = sizeof(query), .query_addr = probe->scratch};
    int err;

    if (probe->maps_fd < 0)
        return probe->maps_fd;
    err = pm_sys_ioctl(probe->maps_fd, PM_ABI_PROCMAP_QUERY, &query);
    if (err)
        return err;
    return query.vma_start <= probe->scratch && query.vma_end > probe->scratch ? 0 : -EOPNOTSUPP;
}

static int try_populate(struct probe *probe)
{
    int err = pm_sys_madvise(probe->scratch, PM_PAGE_SIZE, PM_ABI_MADV_POPULATE_READ);

    return err ? err : pm_sys_madvise(probe->scratch, PM_PAGE_SIZE, PM_ABI_MADV_POPULATE_WRITE);
}

static int try_process_vm(struct probe *probe)
{
    char byte = 1;
    ssize_t n;

    fill(probe->scratch);
    n = pm_sys_vm_readv(&byte, probe->scratch, 1);
    if (n == 1)
        n = pm_sys_vm_writev(&byte, probe->scratch, 1);
    if (n < 0)
        return (int)n;
    return n == 1 ? 0 : -EOPNOTSUPP;
}

/* One buffer in a table of empty slots. It is unregistered before the close: the kernel tears a ring down
 * later, and its pins with it. */
static int try_io_uring(struct probe *probe)
{
    struct iovec buffer = {(void *)(uintptr_t)probe->scratch, PM_PAGE_SIZE};
    struct pm_abi_rsrc_register table = {.nr = 1, .flags = PM_ABI_IORING_RSRC_REGISTER_SPARSE};
    struct pm_abi_rsrc_update2 add = {.data = (uintptr_t)&buffer, .nr = 1};
    struct io_uring_params params;
    int fd, n;

    memset(&params, 0, sizeof(params));
    fd = pm_sys_io_uring_setup(1, &params);
    if (fd < 0)
        return fd;
    n = pm_sys_io_uring_register(fd, PM_ABI_IORING_REGISTER_BUFFERS2, &table, sizeof(table));
    if (!n) {
        n = pm_sys_io_uring_register(fd, PM_ABI_IORING_REGISTER_BUFFERS_UPDATE, &add, sizeof(add));
        pm_sys_io_uring_register(fd, PM_ABI_IORING_UNREGISTER_BUFFERS, NULL, 0);
        if (n != 1 && n >= 0)
            n = -EOPNOTSUPP;
    }
    /* Nothing to submit: is it permitted? */
    if (n > 0)
        n = pm_sys_io_uring_enter(fd, 0, 0, 0, NULL, 0);
    pm_sys_close(fd);
    return n;
}

static int guard_page(uint64_t page)
{
    char byte;
    int err, fd = pm_sys_open("/proc/self/mem", O_RDWR);

    if (fd < 0)
        return fd;
    err = pm_sys_madvise(page, PM_PAGE_SIZE, PM_ABI_MADV_GUARD_INSTALL);
    if (!err)
        err = pm_sys_madvise(page, PM_PAGE_SIZE, PM_ABI_MADV_GUARD_REMOVE);
    if (!err)
        err = pm_sys_mprotect(page, PM_PAGE_SIZE, PROT_NONE);
    if (!err && pm_sys_pread(fd, &byte, 1, page) != 1)
        err = -EPERM; /* proc_mem.force_override */
    pm_sys_close(fd);
    return err;
}

static int try_guard(struct probe *probe)
{
    int fd = pm_sys_memfd("pymirror-probe"), err = fd < 0 ? fd : pm_sys_ftruncate(fd, PM_PAGE_SIZE);
    uint64_t page;

    (void)probe;
    if (!err)
        err = pm_sys_mmap(0, PM_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0, &page);
    if (fd >= 0)
        pm_sys_close(fd);
    if (err)
        return err;
    err = guard_page(page);
    pm_sys_munmap(page, PM_PAGE_SIZE);
    return err;
}

static int (*const probes[PM_FEAT_COUNT])(struct probe *) = {
    [PM_FEAT_UFFD] = try_uffd,
    [PM_FEAT_UFFD_KERNEL] = try_uffd_kernel,
    [PM_FEAT_UFFD_WP_ASYNC] = try_wp_async,
    [PM_FEAT_UFFD_WP_UNPOPULATED] = try_wp_unpopulated,
    [PM_FEAT_UFFD_EVENTS] = try_uffd_events,
    [PM_FEAT_UFFD_EVENT_FORK] = try_uffd_event_fork,
    [PM_FEAT_UFFD_MOVE] = try_uffd_move,
    [PM_FEAT_UFFD_SIGBUS] = try_uffd_sigbus,
    [PM_FEAT_PAGEMAP] = try_pagemap,
    [PM_FEAT_PFN] = try_pfn,
    [PM_FEAT_PAGEMAP_SCAN] = try_pagemap_scan,
    [PM_FEAT_PROCMAP_QUERY] = try_procmap_query,
    [PM_FEAT_POPULATE] = try_populate,
    [PM_FEAT_PROCESS_VM] = try_process_vm,
    [PM_FEAT_IO_URING] = try_io_uring,
    [PM_FEAT_GUARD] = try_guard,
};

/* Features are tried in the order of the enum: one that another rests on comes first. */
static void try_all(struct probe *probe)
{
    for (int i = 0; i < PM_FEAT_COUNT; i++) {
        int err;

        if ((PM_NEEDS_UFFD & PM_BIT(i)) && !(probe->ret->have & PM_BIT(PM_FEAT_UFFD)))
            err = -probe->ret->why[PM_FEAT_UFFD];
        else if ((PM_NEEDS_PAGEMAP & PM_BIT(i)) && !(probe->ret->have & PM_BIT(PM_FEAT_PAGEMAP)))
            err = -probe->ret->why[PM_FEAT_PAGEMAP];
        else
            err = probes[i](probe);
        probe->ret->why[i] = -err;
        if (!err)
            probe->ret->have |= PM_BIT(i);
    }
}

int pm_probe_kernel(struct pm_features *ret)
{
    struct probe probe = {.ret = ret};
    uint64_t size = SCRATCH_PAGES * PM_PAGE_SIZE;
    int err;

    memset(ret, 0, sizeof(*ret));
    err = pm_sys_mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &probe.scratch);
    if (err)
        return err;
    /* A neighbour's huge page must not reach in; where there are none the call fails, and that is well. */
    pm_sys_madvise(probe.scratch, size, MADV_NOHUGEPAGE);
    probe.pagemap_fd = pm_sys_open("/proc/self/pagemap", O_RDONLY);
    probe.maps_fd = pm_sys_open("/proc/self/maps", O_RDONLY);
    try_all(&probe);
    if (probe.maps_fd >= 0)
        pm_sys_close(probe.maps_fd);
    if (probe.pagemap_fd >= 0)
        pm_sys_close(probe.pagemap_fd);
    pm_sys_munmap(probe.scratch, size);
    return 0;
}
