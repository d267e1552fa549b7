# SPDX-License-Identifier: MIT
"""The DMA API: addresses that a device uses, what they lead to, and the bookkeeping that catches bugs."""
