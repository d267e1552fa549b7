# SPDX-License-Identifier: MIT
"""Complete small drivers on the public API, each the shape of a real family of drivers. See docs/drivers.md.

``odp`` (with ``odp_mr``, ``umem_odp``): RDMA on-demand paging. ``svm`` (with ``svm_range``, ``svm_faults``,
``svm_devmem``, ``svm_exclusive``): shared virtual memory. ``userptr``: invalidations followed, no page
faults. ``pinned``: pins and a registration cache. ``dmirror``: the kernel's test device. What they share:
``retry``, ``segments``, ``counts``.
"""
