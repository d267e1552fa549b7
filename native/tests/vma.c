/* SPDX-License-Identifier: MIT */
/* Vmas and features: equal with PROCMAP_QUERY and without, and every feature that is missing says why. */
#include "util.h"

static void by_address(uint64_t disable)
{
    const struct pm_mm_options opt = {.disable = disable};
    pm_mm *mm = open_mm_with(&opt);
    char *mem = new_pages(8);
    struct pm_vma vma;

    CHECK_EQ(mprotect(mem + 2 * PAGE, 2 * PAGE, PROT_READ), 0);
    CHECK_EQ(munmap(mem + 5 * PAGE, PAGE), 0);
    CHECK_EQ(pm_vma_find(mm, addr_of(mem) + 3 * PAGE + 5, &vma), 0);
    CHECK_EQ(vma.start, addr_of(mem) + 2 * PAGE);
    CHECK_EQ(vma.end, addr_of(mem) + 4 * PAGE);
    CHECK_EQ(vma.flags, PM_VMA_READ);
    CHECK_EQ(vma.page_size, PAGE);
    CHECK_EQ(pm_vma_find(mm, addr_of(mem) + 5 * PAGE, &vma), 0);
    CHECK_EQ(vma.start, addr_of(mem) + 6 * PAGE);
    CHECK_EQ(vma.flags, PM_VMA_READ | PM_VMA_WRITE);
    CHECK_EQ(pm_vma_find(mm, 1ULL << 63, &vma), -ENOENT);
    CHECK_EQ(pm_vma_find(mm, UINT64_MAX, &vma), -ENOENT);
    close_mm(mm);
    free_pages(mem, 8);
}

static void with_procmap_query(void)
{
    by_address(0);
}

static void without_procmap_query(void)
{
    by_address(1ULL << PM_FEAT_PROCMAP_QUERY);
}

static void files_and_shared_memory(uint64_t disable)
{
    const struct pm_mm_options opt = {.disable = disable};
    pm_mm *mm = open_mm_with(&opt);
    int fd = memfd_create("a name of its own", MFD_CLOEXEC);
    struct pm_vma vma;
    char *mem;

    CHECK_EQ(ftruncate(fd, 4 * PAGE), 0);
    mem = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 2 * PAGE);
    CHECK_EQ(pm_vma_find(mm, addr_of(mem), &vma), 0);
    CHECK_EQ(vma.flags, PM_VMA_READ | PM_VMA_WRITE | PM_VMA_SHARED | PM_VMA_FILE);
    CHECK_EQ(vma.offset, 2 * PAGE);
    CHECK(vma.inode != 0);
    CHECK(strstr(vma.name, "a name of its own") != NULL);
    munmap(mem, 2 * PAGE);
    mem = mmap(NULL, 2 * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK_EQ(pm_vma_find(mm, addr_of(mem), &vma), 0);
    CHECK_EQ(vma.flags, PM_VMA_READ | PM_VMA_FILE);
    munmap(mem, 2 * PAGE);
    close(fd);
    close_mm(mm);
}

static void files_with_procmap_query(void)
{
    files_and_shared_memory(0);
}

static void files_without_procmap_query(void)
{
    files_and_shared_memory(1ULL << PM_FEAT_PROCMAP_QUERY);
}

/* All vmas of the process, walked both ways, are those that /proc/self/maps lists. */
static void both_ways_agree(void)
{
    const struct pm_mm_options slow = {.disable = 1ULL << PM_FEAT_PROCMAP_QUERY};
    pm_mm *one = open_mm(), *other = open_mm_with(&slow);
    struct pm_vma a, b;
    uint64_t addr = 0;
    int n = 0, err;

    while ((err = pm_vma_find(one, addr, &a)) == 0) {
        NEED_EQ(pm_vma_find(other, addr, &b), 0);
        CHECK_EQ(a.start, b.start);
        CHECK_EQ(a.end, b.end);
        CHECK_EQ(a.flags, b.flags);
        CHECK_EQ(a.page_size, b.page_size);
        CHECK_EQ(a.offset, b.offset);
        CHECK_EQ(a.inode, b.inode);
        CHECK_EQ(a.dev_major, b.dev_major);
        CHECK_EQ(a.dev_minor, b.dev_minor);
        CHECK(strcmp(a.name, b.name) == 0);
        addr = a.end;
        n++;
    }
    CHECK_EQ(err, -ENOENT);
    CHECK(n > 5);
    close_mm(one);
    close_mm(other);
}

static void features_say_why(void)
{
    struct pm_features features;

    CHECK_EQ(pm_features_probe(0, &features), 0);
    for (int i = 0; i < PM_FEAT_COUNT; i++) {
        if ((features.have >> i) & 1)
            CHECK_EQ(features.why[i], 0);
        else
            CHECK(features.why[i] > 0);
    }
    CHECK_EQ(features.have >> PM_FEAT_COUNT, 0);
    CHECK_EQ(pm_features_probe(UINT64_MAX, &features), 0);
    CHECK_EQ(features.have, 0);
}

static void the_pagemap_shows_what_is_present(void)
{
    pm_mm *mm = open_mm();
    char *mem = new_pages(4);
    uint64_t seen[4] = {0};

    mem[PAGE] = 1;
    CHECK_EQ(pm_pagemap_read(mm, addr_of(mem), 4, seen), 0);
    CHECK_EQ(seen[0] >> 63, 0);
    CHECK_EQ(seen[1] >> 63, 1);
    CHECK_EQ(seen[2] >> 63, 0);
    CHECK_EQ(pm_pagemap_read(mm, addr_of(mem) + 1, 1, seen), -EINVAL);
    close_mm(mm);
    free_pages(mem, 4);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(with_procmap_query),
        TEST(without_procmap_query),
        TEST(files_with_procmap_query),
        TEST(files_without_procmap_query),
        TEST(both_ways_agree),
        TEST(features_say_why),
        TEST(the_pagemap_shows_what_is_present),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
