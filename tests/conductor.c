/* SPDX-License-Identifier: MIT */
/*
 * conductor.c - a thread without the GIL that waits at named points of the shim, and does something there
 * that nobody expects: a signal whose handler touches memory, to the thread under test, or a fork whose child
 * reads it.
 *
 * The thread under test may stand in a touch of memory with the GIL held, hence no Python.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MOST = 64, CHILD_S = 20 };
static const uint64_t signal_ns = 1000ULL * 1000 * 1000, fork_ns = 5ULL * 1000 * 1000;

struct snapshot {
    int point, pid, status;
    unsigned char *bytes;
    pthread_t thread;
    sem_t go;
    bool asked;
    atomic_bool done;
};

struct conductor {
    int (*wait)(int point, uint64_t timeout_ns);
    int (*release)(int point);
    int points[MOST], others[MOST], met[MOST]; /* others: not the thread under test stands there */
    int npoints, tid, sig;                     /* sig 0: forks */
    atomic_int stop;
    pthread_t thread;
    struct snapshot snapshots[MOST];
    int nsnapshots;
    unsigned char *bytes;
};

static struct {
    uint64_t pages[MOST], n;
    _Atomic uint64_t *counter; /* in memory that a device may have */
    _Atomic uint64_t ran;
} touched;

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void nap(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 20 * 1000}, NULL);
}

static void on_signal(int sig)
{
    int saved = errno;

    (void)sig;
    for (uint64_t i = 0; i < touched.n; i++)
        (void)*(volatile unsigned char *)(uintptr_t)touched.pages[i];
    if (touched.counter)
        atomic_fetch_add(touched.counter, 1);
    atomic_fetch_add(&touched.ran, 1);
    errno = saved;
}

/* What the handler touches, and the child of a fork reads: that may do without the last page. */
void touch(const uint64_t *pages, uint64_t n, uint64_t counter)
{
    memcpy(touched.pages, pages, n * sizeof(*pages));
    touched.n = n;
    touched.counter = (_Atomic uint64_t *)(uintptr_t)counter;
    atomic_store(&touched.ran, 0);
}

uint64_t touch_ran(void)
{
    return atomic_load(&touched.ran);
}

/* Without SA_RESTART; with `off` ignored from here on. */
int touch_at(int sig, int off)
{
    return sigaction(sig, &(struct sigaction){.sa_handler = off ? SIG_IGN : on_signal}, NULL);
}

/* The signal goes to one thread, every so often, wherever it is: 0, and the timer's number. */
int storm_start(int tid, int sig, uint64_t ns, int *timer)
{
    struct sigevent to = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = sig, ._sigev_un._tid = tid};
    struct timespec every = {.tv_nsec = (long)ns};

    if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &to, timer))
        return -1;
    return (int)syscall(SYS_timer_settime, *timer, 0, &(struct itimerspec){every, every}, NULL);
}

void storm_stop(int timer)
{
    syscall(SYS_timer_delete, timer);
}

static bool blocks(int tid, int sig)
{
    char name[64], text[4096], *at;
    ssize_t n;
    int fd;

    snprintf(name, sizeof(name), "/proc/self/task/%d/status", tid);
    fd = open(name, O_RDONLY | O_CLOEXEC);
    n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    at = strstr(text, "SigBlk:");
    return !at || strtoull(at + strlen("SigBlk:"), NULL, 16) >> (sig - 1) & 1;
}

/* Until the handler has run, unless the signal is blocked here. */
static void send_signal(struct conductor *conductor, bool other)
{
    uint64_t before = atomic_load(&touched.ran), until = now_ns() + signal_ns;

    syscall(SYS_tgkill, getpid(), conductor->tid, conductor->sig);
    while (!other && atomic_load(&touched.ran) == before && now_ns() < until) {
        if (blocks(conductor->tid, conductor->sig))
            return;
        nap();
    }
}

static bool read_page(unsigned char *to, uint64_t from)
{
    struct iovec local = {to, PAGE}, remote = {(void *)(uintptr_t)from, PAGE};

    return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == PAGE;
}

static void read_all(struct snapshot *into)
{
    uint64_t n = touched.n;
    unsigned char *to = into->bytes;

    sigset_t none;

    sigemptyset(&none);
    signal(SIGALRM, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    alarm(CHILD_S);
    for (uint64_t i = 0; i + 1 < n; i++, to += PAGE)
        memcpy(to, (const void *)(uintptr_t)touched.pages[i], PAGE);
    _exit(read_page(to, touched.pages[n - 1]) ? 0 : 1);
}

static void *fork_and_read(void *arg)
{
    struct snapshot *snapshot = arg;

    sem_wait(&snapshot->go);
    if (!snapshot->asked)
        return NULL;
    snapshot->pid = fork();
    if (snapshot->pid == 0)
        read_all(snapshot);
    if (snapshot->pid > 0)
        waitpid(snapshot->pid, &snapshot->status, 0);
    atomic_store(&snapshot->done, true);
    return NULL;
}

/*
 * It goes on once that has ended, or waits for what stands here, most likely. The threads are there already:
 * to make one takes malloc's locks, which a fork holds that waits for the monitor, which may stand at a
 * point.
 */
static void begin_fork(struct conductor *conductor, int point)
{
    struct snapshot *snapshot = &conductor->snapshots[conductor->nsnapshots];
    uint64_t until = now_ns() + fork_ns;

    snapshot->point = point;
    snapshot->bytes = conductor->bytes + (uint64_t)conductor->nsnapshots++ * touched.n * PAGE;
    snapshot->asked = true;
    sem_post(&snapshot->go);
    while (!atomic_load(&snapshot->done) && now_ns() < until)
        nap();
}

static void look_at(struct conductor *conductor, int i)
{
    int point = conductor->points[i];

    if (conductor->met[i] || conductor->wait(point, 0))
        return;
    conductor->met[i] = 1;
    if (conductor->sig)
        send_signal(conductor, conductor->others[i]);
    else
        begin_fork(conductor, point);
    conductor->release(point);
}

static void *conduct(void *arg)
{
    struct conductor *conductor = arg;

    while (!atomic_load(&conductor->stop)) {
        for (int i = 0; i < conductor->npoints; i++)
            look_at(conductor, i);
        nap();
    }
    return NULL;
}

static void start(pthread_t *thread, void *(*work)(void *), void *arg)
{
    if (pthread_create(thread, NULL, work, arg))
        abort();
}

/* `bytes`: room for the pages of as many forks as there are points. */
struct conductor *conductor_start(void *wait, void *release, const int *points, const int *others, int n,
                                  int tid, int sig, unsigned char *bytes)
{
    struct conductor *conductor = calloc(1, sizeof(*conductor));
    sigset_t all, before;

    memcpy(&conductor->wait, &wait, sizeof(wait));
    memcpy(&conductor->release, &release, sizeof(release));
    memcpy(conductor->points, points, (size_t)n * sizeof(*points));
    memcpy(conductor->others, others, (size_t)n * sizeof(*others));
    conductor->npoints = n;
    conductor->tid = tid;
    conductor->sig = sig;
    conductor->bytes = bytes;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 0; i < n && !sig; i++) {
        sem_init(&conductor->snapshots[i].go, 0, 0);
        start(&conductor->snapshots[i].thread, fork_and_read, &conductor->snapshots[i]);
    }
    start(&conductor->thread, conduct, conductor);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return conductor;
}

/* Points that nobody came to stop nobody any more. */
void conductor_stop(struct conductor *conductor)
{
    atomic_store(&conductor->stop, 1);
    pthread_join(conductor->thread, NULL);
    for (int i = 0; i < conductor->npoints; i++)
        conductor->release(conductor->points[i]);
    for (int i = 0; i < conductor->npoints && !conductor->sig; i++) {
        sem_post(&conductor->snapshots[i].go);
        pthread_join(conductor->snapshots[i].thread, NULL);
    }
}

int conductor_met(const struct conductor *conductor, int i)
{
    return conductor->met[i];
}

/* The i-th fork: where, and the wait status of its child; -1: there was none. */
int conductor_fork(const struct conductor *conductor, int i, int *status)
{
    if (i >= conductor->nsnapshots)
        return -1;
    *status = conductor->snapshots[i].pid > 0 ? conductor->snapshots[i].status : -1;
    return conductor->snapshots[i].point;
}

void conductor_free(struct conductor *conductor)
{
    free(conductor);
}
