/* SPDX-License-Identifier: MIT */
/*
 * spans.c - intervals with a name, and which of them overlap. For the DMA API's search for memory that two
 * mappings let devices write.
 */
#include <errno.h>
#include <stdlib.h>

#include "internal.h"

struct pm_span {
    struct pm_inode node; /* first: the tree hands out nodes */
    uint64_t cookie;
};

struct pm_spans {
    pthread_mutex_t lock;
    uint64_t owner; /* pm_process() of the process that made it */
    struct pm_inode *root;
};

int pm_spans_create(pm_spans **ret)
{
    struct pm_spans *spans = pm_sys_calloc(1, sizeof(*spans));
    int err;

    if (!spans)
        return -ENOMEM;
    err = pm_process_mark(&spans->owner);
    if (err) {
        free(spans);
        return err;
    }
    pthread_mutex_init(&spans->lock, NULL);
    *ret = spans;
    return 0;
}

static void free_below(struct pm_inode *node)
{
    if (!node)
        return;
    free_below(node->left);
    free_below(node->right);
    free(node);
}

void pm_spans_destroy(pm_spans *spans)
{
    if (!spans)
        return;
    free_below(spans->root);
    pthread_mutex_destroy(&spans->lock);
    free(spans);
}

static bool take_cookie(struct pm_inode *node, void *arg)
{
    *(uint64_t *)arg = ((struct pm_span *)node)->cookie;
    return false;
}

int pm_spans_add(pm_spans *spans, uint64_t start, uint64_t last, uint64_t cookie, pm_span **ret,
                 uint64_t *other)
{
    struct pm_span *span;

    if (start > last || !cookie)
        return -EINVAL;
    if (spans->owner != pm_process())
        return -ESRCH;
    span = pm_sys_calloc(1, sizeof(*span));
    if (!span)
        return -ENOMEM;
    span->node.start = start;
    span->node.last = last;
    span->cookie = cookie;
    *other = 0;
    pthread_mutex_lock(&spans->lock);
    pm_itree_visit(spans->root, start, last, take_cookie, other);
    pm_itree_insert(&spans->root, &span->node);
    pthread_mutex_unlock(&spans->lock);
    *ret = span;
    return 0;
}

struct wanted {
    uint64_t start, last;
    uint64_t cookie; /* out */
};

/* The first, until there is one that holds all. */
static bool take_whole(struct pm_inode *node, void *arg)
{
    struct wanted *want = arg;
    bool whole = node->start <= want->start && want->last <= node->last;

    if (whole || !want->cookie)
        want->cookie = ((struct pm_span *)node)->cookie;
    return !whole;
}

int pm_spans_find(pm_spans *spans, uint64_t start, uint64_t last, uint64_t *ret)
{
    struct wanted want = {.start = start, .last = last};

    if (start > last)
        return -EINVAL;
    if (spans->owner != pm_process())
        return -ESRCH;
    pthread_mutex_lock(&spans->lock);
    pm_itree_visit(spans->root, start, last, take_whole, &want);
    pthread_mutex_unlock(&spans->lock);
    *ret = want.cookie;
    return want.cookie ? 0 : -ENOENT;
}

int pm_spans_remove(pm_spans *spans, pm_span *span)
{
    if (spans->owner != pm_process())
        return -ESRCH;
    pthread_mutex_lock(&spans->lock);
    pm_itree_remove(&spans->root, &span->node);
    pthread_mutex_unlock(&spans->lock);
    free(span);
    return 0;
}
