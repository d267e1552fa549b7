/* SPDX-License-Identifier: MIT */
/*
 * driver.c - a small coverage-guided fuzzer: fuzz SECONDS CORPUS [NEW [SEED]]
 *
 * The library is compiled with -fsanitize-coverage=trace-pc, which calls back at each block of code. An input
 * that reaches a block for the first time is kept, in the folder NEW too, and others are made from it. First
 * come the files of CORPUS, which with 0 seconds is all: a regression test. An input that fails is left in
 * the file fuzz-failed.
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

enum { MOST = 512, CORPUS_MAX = 8192, BLOCKS = 1 << 16, HANG_SECONDS = 20 };

#define FAILED "fuzz-failed"

struct input {
    size_t len;
    uint8_t data[MOST];
};

void __sanitizer_cov_trace_pc(void);

static uint8_t seen[BLOCKS];
static unsigned long blocks;
static struct input corpus[CORPUS_MAX];
static uint8_t *current;
static size_t ncorpus;
static uint64_t state = 1;

void __sanitizer_cov_trace_pc(void)
{
    uintptr_t pc = (uintptr_t)__builtin_return_address(0);
    uint8_t *block = &seen[(pc ^ pc >> 16) % BLOCKS];

    if (!*block) {
        *block = 1;
        blocks++;
    }
}

/* The input is in a file that outlives any death. */
static void open_current(void)
{
    int fd = open(FAILED, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

    if (fd >= 0 && ftruncate(fd, MOST) == 0)
        current = mmap(NULL, MOST, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (!current || current == MAP_FAILED) {
        perror(FAILED);
        exit(1);
    }
    close(fd);
}

_Noreturn void fuzz_fail(const char *what)
{
    fprintf(stderr, "fuzz: %s; the input is in " FAILED "\n", what);
    _exit(1);
}

static uint64_t pick(uint64_t n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return n ? state % n : 0;
}

static bool run(const struct input *input)
{
    unsigned long before = blocks;

    memset(current, 0, MOST); /* what is not there reads as 0 */
    memcpy(current, input->data, input->len);
    alarm(HANG_SECONDS); /* the default action ends a call that hangs */
    fuzz_one(current, input->len);
    alarm(0);
    return blocks > before;
}

static void keep(const struct input *input, const char *folder)
{
    char path[4096];
    FILE *file;

    if (ncorpus == CORPUS_MAX)
        return;
    corpus[ncorpus++] = *input;
    if (!folder)
        return;
    snprintf(path, sizeof(path), "%s/%04zu", folder, ncorpus);
    file = fopen(path, "wb");
    if (!file || fwrite(input->data, 1, input->len, file) != input->len || fclose(file)) {
        perror(path);
        exit(1);
    }
}

static bool load(const char *folder, const char *name, struct input *input)
{
    char path[4096];
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    file = name[0] == '.' ? NULL : fopen(path, "rb");
    if (!file)
        return false;
    input->len = fread(input->data, 1, MOST, file);
    fclose(file);
    return true;
}

static size_t run_corpus(const char *folder)
{
    struct dirent **names;
    int n = scandir(folder, &names, NULL, alphasort);
    struct input input;
    size_t ran = 0;

    for (int i = 0; i < n; i++) {
        if (load(folder, names[i]->d_name, &input)) {
            run(&input);
            keep(&input, NULL);
            ran++;
        }
        free(names[i]);
    }
    if (n >= 0)
        free(names);
    return ran;
}

static void change_once(struct input *input)
{
    size_t at = pick(input->len + 1), n = pick(16) + 1;
    const struct input *other;

    switch (pick(6)) {
    case 0:
        if (at < input->len)
            input->data[at] ^= (uint8_t)(1U << pick(8));
        break;
    case 1:
        if (at < input->len)
            input->data[at] = (uint8_t)pick(256);
        break;
    case 2: /* more */
        n = n < MOST - input->len ? n : MOST - input->len;
        memmove(input->data + at + n, input->data + at, input->len - at);
        for (size_t i = 0; i < n; i++)
            input->data[at + i] = (uint8_t)pick(256);
        input->len += n;
        break;
    case 3: /* less */
        n = n < input->len - at ? n : input->len - at;
        memmove(input->data + at, input->data + at + n, input->len - at - n);
        input->len -= n;
        break;
    default: /* the end of another */
        other = &corpus[pick(ncorpus)];
        n = pick(other->len + 1);
        input->len = at;
        for (; n < other->len && input->len < MOST; n++)
            input->data[input->len++] = other->data[n];
    }
}

static struct input made(void)
{
    struct input input = {0};

    if (ncorpus)
        input = corpus[pick(ncorpus)];
    for (uint64_t n = 1 + pick(6); n; n--)
        change_once(&input);
    return input;
}

int main(int argc, char **argv)
{
    time_t until = time(NULL) + (argc > 1 ? atol(argv[1]) : 0);
    const char *folder = argc > 3 && argv[3][0] ? argv[3] : NULL;
    time_t began = time(NULL);
    size_t seeds, tried = 0;

    if (argc < 3) {
        fprintf(stderr, "fuzz SECONDS CORPUS [NEW [SEED]]\n");
        return 2;
    }
    state = argc > 4 ? strtoull(argv[4], NULL, 0) | 1 : (uint64_t)time(NULL) * 2 + 1;
    open_current();
    seeds = run_corpus(argv[2]);
    while (time(NULL) < until) {
        struct input input = made();

        if (run(&input))
            keep(&input, folder);
        tried++;
    }
    unlink(FAILED);
    printf("fuzz: %zu seeds, %zu inputs tried, %llu calls, %lu blocks of code, %zu inputs kept, %ld s, no "
           "failure\n",
           seeds, tried, (unsigned long long)fuzz_calls(), blocks, ncorpus, (long)(time(NULL) - began));
    return 0;
}
