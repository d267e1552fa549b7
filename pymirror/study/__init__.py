# SPDX-License-Identifier: MIT
"""`pymirror study`: mirror or pin? What the discussion of the series argues about, measured here."""

from .machine import Machine
from .options import Options
from .results import Cell, Report
from .runner import run

__all__ = ["Cell", "Machine", "Options", "Report", "run"]
