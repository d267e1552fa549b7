/* SPDX-License-Identifier: MIT */
/*
 * sys.c - every system call of the shim, as functions that return a negative errno. It counts them, and it is
 * where tests inject errors. What a call means, and whether it is tried again, is the caller's business.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum { MAPPED_ALONE = 32 << 20 }; /* bytes: the largest threshold that malloc gives itself */

/* Without a lock, so that it works between a fork and an exec and under any lock. */
static struct {
    atomic_int armed;         /* released last, so that who sees it sees the rest */
    atomic_int sys, err, tid; /* a thread may still look at the last one */
    atomic_uint_least64_t nth, times;
    atomic_uint_least64_t seen, struck;
} injection;

static atomic_uint_least64_t calls[PM_SYS_COUNT];

int pm_inject(int sys, uint64_t nth, uint64_t times, int err, int tid)
{
    if (sys < 0 || sys >= PM_SYS_COUNT || nth == 0 || err <= 0 || tid < 0)
        return -EINVAL;
    pm_inject_clear();
    injection.sys = sys;
    injection.nth = nth;
    injection.times = times;
    injection.err = err;
    injection.tid = tid;
    atomic_store(&injection.seen, 0);
    atomic_store(&injection.struck, 0);
    atomic_store_explicit(&injection.armed, 1, memory_order_release);
    return 0;
}

uint64_t pm_inject_clear(void)
{
    atomic_store(&injection.armed, 0);
    return atomic_exchange(&injection.struck, 0);
}

uint64_t pm_inject_struck(void)
{
    return atomic_load(&injection.struck);
}

uint64_t pm_sys_calls(int sys)
{
    uint64_t total = 0;

    if (sys < 0 || sys >= PM_SYS_COUNT)
        return 0;
    if (sys != PM_SYS_ANY)
        return atomic_load(&calls[sys]);
    for (int i = 0; i < PM_SYS_COUNT; i++)
        total += atomic_load(&calls[i]);
    return total;
}

static int injected(int sys)
{
    uint64_t n;

    if (injection.sys != PM_SYS_ANY && injection.sys != sys)
        return 0;
    if (injection.tid != 0 && injection.tid != pm_gettid())
        return 0;
    n = atomic_fetch_add(&injection.seen, 1) + 1;
    if (n < injection.nth || n - injection.nth >= injection.times)
        return 0;
    atomic_fetch_add(&injection.struck, 1);
    return -injection.err;
}

/* Count the call; the error to give instead of making it, or 0. */
static inline int enter(int sys)
{
    atomic_fetch_add_explicit(&calls[sys], 1, memory_order_relaxed);
    if (atomic_load_explicit(&injection.armed, memory_order_acquire) == 0)
        return 0;
    return injected(sys);
}

static inline long result(long ret)
{
    return ret < 0 ? -errno : ret;
}

static struct timespec timespec_of(uint64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
}

int pm_sys_open(const char *path, int flags)
{
    int err = enter(PM_SYS_OPEN);

    return err ? err : (int)result(open(path, flags | O_CLOEXEC));
}

/* Linux frees the descriptor whatever close(2) returns, so an injected error comes after the call. */
int pm_sys_close(int fd)
{
    int err = enter(PM_SYS_CLOSE);
    int ret = (int)result(close(fd));

    return err ? err : ret;
}

ssize_t pm_sys_read(int fd, void *buf, size_t len)
{
    int err = enter(PM_SYS_READ);

    return err ? err : result(read(fd, buf, len));
}

ssize_t pm_sys_write(int fd, const void *buf, size_t len)
{
    int err = enter(PM_SYS_WRITE);

    return err ? err : result(write(fd, buf, len));
}

ssize_t pm_sys_pread(int fd, void *buf, size_t len, uint64_t offset)
{
    int err = enter(PM_SYS_PREAD);

    return err ? err : result(pread(fd, buf, len, (off_t)offset));
}

ssize_t pm_sys_pwrite(int fd, const void *buf, size_t len, uint64_t offset)
{
    int err = enter(PM_SYS_PWRITE);

    return err ? err : result(pwrite(fd, buf, len, (off_t)offset));
}

int pm_sys_nofile(const struct rlimit *set, struct rlimit *old)
{
    int err = enter(PM_SYS_OPEN);

    return err ? err : (int)result(prlimit(0, RLIMIT_NOFILE, set, old));
}

int pm_sys_ioctl(int fd, unsigned long request, void *arg)
{
    int err = enter(PM_SYS_IOCTL);

    return err ? err : (int)result(ioctl(fd, request, arg));
}

int pm_sys_poll(struct pollfd *fds, nfds_t n, uint64_t timeout_ns)
{
    struct timespec timeout = timespec_of(timeout_ns);
    int err = enter(PM_SYS_POLL);

    if (err)
        return err;
    return (int)result(timeout_ns == UINT64_MAX ? poll(fds, n, -1) : ppoll(fds, n, &timeout, NULL));
}

int pm_sys_mmap(uint64_t addr, uint64_t len, int prot, int flags, int fd, uint64_t offset, uint64_t *ret)
{
    int err = enter(PM_SYS_MMAP);
    void *map;

    if (err)
        return err;
    map = mmap((void *)(uintptr_t)addr, len, prot, flags, fd, (off_t)offset);
    if (map == MAP_FAILED)
        return -errno;
    *ret = (uintptr_t)map;
    return 0;
}

int pm_sys_munmap(uint64_t addr, uint64_t len)
{
    int err = enter(PM_SYS_MUNMAP);

    return err ? err : (int)result(munmap((void *)(uintptr_t)addr, len));
}

int pm_sys_mprotect(uint64_t addr, uint64_t len, int prot)
{
    int err = enter(PM_SYS_MPROTECT);

    return err ? err : (int)result(mprotect((void *)(uintptr_t)addr, len, prot));
}

int pm_sys_madvise(uint64_t addr, uint64_t len, int advice)
{
    int err = enter(PM_SYS_MADVISE);

    return err ? err : (int)result(madvise((void *)(uintptr_t)addr, len, advice));
}

int pm_sys_mlock(uint64_t addr, uint64_t len)
{
    int err = enter(PM_SYS_MLOCK);

    return err ? err : (int)result(mlock2((void *)(uintptr_t)addr, len, MLOCK_ONFAULT));
}

int pm_sys_munlock(uint64_t addr, uint64_t len)
{
    int err = enter(PM_SYS_MUNLOCK);

    return err ? err : (int)result(munlock((void *)(uintptr_t)addr, len));
}

int pm_sys_mremap(uint64_t addr, uint64_t old_len, uint64_t new_len, int flags, uint64_t new_addr,
                  uint64_t *ret)
{
    int err = enter(PM_SYS_MREMAP);
    void *map;

    if (err)
        return err;
    map = mremap((void *)(uintptr_t)addr, old_len, new_len, flags, (void *)(uintptr_t)new_addr);
    if (map == MAP_FAILED)
        return -errno;
    *ret = (uintptr_t)map;
    return 0;
}

int pm_sys_mincore(uint64_t addr, uint64_t len, unsigned char *vec)
{
    int err = enter(PM_SYS_MINCORE);

    return err ? err : (int)result(mincore((void *)(uintptr_t)addr, len, vec));
}

int pm_sys_userfaultfd(int flags)
{
    int err = enter(PM_SYS_USERFAULTFD);

    return err ? err : (int)result(syscall(SYS_userfaultfd, flags | O_CLOEXEC));
}

int pm_sys_timerfd(void)
{
    int err = enter(PM_SYS_TIMERFD);

    return err ? err : (int)result(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
}

int pm_sys_timerfd_set(int fd, uint64_t first_ns, uint64_t every_ns)
{
    struct itimerspec times = {.it_value = timespec_of(first_ns), .it_interval = timespec_of(every_ns)};
    int err = enter(PM_SYS_TIMERFD);

    return err ? err : (int)result(timerfd_settime(fd, 0, &times, NULL));
}

int pm_sys_memfd(const char *name)
{
    int err = enter(PM_SYS_MEMFD);
    int fd;

    if (err)
        return err;
    fd = (int)result(memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (fd >= 0)
        /* The kernel gives it mode 0777, which would count for whoever reaches it in /proc. */
        fchmod(fd, S_IRUSR | S_IWUSR);
    return fd;
}

int pm_sys_seal(int fd, int seals)
{
    int err = enter(PM_SYS_MEMFD);

    return err ? err : (int)result(fcntl(fd, F_ADD_SEALS, seals | F_SEAL_SEAL));
}

int pm_sys_ftruncate(int fd, uint64_t len)
{
    int err = enter(PM_SYS_FTRUNCATE);

    return err ? err : (int)result(ftruncate(fd, (off_t)len));
}

/* Not libc's wrapper: ThreadSanitizer would take the device's copy of what the CPU writes for a race of the
 * shim. */
static ssize_t vm_writev(const struct iovec *local, const struct iovec *remote)
{
    return result(syscall(SYS_process_vm_writev, getpid(), local, 1, remote, 1, 0));
}

/*
 * Process_vm_writev turned round: what is read is the local side, touched by ordinary read faults, and the
 * buffer is the remote one. process_vm_readv would pin the pages that it reads, and a pin gives a page that
 * is shared with a forked child a copy of its own (FAULT_FLAG_UNSHARE, Linux 5.17): a read would change the
 * page table.
 */
ssize_t pm_sys_vm_readv(void *buf, uint64_t addr, size_t len)
{
    struct iovec local = {(void *)(uintptr_t)addr, len}, remote = {buf, len};
    int err = enter(PM_SYS_VM_READV);

    return err ? err : vm_writev(&local, &remote);
}

ssize_t pm_sys_vm_writev(const void *buf, uint64_t addr, size_t len)
{
    struct iovec local = {(void *)(uintptr_t)buf, len}, remote = {(void *)(uintptr_t)addr, len};
    int err = enter(PM_SYS_VM_WRITEV);

    return err ? err : vm_writev(&local, &remote);
}

int pm_sys_thread(pthread_t *thread, void *(*fn)(void *), void *arg)
{
    int err = enter(PM_SYS_THREAD);
    sigset_t all, old;

    if (err)
        return err;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = pthread_create(thread, NULL, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -err;
}

int pm_sys_sigaction(int sig, const struct sigaction *act, struct sigaction *old)
{
    int err = enter(PM_SYS_SIGACTION);

    return err ? err : (int)result(sigaction(sig, act, old));
}

int pm_sys_io_uring_setup(unsigned entries, void *params)
{
    int err = enter(PM_SYS_URING_SETUP);

    return err ? err : (int)result(syscall(SYS_io_uring_setup, entries, params));
}

int pm_sys_io_uring_register(int fd, unsigned opcode, void *arg, unsigned count)
{
    int err = enter(PM_SYS_URING_REGISTER);

    return err ? err : (int)result(syscall(SYS_io_uring_register, fd, opcode, arg, count));
}

int pm_sys_io_uring_enter(int fd, unsigned submit, unsigned wait, unsigned flags, void *arg, size_t len)
{
    int err = enter(PM_SYS_URING_ENTER);

    return err ? err : (int)result(syscall(SYS_io_uring_enter, fd, submit, wait, flags, arg, len));
}

/*
 * A page of malloc's that nobody has touched is a hole, and holes fault from when memory in the same 2 MiB
 * went to a device. Then who touches it under the device lock waits for who needs the lock to serve that
 * fault. So there are no such pages; what is larger malloc maps by itself.
 */
static void *touched(void *mem, size_t len)
{
    volatile char *at = mem;

    if (!mem || !len || len >= MAPPED_ALONE)
        return mem;
    for (size_t i = 0; i < len; i += PM_PAGE_SIZE)
        at[i] = 0;
    at[len - 1] = 0;
    return mem;
}

void *pm_sys_calloc(size_t n, size_t size)
{
    return enter(PM_SYS_MALLOC) ? NULL : touched(calloc(n, size), n * size);
}

void *pm_sys_malloc(size_t size)
{
    return enter(PM_SYS_MALLOC) ? NULL : touched(malloc(size), size);
}

void pm_sys_name_thread(const char *name)
{
    prctl(PR_SET_NAME, name);
}

/* Kept with the process that it is of: after a fork it would name the parent's thread. */
int pm_gettid(void)
{
    static _Thread_local struct {
        uint64_t process;
        int tid;
    } kept __attribute__((tls_model("initial-exec")));
    uint64_t process = pm_process();

    if (!process)
        return (int)syscall(SYS_gettid);
    if (kept.process != process) {
        kept.tid = (int)syscall(SYS_gettid);
        kept.process = process;
    }
    return kept.tid;
}

uint64_t pm_now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
