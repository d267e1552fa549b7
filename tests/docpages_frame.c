/* SPDX-License-Identifier: MIT */
/* What stands around a C block of the documentation: four pages of watched memory, and a driver to mirror them. */
#include "tests/util.h"

static pm_mm *mm;
static pm_table *table;
static pm_sub *sub;
static char *mem;

static void mirror(struct call *call)
{
    call->ret = mirror_pages(mm, table, sub, mem, 4, WANT_READ);
}

static void block(void)
{
    struct call call = {.fn = mirror};

    /* block */
}

static void before(void)
{
    mm = open_mm();
    mem = new_pages(4);
    memset(mem, 1, 4 * PAGE);
    table = new_table();
    sub = new_sub(mm, mem, 4);
    CHECK(pm_watch(mm, addr_of(mem), addr_of(mem) + 4 * PAGE, 0) >= 0);
}

static void after(void)
{
    pm_points_reset();
    pm_inject_clear();
    drop_sub(sub);
    pm_table_put(table);
    close_mm(mm);
    munmap(mem, 4 * PAGE);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {TEST(block)};

    return run_tests_with(before, after, tests, COUNT_OF(tests), argc, argv);
}
