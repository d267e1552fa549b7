/* SPDX-License-Identifier: MIT */
/* The loops over the entries of DMA mappings, at every length, against what they say of one entry. */
#include "entries.h"
#include "util.h"

enum { LONGEST = 40, ROUNDS = 200 };

static const uint64_t guard = 0x5a5a5a5a5a5a5a5aULL, keep = ~(PM_PFN_ERROR | PM_PFN_STICKY);
static uint64_t random_state = 88172645463325252ULL;

static uint64_t random_u64(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* Mostly the page after the one before, so that there are stretches; bits besides, and holes. */
static void make_pfns(uint64_t *pfns, uint64_t n)
{
    uint64_t page = random_u64() & PM_PFN_MASK;

    for (uint64_t i = 0; i < n; i++) {
        uint64_t random = random_u64();

        page = random % 4 ? (page + 1) & PM_PFN_MASK : random_u64() & PM_PFN_MASK;
        pfns[i] = page | (random & ~PM_PFN_MASK);
        if (random >> 8 & 3)
            pfns[i] |= PM_PFN_VALID;
    }
}

static void filled_are_the_valid_ones(void)
{
    uint64_t pfns[LONGEST], entries[LONGEST + 1], runs;

    for (uint64_t round = 0; round < ROUNDS; round++) {
        uint64_t n = round % (LONGEST + 1), want = 0, want_runs = 0;

        make_pfns(pfns, n);
        entries[n] = guard;
        for (uint64_t i = 0; i < n; i++) {
            bool valid = pfns[i] >> 63, before = i > 0 && pfns[i - 1] >> 63;

            want += valid;
            want_runs += valid && !(before && (pfns[i] & PM_PFN_MASK) == (pfns[i - 1] & PM_PFN_MASK) + 1);
        }
        CHECK_EQ(pm_entries_fill(entries, pfns, n, keep, &runs), want);
        CHECK_EQ(runs, want_runs);
        for (uint64_t i = 0; i < n; i++)
            CHECK_EQ(entries[i], pfns[i] >> 63 ? pfns[i] & keep : 0);
        CHECK_EQ(entries[n], guard);
    }
}

static void placed_are_the_valid_ones(void)
{
    const struct pm_run at = {0xfffffff00000ULL, PAGE};
    uint64_t entries[LONGEST], daddrs[LONGEST + 1];

    for (uint64_t round = 0; round < ROUNDS; round++) {
        uint64_t n = round % (LONGEST + 1);

        make_pfns(entries, n);
        daddrs[n] = guard;
        pm_entries_place(entries, n, at, daddrs);
        for (uint64_t i = 0; i < n; i++)
            CHECK_EQ(daddrs[i], entries[i] >> 63 ? at.first + i * PAGE : 0);
        CHECK_EQ(daddrs[n], guard);
    }
}

static void cleared_are_counted(void)
{
    uint64_t entries[LONGEST + 1], writable;

    for (uint64_t round = 0; round < ROUNDS; round++) {
        uint64_t n = round % (LONGEST + 1), want = 0, want_writable = 0;

        make_pfns(entries, n);
        entries[n] = guard;
        for (uint64_t i = 0; i < n; i++) {
            entries[i] = random_u64() % 4 ? entries[i] : 0;
            want += entries[i] != 0;
            want_writable += (entries[i] & PM_ENTRY_WRITE) != 0;
        }
        CHECK_EQ(pm_entries_clear(entries, n, &writable), want);
        CHECK_EQ(writable, want_writable);
        for (uint64_t i = 0; i < n; i++)
            CHECK_EQ(entries[i], 0);
        CHECK_EQ(entries[n], guard);
    }
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        TEST(filled_are_the_valid_ones),
        TEST(placed_are_the_valid_ones),
        TEST(cleared_are_counted),
    };

    return run_tests(tests, COUNT_OF(tests), argc, argv);
}
