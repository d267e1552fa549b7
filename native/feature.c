/* SPDX-License-Identifier: MIT */
/*
 * feature.c - the features of this kernel as a context gets them: probed once a process, less what it does
 * without.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "feature.h"

static int uffd_from_device(void)
{
    int dev = pm_sys_open("/dev/userfaultfd", O_RDWR);
    int fd;

    if (dev < 0)
        return dev;
    /* This ioctl takes its flags by value. */
    fd = pm_sys_ioctl(dev, PM_ABI_USERFAULTFD_IOC_NEW, (void *)(uintptr_t)(O_CLOEXEC | O_NONBLOCK));
    pm_sys_close(dev);
    return fd;
}

int pm_uffd_open(uint64_t disable, uint32_t *source)
{
    int fd;

    *source = 0;
    if (disable & PM_BIT(PM_FEAT_UFFD))
        return -EOPNOTSUPP;
    if (!(disable & PM_BIT(PM_FEAT_UFFD_KERNEL))) {
        fd = uffd_from_device();
        *source = 1;
        if (fd >= 0)
            return fd;
        fd = pm_sys_userfaultfd(O_NONBLOCK);
        *source = 2;
        if (fd >= 0)
            return fd;
    }
    fd = pm_sys_userfaultfd(O_NONBLOCK | PM_ABI_UFFD_USER_MODE_ONLY);
    *source = fd >= 0 ? 3 : 0;
    return fd;
}

int pm_uffd_api(int fd, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};

    return pm_sys_ioctl(fd, UFFDIO_API, &api);
}

/* A shortage of the moment says nothing about the kernel. */
static bool lasting(const struct pm_features *features)
{
    for (int i = 0; i < PM_FEAT_COUNT; i++) {
        int why = features->why[i];

        if (why == ENOMEM || why == EMFILE || why == ENFILE || why == EINTR || why == EAGAIN)
            return false;
    }
    return true;
}

/* What was found holds for this process and user: a forked child may have given up privileges. */
static struct {
    atomic_int state; /* 0 empty, 1 being written, 2 there */
    pid_t pid;
    uid_t euid;
    struct pm_features features;
} cache;

static void remember(const struct pm_features *features)
{
    int empty = 0;

    if (!lasting(features) || !atomic_compare_exchange_strong(&cache.state, &empty, 1))
        return;
    cache.pid = getpid();
    cache.euid = geteuid();
    cache.features = *features;
    atomic_store_explicit(&cache.state, 2, memory_order_release);
}

static bool remembered(struct pm_features *ret)
{
    if (atomic_load_explicit(&cache.state, memory_order_acquire) != 2)
        return false;
    if (cache.pid != getpid() || cache.euid != geteuid())
        return false;
    *ret = cache.features;
    return true;
}

static void withdraw(struct pm_features *features, uint64_t gone, int err)
{
    for (int i = 0; i < PM_FEAT_COUNT; i++) {
        if (!(gone & features->have & PM_BIT(i)))
            continue;
        features->have &= ~PM_BIT(i);
        features->why[i] = err;
    }
}

static void disable_features(struct pm_features *features, uint64_t disable)
{
    if (disable & PM_BIT(PM_FEAT_UFFD)) {
        disable |= PM_NEEDS_UFFD;
        features->uffd_source = 0;
        features->uffd_features = 0;
    } else if ((disable & PM_BIT(PM_FEAT_UFFD_KERNEL)) && features->uffd_source) {
        features->uffd_source = 3;
    }
    if (disable & PM_BIT(PM_FEAT_PAGEMAP))
        disable |= PM_NEEDS_PAGEMAP;
    if (disable & PM_BIT(PM_FEAT_PFN))
        features->zero_pfn = 0;
    withdraw(features, disable, EOPNOTSUPP);
}

int pm_features_probe(uint64_t disable, struct pm_features *ret)
{
    uint64_t struck = pm_inject_struck();
    int err;

    if (!remembered(ret)) {
        err = pm_probe_kernel(ret);
        if (err)
            return err;
        if (pm_inject_struck() == struck)
            remember(ret);
    }
    disable_features(ret, disable);
    return 0;
}
