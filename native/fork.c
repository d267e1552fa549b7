/* SPDX-License-Identifier: MIT */
/*
 * fork.c - what libc's fork means for the contexts of this process.
 *
 * A fork write-protects the parent's private pages: an invalidation of the whole mm but the shared mappings
 * that are watched (a device maps no other), in one piece between each two of them, begun before it and ended
 * after it. The device lock is not held in between, since fork() waits for the monitor, which needs it. The
 * child has none of the threads: it closes the descriptors, which would keep the parent's registrations
 * and pins alive, and its contexts are dead.
 */
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "alone.h"
#include "devmem.h"

static const uint64_t drain_limit_ns = 1000ULL * 1000 * 1000;
static const uint64_t copy_limit_ns = 30000ULL * 1000 * 1000;

/*
 * Pages in device memory are copied into the child by the monitor, while fork() goes on. What the child does
 * to its memory in the meantime, an mremap for one, would race with that: so it waits. A page shared with
 * the child, 0 without device pages; parent_pid is the parent's.
 */
static uint64_t copied_page;
static pid_t parent_pid;

static atomic_uint *copied(void)
{
    return (atomic_uint *)(uintptr_t)copied_page;
}

static void open_piece(struct pm_mm *mm, enum pm_event_type type, uint64_t start, uint64_t end)
{
    struct pm_inv *inv = &mm->fork_inv[mm->fork_pieces];
    struct pm_event event = {.start = start, .end = end, .type = type, .guarantee = PM_BEFORE};

    if (start == end && start)
        return;
    mm->fork_pieces++;
    memset(inv, 0, sizeof(*inv));
    event.seq = pm_inv_open(mm, inv, start, pm_last(end), (int)type, PM_BEFORE);
    event.when_ns = inv->since_ns;
    pm_queue_push(mm, &event);
    pm_status_update(mm);
}

/* Its drivers know of no other reason why pages come home. */
static void tell_of_leaving(struct pm_mm *mm)
{
    pm_lock(mm);
    open_piece(mm, PM_MIGRATE, 0, 0);
    mm->stats.events[PM_MIGRATE]++;
    pm_unlock(mm);
}

/* Without the kernel's message nobody could copy: all comes home. */
static void leave_devices(struct pm_mm *mm)
{
    uint64_t moved = 0;

    tell_of_leaving(mm);
    pm_home_all(mm, 0, PM_USER_END, NULL, &moved);
}

/* Nor can the pages of the child be filled where guards are. */
static void leave_guarded(struct pm_mm *mm)
{
    uint64_t moved = 0, addr = 0, end;

    if (!pm_guard_next(mm, &addr, &end))
        return;
    tell_of_leaving(mm);
    for (; pm_guard_next(mm, &addr, &end); addr = end)
        pm_home_all(mm, addr, end, NULL, &moved);
}

/* The monitor copies what is in device memory proper. */
static void leave_some(struct pm_mm *mm)
{
    uint64_t moved = 0;

    if (mm->devices->exclusive)
        pm_home_all(mm, 0, PM_USER_END, mm->devices->exclusive, &moved);
    leave_guarded(mm);
}

/* Nothing leaves any more: fork_tid is set. */
static void prepare_devices(struct pm_mm *mm)
{
    const int flags = MAP_SHARED | MAP_ANONYMOUS;
    bool any;

    if (!mm->devices)
        return;
    pm_lock(mm);
    while (mm->lift.len) {
        pm_unlock(mm);
        pm_doze();
        pm_lock(mm);
    }
    any = mm->devices->stats.resident != 0;
    pm_unlock(mm);
    if (!any)
        return;
    if (!copied_page && pm_have(mm, PM_FEAT_UFFD_EVENT_FORK))
        pm_sys_mmap(0, PM_PAGE_SIZE, PROT_READ | PROT_WRITE, flags, -1, 0, &copied_page);
    if (!copied_page || !pm_have(mm, PM_FEAT_UFFD_EVENT_FORK))
        leave_devices(mm);
    else
        leave_some(mm);
    pm_lock(mm);
    pm_resident_protect(mm, 0, PM_USER_END);
    pm_unlock(mm);
}

static void prepare_mm(struct pm_mm *mm)
{
    /* One piece more than these, and one for what leaves devices. */
    struct pm_watch_range shared[PM_FORK_PIECES - 2];
    uint32_t n;

    /* Until the fork is over, so that a close waits for it. */
    if (pm_mm_enter(mm))
        return;
    n = pm_watch_shared(mm, shared, PM_FORK_PIECES - 2);
    pm_lock(mm);
    mm->fork_tid = pm_gettid();
    mm->fork_pieces = 0;
    for (uint32_t i = 0; i <= n; i++)
        open_piece(mm, PM_PROTECTION_PAGE, i ? shared[i - 1].end : 0, i < n ? shared[i].start : 0);
    mm->stats.events[PM_PROTECTION_PAGE]++;
    pm_drain_writes(mm, 0, UINT64_MAX, pm_now_ns() + drain_limit_ns);
    pm_unlock(mm);
    prepare_devices(mm);
}

static void parent_mm(struct pm_mm *mm)
{
    if (mm->fork_tid != pm_gettid())
        return;
    pm_watch_after_fork(mm);
    pm_lock(mm);
    while (mm->fork_pieces)
        pm_inv_close(mm, &mm->fork_inv[--mm->fork_pieces]);
    mm->fork_tid = 0;
    pm_status_update(mm);
    pm_unlock(mm);
    pm_mm_exit(mm);
}

static void child_close(int fd)
{
    if (fd >= 0)
        pm_sys_close(fd);
}

static void child_mm(struct pm_mm *mm)
{
    child_close(mm->uffd);
    child_close(mm->tick_fd);
    child_close(mm->spare_fd);
    child_close(mm->maps_fd);
    child_close(mm->pagemap_fd);
    child_close(mm->ksm_fd);
    mm->canary_locked = false;
    child_close(mm->status_fd);
    child_close(mm->ring_fd);
    child_close(mm->stage_fd);
    child_close(mm->arena_fd);
    child_close(mm->mem_fd);
}

static void prepare(void)
{
    pm_registry_lock();
    parent_pid = getpid();
    for (struct pm_mm *mm = pm_registry_list(); mm; mm = mm->next)
        prepare_mm(mm);
    pm_point(PM_POINT_FORK_PREPARE);
}

static void forget_copied(void)
{
    if (copied_page)
        pm_sys_munmap(copied_page, PM_PAGE_SIZE);
    copied_page = 0;
}

static void parent(void)
{
    pm_point(PM_POINT_FORK_PARENT);
    for (struct pm_mm *mm = pm_registry_list(); mm; mm = mm->next)
        parent_mm(mm);
    /* The monitor copies under the device lock, and each of these has been taken since. */
    if (copied_page)
        atomic_store(copied(), 1);
    forget_copied();
    pm_registry_unlock();
}

/* A parent outside of the child's PID namespace is 0 to it, alive or dead: it has its time. */
static bool parent_gone(uint64_t until)
{
    pid_t now = getppid();

    return now ? now != parent_pid : pm_now_ns() > until;
}

static void wait_until_copied(void)
{
    static const char lost[] = "pymirror: the parent died in fork(), and memory of this child with it\n";
    uint64_t until = pm_now_ns() + copy_limit_ns;

    while (copied_page && !atomic_load(copied())) {
        if (parent_gone(until)) {
            pm_sys_write(STDERR_FILENO, lost, sizeof(lost) - 1);
            _exit(127);
        }
        nanosleep(&(struct timespec){.tv_nsec = 50 * 1000}, NULL);
    }
    forget_copied();
}

static void child(void)
{
    wait_until_copied();
    for (struct pm_mm *mm = pm_registry_list(); mm; mm = mm->next)
        child_mm(mm);
    pm_alone_child();
    pm_registry_reset();
    pm_registry_unlock();
}

int pm_fork_install(void)
{
    return -pthread_atfork(prepare, parent, child);
}
