/* SPDX-License-Identifier: MIT */
/*
 * extents.c - free IOVA pages as a treap of runs.
 *
 * Each node knows the longest run and the largest aligned power of two below it. With the second, a search
 * for an aligned power of two never enters a subtree in vain, but for the one run that the limit cuts. The
 * first serves lengths that are no power of two, when no whole one is left.
 */
#include "extents.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static uint64_t last_of(const struct pm_extent *run)
{
    return run->first + run->pages - 1;
}

static uint64_t align_up(uint64_t page, uint64_t align)
{
    return (page + align - 1) & ~(align - 1);
}

static uint32_t aligned_order(const struct pm_extent *run)
{
    uint32_t order = 63 - (uint32_t)__builtin_clzll(run->pages);
    uint64_t size = 1ULL << order;

    return align_up(run->first, size) + size - 1 <= last_of(run) ? order : order - 1;
}

/* Nodes keep the priority of their index: it has nothing to do with where the run lies. */
static uint32_t prio(uint32_t index)
{
    uint64_t x = index * 0x9e3779b97f4a7c15ULL;

    x = (x ^ (x >> 32)) * 0xbf58476d1ce4e5b9ULL;
    return (uint32_t)(x >> 32);
}

static void update(struct pm_extents *set, uint32_t index)
{
    struct pm_extent *node = &set->nodes[index];
    const struct pm_extent *left = &set->nodes[node->left], *right = &set->nodes[node->right];

    node->max_pages = pm_max(node->pages, pm_max(left->max_pages, right->max_pages));
    node->max_order = aligned_order(node);
    if (node->left && left->max_order > node->max_order)
        node->max_order = left->max_order;
    if (node->right && right->max_order > node->max_order)
        node->max_order = right->max_order;
}

static void split(struct pm_extents *set, uint32_t tree, uint64_t at, uint32_t *low, uint32_t *high)
{
    struct pm_extent *node = &set->nodes[tree];

    if (!tree) {
        *low = *high = 0;
        return;
    }
    if (node->first < at) {
        split(set, node->right, at, &node->right, high);
        *low = tree;
    } else {
        split(set, node->left, at, low, &node->left);
        *high = tree;
    }
    update(set, tree);
}

static uint32_t merge(struct pm_extents *set, uint32_t low, uint32_t high)
{
    if (!low || !high)
        return low ? low : high;
    if (prio(low) >= prio(high)) {
        set->nodes[low].right = merge(set, set->nodes[low].right, high);
        update(set, low);
        return low;
    }
    set->nodes[high].left = merge(set, low, set->nodes[high].left);
    update(set, high);
    return high;
}

static uint32_t insert(struct pm_extents *set, uint32_t tree, uint32_t index)
{
    struct pm_extent *node = &set->nodes[index];

    if (!tree || prio(index) > prio(tree)) {
        split(set, tree, node->first, &node->left, &node->right);
        update(set, index);
        return index;
    }
    if (node->first < set->nodes[tree].first)
        set->nodes[tree].left = insert(set, set->nodes[tree].left, index);
    else
        set->nodes[tree].right = insert(set, set->nodes[tree].right, index);
    update(set, tree);
    return tree;
}

static uint32_t without(struct pm_extents *set, uint32_t tree, uint32_t index)
{
    struct pm_extent *node = &set->nodes[tree];

    if (tree == index)
        return merge(set, node->left, node->right);
    if (set->nodes[index].first < node->first)
        node->left = without(set, node->left, index);
    else
        node->right = without(set, node->right, index);
    update(set, tree);
    return tree;
}

/* A run has changed its length in place: bring the nodes on the way to it up to date. */
static void refresh(struct pm_extents *set, uint32_t tree, uint32_t index)
{
    if (tree != index) {
        const struct pm_extent *node = &set->nodes[tree];

        refresh(set, set->nodes[index].first < node->first ? node->left : node->right, index);
    }
    update(set, tree);
}

static void put_node(struct pm_extents *set, uint64_t first, uint64_t pages)
{
    uint32_t index = set->unused;

    set->unused = set->nodes[index].left;
    set->nodes[index] = (struct pm_extent){.first = first, .pages = pages};
    set->root = insert(set, set->root, index);
    set->count++;
}

static void drop_node(struct pm_extents *set, uint32_t index)
{
    set->root = without(set, set->root, index);
    set->nodes[index] = (struct pm_extent){.left = set->unused};
    set->unused = index;
    set->count--;
}

/* The last run that starts at the page or below it. */
static uint32_t at_or_below(const struct pm_extents *set, uint64_t page)
{
    uint32_t found = 0;

    for (uint32_t tree = set->root; tree;) {
        const struct pm_extent *node = &set->nodes[tree];

        if (node->first <= page)
            found = tree;
        tree = node->first <= page ? node->right : node->left;
    }
    return found;
}

static uint32_t above(const struct pm_extents *set, uint64_t page)
{
    uint32_t found = 0;

    for (uint32_t tree = set->root; tree;) {
        const struct pm_extent *node = &set->nodes[tree];

        if (node->first > page)
            found = tree;
        tree = node->first > page ? node->left : node->right;
    }
    return found;
}

int pm_extents_reserve(struct pm_extents *set, uint64_t n)
{
    uint64_t room = pm_max(set->room, 64);
    struct pm_extent *nodes;

    if (n <= set->room)
        return 0;
    while (room < n)
        room *= 2;
    if (room >= UINT32_MAX)
        return -ENOMEM;
    nodes = pm_sys_calloc(room + 1, sizeof(*nodes));
    if (!nodes)
        return -ENOMEM;
    if (set->nodes)
        memcpy(nodes, set->nodes, (set->room + 1) * sizeof(*nodes));
    for (uint32_t index = (uint32_t)room; index > set->room; index--) {
        nodes[index].left = set->unused;
        set->unused = index;
    }
    free(set->nodes);
    set->nodes = nodes;
    set->room = (uint32_t)room;
    return 0;
}

void pm_extents_free(struct pm_extents *set)
{
    free(set->nodes);
    *set = (struct pm_extents){0};
}

void pm_extents_add(struct pm_extents *set, uint64_t first, uint64_t pages)
{
    uint32_t low = at_or_below(set, first), high = above(set, first);
    bool joins_low = low && last_of(&set->nodes[low]) + 1 == first;
    bool joins_high = high && set->nodes[high].first == first + pages;

    set->pages += pages;
    if (!joins_low && !joins_high) {
        put_node(set, first, pages);
        return;
    }
    if (!joins_low) {
        set->nodes[high].first = first;
        set->nodes[high].pages += pages;
        refresh(set, set->root, high);
        return;
    }
    if (joins_high) {
        pages += set->nodes[high].pages;
        drop_node(set, high);
    }
    set->nodes[low].pages += pages;
    refresh(set, set->root, low);
}

void pm_extents_take(struct pm_extents *set, uint64_t first, uint64_t pages)
{
    uint32_t index = at_or_below(set, first);
    struct pm_extent *run = &set->nodes[index];
    uint64_t before = first - run->first, after = run->pages - before - pages;

    set->pages -= pages;
    if (!before && !after) {
        drop_node(set, index);
        return;
    }
    if (before) {
        run->pages = before;
    } else {
        run->first = first + pages;
        run->pages = after;
    }
    refresh(set, set->root, index);
    if (before && after)
        put_node(set, first + pages, after);
}

struct wanted {
    uint64_t pages, align, last;
    uint32_t order; /* look only where a whole aligned power of two is; 0: wherever it is long enough */
    uint64_t first; /* out */
};

static bool fits(const struct pm_extent *run, struct wanted *want)
{
    uint64_t last = pm_min(last_of(run), want->last);

    if (last < run->first || last - run->first + 1 < want->pages)
        return false;
    want->first = (last + 1 - want->pages) & ~(want->align - 1);
    return want->first >= run->first;
}

static bool search(const struct pm_extents *set, uint32_t tree, struct wanted *want)
{
    const struct pm_extent *node = &set->nodes[tree];

    if (!tree || node->max_pages < want->pages || node->max_order < want->order)
        return false;
    if (node->first <= want->last && (search(set, node->right, want) || fits(node, want)))
        return true;
    return search(set, node->left, want);
}

bool pm_extents_find(const struct pm_extents *set, uint64_t pages, uint64_t align, uint64_t last,
                     uint64_t *first)
{
    struct wanted want = {.pages = pages, .align = align, .last = last};
    bool found = false;

    if (pages <= align) {
        want.order = (uint32_t)__builtin_ctzll(align);
        found = search(set, set->root, &want);
    }
    if (!found && pages != align) {
        want.order = 0;
        found = search(set, set->root, &want);
    }
    if (found)
        *first = want.first;
    return found;
}

bool pm_extents_next(const struct pm_extents *set, uint64_t page, uint64_t *first, uint64_t *last)
{
    uint32_t index = at_or_below(set, page);

    if (!index || last_of(&set->nodes[index]) < page)
        index = above(set, page);
    if (!index)
        return false;
    *first = set->nodes[index].first;
    *last = last_of(&set->nodes[index]);
    return true;
}
