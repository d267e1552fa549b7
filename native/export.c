/* SPDX-License-Identifier: MIT */
/*
 * export.c - counts the buffers that an object exports, for pymirror/exporter.py.
 *
 * The interpreter calls the two functions as the bf_getbuffer and bf_releasebuffer of a type, with its lock
 * held. What they know of the object is where in it a word is free for the count.
 */
#include "internal.h"

static struct {
    int (*get)(void *object, void *buffer, int flags);
    uint64_t offset;
} exporter;

static uint64_t *count_of(void *object)
{
    return (uint64_t *)((char *)object + exporter.offset);
}

void pm_export_init(int (*get)(void *object, void *buffer, int flags), uint64_t offset)
{
    exporter.get = get;
    exporter.offset = offset;
}

int pm_export_get(void *object, void *buffer, int flags)
{
    int ret = exporter.get(object, buffer, flags);

    if (ret == 0)
        ++*count_of(object);
    return ret;
}

void pm_export_release(void *object, void *buffer)
{
    (void)buffer;
    --*count_of(object);
}
