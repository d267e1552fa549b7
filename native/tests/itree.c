/* SPDX-License-Identifier: MIT */
/* The interval tree against a list that is searched from end to end. */
#include "internal.h"
#include "util.h"

enum { NODES = 600, ROUNDS = 40000 };

static uint64_t random_state = 88172645463325252ULL;

static uint64_t random_u64(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

struct visit {
    struct pm_inode *found[NODES];
    size_t n, limit;
};

static bool collect(struct pm_inode *node, void *arg)
{
    struct visit *visit = arg;

    visit->found[visit->n++] = node;
    return visit->n < visit->limit;
}

static bool is_found(const struct visit *visit, const struct pm_inode *node)
{
    for (size_t i = 0; i < visit->n; i++) {
        if (visit->found[i] == node)
            return true;
    }
    return false;
}

static bool visit_is_right(struct pm_inode *root, struct pm_inode *nodes, const bool *in, uint64_t start,
                           uint64_t last)
{
    struct visit visit = {.limit = NODES + 1};
    size_t want = 0;

    pm_itree_visit(root, start, last, collect, &visit);
    for (size_t i = 0; i < NODES; i++) {
        if (!in[i] || !pm_overlap(start, last, nodes[i].start, nodes[i].last))
            continue;
        want++;
        if (!is_found(&visit, &nodes[i]))
            return false;
    }
    for (size_t i = 1; i < visit.n; i++) {
        if (visit.found[i]->start < visit.found[i - 1]->start)
            return false;
    }
    return visit.n == want;
}

/* Few distinct places, so that equal starts, nested and touching intervals are common. */
static void random_interval(uint64_t *start, uint64_t *last)
{
    *start = random_u64() % 512;
    *last = *start + random_u64() % (random_u64() % 8 ? 8 : 256);
    if (random_u64() % 64 == 0)
        *last = UINT64_MAX;
    if (random_u64() % 64 == 0)
        *start = 0;
}

static void random_operations(void)
{
    static struct pm_inode nodes[NODES];
    static bool in[NODES];
    struct pm_inode *root = NULL;

    for (int round = 0; round < ROUNDS; round++) {
        size_t i = random_u64() % NODES;
        uint64_t start, last;

        if (in[i]) {
            pm_itree_remove(&root, &nodes[i]);
        } else {
            random_interval(&nodes[i].start, &nodes[i].last);
            pm_itree_insert(&root, &nodes[i]);
        }
        in[i] = !in[i];
        if (round % 8)
            continue;
        random_interval(&start, &last);
        NEED(visit_is_right(root, nodes, in, start, last));
    }
    for (size_t i = 0; i < NODES; i++) {
        if (in[i])
            pm_itree_remove(&root, &nodes[i]);
    }
    CHECK(root == NULL);
}

static void visit_ends_when_told(void)
{
    struct pm_inode nodes[10] = {0};
    struct pm_inode *root = NULL;
    struct visit visit = {.limit = 3};

    for (size_t i = 0; i < COUNT_OF(nodes); i++) {
        nodes[i].start = i;
        nodes[i].last = i + 100;
        pm_itree_insert(&root, &nodes[i]);
    }
    pm_itree_visit(root, 0, UINT64_MAX, collect, &visit);
    CHECK_EQ(visit.n, 3);
    for (size_t i = 0; i < 3; i++)
        CHECK(visit.found[i] == &nodes[i]);
}

static uint64_t depth(const struct pm_inode *node)
{
    return node ? 1 + pm_max(depth(node->left), depth(node->right)) : 0;
}

/* Drivers register ranges in address order: a tree without balance would become a list. */
static void sorted_inserts_stay_shallow(void)
{
    enum { MANY = 1 << 16 };
    struct pm_inode *nodes = calloc(MANY, sizeof(*nodes));
    struct pm_inode *root = NULL;

    NEED(nodes != NULL);
    for (uint64_t i = 0; i < MANY; i++) {
        nodes[i].start = i * PAGE;
        nodes[i].last = i * PAGE + PAGE - 1;
        pm_itree_insert(&root, &nodes[i]);
    }
    CHECK(depth(root) < 80);
    free(nodes);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(random_operations),
        TEST(visit_ends_when_told),
        TEST(sorted_inserts_stay_shallow),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
