# SPDX-License-Identifier: MIT
"""What this kernel, user and machine can do for pymirror, by trying and by reading, and what would help.

A check never raises and changes nothing; what cannot be found out is "unknown", with the reason.
"""

from .check import Check, Status
from .report import Report, examine

__all__ = ["Check", "Report", "Status", "examine"]
