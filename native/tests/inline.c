/* SPDX-License-Identifier: MIT */
/* Faults that are served in the thread that takes them: what the handler of SIGBUS does, and what it leaves
 * to others. What both deliveries have in common is in migrate.c.
 */
#include <linux/futex.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#include "util.h"

enum { PAGES = 16 };

#define NEED_VRAM()                                                                                          \
    do {                                                                                                     \
        if (!vram)                                                                                           \
            LEAVE_OUT("needs a userfaultfd with events, SIGBUS and UFFDIO_MOVE");                            \
    } while (0)

static pm_mm *mm;
static pm_devmem *vram;
static char *mem;

static void open_with(uint32_t flags)
{
    struct pm_mm_options opt = {.flags = flags};

#ifdef __SANITIZE_THREAD__
    opt.disable = 1ULL << PM_FEAT_UFFD_EVENT_FORK; /* see fork.c */
#endif
    mm = open_mm_with(&opt);
    vram = NULL;
    mem = new_pages(PAGES);
    for (int i = 0; i < PAGES; i++)
        memset(mem + i * PAGE, i + 1, PAGE);
    if (!can_migrate(mm, flags))
        return;
    CHECK_EQ(pm_devmem_create(mm, 64 << 20, 7, &vram), 0);
    CHECK(pm_watch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE, PM_WATCH_EXACT) > 0);
}

static void close_it(void)
{
    pm_points_reset();
    CHECK_EQ(pm_mm_close(mm), 0);
    if (vram)
        CHECK_EQ(pm_devmem_destroy(vram), 0);
    pm_mm_put(mm);
    free_pages(mem, PAGES);
}

static void set_up(void)
{
    open_with(PM_MM_INLINE);
}

static int out(void)
{
    uint64_t moved, start = addr_of(mem), seq;
    pm_inv *inv;
    int err;

    CHECK_EQ(pm_invalidate_start(mm, start, start + PAGES * PAGE, PM_MIGRATE, PM_BEFORE, &inv, &seq), 0);
    pm_invalidate_delivered(inv);
    err = pm_migrate_to_device(vram, start, start + PAGES * PAGE, &moved);
    pm_invalidate_end(inv);
    return err ? err : (int)moved;
}

static uint64_t at_home(void)
{
    struct pm_devmem_stats stats;

    CHECK_EQ(pm_devmem_stats(mm, &stats), 0);
    return PAGES - stats.resident;
}

static int wrong_pages(void)
{
    int wrong = 0;

    for (int i = 0; i < PAGES; i++)
        wrong += mem[i * PAGE] != i + 1 || mem[(i + 1) * PAGE - 1] != i + 1;
    return wrong;
}

static int child_looks(void)
{
    int wrong = wrong_pages();

    memset(mem, 0, PAGES * PAGE);
    return wrong;
}

static void call_touch(struct call *call)
{
    call->ret = *(volatile char *)call->arg[0];
}

/* What is not ours: in children, as the handler of a process is made once. */

static atomic_int met;
static void *at;

static void met_with_info(int sig, siginfo_t *info, void *context)
{
    (void)context;
    if (sig == SIGBUS && info->si_addr == at)
        atomic_fetch_add(&met, 1);
    /* It may touch device memory itself. */
    if (mem[PAGE] != 2)
        _exit(9);
    mmap(at, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

static void met_plain(int sig)
{
    met_with_info(sig, &(siginfo_t){.si_addr = at}, NULL);
}

static void map_beyond_a_file(void)
{
    int fd = memfd_create("empty", 0);

    at = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
}

/* Exit 0: our faults were served, and the other one came to the earlier handler, once. */
static int touch_both(const struct sigaction *act, int times)
{
    sigset_t before, after;

    sigaction(SIGBUS, act, NULL);
    set_up();
    if (!vram)
        return 77;
    map_beyond_a_file();
    CHECK_EQ(pm_watch(mm, addr_of(at), addr_of(at) + PAGE, PM_WATCH_FILES), PAGE);
    if (out() != PAGES)
        return 1;
    if (mem[0] != 1 || at_home() != 1)
        return 2;
    pthread_sigmask(SIG_BLOCK, NULL, &before);
    for (int i = 0; i < times; i++) {
        errno = 4242;
        if (*(volatile char *)at != 0 || errno != 4242)
            return 3;
        map_beyond_a_file();
    }
    pthread_sigmask(SIG_BLOCK, NULL, &after);
    if (atomic_load(&met) != times || memcmp(&before, &after, _NSIG / 8))
        return 4;
    if (wrong_pages())
        return 5;
    close_it();
    return check_failures ? 6 : 0;
}

static int child_with_info(void)
{
    return touch_both(&(struct sigaction){.sa_sigaction = met_with_info, .sa_flags = SA_SIGINFO}, 3);
}

static int child_plain(void)
{
    return touch_both(&(struct sigaction){.sa_handler = met_plain}, 3);
}

static int child_once(void)
{
    return touch_both(&(struct sigaction){.sa_handler = met_plain, .sa_flags = (int)SA_RESETHAND}, 2);
}

static int child_default(void)
{
    return touch_both(&(struct sigaction){.sa_handler = SIG_DFL}, 1);
}

static int child_ignored(void)
{
    return touch_both(&(struct sigaction){.sa_handler = SIG_IGN}, 1);
}

static int child_blocked(void)
{
    sigset_t set;

    set_up();
    if (!vram || out() != PAGES)
        return 77;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    return mem[0];
}

static int child_sent(void)
{
    signal(SIGBUS, SIG_DFL); /* a sanitizer has one of its own */
    set_up();
    if (!vram || out() != PAGES)
        return 77;
    raise(SIGBUS);
    return 1;
}

static int child_sent_ignored(void)
{
    signal(SIGBUS, SIG_IGN);
    set_up();
    if (!vram || out() != PAGES)
        return 77;
    raise(SIGBUS);
    if (wrong_pages())
        return 1;
    close_it();
    return check_failures;
}

static int killed_by(int status)
{
    return status < 1000 ? -status : WTERMSIG(status - 1000);
}

static void an_earlier_handler_gets_the_rest(void)
{
    int status = in_child(child_with_info);

    if (status == 77)
        LEAVE_OUT("needs a userfaultfd with events, SIGBUS and UFFDIO_MOVE");
    CHECK_EQ(status, 0);
    CHECK_EQ(in_child(child_plain), 0);
    CHECK_EQ(in_child(child_sent_ignored), 0);
}

static void without_one_the_process_dies(void)
{
    int status = in_child(child_default);

    if (status == 77)
        LEAVE_OUT("needs a userfaultfd with events, SIGBUS and UFFDIO_MOVE");
    CHECK_EQ(killed_by(status), SIGBUS);
    CHECK_EQ(killed_by(in_child(child_ignored)), SIGBUS);
    CHECK_EQ(killed_by(in_child(child_once)), SIGBUS);
    CHECK_EQ(killed_by(in_child(child_sent)), SIGBUS);
}

static void a_thread_that_blocks_it_dies(void)
{
    int status = in_child(child_blocked);

    if (status == 77)
        LEAVE_OUT("needs a userfaultfd with events, SIGBUS and UFFDIO_MOVE");
    CHECK_EQ(killed_by(status), SIGBUS);
}

static int child_later(void)
{
    struct sigaction ours, later = {.sa_handler = met_plain}, none = {.sa_handler = SIG_DFL};
    bool ok;

    set_up();
    if (!vram || out() != PAGES)
        return 77;
    ok = pm_handler_over(SIGBUS) == 0;
    CHECK_EQ(wrong_pages(), 0);
    sigaction(SIGBUS, &later, &ours);
    ok = ok && pm_handler_over(SIGBUS) == (uintptr_t)met_plain && out() == -EBUSY && at_home() == PAGES;
    sigaction(SIGBUS, &ours, NULL);
    ok = ok && pm_handler_over(SIGBUS) == 0 && out() == PAGES;
    CHECK_EQ(wrong_pages(), 0);
    /* Somebody gave the default back: ours comes again. */
    sigaction(SIGBUS, &none, NULL);
    ok = ok && out() == PAGES;
    CHECK_EQ(wrong_pages(), 0);
    close_it();
    return check_failures || !ok;
}

static void a_later_handler_keeps_pages_at_home(void)
{
    int status = in_child(child_later);

    if (status == 77)
        LEAVE_OUT("needs a userfaultfd with events, SIGBUS and UFFDIO_MOVE");
    CHECK_EQ(status, 0);
}

static int child_refused(void)
{
    set_up();
    if (!vram)
        return 77;
    CHECK_EQ(pm_inject(PM_SYS_SIGACTION, 1, 1, EPERM, 0), 0);
    CHECK_EQ(out(), -EPERM);
    CHECK_EQ(pm_inject(PM_SYS_SIGACTION, 2, 1, EPERM, 0), 0);
    CHECK_EQ(out(), -EPERM);
    CHECK_EQ(pm_inject_clear(), 1);
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(wrong_pages(), 0);
    close_it();
    return check_failures;
}

static void nothing_leaves_without_a_handler(void)
{
    int status = in_child(child_refused);

    if (status == 77)
        LEAVE_OUT("needs a userfaultfd with events, SIGBUS and UFFDIO_MOVE");
    CHECK_EQ(status, 0);
}

/* System calls. */

struct tried {
    int64_t read, write, vm_readv, futex;
};

static int64_t result(int64_t ret)
{
    return ret < 0 ? -errno : ret;
}

static struct tried try_system_calls(void)
{
    struct iovec local = {mem + 2 * PAGE, 8}, remote = {mem + 3 * PAGE, 8};
    struct tried ret;
    char byte = 1;
    int fds[2];

    CHECK_EQ(pipe(fds), 0);
    CHECK_EQ(out(), PAGES);
    ret.write = result(write(fds[1], mem, 1));
    if (ret.write < 0)
        CHECK_EQ(write(fds[1], &byte, 1), 1);
    ret.read = result(read(fds[0], mem + PAGE, 1));
    local.iov_base = (char[8]){0};
    ret.vm_readv = result(process_vm_readv(getpid(), &local, 1, &remote, 1, 0));
    ret.futex =
        result(syscall(SYS_futex, mem + 4 * PAGE, FUTEX_WAIT_PRIVATE, 1, &(struct timespec){0}, NULL, 0));
    close(fds[0]);
    close(fds[1]);
    return ret;
}

static void system_calls_are_refused(void)
{
    struct tried tried;

    NEED_VRAM();
    tried = try_system_calls();
    CHECK_EQ(tried.write, -EFAULT);
    CHECK_EQ(tried.read, -EFAULT);
    CHECK_EQ(tried.vm_readv, -EFAULT);
    CHECK_EQ(tried.futex, -EFAULT);
    CHECK_EQ(at_home(), 0);
    CHECK_EQ(wrong_pages(), 0);
}

static void system_calls_work_by_thread(void)
{
    struct tried tried;

    close_it();
    open_with(0);
    NEED_VRAM();
    tried = try_system_calls();
    CHECK_EQ(tried.write, 1);
    CHECK_EQ(tried.read, 1);
    CHECK_EQ(tried.vm_readv, 8);
    CHECK_EQ(tried.futex, -EAGAIN);
    mem[PAGE] = 2;
    CHECK_EQ(wrong_pages(), 0);
}

static void ours_bring_pages_home_themselves(void)
{
    pm_sub *sub = new_sub(mm, mem, PAGES);
    pm_table *table = new_table();
    char *buf = mem + 8 * PAGE, *fresh = new_pages(PAGES);
    struct pm_pinning pinning = {.start = addr_of(fresh), .npages = PAGES / 2};
    struct pm_access access;
    pm_pin *pin;
    uint64_t done, moved;
    int err;

    NEED_VRAM();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(mirror_pages(mm, table, sub, mem, 4, WANT_WRITE), 0);
    CHECK_EQ(at_home(), 4);
    access = device_read(table, mem + PAGE, buf, PAGE, &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(access.done, PAGE);
    CHECK_EQ(buf[0], 2);
    access = device_write(table, mem + 2 * PAGE, mem + 9 * PAGE, PAGE, &err);
    CHECK_EQ(err, 0);
    CHECK_EQ(mem[2 * PAGE], 10);
    /* Never-touched pages, whose holes fault. */
    CHECK(pm_watch(mm, addr_of(fresh), addr_of(fresh) + PAGES * PAGE, PM_WATCH_EXACT) > 0);
    CHECK_EQ(pm_migrate_to_device(vram, addr_of(fresh), addr_of(fresh) + PAGES * PAGE, &moved), 0);
    if (mm_has(mm, PM_FEAT_IO_URING)) {
        NEED_EQ(pm_pin_create(mm, &pinning, &pin), 0);
        CHECK_EQ(pm_pin_access(pin, 0, mem + 10 * PAGE, PAGE, true, &done), 0);
        CHECK_EQ(fresh[0], 11);
        CHECK_EQ(pm_pin_release(pin), 0);
        pm_pin_put(pin);
    }
    drop_sub(sub);
    sub = new_sub(mm, fresh, PAGES);
    CHECK_EQ(mirror_pages(mm, table, sub, fresh, PAGES, WANT_READ), 0);
    CHECK_EQ(fresh[(PAGES - 1) * PAGE], 0);
    pm_table_clear(table, 0, 0);
    pm_table_put(table);
    drop_sub(sub);
    free_pages(fresh, PAGES);
}

/* Orders of steps. */

static void call_unmap(struct call *call)
{
    call->ret = munmap(call->arg[0], PAGE);
}

static void an_unread_event_is_waited_for(void)
{
    struct call touch = {.fn = call_touch, .arg = {mem + PAGE}};
    struct call unmap = {.fn = call_unmap, .arg = {mem}};

    NEED_VRAM();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(pm_point_arm(PM_POINT_MONITOR_POLLED), 0);
    call_start(&unmap);
    CHECK_EQ(pm_point_wait(PM_POINT_MONITOR_POLLED, 10 * SECOND), 0);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(pm_point_arm(PM_POINT_INLINE_FAULT), 0);
        if (i == 0)
            call_start(&touch);
        CHECK_EQ(pm_point_wait(PM_POINT_INLINE_FAULT, 10 * SECOND), 0);
        pm_point_release(PM_POINT_INLINE_FAULT);
    }
    CHECK(!atomic_load(&touch.done));
    pm_point_release(PM_POINT_MONITOR_POLLED);
    CHECK_EQ(call_join(&touch), 2);
    CHECK_EQ(call_join(&unmap), 0);
    CHECK(mmap(mem, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == mem);
    mem[0] = mem[PAGE - 1] = 1;
    CHECK_EQ(wrong_pages(), 0);
}

/* While the thread is on its way, its page comes home, and the memory is watched no more. */
static void a_fault_that_comes_too_late_is_none(void)
{
    struct call touch = {.fn = call_touch, .arg = {mem + PAGE}};

    NEED_VRAM();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(pm_point_arm(PM_POINT_INLINE_FAULT), 0);
    call_start(&touch);
    CHECK_EQ(pm_point_wait(PM_POINT_INLINE_FAULT, 10 * SECOND), 0);
    CHECK_EQ(pm_unwatch(mm, addr_of(mem), addr_of(mem) + PAGES * PAGE), 0);
    pm_point_release(PM_POINT_INLINE_FAULT);
    CHECK_EQ(call_join(&touch), 2);
    CHECK_EQ(at_home(), PAGES);
    CHECK_EQ(wrong_pages(), 0);
}

/* Beyond the end of a file when it was touched, and not any more: what is in the file is read, no zeroes. */
static void a_file_may_have_grown(void)
{
    int fd = memfd_create("short", 0);
    char *map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    struct call touch = {.fn = call_touch, .arg = {map}};

    NEED_VRAM();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(pm_watch(mm, addr_of(map), addr_of(map) + PAGE, PM_WATCH_FILES), PAGE);
    CHECK_EQ(pm_point_arm(PM_POINT_INLINE_FAULT), 0);
    call_start(&touch);
    CHECK_EQ(pm_point_wait(PM_POINT_INLINE_FAULT, 10 * SECOND), 0);
    CHECK_EQ(pwrite(fd, "grown", 5, 0), 5);
    pm_point_release(PM_POINT_INLINE_FAULT);
    CHECK_EQ(call_join(&touch), 'g');
    munmap(map, PAGE);
    close(fd);
}

static void call_close(struct call *call)
{
    call->ret = pm_mm_close(call->arg[0]);
}

static void a_close_waits_for_the_handler(void)
{
    struct call touch = {.fn = call_touch, .arg = {mem + PAGE}}, closing = {.fn = call_close, .arg = {mm}};

    NEED_VRAM();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(pm_point_arm(PM_POINT_INLINE_FAULT), 0);
    call_start(&touch);
    CHECK_EQ(pm_point_wait(PM_POINT_INLINE_FAULT, 10 * SECOND), 0);
    call_start(&closing);
    pm_point_release(PM_POINT_INLINE_FAULT);
    CHECK_EQ(call_join(&touch), 2);
    CHECK_EQ(call_join(&closing), 0);
    CHECK_EQ(wrong_pages(), 0);
}

/* Whatever the kernel refuses it with, the touch comes again. */
static void refusals_are_tried_again(void)
{
    static const int errors[] = {EAGAIN, ENOMEM, EBUSY, EINTR, EIO};
    uint64_t struck = 0;

    NEED_VRAM();
    for (size_t i = 0; i < COUNT_OF(errors); i++) {
        for (uint64_t nth = 1; nth < 5; nth++) {
            CHECK_EQ(out(), PAGES);
            CHECK_EQ(pm_inject(PM_SYS_IOCTL, nth, 3, errors[i], 0), 0);
            CHECK_EQ(mem[PAGE], 2);
            struck += pm_inject_clear();
            CHECK_EQ(wrong_pages(), 0);
        }
    }
    CHECK(struck > 2 * COUNT_OF(errors));
}

/*
 * ThreadSanitizer runs handlers late and with every signal blocked, SIGBUS too; and a child can neither be a
 * raw clone's nor have threads under it.
 */
#ifndef __SANITIZE_THREAD__

/* Other signals. */

static atomic_int seen;

static void look(int sig)
{
    (void)sig;
    atomic_store(&seen, mem[5 * PAGE]);
}

static void a_signal_handler_may_touch(void)
{
    NEED_VRAM();
    signal(SIGUSR1, look);
    CHECK_EQ(out(), PAGES);
    raise(SIGUSR1);
    CHECK_EQ(atomic_load(&seen), 6);
    CHECK_EQ(at_home(), 1);
    signal(SIGUSR1, SIG_DFL);
}

static void call_write(struct call *call)
{
    int err;

    device_write(call->arg[0], mem, "written", 7, &err);
    call->ret = err;
}

/* A thread's own device write does not keep it from bringing home what is around. */
static void one_in_the_middle_of_a_device_write(void)
{
    pm_sub *sub = new_sub(mm, mem, PAGES);
    pm_table *table = new_table();
    struct call call = {.fn = call_write, .arg = {table}};
    struct pm_mm_stats stats;

    NEED_VRAM();
    signal(SIGUSR1, look);
    atomic_store(&seen, 0);
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(pm_devmem_fault_around(vram, 512 * PAGE), 0);
    mem[0] = 1;
    CHECK_EQ(mirror_pages(mm, table, sub, mem, 1, WANT_WRITE), 0);
    CHECK_EQ(pm_migrate_to_device(vram, addr_of(mem) + PAGE, addr_of(mem) + PAGES * PAGE, &(uint64_t){0}), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_start(&call);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_LOOKED_UP, 10 * SECOND), 0);
    pthread_kill(call.thread, SIGUSR1);
    while (!atomic_load(&seen))
        sched_yield();
    pm_point_release(PM_POINT_ACCESS_LOOKED_UP);
    CHECK_EQ(call_join(&call), 0);
    CHECK_EQ(atomic_load(&seen), 6);
    CHECK_EQ(pm_mm_stats(mm, &stats), 0);
    CHECK_EQ(stats.drain_timeouts, 0);
    CHECK_EQ(memcmp(mem, "written", 7), 0);
    pm_table_clear(table, 0, 0);
    pm_table_put(table);
    drop_sub(sub);
    signal(SIGUSR1, SIG_DFL);
}

static void call_write_there(struct call *call)
{
    int err;

    device_write(call->arg[0], mem + 5 * PAGE, "written", 7, &err);
    call->ret = err;
}

/* A write to device memory is over before a handler in the same thread brings that page home. */
static void write_and_look(void)
{
    pm_sub *sub = new_sub(mm, mem, PAGES);
    pm_table *table = new_table();
    struct call call = {.fn = call_write_there, .arg = {table}};
    uint64_t pfn[1] = {0};
    struct pm_walk there = {
        .start = addr_of(mem) + 5 * PAGE,
        .end = addr_of(mem) + 6 * PAGE,
        .pfns = pfn,
        .owner = 7,
        .sub = sub,
    };

    atomic_store(&seen, 0);
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(read_begin(sub, &there.seq), 0);
    CHECK_EQ(pm_walk(mm, &there), 0);
    CHECK_EQ(pm_table_map(table, sub, there.seq, there.start, 1, pfn), 0);
    CHECK_EQ(pm_point_arm(PM_POINT_ACCESS_LOOKED_UP), 0);
    call_start(&call);
    CHECK_EQ(pm_point_wait(PM_POINT_ACCESS_LOOKED_UP, 10 * SECOND), 0);
    pthread_kill(call.thread, SIGUSR1);
    pm_point_release(PM_POINT_ACCESS_LOOKED_UP);
    CHECK_EQ(call_join(&call), 0);
    CHECK_EQ(atomic_load(&seen), 'w');
    CHECK_EQ(memcmp(mem + 5 * PAGE, "written", 7), 0);
    pm_table_clear(table, 0, 0);
    pm_table_put(table);
    drop_sub(sub);
}

static void one_in_the_middle_of_a_write_to_device_memory(void)
{
    NEED_VRAM();
    signal(SIGUSR1, look);
    write_and_look();
    close_it();
    open_with(0);
    if (vram)
        write_and_look();
    signal(SIGUSR1, SIG_DFL);
}

/* Children. */

/* The kernel lets the child run before the monitor has filled it. */
static void a_raw_childs_touch_waits(void)
{
    atomic_bool *begun = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int status = -1, pid;

    NEED_VRAM();
    if (!mm_has(mm, PM_FEAT_UFFD_EVENT_FORK))
        LEAVE_OUT("needs CAP_SYS_PTRACE");
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(pm_point_arm(PM_POINT_MONITOR_AFTER_READ), 0);
    pid = (int)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (pid == 0) {
        atomic_store(begun, true);
        _exit(child_looks());
    }
    CHECK_EQ(pm_point_wait(PM_POINT_MONITOR_AFTER_READ, 10 * SECOND), 0);
    while (!atomic_load(begun))
        sched_yield();
    CHECK_EQ(waitpid(pid, &status, WNOHANG), 0);
    pm_point_release(PM_POINT_MONITOR_AFTER_READ);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK_EQ(status, 0);
    CHECK_EQ(wrong_pages(), 0);
    munmap(begun, PAGE);
}

static int child_of_its_own(void)
{
    pm_mm *of_parent = mm;
    char *parents = mem;
    int failed;

    check_failures = 0;
    set_up();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(wrong_pages(), 0);
    failed = parents[PAGE] != 2 || pm_mm_alive(of_parent) != -1;
    close_it();
    return failed + check_failures;
}

static void a_child_can_do_the_same(void)
{
    NEED_VRAM();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(in_child(child_of_its_own), 0);
    CHECK_EQ(wrong_pages(), 0);
}

#endif

static atomic_bool keep_going;

static void call_allocate(struct call *call)
{
    while (atomic_load(&keep_going)) {
        void *some = malloc(100 + call->num[0]++ % 5000);

        *(volatile char *)some = *(volatile char *)(mem + (call->num[0] % PAGES) * PAGE);
        free(some);
    }
}

static void forks_among_mallocs_and_touches(void)
{
    struct call calls[2] = {{.fn = call_allocate}, {.fn = call_allocate}};

    NEED_VRAM();
    atomic_store(&keep_going, true);
    for (size_t i = 0; i < COUNT_OF(calls); i++)
        call_start(&calls[i]);
    for (int i = 0; i < 50; i++) {
        CHECK(out() >= 0);
        CHECK_EQ(in_child(child_looks), 0);
    }
    atomic_store(&keep_going, false);
    for (size_t i = 0; i < COUNT_OF(calls); i++)
        call_join(&calls[i]);
    CHECK_EQ(wrong_pages(), 0);
}

static void two_contexts_share_the_handler(void)
{
    pm_mm *first = mm;
    pm_devmem *first_vram = vram;
    char *first_mem = mem;

    NEED_VRAM();
    CHECK_EQ(out(), PAGES);
    set_up();
    CHECK_EQ(out(), PAGES);
    CHECK_EQ(first_mem[PAGE] + mem[2 * PAGE], 5);
    close_it();
    mm = first;
    vram = first_vram;
    mem = first_mem;
    CHECK_EQ(at_home(), 1);
    CHECK_EQ(wrong_pages(), 0);
}

int main(int argc, char **argv)
{
    static const struct test fresh[] = {
        TEST(an_earlier_handler_gets_the_rest), TEST(without_one_the_process_dies),
        TEST(a_thread_that_blocks_it_dies),     TEST(a_later_handler_keeps_pages_at_home),
        TEST(nothing_leaves_without_a_handler),
    };
    static const struct test tests[] = {
        TEST(system_calls_are_refused),
        TEST(system_calls_work_by_thread),
        TEST(ours_bring_pages_home_themselves),
        TEST(an_unread_event_is_waited_for),
        TEST(a_fault_that_comes_too_late_is_none),
        TEST(a_file_may_have_grown),
        TEST(a_close_waits_for_the_handler),
        TEST(refusals_are_tried_again),
        TEST(forks_among_mallocs_and_touches),
        TEST(two_contexts_share_the_handler),
#ifndef __SANITIZE_THREAD__
        TEST(a_signal_handler_may_touch),
        TEST(one_in_the_middle_of_a_device_write),
        TEST(one_in_the_middle_of_a_write_to_device_memory),
        TEST(a_raw_childs_touch_waits),
        TEST(a_child_can_do_the_same),
#endif
    };
    int failed = run_tests(fresh, COUNT_OF(fresh), argc, argv);

    return run_tests_with(set_up, close_it, tests, COUNT_OF(tests), argc, argv) | failed;
}
