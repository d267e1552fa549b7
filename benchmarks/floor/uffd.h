/* SPDX-License-Identifier: MIT */
/* uffd.h - what the floors with a userfaultfd share. Each call is the bare system call, or ends the program.
 */
#ifndef PM_UFFD_H
#define PM_UFFD_H

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "floor.h"
#include "kernel_abi.h"

static inline int uffd_open(uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    int fd = (int)must(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | PM_ABI_UFFD_USER_MODE_ONLY),
                       "userfaultfd");

    must(ioctl(fd, UFFDIO_API, &api), "UFFDIO_API");
    return fd;
}

static inline void uffd_register(int fd, const char *at, size_t size, uint64_t mode)
{
    struct uffdio_register reg = {.range = {(uintptr_t)at, size}, .mode = mode};

    must(ioctl(fd, UFFDIO_REGISTER, &reg), "UFFDIO_REGISTER");
}

static inline void uffd_unregister(int fd, const char *at, size_t size)
{
    must(ioctl(fd, UFFDIO_UNREGISTER, &(struct uffdio_range){(uintptr_t)at, size}), "UFFDIO_UNREGISTER");
}

/* Wakes who waits for the pages, too. */
static inline void uffd_move(int fd, const char *to, const char *from, size_t size)
{
    for (size_t at = 0; at < size;) {
        struct pm_abi_uffdio_move move = {
            .dst = (uintptr_t)to + at, .src = (uintptr_t)from + at, .len = size - at};

        if (ioctl(fd, PM_ABI_UFFDIO_MOVE, &move) && move.move <= 0)
            must(-1, "UFFDIO_MOVE");
        at += (size_t)move.move;
    }
}

#endif
