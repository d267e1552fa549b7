/* SPDX-License-Identifier: MIT */
/* pin.c - the floor of a pin: BYTES registered as a buffer of an io_uring and dropped again, TIMES over. */
#include <linux/io_uring.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "floor.h"
#include "kernel_abi.h"

static size_t size;
static unsigned long times;
static char *memory;
static int ring;

static long registered(unsigned opcode, void *arg, size_t len)
{
    return must(syscall(SYS_io_uring_register, ring, opcode, arg, len), "io_uring_register");
}

static uint64_t round_of(uint64_t *done)
{
    struct iovec pages = {memory, size}, none = {NULL, 0};
    struct pm_abi_rsrc_update2 add = {.data = (uintptr_t)&pages, .nr = 1};
    struct pm_abi_rsrc_update2 drop = {.data = (uintptr_t)&none, .nr = 1};
    uint64_t start = now();

    for (unsigned long i = 0; i < times; i++) {
        *done += (uint64_t)registered(PM_ABI_IORING_REGISTER_BUFFERS_UPDATE, &add, sizeof(add));
        registered(PM_ABI_IORING_REGISTER_BUFFERS_UPDATE, &drop, sizeof(drop));
    }
    return now() - start;
}

int main(int argc, char **argv)
{
    struct pm_abi_rsrc_register table = {.nr = 64, .flags = PM_ABI_IORING_RSRC_REGISTER_SPARSE};
    struct io_uring_params params;

    size = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;
    times = argc > 2 ? strtoul(argv[2], NULL, 0) : 0;
    memory = map_small(size);
    memset(memory, 1, size);
    memset(&params, 0, sizeof(params));
    ring = (int)must(syscall(SYS_io_uring_setup, 2, &params), "io_uring_setup");
    registered(PM_ABI_IORING_REGISTER_BUFFERS2, &table, sizeof(table));
    return serve(round_of);
}
