# SPDX-License-Identifier: MIT
"""A process that uses pymirror, seen from outside: what is held, what runs, what waits, and what is wrong.

Everything comes from /proc and from the status pages that native code keeps (``struct pm_status``): nothing
is asked of the process, so it may hang, be stopped, or have its GIL stuck.
"""

from .diagnosis import Finding, diagnose
from .look import Look, Watch, look_at
from .procfs import Thread
from .status import Space

__all__ = ["Finding", "Look", "Space", "Thread", "Watch", "diagnose", "look_at"]
