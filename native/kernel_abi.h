/* SPDX-License-Identifier: MIT */
/*
 * kernel_abi.h - numbers and layouts of kernel interfaces that distribution headers may lack.
 *
 * Everything is prefixed, so a newer <linux/...> header can be included beside it. That a name stands here
 * says nothing about the running kernel: feature.c probes.
 */
#ifndef PM_KERNEL_ABI_H
#define PM_KERNEL_ABI_H

#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>

/* userfaultfd: every feature bit, 64 bits wide (a plain 1 << 31 would not survive the conversion). */
#define PM_ABI_UFFD_FEATURE_PAGEFAULT_FLAG_WP (1ULL << 0)
#define PM_ABI_UFFD_FEATURE_EVENT_FORK (1ULL << 1)
#define PM_ABI_UFFD_FEATURE_EVENT_REMAP (1ULL << 2)
#define PM_ABI_UFFD_FEATURE_EVENT_REMOVE (1ULL << 3)
#define PM_ABI_UFFD_FEATURE_MISSING_HUGETLBFS (1ULL << 4)
#define PM_ABI_UFFD_FEATURE_MISSING_SHMEM (1ULL << 5)
#define PM_ABI_UFFD_FEATURE_EVENT_UNMAP (1ULL << 6)
#define PM_ABI_UFFD_FEATURE_SIGBUS (1ULL << 7)
#define PM_ABI_UFFD_FEATURE_THREAD_ID (1ULL << 8)
#define PM_ABI_UFFD_FEATURE_MINOR_HUGETLBFS (1ULL << 9)
#define PM_ABI_UFFD_FEATURE_MINOR_SHMEM (1ULL << 10)
#define PM_ABI_UFFD_FEATURE_EXACT_ADDRESS (1ULL << 11)
#define PM_ABI_UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1ULL << 12)
#define PM_ABI_UFFD_FEATURE_WP_UNPOPULATED (1ULL << 13) /* 6.4 */
#define PM_ABI_UFFD_FEATURE_POISON (1ULL << 14)         /* 6.6 */
#define PM_ABI_UFFD_FEATURE_WP_ASYNC (1ULL << 15)       /* 6.7 */
#define PM_ABI_UFFD_FEATURE_MOVE (1ULL << 16)           /* 6.8 */

#define PM_ABI_UFFD_USER_MODE_ONLY 1

/* The ioctl of /dev/userfaultfd (6.1) that makes a userfaultfd; the argument is userfaultfd(2)'s flags. */
#define PM_ABI_USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)

struct pm_abi_uffdio_move {
    uint64_t dst;
    uint64_t src;
    uint64_t len;
    uint64_t mode;
    int64_t move; /* out: bytes moved, or a negative errno */
};

#define PM_ABI_UFFDIO_MOVE_NR 0x05
#define PM_ABI_UFFDIO_MOVE _IOWR(0xAA, PM_ABI_UFFDIO_MOVE_NR, struct pm_abi_uffdio_move)
#define PM_ABI_UFFDIO_MOVE_MODE_DONTWAKE (1ULL << 0)
#define PM_ABI_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES (1ULL << 1)

struct pm_abi_uffdio_poison {
    uint64_t start;
    uint64_t len;
    uint64_t mode;
    int64_t updated; /* out: bytes poisoned, or a negative errno */
};

#define PM_ABI_UFFDIO_POISON_NR 0x08
#define PM_ABI_UFFDIO_POISON _IOWR(0xAA, PM_ABI_UFFDIO_POISON_NR, struct pm_abi_uffdio_poison)

/* Entries of /proc/pid/pagemap. */
#define PM_ABI_PAGEMAP_PFN_MASK ((1ULL << 55) - 1)
#define PM_ABI_PAGEMAP_SOFT_DIRTY (1ULL << 55)
#define PM_ABI_PAGEMAP_EXCLUSIVE (1ULL << 56)
#define PM_ABI_PAGEMAP_UFFD_WP (1ULL << 57)
#define PM_ABI_PAGEMAP_GUARD (1ULL << 58) /* 6.15 */
#define PM_ABI_PAGEMAP_FILE (1ULL << 61)  /* a page of a file or of shared anonymous memory */
#define PM_ABI_PAGEMAP_SWAPPED (1ULL << 62)
#define PM_ABI_PAGEMAP_PRESENT (1ULL << 63)

/* PAGEMAP_SCAN (6.7), an ioctl of /proc/pid/pagemap: ranges by category. Returns the regions filled. */
#define PM_ABI_PAGE_IS_WPALLOWED (1ULL << 0)
#define PM_ABI_PAGE_IS_WRITTEN (1ULL << 1)
#define PM_ABI_PAGE_IS_FILE (1ULL << 2)
#define PM_ABI_PAGE_IS_PRESENT (1ULL << 3)
#define PM_ABI_PAGE_IS_SWAPPED (1ULL << 4)
#define PM_ABI_PAGE_IS_PFNZERO (1ULL << 5)
#define PM_ABI_PAGE_IS_HUGE (1ULL << 6) /* mapped by a PMD or by hugetlb */
#define PM_ABI_PAGE_IS_SOFT_DIRTY (1ULL << 7)
#define PM_ABI_PAGE_IS_GUARD (1ULL << 8) /* 6.15 */

#define PM_ABI_SCAN_WP_MATCHING (1ULL << 0)
#define PM_ABI_SCAN_CHECK_WPASYNC (1ULL << 1)

struct pm_abi_page_region {
    uint64_t start;
    uint64_t end;
    uint64_t categories;
};

struct pm_abi_scan_arg {
    uint64_t size; /* of this struct */
    uint64_t flags;
    uint64_t start;
    uint64_t end;
    uint64_t walk_end; /* out: where the walk stopped */
    uint64_t vec;      /* address of an array of struct pm_abi_page_region */
    uint64_t vec_len;  /* its elements */
    uint64_t max_pages;
    uint64_t category_inverted;
    uint64_t category_mask;
    uint64_t category_anyof_mask;
    uint64_t return_mask;
};

#define PM_ABI_PAGEMAP_SCAN _IOWR('f', 16, struct pm_abi_scan_arg)

/* PROCMAP_QUERY (6.11), an ioctl of /proc/pid/maps: one vma by address. */
#define PM_ABI_PROCMAP_VMA_READABLE 0x01
#define PM_ABI_PROCMAP_VMA_WRITABLE 0x02
#define PM_ABI_PROCMAP_VMA_EXECUTABLE 0x04
#define PM_ABI_PROCMAP_VMA_SHARED 0x08
#define PM_ABI_PROCMAP_COVERING_OR_NEXT_VMA 0x10
#define PM_ABI_PROCMAP_FILE_BACKED_VMA 0x20

struct pm_abi_procmap_query {
    uint64_t size; /* of this struct */
    uint64_t query_flags;
    uint64_t query_addr;
    uint64_t vma_start;
    uint64_t vma_end;
    uint64_t vma_flags;
    uint64_t vma_page_size;
    uint64_t vma_offset;
    uint64_t inode;
    uint32_t dev_major;
    uint32_t dev_minor;
    uint32_t vma_name_size; /* in: room for the name; out: its length with the NUL */
    uint32_t build_id_size;
    uint64_t vma_name_addr;
    uint64_t build_id_addr;
};

#define PM_ABI_PROCMAP_QUERY _IOWR('f', 17, struct pm_abi_procmap_query)

/* io_uring: what registers single buffers in a table of empty slots (5.19), and waits with a time-out. */
#define PM_ABI_IORING_UNREGISTER_BUFFERS 1
#define PM_ABI_IORING_REGISTER_BUFFERS2 15
#define PM_ABI_IORING_REGISTER_BUFFERS_UPDATE 16
#define PM_ABI_IORING_RSRC_REGISTER_SPARSE (1U << 0)
#define PM_ABI_IORING_OP_READ_FIXED 4
#define PM_ABI_IORING_OP_WRITE_FIXED 5
#define PM_ABI_IORING_ENTER_GETEVENTS (1U << 0)
#define PM_ABI_IORING_ENTER_EXT_ARG (1U << 3)
#define PM_ABI_IORING_FEAT_SINGLE_MMAP (1U << 0)
#define PM_ABI_IORING_FEAT_EXT_ARG (1U << 8)
#define PM_ABI_IORING_OFF_SQ_RING 0
#define PM_ABI_IORING_OFF_SQES 0x10000000ULL
#define PM_ABI_IORING_MAX_BUFFERS (1U << 14)
#define PM_ABI_IORING_BUFFER_MAX (1ULL << 30) /* bytes of one registered buffer */

struct pm_abi_rsrc_register {
    uint32_t nr;
    uint32_t flags;
    uint64_t resv2;
    uint64_t data;
    uint64_t tags;
};

struct pm_abi_rsrc_update2 {
    uint32_t offset;
    uint32_t resv;
    uint64_t data; /* address of an array of struct iovec; an empty one drops the buffer */
    uint64_t tags;
    uint32_t nr;
    uint32_t resv2;
};

struct pm_abi_getevents_arg {
    uint64_t sigmask;
    uint32_t sigmask_sz;
    uint32_t pad;
    uint64_t ts; /* address of two int64_t: seconds, nanoseconds */
};

/* madvise(2), mremap(2), mmap(2) */
#define PM_ABI_MADV_FREE 8
#define PM_ABI_MADV_REMOVE 9
#define PM_ABI_MADV_COLD 20
#define PM_ABI_MADV_PAGEOUT 21
#define PM_ABI_MADV_POPULATE_READ 22   /* 5.14 */
#define PM_ABI_MADV_POPULATE_WRITE 23  /* 5.14 */
#define PM_ABI_MADV_DONTNEED_LOCKED 24 /* 5.18 */
#define PM_ABI_MADV_COLLAPSE 25        /* 6.1 */
#define PM_ABI_MADV_GUARD_INSTALL 102  /* 6.13 */
#define PM_ABI_MADV_GUARD_REMOVE 103

#define PM_ABI_MREMAP_DONTUNMAP 4 /* 5.7 */
#define PM_ABI_MAP_HUGE_SHIFT 26
#define PM_ABI_MAP_FIXED_NOREPLACE 0x100000

#define PM_ABI_EHWPOISON 133

_Static_assert(sizeof(struct pm_abi_uffdio_move) == 40, "struct uffdio_move");
_Static_assert(sizeof(struct pm_abi_uffdio_poison) == 32, "struct uffdio_poison");
_Static_assert(sizeof(struct pm_abi_scan_arg) == 96, "struct pm_scan_arg");
_Static_assert(sizeof(struct pm_abi_procmap_query) == 104, "struct procmap_query");
_Static_assert(sizeof(struct pm_abi_rsrc_register) == 32, "struct io_uring_rsrc_register");
_Static_assert(sizeof(struct pm_abi_rsrc_update2) == 32, "struct io_uring_rsrc_update2");
_Static_assert(sizeof(struct pm_abi_getevents_arg) == 24, "struct io_uring_getevents_arg");

#endif
