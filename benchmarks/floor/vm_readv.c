/* SPDX-License-Identifier: MIT */
/* vm_readv.c - the floor of a device read: process_vm_readv of this process's own BYTES, in pieces of PIECE
 * bytes. */
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "floor.h"

static size_t size, piece;
static char *memory, *buffer;

static uint64_t round_of(uint64_t *done)
{
    pid_t self = getpid();
    uint64_t start = now();

    for (size_t at = 0; at < size; at += piece) {
        struct iovec local = {buffer, piece}, remote = {memory + at, piece};

        *done += (uint64_t)must(process_vm_readv(self, &local, 1, &remote, 1, 0), "process_vm_readv");
    }
    return now() - start;
}

int main(int argc, char **argv)
{
    size = argc > 2 ? strtoul(argv[1], NULL, 0) : 0;
    piece = argc > 2 ? strtoul(argv[2], NULL, 0) : 0;
    memory = map_small(size);
    buffer = map_small(piece);
    memset(memory, 1, size);
    memset(buffer, 1, piece);
    return serve(round_of);
}
