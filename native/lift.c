/* SPDX-License-Identifier: MIT */
/*
 * lift.c - to device memory, from where UFFDIO_MOVE may not take pages: memory that is read-only, and the
 * copies that a process has of pages of a file.
 *
 * mremap(MREMAP_DONTUNMAP) takes the pages out in one step, so no write of the CPU can fall between reading
 * and taking. What touches the hole meanwhile faults, and waits: the pages are noted as gone before, and
 * nothing brings them home until they have been copied. The events of our own mremap are nobody's news.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "devmem.h"

static const int lift_flags = MREMAP_MAYMOVE | MREMAP_FIXED | PM_ABI_MREMAP_DONTUNMAP;

bool pm_lifting(const struct pm_mm *mm, uint64_t start, uint64_t end)
{
    return mm->lift_end && pm_overlap(start, end - 1, mm->lift_start, mm->lift_end - 1);
}

bool pm_lift_claims(const struct pm_mm *mm, const struct uffd_msg *msg)
{
    if (msg->event == UFFD_EVENT_REMAP)
        return pm_lifting(mm, msg->arg.remap.from, msg->arg.remap.from + 1) ||
               pm_lifting(mm, msg->arg.remap.to, msg->arg.remap.to + 1);
    return mm->lift_back && msg->event == UFFD_EVENT_UNMAP && msg->arg.remove.start == mm->lift_start;
}

/* mremap would take the lock from a vma that is locked, and nothing tells which one that is. */
bool pm_memory_locked(void)
{
    char text[4096], *at;
    int fd = pm_sys_open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? fd : pm_sys_read(fd, text, sizeof(text) - 1);

    if (fd >= 0)
        pm_sys_close(fd);
    text[n > 0 ? n : 0] = 0;
    at = strstr(text, "VmLck:");
    return !at || strtoull(at + strlen("VmLck:"), NULL, 10) != 0;
}

static bool is_copied(const struct pm_mm *mm, uint64_t entry)
{
    uint64_t zero = mm->features.zero_pfn;

    return (entry & PM_ABI_PAGEMAP_PRESENT) && !(zero && (entry & PM_ABI_PAGEMAP_PFN_MASK) == zero);
}

/* The pages that are there: `seen` is from before they were taken out. */
static int copy_pages(struct pm_mm *mm, uint64_t to, uint64_t from, uint64_t n, const uint64_t *seen)
{
    int err = 0;

    for (uint64_t i = 0, run; !err && i < n; i += run) {
        struct uffdio_copy copy = {.dst = to + (i << PM_PAGE_SHIFT), .src = from + (i << PM_PAGE_SHIFT)};

        for (run = 0; i + run < n && is_copied(mm, seen[i + run]);)
            run++;
        copy.len = run << PM_PAGE_SHIFT;
        if (run)
            err = pm_sys_ioctl(mm->arena_fd, UFFDIO_COPY, &copy);
        else
            run = 1;
    }
    return err;
}

/* Room of the size of a run, at the same place in its 2 MiB, so that huge pages are not split. */
static int reserve(uint64_t addr, uint64_t len, uint64_t *area, uint64_t *to)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    int err = pm_sys_mmap(0, len + PM_HUGE_SIZE, PROT_NONE, flags, -1, 0, area);

    *to = err ? 0 : *area + (addr - *area) % PM_HUGE_SIZE;
    return err;
}

static void set_lift(struct pm_mm *mm, uint64_t start, uint64_t end, bool back)
{
    mm->lift_start = start;
    mm->lift_end = end;
    mm->lift_back = back;
}

/* Not registered any more, the area goes without an event. */
static void drop_area(struct pm_mm *mm, uint64_t area, uint64_t to, uint64_t len)
{
    pm_sys_ioctl(mm->uffd, UFFDIO_UNREGISTER, &(struct uffdio_range){to, len});
    pm_sys_munmap(area, len + PM_HUGE_SIZE);
}

static int carry(struct pm_mm *mm, const struct pm_lift *lift, uint64_t slot)
{
    uint64_t len = lift->n << PM_PAGE_SHIFT, area, to, back;
    int err = reserve(lift->addr, len, &area, &to);

    if (err)
        return err;
    err = pm_sys_mremap(lift->addr, len, len, lift_flags, to, &back);
    if (!err) {
        err = copy_pages(mm, slot, to, lift->n, lift->seen);
        if (err) {
            pm_lock(mm);
            set_lift(mm, lift->addr, lift->addr + len, true);
            pm_unlock(mm);
            pm_sys_mremap(to, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, lift->addr, &back);
            pm_sys_madvise(slot, len, MADV_DONTNEED);
        }
    }
    drop_area(mm, area, to, len);
    return err;
}

static bool any_present(const struct pm_lift *lift)
{
    for (uint64_t i = 0; i < lift->n; i++) {
        if (lift->seen[i] & PM_ABI_PAGEMAP_PRESENT)
            return true;
    }
    return false;
}

int pm_lift(struct pm_devmem *vram, const struct pm_lift *lift)
{
    struct pm_mm *mm = vram->mm;
    uint64_t end = lift->addr + (lift->n << PM_PAGE_SHIFT), room = lift->n, slot;
    int err = pm_lock_quiet(mm, lift->addr, end);

    if (err)
        return err;
    slot = pm_devmem_room(vram, lift->addr, &room);
    err = slot && room == lift->n ? pm_devmem_note(vram, lift->addr, slot, lift->n, lift->writable) : -ENOSPC;
    if (!err)
        set_lift(mm, lift->addr, end, false);
    pm_unlock(mm);
    if (err)
        return err;
    if (any_present(lift))
        err = carry(mm, lift, slot);
    pm_lock(mm);
    set_lift(mm, 0, 0, false);
    if (err)
        pm_devmem_forget(mm, lift->addr, lift->n);
    else
        mm->devices->stats.to_device += lift->n;
    pm_unlock(mm);
    pm_sys_ioctl(mm->uffd, UFFDIO_WAKE, &(struct uffdio_range){lift->addr, end - lift->addr});
    return err;
}
