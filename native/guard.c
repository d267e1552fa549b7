/* SPDX-License-Identifier: MIT */
/*
 * guard.c - to device memory, and home, from private mappings of files: of their pages, the copies that this
 * process has made.
 *
 * Where such a copy was, the next touch would find the file's page, and userfaultfd tells of no hole in a
 * file on disk. So a guard stands there (MADV_GUARD_INSTALL, of files since Linux 6.15): a touch is SIGSEGV,
 * served in the thread that touches (inline.c), and a system call on it gets EFAULT. A guard splits no vma
 * and stays through mprotect() and mremap(), but also through MADV_DONTNEED: then it is taken away here.
 *
 * While contents are on their way their addresses are PROT_NONE, which /proc/self/mem reads and writes all
 * the same, so that no thread meets the file's page meanwhile: what touches waits for the device lock.
 */
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <string.h>
#include <sys/mman.h>

#include "devmem.h"
#include "inline.h"
#include "pagemap.h"

enum { AGAIN_LIMIT = 64 };

static void *at(uint64_t addr)
{
    return (void *)(uintptr_t)addr;
}

static uint64_t bytes(uint64_t pages)
{
    return pages << PM_PAGE_SHIFT;
}

static bool is_private_file(const struct pm_vma *vma)
{
    const uint64_t others = PM_VMA_SHARED | PM_VMA_HUGETLB | PM_VMA_SPECIAL;

    return (vma->flags & (PM_VMA_FILE | others)) == PM_VMA_FILE;
}

static int is_in_object(struct dl_phdr_info *object, size_t size, void *arg)
{
    const struct pm_vma *vma = arg;

    (void)size;
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &object->dlpi_phdr[i];
        uint64_t start = object->dlpi_addr + part->p_vaddr;

        if (part->p_type == PT_LOAD && part->p_memsz &&
            pm_overlap(vma->start, vma->end - 1, start, start + part->p_memsz - 1))
            return 1;
    }
    return 0;
}

/*
 * Not the data of programs and libraries, which the handler itself may touch; nor code: what has been
 * PROT_NONE may not become executable where that is denied (PR_SET_MDWE, SELinux).
 */
bool pm_can_guard(const struct pm_mm *mm, const struct pm_vma *vma)
{
    return pm_have(mm, PM_FEAT_GUARD) && is_private_file(vma) && !(vma->flags & PM_VMA_EXEC) &&
           !dl_iterate_phdr(is_in_object, (struct pm_vma *)(uintptr_t)vma);
}

bool pm_guarded(struct pm_devices *devices, uint64_t addr)
{
    return pm_resident_word(devices, addr) & PM_RESIDENT_GUARD;
}

/* What has begun must end: a call that was refused for a passing reason is made again. */
static int protect(uint64_t addr, uint64_t len, int prot)
{
    int err = pm_sys_mprotect(addr, len, prot);

    for (int i = 0; err && i < AGAIN_LIMIT; i++) {
        pm_doze();
        err = pm_sys_mprotect(addr, len, prot);
    }
    return err;
}

/* Nobody touches these pages until they are protect()ed: 0; or an errno, and nothing has changed. */
static int shut(const struct pm_vma *vma, uint64_t addr, uint64_t len)
{
    int err = pm_sys_mprotect(addr, len, PROT_NONE);

    /* Of a vma that has been unmapped in part meanwhile, what comes before the hole has changed. */
    if (err)
        pm_sys_mprotect(addr, len, pm_vma_prot(vma));
    return err;
}

/* The same for what must come home: where the process has all the vmas that it may have, all of the vma is
 * shut, which splits none. */
static int shut_home(struct pm_mm *mm, const struct pm_vma *vma, uint64_t *addr, uint64_t *len)
{
    int err = shut(vma, *addr, *len);

    if (err != -ENOMEM || !pm_watch_covers(mm, vma->start, vma->end))
        return err;
    *addr = vma->start;
    *len = vma->end - vma->start;
    return shut(vma, *addr, *len);
}

static int advise(uint64_t addr, uint64_t len, int advice)
{
    int err = pm_sys_madvise(addr, len, advice);

    for (int i = 0; err && err != -EINVAL && i < AGAIN_LIMIT; i++) {
        pm_doze();
        err = pm_sys_madvise(addr, len, advice);
    }
    return err;
}

/* No page of a file is beyond its end, nor a copy of one any more. */
static bool is_beyond_end(struct pm_mm *mm, uint64_t addr)
{
    char byte;

    return pm_sys_pread(mm->mem_fd, &byte, 1, addr) == -EIO;
}

/* Contents of slots to where guards are, which is PROT_NONE: bytes, from the first page on. */
static int64_t put(struct pm_mm *mm, uint64_t addr, uint64_t slot, uint64_t len)
{
    int64_t got = advise(addr, len, PM_ABI_MADV_GUARD_REMOVE);

    if (got)
        return got;
    got = pm_sys_pwrite(mm->mem_fd, at(slot), len, addr);
    if (got >= PM_PAGE_SIZE)
        return (int64_t)pm_page_down((uint64_t)got);
    if (is_beyond_end(mm, addr)) {
        mm->devices->stats.dropped++;
        return PM_PAGE_SIZE;
    }
    return got < 0 && got != -EIO ? got : -ENOMEM;
}

int64_t pm_guard_home(struct pm_mm *mm, uint64_t addr, uint64_t slot, uint64_t len)
{
    bool writable = pm_resident_word(mm->devices, addr) & PM_RESIDENT_WRITE;
    uint64_t done, first = addr, all;
    struct pm_vma vma;
    int64_t got;

    if (pm_events_unread(mm) || pm_vma_query(mm, addr, &vma) || vma.start > addr || !is_private_file(&vma))
        return -EAGAIN;
    all = len = pm_min(len, vma.end - addr);
    got = shut_home(mm, &vma, &first, &all);
    if (got)
        return got;
    got = put(mm, addr, slot, len);
    done = got > 0 ? (uint64_t)got : 0;
    if (done < len)
        advise(addr + done, len - done, PM_ABI_MADV_GUARD_INSTALL);
    if (done && !writable && (vma.flags & PM_VMA_WRITE))
        pm_watch_protect(mm, addr, addr + done);
    protect(first, all, pm_vma_prot(&vma));
    if (done) {
        pm_slots_empty(mm, slot, done);
        mm->devices->stats.copied += done >> PM_PAGE_SHIFT;
    }
    return got;
}

/* Is each page a copy of this process's own? *wp: one is write-protected. */
static int look(struct pm_mm *mm, const struct pm_lift *lift, bool *wp)
{
    uint64_t seen[PM_HUGE_PAGES];
    int err = pm_pagemap_read(mm, lift->addr, lift->n, seen);

    *wp = false;
    for (uint64_t i = 0; !err && i < lift->n; i++) {
        *wp |= (seen[i] & PM_ABI_PAGEMAP_UFFD_WP) != 0;
        if (!(seen[i] & PM_ABI_PAGEMAP_PRESENT) || (seen[i] & PM_ABI_PAGEMAP_FILE))
            err = -EAGAIN;
    }
    return !err && pm_events_unread(mm) ? -EAGAIN : err;
}

/*
 * Linux 6.18 installs no guard where a page of a file was write-protected: its removal leaves a marker, which
 * is in the way, and madvise() never returns.
 */
static int install(struct pm_mm *mm, const struct pm_lift *lift, bool wp)
{
    struct uffdio_writeprotect none = {.range = {lift->addr, bytes(lift->n)}};
    int err = atomic_load(&mm->protecting) ? -EAGAIN : 0;

    if (!err && wp)
        err = pm_sys_ioctl(mm->uffd, UFFDIO_WRITEPROTECT, &none);
    return err ? err : advise(lift->addr, bytes(lift->n), PM_ABI_MADV_GUARD_INSTALL);
}

/* The contents to their slots, by way of `room`: the slots are holes, which no system call fills. */
static int fill_slots(struct pm_mm *mm, const struct pm_lift *lift, uint64_t slot, uint64_t room)
{
    struct uffdio_copy copy = {.dst = slot, .src = room, .len = bytes(lift->n)};
    ssize_t got = pm_sys_pread(mm->mem_fd, at(room), copy.len, lift->addr);
    int err = got < 0 ? (int)got : (uint64_t)got == copy.len ? 0 : -EFAULT;

    if (!err)
        err = pm_slots_ready(mm, slot, copy.len);
    return err ? err : pm_sys_ioctl(mm->arena_fd, UFFDIO_COPY, &copy);
}

static void note(struct pm_devmem *vram, const struct pm_lift *lift, uint64_t slot)
{
    uint64_t *word;

    pm_devmem_note(vram, lift->addr, slot, lift->n, lift->writable);
    word = pm_resident_at(vram->mm->devices, lift->addr, false);
    for (uint64_t i = 0; i < lift->n; i++)
        word[i] |= PM_RESIDENT_GUARD;
    vram->mm->devices->stats.to_device += lift->n;
}

/* With the lock held, while the pages are PROT_NONE. */
static int take_protected(struct pm_devmem *vram, const struct pm_lift *lift, uint64_t slot, uint64_t room)
{
    struct pm_mm *mm = vram->mm;
    bool wp;
    int err = look(mm, lift, &wp);

    if (err)
        return err;
    err = fill_slots(mm, lift, slot, room);
    if (!err) {
        err = install(mm, lift, wp);
        if (err)
            put(mm, lift->addr, slot, bytes(lift->n));
    }
    if (err)
        pm_slots_empty(mm, slot, bytes(lift->n));
    else
        note(vram, lift, slot);
    return err;
}

static int take(struct pm_devmem *vram, struct pm_lift *lift, uint64_t room)
{
    struct pm_vma vma;
    uint64_t slot;
    bool wp;
    int err = look(vram->mm, lift, &wp);

    if (!err)
        err = pm_vma_query(vram->mm, lift->addr, &vma);
    if (err || vma.start > lift->addr || lift->addr + bytes(lift->n) > vma.end || !is_private_file(&vma))
        return err ? err : -EAGAIN;
    slot = pm_devmem_room(vram, lift->addr, &lift->n);
    if (!slot)
        return -ENOSPC;
    /* So that noting cannot fail once they are there. */
    err = pm_devmem_note(vram, lift->addr, slot, 0, NULL);
    if (!err)
        err = shut(&vma, lift->addr, bytes(lift->n));
    if (err)
        return err;
    err = take_protected(vram, lift, slot, room);
    protect(lift->addr, bytes(lift->n), pm_vma_prot(&vma));
    return err;
}

static int join(struct pm_mm *mm)
{
    int fd = mm->mem_fd;

    if (fd < 0)
        fd = pm_sys_open("/proc/self/mem", O_RDWR);
    if (fd < 0)
        return fd;
    pm_registry_lock(); /* a fork closes it in the child */
    mm->mem_fd = fd;
    pm_registry_unlock();
    return pm_inline_join_guards(mm);
}

int pm_guard_out(struct pm_devmem *vram, struct pm_lift *lift)
{
    struct pm_mm *mm = vram->mm;
    uint64_t end = lift->addr + bytes(lift->n), room;
    int err = join(mm);

    if (!err)
        err = pm_sys_mmap(0, PM_HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, &room);
    if (err)
        return err;
    pthread_mutex_lock(&mm->ring_lock);
    err = pm_pinned(mm, lift->addr, end) ? -EAGAIN : pm_lock_quiet(mm, lift->addr, end);
    if (!err) {
        err = take(vram, lift, room);
        pm_unlock(mm);
    }
    pthread_mutex_unlock(&mm->ring_lock);
    pm_sys_munmap(room, PM_HUGE_SIZE);
    return err;
}

void pm_guard_removed(struct pm_mm *mm, uint64_t start, uint64_t end)
{
    if (!mm->devices)
        return;
    for (uint64_t addr = start, n; pm_resident_next(mm->devices, &addr, end); addr += bytes(n)) {
        n = pm_resident_run(mm->devices, addr, end);
        if (pm_guarded(mm->devices, addr))
            advise(addr, bytes(n), PM_ABI_MADV_GUARD_REMOVE);
    }
}

bool pm_guard_next(struct pm_mm *mm, uint64_t *addr, uint64_t *end)
{
    bool found;
    uint64_t n;

    pm_lock(mm);
    while ((found = pm_resident_next(mm->devices, addr, PM_USER_END))) {
        n = pm_resident_run(mm->devices, *addr, PM_USER_END);
        *end = *addr + bytes(n);
        if (pm_guarded(mm->devices, *addr))
            break;
        *addr = *end;
    }
    pm_unlock(mm);
    return found;
}
