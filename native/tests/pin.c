/* SPDX-License-Identifier: MIT */
/* Pins: the page stays, its bytes are reached, and it is told which pages they are. */
#include "pinned.h"

/* Without CAP_IPC_LOCK little can be pinned. */
static bool may_pin_much(void)
{
    char line[256];
    uint64_t caps = 0;
    FILE *status = fopen("/proc/self/status", "r");

    while (status && fgets(line, sizeof(line), status)) {
        if (sscanf(line, "CapEff: %" SCNx64, &caps) == 1)
            break;
    }
    if (status)
        fclose(status);
    return caps >> 14 & 1;
}

static void page_stays(void)
{
    char content[PAGES * PAGE], seen[PAGES * PAGE];
    pm_pin *pin = new_pin(mem, PAGES);

    memcpy(content, mem, sizeof(content));
    CHECK_EQ(pinned_kib(), PAGES * PAGE / 1024);
    madvise(mem, PAGES * PAGE, MADV_DONTNEED);
    CHECK_EQ(read_pin(pin, 0, seen, sizeof(seen)), sizeof(seen));
    CHECK(memcmp(seen, content, sizeof(seen)) == 0);
    CHECK_EQ(write_pin(pin, PAGE - 2, "abcd", 4), 4);
    CHECK_EQ(mem[PAGE - 2], 0);
    CHECK_EQ(read_pin(pin, PAGE - 3, seen, 6), 6);
    CHECK(memcmp(seen + 1, "abcd", 4) == 0);
    CHECK_EQ((unsigned char)seen[0], (unsigned char)content[PAGE - 3]);
    drop_pin(pin);
    CHECK_EQ(still_pinned_kib(), 0);
}

static void every_length_at_every_offset(void)
{
    static const uint64_t offsets[] = {0, 1, 7, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 5};
    static const uint64_t lengths[] = {0, 1, 8, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3, 4 * PAGE};
    char seen[4 * PAGE + 2];
    pm_pin *pin = new_pin(mem, PAGES);

    for (size_t i = 0; i < COUNT_OF(offsets); i++) {
        for (size_t j = 0; j < COUNT_OF(lengths); j++) {
            memset(seen, 'z', sizeof(seen));
            CHECK_EQ(read_pin(pin, offsets[i], seen + 1, lengths[j]), lengths[j]);
            CHECK(memcmp(seen + 1, mem + offsets[i], lengths[j]) == 0);
            CHECK(seen[0] == 'z' && seen[lengths[j] + 1] == 'z');
        }
    }
    CHECK_EQ(read_pin(pin, PAGES * PAGE, seen, 0), 0);
    CHECK_EQ(read_pin(pin, PAGES * PAGE, seen, 1), -EINVAL);
    CHECK_EQ(read_pin(pin, PAGES * PAGE - 1, seen, 2), -EINVAL);
    CHECK_EQ(read_pin(pin, UINT64_MAX, seen, 2), -EINVAL);
    drop_pin(pin);
}

static void more_than_a_piece(void)
{
    char *big = new_pages(BIG / PAGE), *other = malloc(BIG), *seen = malloc(BIG);
    pm_pin *pin;

    memset(big, 3, BIG);
    for (int i = 0; i < BIG; i++)
        other[i] = (char)(i * 7 >> 3);
    pin = new_pin(big, BIG / PAGE);
    CHECK_EQ(write_pin(pin, 1, other, BIG - 2), BIG - 2);
    CHECK(big[0] == 3 && big[BIG - 1] == 3);
    CHECK(memcmp(big + 1, other, BIG - 2) == 0);
    CHECK_EQ(read_pin(pin, 1, seen, BIG - 2), BIG - 2);
    CHECK(memcmp(seen, other, BIG - 2) == 0);
    drop_pin(pin);
    free(other);
    free(seen);
    free_pages(big, BIG / PAGE);
}

/* Memory that shows itself many times over: more than a GiB to pin, 4 MiB of it. */
static void more_than_a_gibibyte(void)
{
    const uint64_t piece = 4 << 20, size = (1ULL << 30) + piece;
    int fd = memfd_create("pin", MFD_CLOEXEC);
    char *area = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), text[10];
    struct pm_pin_stats stats;
    pm_pin *pin;

    if (!may_pin_much()) {
        close(fd);
        munmap(area, size);
        LEAVE_OUT("RLIMIT_MEMLOCK");
    }
    NEED(area != MAP_FAILED && ftruncate(fd, (off_t)piece) == 0);
    for (uint64_t at = 0; at < size; at += piece)
        NEED(mmap(area + at, piece, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED);
    pin = new_pin(area, size / PAGE);
    CHECK_EQ(pm_pin_stats(mm, &stats), 0);
    CHECK_EQ(stats.slots, 2);
    memcpy(area + piece - 5, "12345", 5);
    memcpy(area, "67890", 5);
    CHECK_EQ(read_pin(pin, (1ULL << 30) - 5, text, 10), 10);
    CHECK(memcmp(text, "1234567890", 10) == 0);
    drop_pin(pin);
    CHECK_EQ(pm_pin_stats(mm, &stats), 0);
    CHECK_EQ(stats.slots, 0);
    munmap(area, size);
    close(fd);
}

static void every_slot(void)
{
    enum { SLOTS = 16384 };
    pm_pin **pins = calloc(SLOTS, sizeof(*pins)), *one = NULL;
    struct pm_pinning request;
    struct pm_pin_stats stats;

    if (!may_pin_much()) {
        free(pins);
        LEAVE_OUT("RLIMIT_MEMLOCK");
    }
    for (int i = 0; i < SLOTS; i++)
        pins[i] = new_pin(mem, 1);
    CHECK_EQ(pm_pin_stats(mm, &stats), 0);
    CHECK_EQ(stats.slots, SLOTS);
    CHECK_EQ(stats.slots_max, SLOTS);
    CHECK_EQ(pin_at(mem, 1, NULL, 0, &request, &one), -ENOSPC);
    drop_pin(pins[777]);
    pins[777] = new_pin(mem, 1);
    CHECK_EQ(pin_at(mem, 1, NULL, 0, &request, &one), -ENOSPC);
    for (int i = 0; i < SLOTS; i++)
        drop_pin(pins[i]);
    free(pins);
    CHECK_EQ(still_pinned_kib(), 0);
}

static void pages_are_told(void)
{
    uint64_t pfns[PAGES], raw[PAGES];
    struct pm_pinning request;
    pm_pin *pin = NULL;

    if (!mm_has(mm, PM_FEAT_PAGEMAP))
        LEAVE_OUT("no pagemap");
    NEED_EQ(pin_at(mem, PAGES, pfns, 0, &request, &pin), 0);
    CHECK_EQ(request.changed_start, request.changed_end);
    CHECK_EQ(pm_pagemap_read(mm, addr_of(mem), PAGES, raw), 0);
    for (int i = 0; i < PAGES; i++) {
        CHECK_EQ(pfns[i] >> 62, 3);
        CHECK_EQ(pfns[i] & ((1ULL << 52) - 1), raw[i] & ((1ULL << 55) - 1));
    }
    drop_pin(pin);
}

/* Only read so far: the zero page, which the pin would replace. */
static void shared_pages_are_asked_about(void)
{
    char *fresh = new_pages(4);
    uint64_t pfns[4];
    struct pm_pinning request;
    pm_pin *pin = NULL;

    if (!mm_has(mm, PM_FEAT_PAGEMAP))
        LEAVE_OUT("no pagemap");
    fresh[0] = 1;
    (void)*(volatile char *)(fresh + PAGE);
    (void)*(volatile char *)(fresh + 2 * PAGE);
    CHECK_EQ(pin_at(fresh, 4, pfns, 0, &request, &pin), -EAGAIN);
    CHECK_EQ(request.changed_start, addr_of(fresh + PAGE));
    CHECK_EQ(request.changed_end, addr_of(fresh + 3 * PAGE));
    CHECK_EQ(still_pinned_kib(), 0);
    NEED_EQ(pin_at(fresh, 4, pfns, PM_PIN_REPLACE, &request, &pin), 0);
    for (int i = 0; i < 4; i++)
        CHECK_EQ(pfns[i] >> 62, 3);
    drop_pin(pin);
    free_pages(fresh, 4);
}

static void what_cannot_be_pinned(void)
{
    char *hole = new_pages(3), *constant = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct pm_pinning request;
    pm_pin *pin = NULL;

    drop_pin(new_pin(mem, 1)); /* what the ring maps is not to go into the hole */
    munmap(hole + PAGE, PAGE);
    CHECK_EQ(pin_at(hole, 3, NULL, 0, &request, &pin), -EFAULT);
    CHECK_EQ(pin_at(constant, 1, NULL, 0, &request, &pin), -EFAULT);
    CHECK_EQ(pin_at(mem + 1, 1, NULL, 0, &request, &pin), -EINVAL);
    CHECK_EQ(pin_at(mem, 0, NULL, 0, &request, &pin), -EINVAL);
    CHECK_EQ(pin_at(mem, 1, NULL, 2, &request, &pin), -EINVAL);
    CHECK_EQ(pin_at(mem, UINT64_MAX >> 12, NULL, 0, &request, &pin), -EINVAL);
    CHECK_EQ(pin_at((char *)(uintptr_t)(1ULL << 47), 1, NULL, 0, &request, &pin), -EINVAL);
    CHECK(pin == NULL);
    CHECK_EQ(still_pinned_kib(), 0);
    munmap(hole, PAGE);
    munmap(hole + 2 * PAGE, PAGE);
    munmap(constant, PAGE);
}

static void without_the_feature(void)
{
    const struct pm_mm_options opt = {.disable = 1ULL << PM_FEAT_IO_URING};
    struct pm_pinning request = {.start = addr_of(mem), .npages = 1};
    pm_mm *without = open_mm_with(&opt);
    pm_pin *pin = NULL;

    CHECK_EQ(pm_pin_create(without, &request, &pin), -EOPNOTSUPP);
    close_mm(without);
}

static const struct test tests[] = {
    TEST(page_stays),
    TEST(every_length_at_every_offset),
    TEST(more_than_a_piece),
    TEST(more_than_a_gibibyte),
    TEST(every_slot),
    TEST(pages_are_told),
    TEST(shared_pages_are_asked_about),
    TEST(what_cannot_be_pinned),
    TEST(without_the_feature),
};

int main(int argc, char **argv)
{
    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
