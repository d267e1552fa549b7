/* SPDX-License-Identifier: MIT */
/*
 * itree.c - the interval tree of notifiers and ranges.
 *
 * A treap keyed by (start, address of the node), each node augmented with the greatest `last` below it, so
 * that insert, remove and the first overlap are O(log n) expected. Nodes are embedded in their owners:
 * nothing here allocates, for the monitor visits the tree while another thread may hold malloc's locks.
 */
#include "internal.h"

static uint32_t node_prio(const struct pm_inode *node)
{
    uint64_t x = (uint64_t)(uintptr_t)node ^ (node->start << 1);

    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return (uint32_t)(x >> 32);
}

static bool node_before(const struct pm_inode *a, const struct pm_inode *b)
{
    if (a->start != b->start)
        return a->start < b->start;
    return (uintptr_t)a < (uintptr_t)b;
}

static void node_update(struct pm_inode *node)
{
    uint64_t max = node->last;

    if (node->left)
        max = pm_max(max, node->left->max_last);
    if (node->right)
        max = pm_max(max, node->right->max_last);
    node->max_last = max;
}

static void tree_split(struct pm_inode *tree, const struct pm_inode *at, struct pm_inode **low,
                       struct pm_inode **high)
{
    if (!tree) {
        *low = *high = NULL;
        return;
    }
    if (node_before(tree, at)) {
        tree_split(tree->right, at, &tree->right, high);
        *low = tree;
    } else {
        tree_split(tree->left, at, low, &tree->left);
        *high = tree;
    }
    node_update(tree);
}

static struct pm_inode *tree_merge(struct pm_inode *low, struct pm_inode *high)
{
    if (!low || !high)
        return low ? low : high;
    if (low->prio >= high->prio) {
        low->right = tree_merge(low->right, high);
        node_update(low);
        return low;
    }
    high->left = tree_merge(low, high->left);
    node_update(high);
    return high;
}

static struct pm_inode *tree_insert(struct pm_inode *tree, struct pm_inode *node)
{
    if (!tree || node->prio > tree->prio) {
        tree_split(tree, node, &node->left, &node->right);
        node_update(node);
        return node;
    }
    if (node_before(node, tree))
        tree->left = tree_insert(tree->left, node);
    else
        tree->right = tree_insert(tree->right, node);
    node_update(tree);
    return tree;
}

static struct pm_inode *tree_remove(struct pm_inode *tree, const struct pm_inode *node)
{
    if (!tree)
        return NULL;
    if (tree == node)
        return tree_merge(tree->left, tree->right);
    if (node_before(node, tree))
        tree->left = tree_remove(tree->left, node);
    else
        tree->right = tree_remove(tree->right, node);
    node_update(tree);
    return tree;
}

void pm_itree_insert(struct pm_inode **root, struct pm_inode *node)
{
    node->left = node->right = NULL;
    node->max_last = node->last;
    node->prio = node_prio(node);
    *root = tree_insert(*root, node);
}

void pm_itree_remove(struct pm_inode **root, struct pm_inode *node)
{
    *root = tree_remove(*root, node);
    node->left = node->right = NULL;
}

static bool tree_visit(struct pm_inode *tree, uint64_t start, uint64_t last, pm_itree_fn fn, void *arg)
{
    if (!tree || tree->max_last < start)
        return true;
    if (!tree_visit(tree->left, start, last, fn, arg))
        return false;
    if (tree->start > last)
        return true;
    if (tree->last >= start && !fn(tree, arg))
        return false;
    return tree_visit(tree->right, start, last, fn, arg);
}

void pm_itree_visit(struct pm_inode *root, uint64_t start, uint64_t last, pm_itree_fn fn, void *arg)
{
    tree_visit(root, start, last, fn, arg);
}
