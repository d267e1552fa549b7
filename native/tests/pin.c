/* SPDX-License-Identifier: MIT */
/* Pins: the page stays, its bytes are reached, and whatever fails or ends leaves nothing pinned. */
#include <fcntl.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "util.h"

enum { PAGES = 8, BIG = 1 << 20 };

static pm_mm *mm;
static char *mem;
static long long pinned_before;

/* Of this process, by the kernel's account; KiB. */
static long long vm_pin(void)
{
    char line[256];
    long long kib = -1;
    FILE *status = fopen("/proc/self/status", "r");

    while (status && fgets(line, sizeof(line), status)) {
        if (sscanf(line, "VmPin: %lld", &kib) == 1)
            break;
    }
    if (status)
        fclose(status);
    return kib;
}

static long long pinned_kib(void)
{
    return vm_pin() - pinned_before;
}

static void set_up(void)
{
    struct pm_mm_options opt = {0};

#ifdef __SANITIZE_THREAD__
    opt.disable = 1ULL << PM_FEAT_UFFD_EVENT_FORK; /* see fork.c */
#endif
    pinned_before = vm_pin();
    mm = open_mm_with(&opt);
    mem = new_pages(PAGES);
    for (int i = 0; i < PAGES * PAGE; i++)
        mem[i] = (char)(i % 251);
}

static void tear_down(void)
{
    pm_points_reset();
    pm_inject_clear();
    close_mm(mm);
    CHECK_EQ(pinned_kib(), 0);
    free_pages(mem, PAGES);
}

static int pin_at(const void *at, uint64_t npages, uint64_t *pfns, uint32_t flags, struct pm_pinning *ret,
                  pm_pin **pin)
{
    *ret = (struct pm_pinning){.start = addr_of(at), .npages = npages, .pfns = pfns, .flags = flags};
    return pm_pin_create(mm, ret, pin);
}

static pm_pin *new_pin(const void *at, uint64_t npages)
{
    struct pm_pinning request;
    pm_pin *pin = NULL;

    CHECK_EQ(pin_at(at, npages, NULL, 0, &request, &pin), 0);
    return pin;
}

static void drop_pin(pm_pin *pin)
{
    CHECK_EQ(pm_pin_release(pin), 0);
    pm_pin_put(pin);
}

static int64_t read_pin(pm_pin *pin, uint64_t offset, void *buf, uint64_t len)
{
    uint64_t done;
    int err = pm_pin_access(pin, offset, buf, len, 0, &done);

    return err ? err : (int64_t)done;
}

static int64_t write_pin(pm_pin *pin, uint64_t offset, const void *buf, uint64_t len)
{
    uint64_t done;
    int err = pm_pin_access(pin, offset, (void *)(uintptr_t)buf, len, 1, &done);

    return err ? err : (int64_t)done;
}

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
    CHECK_EQ(pinned_kib(), 0);
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
    CHECK_EQ(pinned_kib(), 0);
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
    CHECK_EQ(pinned_kib(), 0);
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
    CHECK_EQ(pinned_kib(), 0);
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

static void released_once(void)
{
    pm_pin *pin = new_pin(mem, 2);
    char byte;

    CHECK_EQ(pm_pin_hold(pin), 0);
    CHECK_EQ(pm_pin_release(pin), -EBUSY);
    CHECK_EQ(read_pin(pin, 0, &byte, 1), 1);
    pm_pin_unhold(pin);
    CHECK_EQ(pm_pin_release(pin), 0);
    CHECK_EQ(pm_pin_release(pin), -EALREADY);
    CHECK_EQ(pm_pin_hold(pin), -EALREADY);
    CHECK_EQ(read_pin(pin, 0, &byte, 1), -EALREADY);
    pm_pin_put(pin);
    pin = new_pin(mem, 1);
    pm_pin_get(pin);
    pm_pin_put(pin);
    CHECK_EQ(read_pin(pin, 0, &byte, 1), 1);
    pm_pin_put(pin); /* the last reference releases what nobody did */
    CHECK_EQ(pinned_kib(), 0);
}

static void close_gives_all_back(void)
{
    pm_mm *other = open_mm();
    struct pm_pinning request = {.start = addr_of(mem), .npages = 4};
    pm_pin *pin = NULL, *second = NULL;
    uint64_t done;
    char byte;

    NEED_EQ(pm_pin_create(other, &request, &pin), 0);
    NEED_EQ(pm_pin_create(other, &request, &second), 0);
    CHECK_EQ(pm_mm_close(other), 0);
    CHECK_EQ(pinned_kib(), 0);
    CHECK_EQ(pm_pin_access(pin, 0, &byte, 1, 0, &done), -ESRCH);
    CHECK_EQ(pm_pin_release(pin), -ESRCH);
    CHECK_EQ(pm_pin_hold(pin), -ESRCH);
    CHECK_EQ(pm_pin_create(other, &request, &second), -ESRCH);
    pm_pin_put(pin);
    pm_pin_put(second);
    pm_mm_put(other);
}

static void the_callers_buffer_is_not_there(void)
{
    char *other = new_pages(2);
    pm_pin *pin = new_pin(mem, PAGES);
    uint64_t done;

    munmap(other + PAGE, PAGE);
    CHECK_EQ(pm_pin_access(pin, 0, other, 2 * PAGE, 0, &done), -EFAULT);
    CHECK_EQ(done, PAGE);
    CHECK(memcmp(other, mem, PAGE) == 0);
    CHECK_EQ(pm_pin_access(pin, 0, other, 2 * PAGE, 1, &done), -EFAULT);
    CHECK_EQ(done, PAGE);
    drop_pin(pin);
    munmap(other, PAGE);
}

static void release_amid_an_access(struct call *call)
{
    uint64_t done;

    call->ret = pm_pin_access(call->arg[0], 0, call->arg[1], call->num[0], 0, &done);
    call->num[1] = done;
}

static void released_between_two_pieces(void)
{
    char *big = new_pages(BIG / PAGE), *seen = malloc(BIG);
    struct call call = {.fn = release_amid_an_access, .num = {BIG}};
    pm_pin *pin;

    memset(big, 5, BIG);
    pin = new_pin(big, BIG / PAGE);
    call.arg[0] = pin;
    call.arg[1] = seen;
    CHECK_EQ(pm_point_arm(PM_POINT_PIN_PIECE), 0);
    call_start(&call);
    CHECK_EQ(pm_point_wait(PM_POINT_PIN_PIECE, 10 * SECOND), 0);
    CHECK_EQ(pm_pin_release(pin), 0);
    CHECK_EQ(pinned_kib(), 0);
    pm_point_release(PM_POINT_PIN_PIECE);
    CHECK_EQ(call_join(&call), -EALREADY);
    CHECK_EQ(call.num[1], 0);
    pm_pin_put(pin);
    free(seen);
    free_pages(big, BIG / PAGE);
}

static void close_waits_for_an_access(struct call *call)
{
    call->ret = pm_mm_close(call->arg[0]);
}

static void closed_amid_an_access(void)
{
    char seen[PAGE];
    struct call access = {.fn = release_amid_an_access, .num = {PAGE}, .arg = {NULL, seen}};
    struct call closing = {.fn = close_waits_for_an_access, .arg = {mm}};
    pm_pin *pin = new_pin(mem, 1);

    access.arg[0] = pin;
    CHECK_EQ(pm_point_arm(PM_POINT_PIN_PIECE), 0);
    call_start(&access);
    CHECK_EQ(pm_point_wait(PM_POINT_PIN_PIECE, 10 * SECOND), 0);
    call_start(&closing);
    while (pm_mm_alive(mm) == 1)
        usleep(100);
    pm_point_release(PM_POINT_PIN_PIECE);
    CHECK_EQ(call_join(&closing), 0);
    call_join(&access);
    CHECK(access.ret == 0 || access.ret == -ESRCH);
    CHECK_EQ(pinned_kib(), 0);
    pm_pin_put(pin);
}

/* Threads that pin, read, write and unpin their own pages of one mm. */
static void work(struct call *call)
{
    char *own = call->arg[0], seen[PAGE];

    for (int i = 0; i < 200; i++) {
        struct pm_pinning request = {.start = addr_of(own), .npages = 1};
        pm_pin *pin = NULL;

        if (pm_pin_create(mm, &request, &pin))
            break;
        memset(seen, i, sizeof(seen));
        if (write_pin(pin, 0, seen, PAGE) != PAGE || own[i] != (char)i)
            call->ret++;
        if (read_pin(pin, 100, seen, 50) != 50 || seen[7] != (char)i)
            call->ret++;
        if (pm_pin_release(pin))
            call->ret++;
        pm_pin_put(pin);
        call->num[0]++;
    }
}

static void threads_of_one_mm(void)
{
    struct call call[4] = {0};

    for (int i = 0; i < 4; i++) {
        call[i].fn = work;
        call[i].arg[0] = mem + i * PAGE;
        call_start(&call[i]);
    }
    for (int i = 0; i < 4; i++) {
        CHECK_EQ(call_join(&call[i]), 0);
        CHECK_EQ(call[i].num[0], 200);
    }
}

/* What fails at the nth system call, for each n: it is refused and leaves nothing, or it is done. */
static bool attempt(int kind, uint64_t nth, int err, uint64_t times)
{
    struct pm_pinning request;
    uint64_t pfns[PAGES], done = 0;
    char seen[PAGE], given[PAGE];
    pm_pin *pin = NULL;
    pm_mm *fresh = mm;
    struct pm_pin_stats stats;
    int ret, released;

    memset(given, (int)nth, sizeof(given));
    pm_inject(kind, nth, times, err, (int)syscall(SYS_gettid));
    ret = pin_at(mem, PAGES, pfns, PM_PIN_REPLACE, &request, &pin);
    if (!ret && pm_pin_access(pin, PAGE, given, PAGE, 1, &done) == 0)
        CHECK(memcmp(mem + PAGE, given, PAGE) == 0);
    if (!ret && pm_pin_access(pin, 0, seen, PAGE, 0, &done) == 0)
        CHECK(memcmp(mem, seen, PAGE) == 0);
    released = ret ? 0 : pm_pin_release(pin);
    if (!ret)
        pm_pin_put(pin);
    if (pm_inject_clear() == 0)
        return false;
    CHECK(ret <= 0);
    CHECK(released == 0 || released == -err);
    CHECK_EQ(pm_pin_stats(fresh, &stats), 0);
    CHECK_EQ(stats.pins, 0);
    CHECK_EQ(stats.slots, stats.slots_stuck);
    if (!released)
        CHECK_EQ(pinned_kib(), 0);
    pin = NULL;
    CHECK_EQ(pin_at(mem, PAGES, NULL, 0, &request, &pin), 0);
    if (pin) {
        CHECK_EQ(write_pin(pin, 0, "still", 5), 5);
        CHECK(memcmp(mem, "still", 5) == 0);
        drop_pin(pin);
    }
    CHECK_EQ(pinned_kib(), 0);
    return true;
}

static void errors_at_each_call(void)
{
    static const int errors[] = {ENOMEM, EINTR, EAGAIN};

    for (int kind = PM_SYS_ANY + 1; kind < PM_SYS_COUNT && !check_failures; kind++) {
        for (size_t e = 0; e < COUNT_OF(errors); e++) {
            for (uint64_t nth = 1; attempt(kind, nth, errors[e], 1) && !check_failures; nth++)
                continue;
        }
    }
    for (uint64_t nth = 1; nth < 4; nth++)
        attempt(PM_SYS_URING_REGISTER, nth, EINVAL, 1000);
}

/* As above, of a ring that is made. */
static void errors_while_the_ring_is_made(void)
{
    for (int kind = PM_SYS_ANY + 1; kind < PM_SYS_COUNT && !check_failures; kind++) {
        for (uint64_t nth = 1; !check_failures; nth++) {
            bool struck;

            pm_mm_close(mm);
            pm_mm_put(mm);
            mm = open_mm();
            struck = attempt(kind, nth, EMFILE, 1);
            if (!struck)
                break;
        }
    }
}

static int child_has_no_pin(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    struct dirent *entry;

    while (dir && (entry = readdir(dir))) {
        char path[300], target[64] = "";

        snprintf(path, sizeof(path), "/proc/self/fd/%s", entry->d_name);
        if (readlink(path, target, sizeof(target) - 1) > 0 &&
            (strstr(target, "io_uring") || strstr(target, "pymirror-stage")))
            n++;
    }
    if (dir)
        closedir(dir);
    return n;
}

static void forked_child(void)
{
    pm_pin *pin = new_pin(mem, 2);
    int status = -1, pid;
    char seen[5];

    memcpy(mem, "first", 5);
    pid = fork();
    if (pid == 0) {
        uint64_t done;

        if (memcmp(mem, "first", 5) != 0)
            _exit(101);
        if (pm_pin_access(pin, 0, seen, 5, 0, &done) != -ESRCH || pm_pin_release(pin) != -ESRCH)
            _exit(102);
        pm_pin_put(pin);
        memcpy(mem, "child", 5);
        _exit(child_has_no_pin());
    }
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    memcpy(mem, "again", 5);
    CHECK_EQ(read_pin(pin, 0, seen, 5), 5);
    CHECK(memcmp(seen, "again", 5) == 0);
    drop_pin(pin);
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
    TEST(released_once),
    TEST(close_gives_all_back),
    TEST(the_callers_buffer_is_not_there),
    TEST(released_between_two_pieces),
    TEST(closed_amid_an_access),
    TEST(threads_of_one_mm),
    TEST(errors_at_each_call),
    TEST(errors_while_the_ring_is_made),
    TEST(forked_child),
};

int main(int argc, char **argv)
{
    return run_tests_with(set_up, tear_down, tests, COUNT_OF(tests), argc, argv);
}
